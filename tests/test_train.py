"""The loop: resumes exactly, is the same at any world size, and stops at the wrong data."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import CheckpointError, CheckpointStore
from pipeline.collapse import CollapseError, NonFiniteLossError
from pipeline.config import Config, load_config, override
from pipeline.data.batch import Batch
from pipeline.data.manifest import Manifest
from pipeline.optim import build_optimizer
from pipeline.progress import Progress
from pipeline.train import build_method, restore, to_device
from tests import fits, gloo
from tests.data.images import write_digits


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three epochs of four steps on 400 real digits."""
    folder = tmp_path_factory.mktemp("train")
    write_digits(f"{folder}/shards", {"train": 400})
    return load_config(
        "configs/quickstart.yaml",
        [
            f"storage.url={folder}",
            f"data.shards={folder}/shards",
            "data.source=null",
            "model.args={channels: [4, 8, 8, 16]}",
            "train.global_batch_size=100",
            "train.epochs=3",
            "optim.warmup_epochs=0.5",
            "train.checkpoint_every_steps=5",
            "train.log_every_steps=1",
            "data.loader_workers=0",
        ],
    )


def run(config: Config, store_url: str, until: int | None = None) -> tuple[dict[str, torch.Tensor], list[Progress]]:
    """``fits.run``, of whose method the state is kept."""
    method, reports = fits.run(config, store_url, until)
    return {name: value.clone() for name, value in method.state_dict().items()} if method else {}, reports


def test_a_killed_run_resumes_mid_epoch_onto_the_undisturbed_trajectory(config: Config, tmp_path: Path) -> None:
    undisturbed, reports = run(config, str(tmp_path / "a"))
    assert [r.step for r in reports] == list(range(1, 13))
    _, first = run(config, str(tmp_path / "b"), until=7)
    assert first[-1].step == 7
    resumed, second = run(config, str(tmp_path / "b"))
    assert second[0].step == 6, "the checkpoint of step 5 is where it resumes"
    assert [r.metrics["loss"] for r in second] == [r.metrics["loss"] for r in reports[5:]]
    for name, value in undisturbed.items():
        assert torch.equal(value, resumed[name]), name


def test_a_finished_run_trains_nothing(config: Config, tmp_path: Path) -> None:
    trained, _ = run(config, str(tmp_path))
    again, reports = run(config, str(tmp_path))
    assert reports == []
    assert all(torch.equal(value, again[name]) for name, value in trained.items())


def run_in_float64(config: Config, store_url: str) -> tuple[dict[str, torch.Tensor], list[Progress]]:
    """``run`` where rounding explains nothing: in float32 it grows to 1e-2 within four steps of LARS."""
    torch.set_default_dtype(torch.float64)
    try:
        return run(config, store_url)
    finally:
        torch.set_default_dtype(torch.float32)


def test_two_ranks_follow_the_trajectory_of_one(config: Config, tmp_path: Path) -> None:
    short = override(config, ["train.epochs=1"])
    alone, reports = run_in_float64(short, str(tmp_path / "alone"))
    ranks = gloo.run(2, run_in_float64, short, str(tmp_path / "ranks"))
    assert [len(r) for _, r in ranks] == [4, 0], "rank 0 alone reports"
    for ours, theirs in zip(reports, ranks[0][1], strict=True):
        assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=1e-6)  # reported in float32
    for name, value in alone.items():
        torch.testing.assert_close(ranks[0][0][name], ranks[1][0][name], rtol=0, atol=0)
        torch.testing.assert_close(ranks[0][0][name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_a_checkpoint_of_other_data_is_refused(config: Config, tmp_path: Path) -> None:
    run(override(config, ["train.epochs=1"]), str(tmp_path))
    with pytest.raises(CheckpointError, match=r"seed 0 .* not seed 5 .* another name"):
        run(override(config, ["train.epochs=1", "seed=5"]), str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.args={channels: [4, 8, 8, 8]}", r"model.args={'channels': \[4, 8, 8, 16\]}, not .* another name"),
        ("optim.name=adamw", r"optim.name=lars, not optim.name=adamw; give the run another name"),
        ("train.global_batch_size=50", r"global_batch_size=100, not .*=50"),
        (
            "method.projection_dim=16",
            r"does not fit method.name=simclr .*: size mismatch for projection_head.* Give the run",
        ),
    ],
)
def test_a_checkpoint_of_another_model_or_optimizer_is_refused(
    config: Config, tmp_path: Path, change: str, message: str
) -> None:
    run(override(config, ["train.epochs=1"]), str(tmp_path))
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        run(override(config, [change]), str(tmp_path))


def test_options_of_a_restored_optimizer_are_the_config_s(config: Config, tmp_path: Path) -> None:
    """A run of PBT begins with another run's weights and momentum, under values of its own."""
    run(override(config, ["train.epochs=1"]), str(tmp_path))
    changed = override(config, ["optim.weight_decay=0.5", "optim.momentum=0.3"])
    method = build_method(changed)
    optimizer = build_optimizer(method, changed.optim, peak=1.0)
    restore(CheckpointStore(str(tmp_path), "run").load(4), method, optimizer, changed, Manifest.load(config.shards_url))
    assert {group["momentum"] for group in optimizer.param_groups} == {0.3}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.5}
    assert optimizer.state, "its momentum is the other run's"


