"""One MLflow run per run id, resumed without double points; an absent server is one clear error, soon."""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.registry.address import RegistryError
from pipeline.registry.tracking import Tracker, probe
from tests.servers import MLflowServer, free_ports


@pytest.fixture(params=["sqlite", "server"])
def tracking_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/tracking/mlflow.db"
    server: MLflowServer = request.getfixturevalue("mlflow_server")
    return server.uri


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    return f"experiment of {request.node.name}"


def history(uri: str, tracker: Tracker, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient(uri).get_metric_history(tracker.mlflow_run_id, key)]


def test_a_resumed_run_is_the_same_run_and_has_no_point_twice(tracking_uri: str, experiment: str) -> None:
    with Tracker(tracking_uri, experiment, "run-1") as first:
        for step in range(8):
            first.log(step, {"loss": 10.0 - step, **({"lr": 0.1} if step < 4 else {})})
    with Tracker(tracking_uri, experiment, "run-1") as second:
        assert MlflowClient(tracking_uri).get_run(second.mlflow_run_id).info.status == "RUNNING"
        for step in range(5, 12):  # replayed from the checkpoint at step 5
            second.log(step, {"loss": 10.0 - step, "lr": 0.1})
    assert second.mlflow_run_id == first.mlflow_run_id
    assert history(tracking_uri, second, "loss") == [(step, 10.0 - step) for step in range(12)]
    assert [step for step, _ in history(tracking_uri, second, "lr")] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    with Tracker(tracking_uri, experiment, "run-2") as other:
        assert other.mlflow_run_id != first.mlflow_run_id


def test_final_metrics_are_logged_once_at_the_last_step(tracking_uri: str, experiment: str) -> None:
    for _ in range(2):
        with Tracker(tracking_uri, experiment, "run-1") as tracker:
            tracker.log(30, {"loss": 1.0})
            tracker.log_final({"knn/encoder": 0.9})
    assert history(tracking_uri, tracker, "knn/encoder") == [(30, 0.9)]
    with Tracker(tracking_uri, experiment, "run-1") as tracker:
        tracker.log_final({"knn/encoder": 0.8})  # evaluated again, with other settings
    assert history(tracking_uri, tracker, "knn/encoder") == [(30, 0.9), (30, 0.8)]


