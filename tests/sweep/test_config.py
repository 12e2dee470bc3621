"""Spaces: what they resolve to, that trials can be told apart and drawn again, and what mistakes are told as."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.config import ConfigError
from pipeline.errors import UserError
from pipeline.sweep.config import Asha, NoScheduler, Pbt, Sweep, SweepConfig, load_sweep, overrides
from pipeline.sweep.space import Entry, SweepError
from tests.data.images import write_digits

BASE = """
model: {name: resnet10t, image_size: 32}
method: {name: moco_v2, queue_size: 1024}
optim: {name: sgd, lr: 0.03, momentum: 0.9, warmup_epochs: 0}
train: {epochs: 9, global_batch_size: 128}
cluster: {num_workers: 1}
"""
TEMPERATURE = {"method.temperature": {"log_uniform": [0.05, 1.0]}}


def write(folder: Path, **sweep: Any) -> Path:
    (folder / "base.yaml").write_text(BASE)
    path = folder / "try.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml", "trials": 8, **sweep}, sort_keys=False))
    return path


def load(folder: Path, *arguments: str, **sweep: Any) -> Sweep:
    return load_sweep(write(folder, **sweep), [f"storage.url={folder}", *arguments])


def test_a_grid_is_every_combination_once(tmp_path: Path) -> None:
    space = {
        "method.temperature": {"grid": [0.1, 0.2]},
        "optim.name": {"choice": ["sgd", "lars"]},
        "optim.momentum": {"grid": [0.8, 0.9], "when": {"optim.name": "sgd"}},
    }
    sweep = load(tmp_path, space=space, searcher="grid", trials=None)
    found = sweep.config.configurations(sweep.base)
    assert len(found) == 2 * (2 + 1), "the key that applies to sgd alone does not double lars"
    assert len({json.dumps(values) for values in found}) == len(found)
    assert all(("optim.momentum" in values) == (values["optim.name"] == "sgd") for values in found)


def test_ranges_are_filled_evenly_on_their_own_scale(tmp_path: Path) -> None:
    space = {
        **TEMPERATURE,
        "method.ema_decay": {"one_minus_log_uniform": [0.9, 0.9999]},
        "optim.lr": {"uniform": [1, 3]},
    }
    sweep = load(tmp_path, space=space, trials=400)
    found = sweep.config.configurations(sweep.base)
    temperature = np.array([values["method.temperature"] for values in found])
    decay = np.array([values["method.ema_decay"] for values in found])
    lr = np.array([values["optim.lr"] for values in found])
    shares = {
        "temperature": np.log(temperature / 0.05) / np.log(1.0 / 0.05),
        "decay": np.log10((1 - decay) / 1e-4) / 3,
        "lr": (lr - 1) / 2,
    }
    for name, share in shares.items():
        assert share.min() > -1e-9, name
        assert share.max() < 1 + 1e-9, name
        distance = np.abs(np.sort(share) - (np.arange(400) + 0.5) / 400).max()
        assert distance < 1.63 / np.sqrt(400), f"{name}: Kolmogorov-Smirnov at 1 %"
    assert abs(np.corrcoef(shares["temperature"], shares["decay"])[0, 1]) < 0.15, "keys are drawn independently"


def test_a_trial_is_the_same_whatever_the_number_of_trials(tmp_path: Path) -> None:
    few, many = (load(tmp_path, space=TEMPERATURE, trials=trials) for trials in (3, 9))
    assert few.config.configurations(few.base) == many.config.configurations(many.base)[:3]
    other = load(tmp_path, "sweep.seed=1", space=TEMPERATURE, trials=3)
    assert few.config.configurations(few.base) != other.config.configurations(other.base)


def test_a_scale_follows_the_batch_size(tmp_path: Path) -> None:
    space = {
        "train.global_batch_size": {"grid": [128, 512]},
        "method.ema_decay": {"scale_one_minus": 0.004, "with": "train.global_batch_size", "at": 256},
    }
    sweep = load(tmp_path, space=space, searcher="grid", trials=None)
    assert [values["method.ema_decay"] for values in sweep.config.configurations(sweep.base)] == [0.998, 0.992]
    searched = {"method.ema_decay": {"scale_one_minus": [0.001, 0.01], "with": "train.global_batch_size", "at": 64}}
    sweep = load(tmp_path, space=searched)
    decays = [values["method.ema_decay"] for values in sweep.config.configurations(sweep.base)]
    assert len(set(decays)) == len(decays)
    assert all(1 - 0.02 - 1e-9 <= decay <= 1 - 0.002 + 1e-9 for decay in decays), "the base's batch of 128 doubles it"


def test_conditions_see_what_lies_inside_a_chosen_value(tmp_path: Path) -> None:
    space = {
        "method": {"choice": [{"name": "simclr", "temperature": 0.1}, {"name": "moco_v2", "queue_size": 1024}]},
        "method.ema_decay": {"grid": [0.99, 0.999], "when": {"method.name": ["moco_v1", "moco_v2"]}},
    }
    sweep = load(tmp_path, space=space, searcher="grid", trials=None)
    found = sweep.config.configurations(sweep.base)
    assert [values["method"]["name"] for values in found] == ["simclr", "moco_v2", "moco_v2"]
    config = sweep.trial_config("x", found[2], 3)
    assert (config.method.name, config.method.model_dump()["ema_decay"], config.seed) == ("moco_v2", 0.999, 3)


def test_values_survive_the_way_through_overrides(tmp_path: Path) -> None:
    sweep = load(tmp_path, space=TEMPERATURE)
    for value in (1e-05, 1e22, True, None, "1e-05", [0.9, 0.99], {"count": 2}, "a: b"):
        ((key, _, text),) = [item.partition("=") for item in overrides({"optim.lr": value})]
        assert (key, yaml.safe_load(text)) == ("optim.lr", value)
    assert sweep.trial_config("x", {"optim.weight_decay": 1e-05}, 0).optim.weight_decay == 1e-05


def test_the_id_names_what_determines_the_results(tmp_path: Path) -> None:
    def sweep_id(*arguments: str, digest: str = "d", **sweep: Any) -> str:
        loaded = load(tmp_path, *arguments, **{"space": TEMPERATURE, **sweep})
        return loaded.config.sweep_id(loaded.base, digest)

    same = {
        sweep_id(),
        sweep_id("sweep.max_concurrent=1"),
        sweep_id("cluster.max_failures=7", "train.log_every_steps=3"),
    }
    assert len(same) == 1
    others = {
        sweep_id("train.epochs=10"),
        sweep_id("evaluate.selection={knn_k: 5}"),
        sweep_id("sweep.seeds=2"),
        sweep_id("sweep.seed=1"),
        sweep_id(digest="e"),
        sweep_id(space={"method.temperature": {"log_uniform": [0.05, 0.9]}}),
        sweep_id("sweep.scheduler={name: asha}"),
    }
    assert len(others | same) == 8


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"space": {}}, ["space"]),
        ({"space": {"method.temprature": {"grid": [0.1]}}}, ["space.method.temprature", "did you mean 'temperature'"]),
        ({"space": {"method.temperature": {"grid": [0.1, -1]}}}, ["method.temperature", "greater than 0", "-1"]),
        ({"space": {"method.temperature": {"log_uniform": [-0.1, 1]}}}, ["log_uniform=[-0.1, 1.0]", "both above 0"]),
        ({"space": {"method.temperature": {"log_uniform": [1, 0.1]}}}, ["[1.0, 0.1]", "the first", "smaller"]),
        ({"space": {"method.ema_decay": {"one_minus_log_uniform": [0.9, 1]}}}, ["[0.9, 1.0]", "both below 1"]),
        ({"space": {"method.temperature": {"uniform": [0.1, 1], "grid": [1]}}}, ["grid and uniform", "exactly one"]),
        ({"space": {"method.temperature": {"grid": [0.1, 0.1]}}}, ["different values", "[0.1, 0.1]"]),
        ({"space": {"method.temperature": {"unifrom": [0.1, 1]}}}, ["unifrom", "no such key", "log_uniform"]),
        ({"space": {"train.log_every_steps": {"grid": [1, 2]}}}, ["train.log_every_steps", "the same weights"]),
        ({"space": {"model.args": {"grid": [{}, {"foo": 1}]}}}, ["space.model.args", "'foo'", "stem_width"]),
        ({"space": {"optim.constant_lr": {"grid": [[], ["predicter"]]}}}, ["'predicter'", "backbone, projection_head"]),
        ({"space": TEMPERATURE, "set": {"train.micro_batches": 2}}, ["micro_batches=2", "BatchNorm"]),
        ({"space": {"train.epochs": {"grid": [1, 2]}}}, ["train.epochs", "the same epoch"]),
        ({"space": {"seed": {"grid": [1, 2]}}}, ["seed", "seeds: <runs per trial>"]),
        (
            {"space": {"method.ema_decay": {"scale_one_minus": 0.9, "with": "train.global_batch_size", "at": 64}}},
            ["scale_one_minus=0.9", "1.8", "global_batch_size=128", "at most 0.5"],
        ),
        ({"space": {"method.ema_decay": {"scale_one_minus": 0.9}}}, ["scale_one_minus, with and at belong together"]),
        (
            {"space": {"optim.momentum": {"uniform": [0.5, 0.9], "when": {"optim.nam": "sgd"}}}},
            ["optim.momentum", "optim.nam", "neither in the space nor in the base config"],
        ),
        (
            {"space": {"optim.momentum": {"grid": [0.5], "when": {"optim.lr": 1}}, "optim.lr": {"grid": [1, 2]}}},
            ["optim.momentum", "optim.lr", "list optim.lr first"],
        ),
        ({"space": TEMPERATURE, "searcher": "grid", "trials": None}, ["cannot enumerate", "method.temperature"]),
        ({"space": TEMPERATURE, "trials": None}, ["searcher=random", "trials: 16"]),
        ({"space": TEMPERATURE, "searcher": "bayes"}, ["searcher", "'grid', 'random' or 'tpe'"]),
        ({"space": TEMPERATURE, "scheduler": {"name": "asha", "grace_epochs": 9}}, ["epochs=9", "train.epochs=9"]),
        ({"space": TEMPERATURE, "scheduler": {"name": "pbt"}}, ["every_epochs"]),
        ({"space": TEMPERATURE, "scheduler": {"name": "pbt", "every_epochs": 2}, "seeds": 2}, ["pbt", "seeds=1"]),
        (
            {"space": TEMPERATURE, "scheduler": {"name": "asha"}, "set": {"evaluate.selection.every_epochs": 2}},
            ["every_epochs=2", "epoch 1", "asha"],
        ),
        ({"space": TEMPERATURE, "base": "bace.yaml"}, ["bace.yaml"]),
        ({"space": TEMPERATURE, "name": "Not A Name"}, ["name", "pattern"]),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_key_and_what_works(tmp_path: Path, sweep: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, **sweep)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_trial_that_fits_no_config_is_found_before_it_runs(tmp_path: Path) -> None:
    """Each value is fine by itself: 1024 keys hold the base's batch of 128, and 2048 images are a batch."""
    space = {"method.queue_size": {"grid": [1024, 4096]}, "train.global_batch_size": {"grid": [256, 1024]}}
    load(tmp_path, space=space, searcher="grid", trials=None)
    with pytest.raises(SweepError, match=r"(?s)trial t00\d .*method\.queue_size=512.*does not hold"):
        load(tmp_path, space={**space, "method.queue_size": {"grid": [512, 4096]}}, searcher="grid", trials=None)


