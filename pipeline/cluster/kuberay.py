"""A pretraining run as a KubeRay RayJob (ray.io/v1, KubeRay 1.5 or newer): one object that `kubectl apply` takes.

The config travels inside it, as an annotation of the head's pod that Kubernetes mounts as a file, so the image
holds code only and the object shows what was submitted. Losing the head loses a Ray cluster for good (kuberay#2155),
so KubeRay then builds another one and the job finds its checkpoints by the run's name.
"""

import hashlib
import math
from importlib.metadata import version
from typing import Any

from pipeline import storage
from pipeline.config import Config, ConfigError, dump

_MAX_NAME = 47  # KubeRay's limit: it appends to the name, and Services allow 63 characters
_CLUSTER_RETRIES = 3  # new clusters after a lost head; the job resumes, so a retry costs what a checkpoint lags
_SUBMITTER_RETRIES = 2  # the pod that follows the job's log may be evicted; it finds the job by its id again
_KEEP_S = 600  # how long the finished cluster stays up for its logs and dashboard
_CONFIG_ANNOTATION = "parallax-config"
_CONFIG_FOLDER = "/etc/parallax"
# Read from the Secret where it has them: a cluster with workload identity or without an own endpoint has fewer.
_SECRET_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NO_PROXY",
)


def ray_job(
    config: Config,
    *,
    image: str,
    namespace: str = "default",
    secret: str = "parallax",
    service_account: str = "default",
    workers_per_pod: int = 1,
    worker_memory_gib: int = 16,
    deadline_h: float = 168,
) -> dict[str, Any]:
    """The RayJob that runs ``jobs.pretrain`` with ``config`` on a cluster of its own.

    ``secret`` names the Kubernetes Secret with the credentials; nothing of it enters the object. A pod holds
    ``workers_per_pod`` ranks of ``worker_memory_gib`` each, and every rank gets its loader processes' CPUs too. The
    name follows from what determines the weights: applying a config twice does not train it twice at once.

    Raises ConfigError for what cannot work in pods: local storage, sqlite tracking, ranks that do not fill pods.
    """
    _refuse_what_pods_cannot_reach(config)
    for argument, value in {"worker_memory_gib": worker_memory_gib, "deadline_h": deadline_h}.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{argument}={value:g} must be a number above 0, e.g. 16")
    pods = _pods(config, workers_per_pod)
    cluster = config.cluster
    gpus = round(workers_per_pod * cluster.gpus_per_worker)
    cpus = math.ceil(workers_per_pod * (cluster.cpus_per_worker + config.data.loader_workers))
    name = _job_name(config)
    head = _pod("ray-head", image, secret, service_account, cpus=2, memory_gib=8, gpus=0)
    _mount_config(head, config)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/name": "parallax"}},
        "spec": {
            "entrypoint": f"python -m jobs.pretrain {_CONFIG_FOLDER}/config.yaml",
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _KEEP_S,
            "activeDeadlineSeconds": math.ceil(deadline_h * 3600),
            "backoffLimit": _CLUSTER_RETRIES,
            "submitterConfig": {"backoffLimit": _SUBMITTER_RETRIES},
            "rayClusterSpec": {
                "rayVersion": version("ray"),  # of the environment that renders; the image pins the same
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    # No ranks on the head: the driver and Ray's own services need it.
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": head,
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "ranks",
                        # All or nothing: a rank that is missing keeps the others waiting on paid machines.
                        "replicas": pods,
                        "minReplicas": pods,
                        "maxReplicas": pods,
                        "rayStartParams": {"num-cpus": str(math.ceil(workers_per_pod * cluster.cpus_per_worker))},
                        "template": _pod(
                            "ray-worker",
                            image,
                            secret,
                            service_account,
                            cpus=cpus,
                            memory_gib=workers_per_pod * worker_memory_gib,
                            gpus=gpus,
                        ),
                    }
                ],
            },
        },
    }


def _refuse_what_pods_cannot_reach(config: Config) -> None:
    for key, url in {"storage.url": config.storage.url, "data.shards": config.shards_url}.items():
        if not storage.is_remote(url):
            raise ConfigError(
                f"{key} is the folder {url}, which the pods of a RayJob do not share; use {key}=s3://bucket/prefix"
            )
    if not config.tracking_uri.startswith(("http://", "https://")):
        raise ConfigError(
            f"the tracking server is {config.tracking_uri}, which pods cannot reach; "
            "use tracking.uri=http://mlflow.<namespace>.svc:5000 or another MLflow server's address"
        )
    if config.cluster.address is not None:
        raise ConfigError(
            f"cluster.address={config.cluster.address} names a cluster, and a RayJob has one of its own; leave it out"
        )


def _pods(config: Config, workers_per_pod: int) -> int:
    workers = config.cluster.num_workers
    if workers_per_pod < 1 or workers % workers_per_pod:
        fitting = ", ".join(str(n) for n in range(1, min(workers, 64) + 1) if workers % n == 0)
        raise ConfigError(
            f"{workers_per_pod} workers a pod do not divide cluster.num_workers={workers}; numbers that work: {fitting}"
        )
    gpus = workers_per_pod * config.cluster.gpus_per_worker
    if gpus != round(gpus):
        raise ConfigError(
            f"{workers_per_pod} workers of cluster.gpus_per_worker={config.cluster.gpus_per_worker:g} make {gpus:g} "
            "GPUs a pod, and Kubernetes gives whole ones; change either so that the product is whole"
        )
    return workers // workers_per_pod


def _job_name(config: Config) -> str:
    """``parallax-<name>-<hash of what determines the weights>``, a DNS label of at most 47 characters."""
    determining = config.run_id(config.shards_url)  # the shards' address stands for their digest: nothing is read here
    digest = hashlib.sha256(determining.encode()).hexdigest()[:10]
    room = _MAX_NAME - len("parallax--") - len(digest)
    return f"parallax-{config.name[:room].rstrip('-')}-{digest}"


def _pod(
    container: str, image: str, secret: str, service_account: str, *, cpus: int, memory_gib: int, gpus: int
) -> dict[str, Any]:
    memory = f"{memory_gib}Gi"
    accelerators = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    return {
        "metadata": {"labels": {"app.kubernetes.io/name": "parallax"}},
        "spec": {
            "serviceAccountName": service_account,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": container,
                    "image": image,
                    "env": [_from_secret(secret, key) for key in _SECRET_KEYS],
                    "resources": {
                        # No CPU limit: it would throttle a rank in the middle of a step.
                        "requests": {"cpu": str(cpus), "memory": memory, **accelerators},
                        "limits": {"memory": memory, **accelerators},
                    },
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                }
            ],
        },
    }


def _from_secret(secret: str, key: str) -> dict[str, Any]:
    return {"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}}}


def _mount_config(pod: dict[str, Any], config: Config) -> None:
    """The entrypoint runs on the head, so the head alone needs the file."""
    pod["metadata"]["annotations"] = {_CONFIG_ANNOTATION: dump(config)}
    field = {"path": "config.yaml", "fieldRef": {"fieldPath": f"metadata.annotations['{_CONFIG_ANNOTATION}']"}}
    pod["spec"]["volumes"] = [{"name": "config", "downwardAPI": {"items": [field]}}]
    pod["spec"]["containers"][0]["volumeMounts"] = [{"name": "config", "mountPath": _CONFIG_FOLDER, "readOnly": True}]
