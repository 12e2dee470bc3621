"""Real servers as subprocesses for the tests: SeaweedFS (S3), MLflow, Ray; loopback only, on free ports.

A server's descendants (Ray starts dozens, some in sessions of their own) inherit an environment variable
with a random value, and teardown ends exactly the processes that carry it: never ``ray stop``, which ends
every Ray of the host.
"""

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import boto3
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError

T = TypeVar("T")
_NODE_IPS = {"head": "127.0.0.2", "raylet": "127.0.0.3"}
_MARK = "PARALLAX_TEST_SERVER"
_START_ATTEMPTS = 3  # a port can be taken between the moment it was found free and the server's bind
_HIGHEST_PORT = 32000  # below Linux's ephemeral range (32768-60999), which outgoing connections draw from


class ServerError(RuntimeError):
    """A server did not start or did not answer; the message ends with the last lines of its log."""


class Server:
    """One subprocess and everything it starts, in ``folder`` with its log."""

    def __init__(self, name: str, command: list[str], folder: Path, env: dict[str, str]) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._mark = f"{_MARK}={secrets.token_hex(8)}"
        key, value = self._mark.split("=")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **env, key: value},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Poll ``ready`` until it holds (an OSError means not yet); ServerError if the process ends first."""
        deadline = time.monotonic() + timeout_s
        while True:
            if (code := self._process.poll()) is not None:
                raise ServerError(f"{self.name} exited with status {code}; its log ends:\n{self._log_tail()}")
            try:
                if ready():
                    return
            except OSError:
                pass  # refused, reset or 5xx: the server is still starting
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name}: not ready after {timeout_s} s; its log ends:\n{self._log_tail()}")
            time.sleep(0.1)

    def pids(self) -> list[int]:
        """Every live process that descends from this server, zombies left out."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if self._mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue  # ended while we looked, or another user's
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole tree, e.g. SIGSTOP for a server that stalls."""
        for pid in self.pids():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def stop(self, grace_s: float = 10) -> None:
        """SIGTERM to the leader, SIGKILL to what is left of the tree; returns when nothing of it lives."""
        if self._process.poll() is None:
            self.signal(signal.SIGCONT)  # a stopped process cannot act on SIGTERM
            self._process.terminate()
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        deadline = time.monotonic() + 10
        while left := self.pids():
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name}: processes {left} survive SIGKILL")
            self.signal(signal.SIGKILL)
            time.sleep(0.05)

    def _log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])


class S3Server:
    """SeaweedFS with one administrator; anonymous requests and wrong keys get 403."""

    def __init__(self, folder: Path) -> None:
        self.access_key = secrets.token_hex(8)
        self.secret_key = secrets.token_hex(16)
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config = folder / "identities.json"
        config.write_text(json.dumps({"identities": [identity]}))
        # Unix sockets allow 107 characters of path, more than pytest's folders leave.
        self._sockets = tempfile.mkdtemp(prefix="parallax-s3-")
        self._server, self.endpoint = _started(lambda: self._start(folder, config))

    def _start(self, folder: Path, config: Path) -> tuple[Server, str]:
        names = ("master", "volume", "filer", "s3")
        ports = dict(zip(names, free_ports(4), strict=True))
        grpc_ports = dict(zip(names, free_ports(4), strict=True))
        endpoint = f"http://127.0.0.1:{ports['s3']}"
        data = tempfile.mkdtemp(prefix="data-", dir=folder)  # a failed attempt leaves its ports in its data
        server = Server(
            "seaweedfs",
            [
                *(_beside_python("weed"), "-logtostderr", "server", f"-dir={data}"),
                *(
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    "-s3",
                    f"-s3.config={config}",
                    "-master.telemetry=false",
                ),
                *(f"-{name}.port={port}" for name, port in ports.items()),
                *(f"-{name}.port.grpc={port}" for name, port in grpc_ports.items()),
                *("-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.preStopSeconds=0"),
                "-s3.autoCreateBucket=false",  # S3 answers a PUT into a missing bucket with 404
                *("-master.volumeSizeLimitMB=64", "-volume.max=0"),
                *(f"-s3.localSocket={self._sockets}/s3", f"-filer.localSocket={self._sockets}/filer"),
            ],
            folder,
            {},
        )
        self.client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=BotoConfig(retries={"max_attempts": 1}, connect_timeout=5, read_timeout=30),
        )
        return _ready(server, self._accepts_writes, timeout_s=60), endpoint

    def _accepts_writes(self) -> bool:
        """The gateway answers before it has loaded its identities and before a volume can be written."""
        try:
            self.client.create_bucket(Bucket="ready")
            self.client.put_object(Bucket="ready", Key="ready", Body=b"ready")
            self.client.delete_object(Bucket="ready", Key="ready")
            self.client.delete_bucket(Bucket="ready")
        except (BotoCoreError, ClientError) as error:
            raise OSError(str(error)) from error
        return True

    @property
    def env(self) -> dict[str, str]:
        """What a process needs to reach this server through s3fs, boto3 or MLflow."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def new_bucket(self) -> str:
        """An empty bucket; returns ``s3://<name>``."""
        name = f"test-{secrets.token_hex(6)}"
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def pause(self) -> None:
        """Stall: connections are accepted by the kernel and never answered."""
        self._server.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """End a stall."""
        self._server.signal(signal.SIGCONT)

    def stop(self) -> None:
        """End the server and remove its sockets; the data stays in the folder it was given."""
        self._server.stop(grace_s=0.5)  # it takes 10 s to leave in order, and nobody reads the data again
        shutil.rmtree(self._sockets)