def test_a_scheduler_is_replaced_by_its_name(tmp_path: Path) -> None:
    asha: dict[str, Any] = {"space": TEMPERATURE, "scheduler": {"name": "asha", "grace_epochs": 2}}
    assert load(tmp_path, "sweep.scheduler.name=none", **asha).config.scheduler == NoScheduler()
    assert load(tmp_path, "sweep.scheduler=none", **asha).config.scheduler == NoScheduler()
    same = load(tmp_path, "sweep.scheduler.name=asha", "sweep.scheduler.reduction=2", **asha)
    assert same.config.scheduler == Asha(name="asha", grace_epochs=2, reduction=2)
    pbt = load(tmp_path, "sweep.scheduler.name=pbt", "sweep.scheduler.every_epochs=3", **asha)
    assert pbt.config.scheduler == Pbt(name="pbt", every_epochs=3)
    bare = load(tmp_path, "sweep.scheduler.grace_epochs=4", space=TEMPERATURE, scheduler="asha")
    assert bare.config.scheduler == Asha(name="asha", grace_epochs=4)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("sweep.space={", ["'sweep.space={'", "not a YAML value"]),
        ("sweep.trials", ["'sweep.trials'", "sweep.trials=8"]),
        ("sweep.name.x=1", ["sweep.name is 'try'", "no key 'x'"]),
        ("sweep.searcher.seed=1", ["sweep.searcher is 'random'", "no key 'seed'"]),
        ("sweep.scheduler=hyperband", ["scheduler", "'hyperband'", "'none', 'asha', 'pbt'"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message(tmp_path: Path, argument: str, words: list[str]) -> None:
    with pytest.raises(SweepError) as caught:
        load(tmp_path, argument, name="try", space=TEMPERATURE, searcher="random")
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_a_range_of_a_key_that_counts_gives_integers(tmp_path: Path, searcher: str) -> None:
    space = {"method.projection_dim": {"uniform": [32, 256]}, "optim.lr": {"log_uniform": [1, 10]}}
    sweep = load(tmp_path, space=space, searcher=searcher)
    drawn = [sweep.config.draw(sweep.base.model_dump(mode="json"), trial) for trial in range(8)]
    assert all(isinstance(values["method.projection_dim"], int) for values in drawn)
    assert all(isinstance(values["optim.lr"], float) for values in drawn), "an lr of 1 to 10 counts nothing"
    assert len({values["method.projection_dim"] for values in drawn}) > 4
    given = load(tmp_path, space={"model.args.drop_rate": {"uniform": [0, 0.5]}}, set={"model.args": {"drop_rate": 0}})
    assert any(
        0 < float(str(values["model.args.drop_rate"])) < 0.5 for values in given.config.configurations(given.base)
    )
    space = {"train.bn_ranks_per_group": {"uniform": [1, 4]}}
    with pytest.raises(SweepError, match=r"space\.train\.bn_ranks_per_group: (?s:.*)valid integer"):
        load(tmp_path, "cluster.num_workers=4", space=space, searcher=searcher)


def test_what_tpe_draws_is_checked_against_the_shards(tmp_path: Path) -> None:
    """Its ends before anything starts; what only clashes together when it is drawn."""
    manifest = write_digits(f"{tmp_path}/shards", {"train": 600, "validation": 20})
    batches = {"train.global_batch_size": {"grid": [128, 512]}, "method.queue_size": {"grid": [256, 1024]}}
    sweep = load(tmp_path, space=batches, searcher="tpe", set={"method.queue_size": 1024}).for_data(manifest)
    assert sweep.objection({"train.global_batch_size": 128, "method.queue_size": 256}, manifest) is None
    clash = sweep.objection({"train.global_batch_size": 512, "method.queue_size": 256}, manifest)
    assert clash is not None
    assert clash.startswith("method.queue_size=256 does not hold the 512 keys")
    assert "\n" not in clash
    large = sweep.objection({"train.global_batch_size": 1024}, manifest)
    assert large is not None
    assert large.startswith("train.global_batch_size=1024 is more than the 600 samples")
    with pytest.raises(ConfigError, match="global_batch_size=1024 is more than the 600 samples"):
        load(tmp_path, space={"train.global_batch_size": {"uniform": [128, 1024]}}, searcher="tpe").for_data(manifest)


def test_shards_that_cannot_measure_the_best_trial_are_refused(tmp_path: Path) -> None:
    sweep = load(tmp_path, space=TEMPERATURE)
    without = write_digits(f"{tmp_path}/without", {"train": 200, "selection": 20})
    with pytest.raises(SweepError, match=r"none .* is of a split 'validation' .*--validation-share 0\.05"):
        sweep.for_data(without)
    with_both = write_digits(f"{tmp_path}/with", {"train": 200, "validation": 20})
    assert sweep.for_data(with_both).train_images == 200
    labels = np.where(with_both.samples.id >= 200, -1, with_both.samples.label).astype(np.int32)
    unlabelled = replace(with_both, samples=replace(with_both.samples, label=labels))
    with pytest.raises(SweepError, match=r"none .* of the split 'validation' has a label"):
        sweep.for_data(unlabelled)


def test_the_base_ranks_by_selection_and_stops_on_collapse(tmp_path: Path) -> None:
    sweep = load(tmp_path, space=TEMPERATURE, set={"train.on_collapse": "warn"})
    assert sweep.base.train.on_collapse == "stop"
    assert sweep.base.evaluate.selection is not None
    own = load(tmp_path, "evaluate.selection={knn_k: 7}", space=TEMPERATURE)
    assert own.base.evaluate.selection is not None
    assert own.base.evaluate.selection.knn_k == 7


def test_coordinates_and_values_are_inverse(tmp_path: Path) -> None:
    entry = Entry(one_minus_log_uniform=(0.9, 0.9999))
    for share in (0.0, 0.3, 0.999):
        value = entry.value(entry.quantile(share))
        assert entry.coordinate(value) == pytest.approx(entry.quantile(share), rel=1e-3)


@pytest.mark.parametrize("path", sorted(Path("configs/sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid(path: Path, tmp_path: Path) -> None:
    sweep = load_sweep(path, [f"storage.url={tmp_path}"])
    assert isinstance(sweep.config, SweepConfig)
    assert sweep.config.keys()