def test_config_and_data_are_logged_and_a_change_on_resume_is_kept_as_a_tag(tracking_uri: str, experiment: str) -> None:
    many = {f"key.{i}": str(i) for i in range(150)}  # more than one request may carry
    for workers in ("2", "4"):
        with Tracker(tracking_uri, experiment, "run-1") as tracker:
            tracker.log_config({**many, "cluster.num_workers": workers, "cluster.address": "", "long": "x" * 9000})
            tracker.log_dataset("s3://bucket/shards/mnist", "e" * 64)
    run = MlflowClient(tracking_uri).get_run(tracker.mlflow_run_id)
    assert run.data.params.items() >= {**many, "cluster.num_workers": "2", "cluster.address": ""}.items()
    assert run.data.tags["changed.cluster.num_workers"] == "4"
    assert [key for key in run.data.tags if key.startswith("changed.")] == ["changed.cluster.num_workers"]
    assert run.data.tags["parallax.data_digest"] == "e" * 64
    assert [(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs] == [("mnist", "e" * 36)]


def test_how_a_run_ends_is_recorded(tracking_uri: str, experiment: str, tmp_path: Path) -> None:
    def status_after(error: type[BaseException] | None) -> str:
        tracker = Tracker(tracking_uri, experiment, f"run-{error.__name__ if error else 0}")
        try:
            with tracker:
                tracker.log(1, {"loss": 0.5})
                if error:
                    raise error
        except (ValueError, KeyboardInterrupt):
            pass
        assert history(tracking_uri, tracker, "loss") == [(1, 0.5)]  # what was buffered is not lost
        return str(MlflowClient(tracking_uri).get_run(tracker.mlflow_run_id).info.status)

    assert (status_after(None), status_after(ValueError), status_after(KeyboardInterrupt)) == (
        "FINISHED",
        "FAILED",
        "KILLED",
    )


def test_an_artifact_comes_back(tracking_uri: str, experiment: str, tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("well")
    with Tracker(tracking_uri, experiment, "run-1") as tracker:
        tracker.log_artifact(tmp_path / "report.txt", "evaluation")
    client = MlflowClient(tracking_uri)
    local = client.download_artifacts(tracker.mlflow_run_id, "evaluation/report.txt", str(tmp_path))
    assert Path(local).read_text() == "well"


def test_a_run_id_in_the_environment_changes_nothing(
    tracking_uri: str, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Tracker(tracking_uri, experiment, "victim") as victim:
        pass
    monkeypatch.setenv("MLFLOW_RUN_ID", victim.mlflow_run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    with Tracker(tracking_uri, experiment, "run-1") as tracker:
        tracker.log_config({"a": "1"})
        tracker.log_final({"loss": 1.0})
    assert tracker.mlflow_run_id != victim.mlflow_run_id
    untouched = MlflowClient(tracking_uri).get_run(victim.mlflow_run_id).data
    assert (untouched.params, untouched.metrics) == ({}, {})
    assert MlflowClient(tracking_uri).get_run(tracker.mlflow_run_id).data.metrics == {"loss": 1.0}


def test_metrics_wait_while_the_server_is_away(
    mlflow_server: MLflowServer, experiment: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("pipeline.registry.tracking._FLUSH_INTERVAL_S", 0.0)
    tracker = Tracker(mlflow_server.uri, experiment, "run-1")
    tracker.log(0, {"loss": 3.0})
    present = tracker._client
    (closed_port,) = free_ports(1)
    tracker._client = MlflowClient(f"http://127.0.0.1:{closed_port}")
    with caplog.at_level(logging.WARNING):
        tracker.log(1, {"loss": 2.0})
        tracker.log(2, {"loss": 1.0})
    assert "2 wait: connection refused" in caplog.text
    with pytest.raises(RegistryError, match="connection refused"):
        tracker.finish("FINISHED")
    tracker._client = present
    tracker.finish("FINISHED")
    assert history(mlflow_server.uri, tracker, "loss") == [(0, 3.0), (1, 2.0), (2, 1.0)]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_an_unreachable_server_is_one_error_within_10_s(silent_port: int) -> None:
    (closed_port,) = free_ports(1)
    for port in (closed_port, silent_port):
        started = time.monotonic()
        with pytest.raises(RegistryError, match=rf"http://127\.0\.0\.1:{port} .*mlflow server.*sqlite"):
            probe(f"http://127.0.0.1:{port}", "x")
        assert time.monotonic() - started < 10


def test_a_server_that_is_not_mlflow_is_told_apart(mlflow_server: MLflowServer) -> None:
    probe(mlflow_server.uri, "x")
    with pytest.raises(RegistryError, match="status 404, so it is not a working MLflow server"):
        probe(f"{mlflow_server.uri}/elsewhere", "x")


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "sqlite:///", "postgresql://host/db", ""])
def test_a_uri_without_a_server_or_a_file_teaches(uri: str) -> None:
    with pytest.raises(RegistryError, match=r"http://127\.0\.0\.1:5000 or sqlite:////"):
        probe(uri, "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(RegistryError, match=r"cannot write /proc/mlflow\.db"):
        probe("sqlite:////proc/mlflow.db", "x")


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match=r"cannot write .*mlflow\.db"):
        probe(f"sqlite:///{tmp_path}/file/mlflow.db", "x")


def test_a_deleted_experiment_teaches(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    client.delete_experiment(Tracker(uri, "gone", "run-1").experiment_id)
    with pytest.raises(RegistryError, match=r"'gone' was deleted.*restore"):
        Tracker(uri, "gone", "run-1")


def test_nothing_is_printed_and_nothing_lies_in_the_working_directory(tracking_uri: str, tmp_path: Path) -> None:
    code = f"""
from pipeline.registry.tracking import Tracker
with Tracker("{tracking_uri}", "quiet", "run-1") as tracker:
    tracker.log_config({{"a": "1"}})
    tracker.log_final({{"loss": 1.0}})
"""
    (tmp_path / "cwd").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "cwd", capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "cwd").iterdir()) == []
