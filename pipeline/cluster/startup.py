"""What Ray needs to start, or to be joined: tried before it is imported, which takes 3 s, and fails, which takes 30 s.

A Ray of our own keeps its Unix sockets, logs and spilled objects in $RAY_TMPDIR, else $TMPDIR, else /tmp. Nothing here
imports Ray, so the dry runs of the jobs try the same.
"""

import os
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pipeline.config import ClusterConfig
from pipeline.errors import UserError

MIN_FREE_BYTES = 2**30  # the logs of one run take some 10 MB; spilled objects and worker crashes take the rest
_LONGEST_SOCKET = "ray/session_2026-01-31_12-00-00_000000_4194304/sockets/plasma_store"  # the largest process id
_SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107
_ANSWER_S = 5
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and an empty SETTINGS frame


class ClusterError(UserError):
    """The cluster cannot run what was asked for; the message says what would fit."""


def check_startup(cluster: ClusterConfig, workers: int) -> str:
    """What Ray it will be, in a few words. ClusterError if none answers at the address given, or if one of our own
    could not start here or would not hold ``workers``."""
    if address := address_of(cluster):
        check_answers(address, "cluster.address")
        return f"joins the one at {address}"
    check_room(cluster, workers)
    folder = temporary_folder()
    return f"starts one in {folder}/ray, {check_folder(folder) / 2**30:,.0f} GiB free"


def address_of(cluster: ClusterConfig) -> str | None:
    """Of the cluster to join; None: start a Ray of our own."""
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    return None if address == "local" else address


def check_answers(address: str, option: str) -> None:
    """ClusterError unless a gRPC server answers at ``address``: Ray itself would try for minutes."""
    if address == "auto":
        return
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "1":
                connection.sendall(_HTTP2_HELLO)
                if connection.recv(4)[3:] != b"\x04":  # the type of a frame: SETTINGS
                    raise OSError("what listens there is no Ray; its port is not that of the dashboard, 8265")
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Ray answers at {address}: {error}; give {option} as <head's ip>:6379, or set RAY_ADDRESS to it"
        ) from error


def check_room(cluster: ClusterConfig, workers: int) -> None:
    """ClusterError if a Ray of our own would not hold ``workers``."""
    resources = {"CPU": cpus_of_our_own(cluster), "GPU": torch.cuda.device_count()}
    if (held := workers_held(cluster, resources)) < workers:
        raise ClusterError(
            f"this machine offers {resources['CPU']} CPUs and {resources['GPU']} GPUs, which hold {held} workers of "
            f"{cluster.cpus_per_worker:g} CPUs and {cluster.gpus_per_worker:g} GPUs; {workers} are wanted: lower "
            "cluster.num_workers (of a sweep, or sweep.seeds), cluster.cpus_per_worker or cluster.gpus_per_worker, or "
            "set cluster.address to a larger cluster"
        )


def cpus_of_our_own(cluster: ClusterConfig) -> int:
    """How many CPUs a Ray of our own says it has: workers may share cores."""
    return max(os.cpu_count() or 1, round(cluster.num_workers * cluster.cpus_per_worker + 0.5))


def workers_held(cluster: ClusterConfig, resources: Mapping[str, float]) -> int:
    """How many workers a node with these resources holds; a worker is never split between nodes."""
    per_worker = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    return int(min((resources.get(name, 0) + 1e-9) // amount for name, amount in per_worker.items() if amount))


def temporary_folder() -> Path:
    """Below which a Ray of our own keeps its files. ClusterError if that is no absolute path: Ray's processes would
    look for one another in different folders, and give up after 30 s."""
    variables = ("RAY_TMPDIR", "TMPDIR") if sys.platform.startswith("linux") else ("RAY_TMPDIR",)
    variable = next((name for name in variables if name in os.environ), None)
    folder = os.environ[variable] if variable else "/tmp"
    if not os.path.isabs(folder):
        raise ClusterError(f"{variable}={folder!r} is no absolute path; unset it, or set RAY_TMPDIR=/tmp")
    return Path(folder)


def check_folder(folder: Path) -> int:
    """Free bytes where Ray will keep its files below ``folder``. ClusterError if its sockets do not fit there, or if
    there is little room; what is not there yet is not made."""
    longest = len(os.fsencode(folder)) + len(f"/{_LONGEST_SOCKET}")
    if longest > _SOCKET_PATH_BYTES:
        room = _SOCKET_PATH_BYTES - len(f"/{_LONGEST_SOCKET}")
        raise ClusterError(
            f"{folder} is too long for Ray's temporary folder: its sockets would have paths of {longest} bytes, and "
            f"{_SOCKET_PATH_BYTES} is the limit; set RAY_TMPDIR to a folder of at most {room} bytes, e.g. /tmp"
        )
    there = next(parent for parent in (folder / "ray", *(folder / "ray").parents) if parent.exists())
    try:
        with TemporaryDirectory(dir=there) as trial, socket.socket(socket.AF_UNIX) as tried:
            tried.bind(f"{trial}/s")
    except OSError as error:
        raise ClusterError(
            f"Ray cannot keep its sockets in {there}: {error.strerror}; set RAY_TMPDIR to a folder on a local disk "
            "that you may write to, e.g. /tmp"
        ) from error
    free = shutil.disk_usage(there).free
    if free < MIN_FREE_BYTES:
        raise ClusterError(
            f"{there} has {free / 2**20:,.0f} MiB free, and Ray wants {MIN_FREE_BYTES / 2**20:,.0f} MiB there for its "
            "logs and what it spills; delete something (old folders session_* of Ray, say), or set RAY_TMPDIR to a "
            "folder on another disk"
        )
    return free
