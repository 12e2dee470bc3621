"""The RayJob: KubeRay's own rules, no secret inside, the config arrives whole, and the shipped example is current."""

import math
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import rayjob
from pipeline.cluster.kuberay import ray_job
from pipeline.config import Config, ConfigError, load_config

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "infra/kuberay/simclr-resnet50-224.yaml"
EXAMPLE_ARGUMENTS = (
    "configs/pretrain/simclr-resnet50-224.yaml storage.url=s3://my-bucket/parallax "
    "data.shards=s3://my-bucket/imagenet/shards tracking.uri=http://mlflow.mlflow.svc:5000 --workers-per-pod 8"
)
REACHABLE = ["storage.url=s3://bucket/runs", "tracking.uri=http://mlflow:5000"]


def config(*overrides: str) -> Config:
    return load_config(REPOSITORY / "configs/quickstart.yaml", [*REACHABLE, *overrides])


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def test_the_shipped_example_is_what_the_command_renders(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["jobs.rayjob", *shlex.split(EXAMPLE_ARGUMENTS)])
    rayjob.main()
    assert capsys.readouterr().out == EXAMPLE.read_text(), (
        f"render it again: python -m jobs.rayjob {EXAMPLE_ARGUMENTS} > {EXAMPLE.relative_to(REPOSITORY)}"
    )


def test_the_config_in_the_head_pod_loads_to_the_config_that_was_rendered(tmp_path: Path):
    original = config("method.temperature=0.07", "train.epochs=3")
    job = ray_job(original, image="parallax:test")
    head = pods(job)[0]
    (tmp_path / "config.yaml").write_text(head["metadata"]["annotations"]["parallax-config"])
    assert load_config(tmp_path / "config.yaml") == original

    # Kubernetes mounts that annotation where the entrypoint looks for it.
    (volume,) = head["spec"]["volumes"]
    (item,) = volume["downwardAPI"]["items"]
    (mount,) = head["spec"]["containers"][0]["volumeMounts"]
    assert item["fieldRef"]["fieldPath"] == "metadata.annotations['parallax-config']"
    assert mount["name"] == volume["name"]
    assert job["spec"]["entrypoint"] == f"python -m jobs.pretrain {mount['mountPath']}/{item['path']}"


def test_kuberays_rules_hold():
    """ValidateRayJobMetadata, ValidateRayJobSpec and ValidateRayClusterSpec of KubeRay 1.7, as far as they apply."""
    job = ray_job(config(), image="parallax:test")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    assert len(job["metadata"]["name"]) <= 47
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["backoffLimit"] > 0
    assert "clusterSelector" not in spec  # incompatible with backoffLimit
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert "resources" not in group


def test_the_ranks_fit_the_pods_and_get_their_loaders_cpus():
    sized = config("cluster.num_workers=8", "cluster.gpus_per_worker=0.5", "data.loader_workers=3")
    job = ray_job(sized, image="parallax:test", workers_per_pod=4, worker_memory_gib=10)
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == 2
    assert group["rayStartParams"]["num-cpus"] == "4"
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == {"cpu": "16", "memory": "40Gi", "nvidia.com/gpu": "2"}
    assert resources["limits"] == {"memory": "40Gi", "nvidia.com/gpu": "2"}


def test_ranks_without_gpus_ask_for_none():
    job = ray_job(config(), image="parallax:test")
    assert all("nvidia.com/gpu" not in str(pod) for pod in pods(job))


def test_secrets_come_by_reference_and_pods_are_unprivileged(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    job = ray_job(config(), image="parallax:test", secret="team-keys", service_account="trainer")
    assert "hunter2" not in yaml.safe_dump(job)
    for pod in pods(job):
        (container,) = pod["spec"]["containers"]
        assert "AWS_SECRET_ACCESS_KEY" in [variable["name"] for variable in container["env"]]
        for variable in container["env"]:
            assert variable["valueFrom"]["secretKeyRef"]["name"] == "team-keys"
            assert "value" not in variable
        assert pod["spec"]["serviceAccountName"] == "trainer"
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_the_name_follows_what_determines_the_weights():
    def name(*overrides: str) -> str:
        return str(ray_job(config(*overrides), image="parallax:test")["metadata"]["name"])

    same = [name(), name("cluster.num_workers=4"), name("train.log_every_steps=3"), name("tracking.uri=http://other:1")]
    assert len(set(same)) == 1
    different = [name("seed=1"), name("method.temperature=0.3"), name("data.shards=s3://bucket/other")]
    assert len({same[0], *different}) == 4


@pytest.mark.parametrize("given", ["a", "0-starts-with-a-digit", "ends-with-a-dash-", "x" * 41, "x" * 26 + "-" * 15])
def test_every_name_a_config_may_have_makes_a_valid_job_name(given: str):
    name = ray_job(config(f"name='{given}'"), image="parallax:test")["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 47


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        (["storage.url=/data"], {}, r"storage\.url is the folder /data.*use storage\.url=s3://bucket/prefix"),
        (["data.shards=shards"], {}, r"data\.shards is the folder .*use data\.shards=s3://bucket/prefix"),
        (["tracking.uri=''"], {}, r"sqlite:///.*pods cannot reach; use tracking\.uri=http://"),
        (["cluster.address=10.0.0.1:6379"], {}, r"cluster\.address=10\.0\.0\.1:6379 .*leave it out"),
        ([], {"workers_per_pod": 3}, r"3 workers a pod .*cluster\.num_workers=2; numbers that work: 1, 2"),
        ([], {"workers_per_pod": 0}, r"numbers that work: 1, 2"),
        ([], {"deadline_h": 0}, r"deadline_h=0 must be a number above 0"),
        ([], {"deadline_h": math.nan}, r"deadline_h=nan must be a number above 0"),
        ([], {"deadline_h": math.inf}, r"deadline_h=inf must be a number above 0"),
        (["cluster.gpus_per_worker=0.3"], {}, r"make 0\.3 GPUs a pod, and Kubernetes gives whole ones"),
    ],
)
def test_what_cannot_work_in_pods_is_refused(overrides: list[str], arguments: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        ray_job(config(*overrides), image="parallax:test", **arguments)


def test_the_deadline_is_whole_seconds():
    assert ray_job(config(), image="parallax:test", deadline_h=0.5)["spec"]["activeDeadlineSeconds"] == 1800