class MLflowServer:
    """``mlflow server`` over sqlite, artifacts proxied into ``folder``; ``uri`` is the tracking URI."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server, self.uri = _started(lambda: self._start(folder))

    def _start(self, folder: Path) -> tuple[Server, str]:
        (port,) = free_ports(1)
        uri = f"http://127.0.0.1:{port}"
        server = Server(
            "mlflow",
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
                *("--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
                *("--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts"),
            ],
            folder,
            {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # 8 processes and 1.2 GB otherwise
        )
        return _ready(server, lambda: http_ok(f"{uri}/health"), timeout_s=120), uri

    def stop(self) -> None:
        """End the server."""
        self._server.stop()


class RayCluster:
    """A head and one more raylet, one CPU each, behind token authentication, as two machines would be.

    Every address in 127.0.0.0/8 is this machine (on Linux), so the nodes get 127.0.0.2 and 127.0.0.3; Ray replaces
    127.0.0.1 by the address of a network card.

    ``node_env`` is what only the nodes know (S3 credentials): the processes that Ray starts inherit it, and
    the jobs API never sees it. ``env`` is what a client process needs.
    """

    def __init__(self, folder: Path, *, node_env: dict[str, str]) -> None:
        self._token = folder / "auth_token"
        self._token.write_text(secrets.token_hex(32))
        self._token.chmod(0o600)
        self._nodes: list[Server] = []
        self._temporary: list[Path] = []
        self._folder, self._node_env = folder, node_env
        head, (self.address, self.dashboard) = _started(self._start_head)
        self._nodes.append(head)
        try:
            self.add_raylet()
        except ServerError:
            self.stop()
            raise

    @property
    def env(self) -> dict[str, str]:
        """What `ray job submit` and `ray.init` need to join as a client."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token),
        }

    @property
    def token(self) -> str:
        """The secret itself, for asserting that it shows nowhere."""
        return self._token.read_text()

    def lose_raylet(self) -> None:
        """SIGKILL to the second node and all that runs on it: a machine that is gone."""
        raylet = self._nodes.pop()
        while raylet.pids():
            raylet.signal(signal.SIGKILL)

    def add_raylet(self) -> None:
        """The second node; returns when the head lists it."""
        raylet, _ = _started(self._start_raylet)
        self._nodes.append(raylet)

    def _start_head(self) -> tuple[Server, tuple[str, str]]:
        gcs, dashboard, client = free_ports(3)
        url = f"http://127.0.0.1:{dashboard}"
        options = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        head = self._ray_start("head", ["--head", *options, "--dashboard-host=127.0.0.1"])
        _ready(head, lambda: len(self._alive_nodes(url)) == 1, timeout_s=120)
        return head, (f"{_NODE_IPS['head']}:{gcs}", url)

    def _start_raylet(self) -> tuple[Server, None]:
        raylet = self._ray_start("raylet", [f"--address={self.address}"])
        return _ready(raylet, lambda: len(self._alive_nodes(self.dashboard)) == 2, timeout_s=120), None

    def _ray_start(self, name: str, options: list[str]) -> Server:
        # Ray's Unix sockets lie some 70 characters below its folder, and the limit is 107.
        temporary = Path(tempfile.mkdtemp(prefix="parallax-ray-"))
        self._temporary.append(temporary)
        flags = ("node-manager-port", "object-manager-port", "runtime-env-agent-port", "metrics-export-port")
        flags += ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")
        workers = free_port_range(40)
        command = [
            *(_beside_python("ray"), "start", *options, "--block", "--disable-usage-stats", "--log-color=false"),
            *(f"--node-ip-address={_NODE_IPS[name]}", "--num-cpus=1", "--num-gpus=0", f"--temp-dir={temporary}"),
            *(f"--object-store-memory={200 * 2**20}", f"--resources={json.dumps({name: 1})}"),
            *(f"--{flag}={port}" for flag, port in zip(flags, free_ports(len(flags)), strict=True)),
            *(f"--min-worker-port={workers.start}", f"--max-worker-port={workers.stop - 1}"),
        ]
        env = {
            **self._node_env,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token),
            # Ports of metrics nobody reads that have no option, and fixed defaults.
            **dict(zip(("DASHBOARD_METRIC_PORT", "AUTOSCALER_METRIC_PORT"), map(str, free_ports(2)), strict=True)),
            "RAY_ADDRESS": "",  # an inherited one would make this node join a cluster that is not ours
            # The `python` of a job's entrypoint is looked up on the head's PATH, in no virtual environment.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        return Server(name, command, self._folder, env)

    def _alive_nodes(self, dashboard: str) -> list[str]:
        request = urllib.request.Request(
            f"{dashboard}/api/v0/nodes?filter_keys=state&filter_predicates=%3D&filter_values=ALIVE",
            headers={"Authorization": f"Bearer {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=5) as reply:
            return [node["node_id"] for node in json.load(reply)["data"]["result"]["result"]]

    def stop(self) -> None:
        """End both nodes, the raylet first, and remove Ray's folders."""
        for node in reversed(self._nodes):
            node.stop(grace_s=5)  # it would drain for 30 s
        for folder in self._temporary:
            shutil.rmtree(folder)


def http_ok(url: str) -> bool:
    """Whether a GET answers 200 within 5 s; OSError if nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except urllib.error.HTTPError:
        return False


def free_ports(count: int) -> list[int]:
    """Distinct loopback TCP ports that nothing is bound to at this moment."""
    sockets = []
    try:
        while len(sockets) < count:
            candidate = socket.socket()
            try:
                candidate.bind(("127.0.0.1", random.randrange(10000, _HIGHEST_PORT)))
            except OSError:
                candidate.close()
                continue
            sockets.append(candidate)
        return [candidate.getsockname()[1] for candidate in sockets]
    finally:
        for bound in sockets:
            bound.close()


def free_port_range(count: int) -> range:
    """``count`` consecutive free ports; Ray takes worker ports as a range."""
    while True:
        start = random.randrange(10000, _HIGHEST_PORT - count)
        if all(_is_free(port) for port in range(start, start + count)):
            return range(start, start + count)


def _beside_python(program: str) -> str:
    return str(Path(sys.executable).with_name(program))


def _is_free(port: int) -> bool:
    with socket.socket() as candidate:
        return candidate.connect_ex(("127.0.0.1", port)) != 0


def _ready(server: Server, ready: Callable[[], bool], timeout_s: float) -> Server:
    try:
        server.wait_until(ready, timeout_s)
    except BaseException:
        server.stop()
        raise
    return server


def _started(start: Callable[[], T]) -> T:
    for _ in range(_START_ATTEMPTS - 1):
        try:
            return start()
        except ServerError:
            continue
    return start()
