"""One list of bad samples for the whole run: all ranks, restarts, another world size; and the share that stops it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import CheckpointStore
from pipeline.config import Config, load_config, override
from pipeline.data.assemble import BadSamplesError
from pipeline.data.manifest import Manifest
from pipeline.data.writer import write_shards
from pipeline.progress import Progress
from pipeline.quarantine import read_quarantine
from pipeline.storage import StorageError
from pipeline.train import fit, make_loader
from tests import gloo
from tests.data.images import photos

BAD = {3: b"not an image", 17: b"nor this", 31: b"\0", 58: b"\xff\xd8 cut"}
SHARD_SAMPLES = 20


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two epochs of three steps over 60 photographs, four of which are none."""
    folder = tmp_path_factory.mktemp("quarantine")
    samples = photos(60)
    for index, data in BAD.items():
        samples[index] = replace(samples[index], image=data)
    write_shards(samples, str(folder / "shards"), class_names=("even", "odd"), max_shard_samples=SHARD_SAMPLES)
    return load_config(
        "configs/quickstart.yaml",
        [
            f"storage.url={folder}",
            f"data.shards={folder}/shards",
            "data.source=null",
            "data.max_bad_share=0.1",
            "data.loader_workers=0",
            "model.args={channels: [4, 8, 8, 16]}",
            "train.global_batch_size=20",
            "train.epochs=2",
            "optim.warmup_epochs=0.5",
            "train.log_every_steps=3",
            "train.checkpoint_every_steps=1",
        ],
    )


def run(config: Config, store_url: str, until: int | None = None) -> tuple[list[Progress], str]:
    """Fit in this process or rank; ``until`` ends it at that step. The reports, and what a BadSamplesError said."""
    reports: list[Progress] = []

    def report(progress: Progress) -> None:
        reports.append(progress)
        if progress.step == until:
            raise KeyboardInterrupt

    manifest = Manifest.load(config.shards_url)
    try:
        fit(config, manifest, CheckpointStore(store_url, "run"), device=torch.device("cpu"), report=report)
    except KeyboardInterrupt:
        pass
    except BadSamplesError as error:
        return reports, str(error)
    return reports, ""


def met_alone(config: Config) -> int:
    """How many bad samples this rank's loader meets in an epoch."""
    loader = make_loader(config, Manifest.load(config.shards_url), torch.device("cpu"))
    for _ in loader.batches(0, loader.steps_per_epoch):
        pass
    return len(loader.quarantine)


def ids_of(url: Path) -> set[int]:
    return {sample.sample_id for sample in read_quarantine(CheckpointStore(str(url), "run"))}


def test_the_list_is_the_whole_job_s_and_survives_a_restart_at_another_world_size(
    config: Config, tmp_path: Path
) -> None:
    first, _ = run(override(config, ["train.log_every_steps=1"]), str(tmp_path), until=1)
    before = ids_of(tmp_path)
    assert before < set(BAD), "those of the first of three steps"
    assert before
    assert first[-1].bad_samples == len(before)

    ranks = gloo.run(2, run, config, str(tmp_path))
    assert [error for _, error in ranks] == ["", ""]
    assert ranks[0][0][-1].bad_samples == ranks[0][0][-1].logged["data/bad_samples"] == len(BAD)
    after = read_quarantine(CheckpointStore(str(tmp_path), "run"))
    assert [(s.sample_id, s.shard) for s in after] == [(i, f"train-{i // SHARD_SAMPLES:06d}.tar") for i in sorted(BAD)]
    run(config, str(tmp_path / "undisturbed"))
    assert read_quarantine(CheckpointStore(str(tmp_path / "undisturbed"), "run")) == after


def test_the_share_is_that_of_all_ranks_together_and_all_stop_with_the_list(config: Config, tmp_path: Path) -> None:
    """Three may be bad. Of two ranks none meets four by itself."""
    strict = override(config, ["data.max_bad_share=0.05", "train.epochs=1"])
    assert max(gloo.run(2, met_alone, strict)) <= 3
    errors = [error for _, error in gloo.run(2, run, strict, str(tmp_path))]
    assert errors[0] == errors[1]
    assert "4 of 60 training images cannot be decoded, more than data.max_bad_share=0.05 allows" in errors[0]
    assert ids_of(tmp_path) == set(BAD)
    for sample in read_quarantine(CheckpointStore(str(tmp_path), "run")):
        assert f"{sample.sample_id} in {sample.shard}: {sample.reason}" in errors[0]

    assert run(strict, str(tmp_path)) == ([], errors[0]), "a restart says so before its first step"
    assert "data.max_bad_share=0.067" in errors[0]
    reports, error = run(override(strict, ["data.max_bad_share=0.067"]), str(tmp_path))
    assert (reports[-1].step, error) == (3, "")


@pytest.mark.parametrize("text", ['[\n {\n  "sample_id": 3,', "5", "null", "[5]", '[{"id": 3}]', ""])
def test_a_list_that_was_cut_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "quarantine.json").write_text(text)
    with pytest.raises(StorageError, match=r"quarantine\.json is not the list .*; delete it"):
        read_quarantine(CheckpointStore(str(tmp_path), "run"))