def test_a_non_finite_loss_stops_before_the_update_and_names_its_samples(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(batch: Batch, config: Config, device: torch.device) -> Batch:
        batch = to_device(batch, config, device)
        return batch._replace(views=[view * float("nan") for view in batch.views])

    monkeypatch.setattr("pipeline.train.to_device", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"step 0: the loss is not finite.*non-finite-000000000.json") as error:
        run(config, str(tmp_path))
    saved = json.loads((tmp_path / "non-finite-000000000.json").read_text())
    assert saved == {"step": 0, "sample_ids": error.value.sample_ids}
    assert len(set(saved["sample_ids"])) == config.train.global_batch_size


def test_a_collapse_stops_the_run_where_the_config_says_so(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.collapse.COLLAPSED_STD", 10.0)  # so that any embedding counts as collapsed
    early = ["train.diagnose_every_steps=2", "train.on_collapse=stop"]
    with pytest.raises(CollapseError, match="collapsed at step 2"):
        run(override(config, early), str(tmp_path))


def test_diagnoses_are_reported(config: Config, tmp_path: Path) -> None:
    _, reports = run(override(config, ["train.diagnose_every_steps=2", "train.epochs=1"]), str(tmp_path))
    assert "embedding/std" not in reports[0].metrics
    assert 0 < reports[1].metrics["embedding/std"] < 2
    assert reports[2].metrics["embedding/rank_me"] == reports[1].metrics["embedding/rank_me"] >= 1


def test_colour_on_the_device_trains_as_in_the_loader_and_resumes(config: Config, tmp_path: Path) -> None:
    """Two steps of 1,000: fewer images would not average out that colour in the loader is rounded to 1/255. A fixed
    learning rate of next to nothing keeps that from growing; SimCLR's own views with every operation."""
    write_digits(f"{tmp_path}/shards", {"train": 2000})
    base = override(
        config,
        [
            f"data.shards={tmp_path}/shards",
            "train.global_batch_size=1000",
            "train.epochs=1",
            "train.checkpoint_every_steps=1",
            "optim.lr=1e-4",
            "method.views=simclr",
        ],
    )
    _, expected = run(base, str(tmp_path / "loader"))
    on_device = override(base, ["data.colour_on=device"])
    undisturbed, reports = run(on_device, str(tmp_path / "device"))
    losses = [[report.metrics["loss"] for report in each] for each in (reports, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != losses[1], "the setting reached the computation"
    run(on_device, str(tmp_path / "killed"), until=2)
    resumed, second = run(on_device, str(tmp_path / "killed"))
    assert [report.metrics["loss"] for report in second] == losses[0][1:]
    assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        ("train.precision=bf16", 0.05),
        ("train.channels_last=true", 1e-3),
        pytest.param("train.compile=true", 1e-3, marks=pytest.mark.heavy),  # compiles for a minute or two
    ],
)
def test_faster_settings_train_as_well_as_the_default(
    config: Config, tmp_path: Path, change: str, tolerance: float
) -> None:
    """Four steps; the losses of all of them within the tolerance (relative) of float32, contiguous, eager."""
    base = override(config, ["train.epochs=1", "optim.lr=0.02", "train.channels_last=false"])
    _, expected = run(base, str(tmp_path / "default"))
    _, actual = run(override(base, [change]), str(tmp_path / "fast"))
    losses = [[report.metrics["loss"] for report in reports] for reports in (actual, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert losses[0] != losses[1], "the setting reached the computation"
