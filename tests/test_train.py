"""The loop: resumes exactly, is the same at any world size, and stops at the wrong data."""

from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import CheckpointError, CheckpointStore
from pipeline.config import Config, load_config, override
from pipeline.data.manifest import Manifest
from pipeline.preflight import prepare_data
from pipeline.progress import Progress
from pipeline.train import fit
from tests import gloo


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three epochs of four steps on real digits."""
    folder = tmp_path_factory.mktemp("train")
    config = load_config(
        "configs/quickstart.yaml",
        [
            f"storage.url={folder}",
            "model.args={channels: [4, 8, 8, 16]}",
            "train.global_batch_size=1000",
            "train.epochs=3",
            "train.checkpoint_every_steps=5",
            "train.log_every_steps=1",
            "data.loader_workers=0",
        ],
    )
    prepare_data(config)
    return config


def run(config: Config, store_url: str, until: int | None = None) -> tuple[dict[str, torch.Tensor], list[Progress]]:
    """Fit in this process or rank; ``until`` raises after that step, as a kill would."""
    reports: list[Progress] = []

    def report(progress: Progress) -> None:
        reports.append(progress)
        if progress.step == until:
            raise KeyboardInterrupt

    store = CheckpointStore(store_url)
    try:
        method = fit(config, Manifest.load(config.shards_url), store, device=torch.device("cpu"), report=report)
    except KeyboardInterrupt:
        return {}, reports
    return {name: value.clone() for name, value in method.state_dict().items()}, reports


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


def test_two_ranks_follow_the_trajectory_of_one(config: Config, tmp_path: Path) -> None:
    short = override(config, ["train.epochs=1"])
    alone, reports = run(short, str(tmp_path / "alone"))
    ranks = gloo.run(2, run, short, str(tmp_path / "ranks"))
    assert [len(r) for _, r in ranks] == [4, 0], "rank 0 alone reports"
    for ours, theirs in zip(reports, ranks[0][1], strict=True):
        assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=2e-4)  # float32 over 4 steps
    for name, value in alone.items():
        torch.testing.assert_close(ranks[0][0][name], ranks[1][0][name], rtol=0, atol=0)
        torch.testing.assert_close(ranks[0][0][name], value, rtol=2e-2, atol=2e-4, msg=name)


def test_a_checkpoint_of_other_data_is_refused(config: Config, tmp_path: Path) -> None:
    run(override(config, ["train.epochs=1"]), str(tmp_path))
    with pytest.raises(CheckpointError, match="seed 0 .* not seed 5 .* another name"):
        run(override(config, ["train.epochs=1", "seed=5"]), str(tmp_path))
