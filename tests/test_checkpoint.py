"""Checkpoints: atomic, verified, pruned, on a folder and on a real S3 server."""

from pathlib import Path

import pytest
import torch

from pipeline import storage
from pipeline.checkpoint import CheckpointError, CheckpointStore, TrainState
from tests.conftest import S3


def state(step: int) -> TrainState:
    return TrainState(
        step=step, seed=0, manifest_digest="d", method={"w": torch.full((3,), float(step))}, optimizer={},
        config="", mlflow_run_id="",
    )  # fmt: skip


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        s3: S3 = request.getfixturevalue("s3")
        return f"{s3.url}/runs/a/checkpoints"
    return str(tmp_path / "checkpoints")


def test_keeps_the_newest_and_reads_them_back(url: str) -> None:
    store = CheckpointStore(url, "run", keep=2)
    assert store.latest_step() is None
    for step in (5, 10, 100):
        store.save(state(step))
    assert store.steps() == [10, 100]
    assert store.load(100)["method"]["w"].tolist() == [100.0] * 3
    assert sorted(storage.list_sizes(url)) == [f"step-{s:09d}.{suffix}" for s in (10, 100) for suffix in ("json", "pt")]


def test_a_payload_without_its_commit_is_no_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), "run")
    store.save(state(5))
    (tmp_path / "step-000000009.pt").write_bytes(b"a kill came before the commit")
    assert store.latest_step() == 5


def test_damage_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), "run")
    store.save(state(5))
    store.save(state(6))
    payload = tmp_path / "step-000000006.pt"
    damaged = bytearray(payload.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    payload.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"step-000000006\.pt is damaged.*delete .*step-000000006\.json.*\[5\]"):
        store.load(6)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"size": 1}', "\xff"])
def test_a_damaged_commit_is_an_error_that_says_how_to_go_on(tmp_path: Path, text: str) -> None:
    store = CheckpointStore(str(tmp_path), "run")
    store.save(state(5))
    store.save(state(6))
    (tmp_path / "step-000000006.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"step-000000006\.json is damaged.*delete .*000006\.json .*\[5\]"):
        store.load(6)


def test_a_missing_payload_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), "run")
    store.save(state(6))
    (tmp_path / "step-000000006.pt").unlink()
    with pytest.raises(CheckpointError, match=r"step-000000006\.pt is missing; delete .*000006\.json .*none"):
        store.load(6)


def test_loading_never_unpickles_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    store = CheckpointStore(str(tmp_path), "run")
    store.save({**state(5), "config": Payload()})  # type: ignore[typeddict-item]
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        store.load(5)
    assert not (tmp_path / "ran").exists()
