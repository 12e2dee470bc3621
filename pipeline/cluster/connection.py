"""Starting or joining Ray, and checking that what it offers is what the run asks for."""

import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from pipeline import storage
from pipeline.cluster.startup import (
    ClusterError,
    address_of,
    check_answers,
    check_startup,
    cpus_of_our_own,
    temporary_folder,
    workers_held,
)
from pipeline.config import ClusterConfig

_WORKER_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead rank is noticed; Ray's default is 2
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",  # of a rank that hangs in a collective; 30 without it
}
_log = logging.getLogger(__name__)
_RESOURCES_WAIT_S = 60.0  # pods of an autoscaled group come up one by one


@contextmanager
def connected(cluster: ClusterConfig, durable: Mapping[str, str]) -> Iterator[None]:
    """Ray, joined at ``cluster.address`` or $RAY_ADDRESS, or else started here and ended with the block.

    ``durable``: option -> URL that every node must reach and that must outlive the job. ClusterError if no Ray answers
    or starts, or if what it offers stays too little.
    """
    address = address_of(cluster)
    if address:
        _refuse_private_storage(durable)
    check_startup(cluster, cluster.num_workers)
    # A Ray of our own: "local" never joins a stranger's cluster that happens to run on this machine.
    with _joining(address) if address else _starting():
        ray.init(
            address=address or "local",
            num_cpus=None if address else cpus_of_our_own(cluster),
            include_dashboard=None if address else False,
            runtime_env={"env_vars": {**_WORKER_ENV, **cluster.env}},
            log_to_driver=False,
            logging_level="error",  # at "warning" it tells of its own token set-up
        )
    try:
        _require_resources(cluster, patience_s=_RESOURCES_WAIT_S if address else 0)  # nothing joins a Ray of our own
        yield
    finally:
        ray.shutdown()


@contextmanager
def joined(address: str | None) -> Iterator[None]:
    """A Ray that runs already: at ``address``, $RAY_ADDRESS, or on this machine. ClusterError if there is none."""
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    check_answers(address, "--address")
    with _joining(address):
        ray.init(address=address, log_to_driver=False, logging_level="error")
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _joining(address: str) -> Iterator[None]:
    """Around ``ray.init``, which raises anything: ClusterError that says what a cluster asks of those who join it."""
    try:
        yield
    except Exception as error:
        ray.shutdown()
        raise ClusterError(
            f"cannot join the Ray at {address}: {_in_one_line(error)}; a cluster takes jobs of its own versions (here: "
            f"Ray {ray.__version__}, Python {platform.python_version()}), and with its token if it has one: set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from error


@contextmanager
def _starting() -> Iterator[None]:
    """Around ``ray.init``, which raises anything: ClusterError that says where to look."""
    try:
        yield
    except Exception as error:
        ray.shutdown()
        raise ClusterError(
            f"Ray does not start on this machine: {_in_one_line(error)}; its own logs say why: "
            f"{temporary_folder()}/ray/session_latest/logs. The usual causes are a machine that is very busy, little "
            "memory, few processes (ulimit -u), or a loopback that is filtered; start again, or set cluster.address to "
            "a Ray that runs"
        ) from error


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def workers_that_fit(cluster: ClusterConfig) -> int:
    """How many workers the nodes of the connected cluster hold in all; a worker is never split between nodes."""
    return sum(workers_held(cluster, node["Resources"]) for node in ray.nodes() if node["Alive"])


def _require_resources(cluster: ClusterConfig, patience_s: float) -> None:
    """ClusterError if the cluster's nodes stay too few for the worker group: Ray would wait for ever.

    What is missing is told at once, in the log, also where nodes may yet join.
    """
    deadline = time.monotonic() + patience_s
    told = False
    while (held := workers_that_fit(cluster)) < cluster.num_workers:
        offered = ray.cluster_resources()
        problem = (
            f"the cluster offers {offered.get('CPU', 0):g} CPUs and {offered.get('GPU', 0):g} GPUs on "
            f"{sum(node['Alive'] for node in ray.nodes())} nodes, which hold {held} workers of "
            f"{cluster.cpus_per_worker:g} CPUs and {cluster.gpus_per_worker:g} GPUs; {cluster.num_workers} are wanted: "
            "lower cluster.num_workers, cluster.cpus_per_worker or cluster.gpus_per_worker, or add nodes"
        )
        if time.monotonic() >= deadline:
            raise ClusterError(problem)
        if not told:
            _log.warning("%s; waiting up to %g s for nodes that may be on their way", problem, patience_s)
            told = True
        time.sleep(1)


def _refuse_private_storage(durable: Mapping[str, str]) -> None:
    """Inside a Ray job, a relative folder lies in the job's own working directory, which Ray deletes."""
    for key, url in durable.items():
        if not storage.is_remote(url) and "/runtime_resources/working_dir_files/" in url:
            raise ClusterError(
                f"{key} is the folder {url}, which Ray deletes with the job; "
                "use a URL that every node reaches, e.g. storage.url=s3://bucket/prefix or a shared mount /mnt/parallax"
            )
