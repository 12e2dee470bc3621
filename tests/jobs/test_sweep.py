"""A sweep as a person runs it, on MNIST digits with a tiny encoder: killed, taken up again, and its mistakes."""

import os
import signal
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs import sweep
from pipeline.config import load_config
from pipeline.sweep.results import SweepResults
from tests.jobs.process import Job
from tests.jobs.refusals import refused

TOY = [
    "model.args={channels: [4, 8, 8, 16]}",
    "method.queue_size=1600",
    "train.global_batch_size=800",
    "train.epochs=2",
    "train.checkpoint_every_steps=2",
    "sweep.space={optim.lr: {grid: [0.5, 1.0e+30]}, method.temperature: {grid: [0.2, 0.5], when: {optim.lr: 0.5}}}",
    "sweep.scheduler={name: none}",
    "registry.model_name=toy",
]
CONFIG = str(Path("configs/sweep/digits-moco.yaml").absolute())
COMMAND = ["jobs.sweep", CONFIG, *TOY]


def start(folder: Path, *arguments: str) -> Job:
    return Job("sweep", CONFIG, *TOY, f"storage.url={folder}", *arguments)


def results(folder: Path) -> SweepResults:
    (path,) = (folder / "sweeps").glob("*/results.json")
    return SweepResults.model_validate_json(path.read_text())


@pytest.mark.heavy
@pytest.mark.integration
def test_a_killed_sweep_goes_on_and_repeats_nothing_that_was_done(tmp_path: Path) -> None:
    """Of its three trials one diverges: it fails at once, and is never the best."""
    first = start(tmp_path)
    first.read_until(r"t00[01] .* finished")
    first.kill()
    before = {run.trial: run for run in results(tmp_path).runs}
    done = next(run for run in before.values() if run.status == "finished")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / done.run_id / "checkpoints").iterdir()}

    out = start(tmp_path, "--resume").finish()
    after = results(tmp_path)
    by_trial = {run.trial: run for run in after.runs}
    assert by_trial[done.trial] == done, "its scores, its seconds, its MLflow run"
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}, "nothing of it was written again"
    assert {trial: run.status for trial, run in by_trial.items()} == {
        "t000": "finished",
        "t001": "finished",
        "t002": "diverged",
    }
    assert "the loss is not finite" in by_trial["t002"].reason
    for trial in ("t000", "t001"):
        assert [score.epoch for score in by_trial[trial].scores] == [1, 2], "no report is lost, none comes twice"

    assert after.final is not None
    assert after.final.trial == max(("t000", "t001"), key=lambda trial: by_trial[trial].scores[-1].knn)
    assert f"{after.sweep_id} is complete" in out
    folder = tmp_path / "sweeps" / after.sweep_id
    assert {"best.yaml", "summary.txt", "heat-map.png", "parallel-coordinates.png"} <= {
        p.name for p in folder.iterdir()
    }
    best = load_config(folder / "best.yaml")
    assert best.method.model_dump()["temperature"] == by_trial[after.final.trial].values["method.temperature"]

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db", f"sqlite:///{tmp_path}/mlflow.db")
    version = client.get_model_version_by_alias("toy", "champion")
    assert version.tags["parallax.sweep_id"] == after.sweep_id
    assert version.tags["parallax.trial"] == after.final.trial
    for run in after.runs:
        logged = client.get_run(run.mlflow_run_id)
        assert logged.data.tags["mlflow.parentRunId"] == after.mlflow_run_id
        assert logged.info.status == ("FAILED" if run.status == "diverged" else "FINISHED")
        if run.scores:
            history = client.get_metric_history(run.mlflow_run_id, "train/selection/knn")
            assert [point.value for point in history] == [score.knn for score in run.scores]

    again = start(tmp_path).finish(timeout_s=60)
    assert "is complete already" in again


@pytest.mark.heavy
@pytest.mark.integration
def test_a_trial_s_killed_driver_and_worker_are_made_up_for(tmp_path: Path) -> None:
    """One trial at a time on all CPUs: if the dead driver's placement group stayed, the next would wait for ever."""
    job = start(
        tmp_path, "train.epochs=6", "sweep.space={method.temperature: {grid: [0.2, 0.5]}}", "cluster.cpus_per_worker=2"
    )
    job.read_until(r"t000 .* epoch 1/6")
    (driver,) = job.pids(b"ray::ResourceTrainable", b"ray::PretrainTrial")  # in a call of Tune, or between two
    os.kill(driver, signal.SIGKILL)
    job.read_until(r"t000 .* epoch [3-6]/6")
    (worker,) = job.pids(b"ray::RayTrainWorker")
    os.kill(worker, signal.SIGKILL)
    job.finish()
    runs = results(tmp_path).runs
    assert [run.status for run in runs] == ["finished", "finished"]
    assert all([score.epoch for score in run.scores] == [1, 2, 3, 4, 5, 6] for run in runs)


@pytest.mark.heavy
@pytest.mark.integration
def test_trials_that_failed_run_again_when_the_sweep_is_taken_up(tmp_path: Path) -> None:
    """Nothing can be written where the runs are to be, as on a disk that is full; then it can."""
    one = ["sweep.space={method.temperature: {grid: [0.2]}}", "train.epochs=1", "optim.warmup_epochs=0"]
    (tmp_path / "runs").write_text("in the way")
    first = start(tmp_path, *one)
    first.read_until(r"no finished trial .* t000 failed: \w*Error: .+")
    first.wait()
    (run,) = results(tmp_path).runs
    assert run.status == "failed"
    (tmp_path / "runs").unlink()
    start(tmp_path, *one).finish()
    (run,) = results(tmp_path).runs
    assert (run.status, run.reason, [score.epoch for score in run.scores]) == ("finished", "", [1])


def test_a_dry_run_lists_the_trials_and_runs_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*COMMAND, f"storage.url={tmp_path}", "--dry-run"])
    sweep.main()
    out = capsys.readouterr().out
    assert "nothing was trained" in out
    assert "t000  optim.lr=0.5  method.temperature=0.2" in out
    assert "t002  optim.lr=1.0e+30\n" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume"], ["no sweep to resume", "leave out --resume"]),
        (["data.hold_out={}"], ["evaluate.selection.split=selection", "train, validation", "hold_out"]),
        (["evaluate.selection={split: validation}"], ["'validation'", "flatter"]),
        (["sweep.space={train.global_batch_size: {grid: [800, 1600, 4000]}}", "method.queue_size=8000"], ["4000"]),
    ],
)
def test_a_mistake_is_one_message_before_a_trial_runs(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    refused(monkeypatch, sweep.main, *COMMAND, f"storage.url={tmp_path}", *arguments)
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.heavy
@pytest.mark.integration
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cluster.gpus_per_worker=1"], ["0 GPUs", "cluster.gpus_per_worker"]),
        (["sweep.seeds=300"], ["one trial needs 300 workers (300 seeds x 1)", "lower sweep.seeds"]),
    ],
)
def test_a_cluster_too_small_for_one_trial_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    refused(monkeypatch, sweep.main, *COMMAND, f"storage.url={tmp_path}", *arguments)
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "runs").exists()
