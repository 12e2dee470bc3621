"""The part of stack.sh that starts, checks and ends the three services.

Nothing is remembered about processes: each carries ``PARALLAX_STACK=<folder>:<part>`` in its environment, which
its descendants inherit and /proc shows, so a stack whose starter was killed, or half of which died, is found
again. Ports and keys are chosen once and kept in ``stack.json``.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "PARALLAX_STACK"
BUCKET = "parallax"
PATIENCE_S = 15.0  # for a process that lives but does not answer; a machine under load takes seconds
# Every address in 127.0.0.0/8 is this machine; Ray would replace 127.0.0.1 by the address of a network card.
RAY_IP = "127.0.0.2"
# The usual port of each service, taken where it is free; 0: any.
PORTS = {
    "s3": 8333,
    "s3-grpc": 0,
    "master": 0,
    "master-grpc": 0,
    "volume": 0,
    "volume-grpc": 0,
    "filer": 0,
    "filer-grpc": 0,
    "mlflow": 5000,
    "ray-gcs": 6379,
    "ray-dashboard": 8265,
    "ray-client": 0,
    "ray-node-manager": 0,
    "ray-object-manager": 0,
    "ray-runtime-env-agent": 0,
    "ray-agent": 0,
    "ray-agent-grpc": 0,
    "ray-metrics": 0,
    "ray-dashboard-metrics": 0,
    "ray-autoscaler-metrics": 0,
}
EPHEMERAL = range(20000, 32000)  # where "any" is looked for: below the range outgoing connections draw from


class StackError(Exception):
    """What went wrong and what to do about it."""


@dataclass(frozen=True)
class State:
    """What is chosen at the first ``up`` and kept, so that addresses and keys stay valid."""

    ports: dict[str, int]
    access_key: str
    secret_key: str
    ray_token: str


@dataclass(frozen=True)
class Part:
    """One service: how to start it and how to tell that it works."""

    name: str
    url: str
    command: list[str]
    env: dict[str, str]
    ready: Callable[[], bool]  # False or an OSError: not (yet)
    start_timeout_s: float


class Stack:
    """The three services of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        name = hashlib.sha256(str(folder).encode()).hexdigest()[:10]
        # Unix sockets allow 107 characters of path, and Ray's lie 70 below its folder: this one is short. It
        # exists only while the stack is up.
        self.sockets = Path(tempfile.gettempdir()) / f"parallax-{os.getuid()}-{name}"
        self.state_file = folder / "stack.json"
        self.token_file = folder / "ray_auth_token"

    def up(self) -> None:
        """Start what is not running or not answering, in order of dependence."""
        state = self._load_or_choose_state()
        self._make_socket_folder()
        for part in self._parts(state):
            if self.pids(part.name) and _within(part.ready, PATIENCE_S):
                _say(f"{part.name:10s} runs already at {part.url}")
                continue
            self._end(part.name)  # what is left of a part that answers no more
            self._start(part)
            if part.name == "seaweedfs":
                _create_bucket(state)
        sys.stdout.write(self._exports(state))
        _say(
            '\nTo use it in this shell:  eval "$(infra/stack.sh up)"\n'
            "Then for example:         python -m jobs.pretrain configs/quickstart.yaml "
            f"storage.url=s3://{BUCKET}/demo tracking.uri=$MLFLOW_TRACKING_URI"
        )

    def status(self) -> bool:
        """Print one line per part; True if all of them work."""
        if not self.state_file.exists():
            print(f"no stack in {self.folder}; start one with: infra/stack.sh up")
            return False
        healthy = True
        for part in self._parts(self._load_state()):
            pids = self.pids(part.name)
            works = bool(pids) and _within(part.ready, PATIENCE_S)
            healthy &= works
            word = "up" if works else "not answering" if pids else "down"
            print(f"{part.name:10s} {word:14s} {part.url:28s} {len(pids):3d} processes  {self._log(part.name)}")
        return healthy

    def down(self) -> None:
        """End every process; data, logs, ports and keys stay in the folder for the next ``up``."""
        for name in ("ray", "mlflow", "seaweedfs"):
            self._end(name)
        if self.sockets.exists():
            shutil.rmtree(self.sockets)
        _say(f"the stack is down; its data stays in {self.folder}")

    def pids(self, part: str) -> list[int]:
        """The live processes of a part, oldest first."""
        mark = f"{MARK}={self.folder}:{part}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    # Field 22 of stat, counted behind the command's closing bracket: the start time in ticks.
                    started = int((entry / "stat").read_text().rpartition(")")[2].split()[19])
                    found.append((started, int(entry.name)))
            except OSError:
                continue  # ended while we looked, or another user's
        return [pid for _, pid in sorted(found)]

    def _parts(self, state: State) -> list[Part]:
        aws = {
            "AWS_ACCESS_KEY_ID": state.access_key,
            "AWS_SECRET_ACCESS_KEY": state.secret_key,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{state.ports['s3']}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        return [self._seaweedfs(state), self._mlflow(state, aws), self._ray(state, aws)]

    def _seaweedfs(self, state: State) -> Part:
        ports = state.ports
        identities = self.folder / "s3-identities.json"
        data = self.folder / "s3"
        command = [
            *(_program("weed"), "-logtostderr", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *("-s3", f"-s3.config={identities}", "-master.telemetry=false", "-s3.autoCreateBucket=false"),
            *(f"-{name}.port={ports[name]}" for name in ("s3", "master", "volume", "filer")),
            *(f"-{name}.port.grpc={ports[f'{name}-grpc']}" for name in ("s3", "master", "volume", "filer")),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.preStopSeconds=0", "-volume.max=0"),
            *("-master.volumeSizeLimitMB=1024", "-master.volumePreallocate=false"),
            *(f"-s3.localSocket={self.sockets}/s3", f"-filer.localSocket={self.sockets}/filer"),
        ]
        return Part("seaweedfs", _s3_url(state), command, {}, lambda: _s3_works(state), start_timeout_s=60)

    def _mlflow(self, state: State, aws: dict[str, str]) -> Part:
        url = f"http://127.0.0.1:{state.ports['mlflow']}"
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(state.ports["mlflow"])),
            *("--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"),
            *("--artifacts-destination", f"s3://{BUCKET}/mlflow", "--serve-artifacts"),
        ]
        # MLflow's job execution would add 8 processes and 1.2 GB.
        env = {**aws, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        return Part("mlflow", url, command, env, lambda: _http(f"{url}/health") == 200, start_timeout_s=120)

    def _ray(self, state: State, aws: dict[str, str]) -> Part:
        ports = state.ports
        dashboard = f"http://127.0.0.1:{ports['ray-dashboard']}"
        flags = {
            "port": "ray-gcs",
            "dashboard-port": "ray-dashboard",
            "ray-client-server-port": "ray-client",
            "node-manager-port": "ray-node-manager",
            "object-manager-port": "ray-object-manager",
            "runtime-env-agent-port": "ray-runtime-env-agent",
            "dashboard-agent-listen-port": "ray-agent",
            "dashboard-agent-grpc-port": "ray-agent-grpc",
            "metrics-export-port": "ray-metrics",
        }
        command = [
            *(_program("ray"), "start", "--head", "--block", "--disable-usage-stats", "--log-color=false"),
            *(f"--node-ip-address={RAY_IP}", "--dashboard-host=127.0.0.1", f"--temp-dir={self.sockets}/ray"),
            *(f"--{flag}={ports[port]}" for flag, port in flags.items()),
        ]
        # The credentials are the nodes' own environment: what Ray starts inherits them, the jobs API never sees them.
        env = {
            **aws,
            **self._ray_auth(),
            "RAY_ADDRESS": "",  # an inherited one would join another cluster
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # for `python` in entrypoints
            "DASHBOARD_METRIC_PORT": str(ports["ray-dashboard-metrics"]),
            "AUTOSCALER_METRIC_PORT": str(ports["ray-autoscaler-metrics"]),
        }

        def ready() -> bool:
            return _http(f"{dashboard}/api/v0/nodes?limit=1", token=state.ray_token) == 200

        return Part("ray", dashboard, command, env, ready, start_timeout_s=120)

    def _ray_auth(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}

    def _exports(self, state: State) -> str:
        env = {
            "AWS_ACCESS_KEY_ID": state.access_key,
            "AWS_SECRET_ACCESS_KEY": state.secret_key,
            "AWS_ENDPOINT_URL": _s3_url(state),
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{state.ports['mlflow']}",
            "RAY_ADDRESS": f"{RAY_IP}:{state.ports['ray-gcs']}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{state.ports['ray-dashboard']}",
            **self._ray_auth(),
        }
        return "".join(f"export {key}={shlex.quote(value)}\n" for key, value in env.items())

    def _start(self, part: Part) -> None:
        log = self._log(part.name)
        _say(f"{part.name:10s} starting ...")
        with log.open("wb") as output:
            process = subprocess.Popen(
                part.command,
                cwd=self.folder,
                env={**os.environ, **part.env, MARK: f"{self.folder}:{part.name}"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + part.start_timeout_s
        while not _within(part.ready, timeout_s=0):
            code = process.poll()
            if code is None and time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            self._end(part.name)
            what = f"exited with status {code}" if code is not None else f"not ready after {part.start_timeout_s:g} s"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise StackError(
                f"{part.name} {what}. Its log, {log}, ends:\n{tail}\n"
                "If another program took one of its ports: infra/stack.sh down, then up, chooses free ones."
            )
        _say(f"{part.name:10s} is up at {part.url}")

    def _end(self, name: str, grace_s: float = 30) -> None:
        """SIGTERM to the oldest process, which started the others; after ``grace_s`` SIGKILL to what is left.

        SeaweedFS takes 15 s to end in order.
        """
        pids = self.pids(name)
        if not pids:
            return
        _say(f"{name:10s} ending {len(pids)} processes ...")
        _kill(pids, signal.SIGCONT)  # a stopped process cannot act on SIGTERM
        _kill(pids[:1], signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while (pids := self.pids(name)) and time.monotonic() < deadline:
            time.sleep(0.1)
        deadline = time.monotonic() + 10
        while pids := self.pids(name):
            if time.monotonic() > deadline:
                raise StackError(f"{name}: the processes {pids} survive SIGKILL; they wait for a disk or the kernel")
            _kill(pids, signal.SIGKILL)
            time.sleep(0.1)

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _load_state(self) -> State:
        try:
            return State(**json.loads(self.state_file.read_text()))
        except (ValueError, TypeError) as error:
            raise StackError(
                f"{self.state_file} is not readable ({error}); infra/stack.sh down, delete that file, then up"
            ) from error

    def _load_or_choose_state(self) -> State:
        """The folder's state; while nothing of it runs, ports that others took meanwhile are replaced."""
        (self.folder / "s3").mkdir(parents=True, exist_ok=True)
        old = self._load_state() if self.state_file.exists() else None
        running = any(self.pids(name) for name in ("seaweedfs", "mlflow", "ray"))
        if old is not None and running:
            return old
        state = State(
            ports=_choose_ports(old.ports if old else PORTS),
            access_key=old.access_key if old else secrets.token_hex(8),
            secret_key=old.secret_key if old else secrets.token_hex(16),
            ray_token=old.ray_token if old else secrets.token_hex(32),
        )
        identity = {
            "name": "stack",
            "credentials": [{"accessKey": state.access_key, "secretKey": state.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        _write_private(self.folder / "s3-identities.json", json.dumps({"identities": [identity]}))
        _write_private(self.token_file, state.ray_token)
        _write_private(self.state_file, json.dumps(state.__dict__, indent=2))
        return state

    def _make_socket_folder(self) -> None:
        self.sockets.mkdir(mode=0o700, exist_ok=True)
        if self.sockets.stat().st_uid != os.getuid():
            raise StackError(f"{self.sockets} belongs to another user; remove it or set TMPDIR to a folder of yours")


def _choose_ports(wanted: dict[str, int]) -> dict[str, int]:
    """Each wanted port if it is free, else any free one; all distinct."""
    chosen: dict[str, int] = {}
    for name, port in wanted.items():
        while port == 0 or port in chosen.values() or not _is_free(port):
            port = EPHEMERAL.start + secrets.randbelow(len(EPHEMERAL))
        chosen[name] = port
    return chosen


def _is_free(port: int) -> bool:
    """Whether nothing is bound to the port on any address (Ray binds them all)."""
    with socket.socket() as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do: TIME_WAIT is no obstacle
        try:
            candidate.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def _program(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise StackError(f"{path} is missing: run pip install -e '.[stack]' in this environment, or set PYTHON")
    return str(path)


def _s3_url(state: State) -> str:
    return f"http://127.0.0.1:{state.ports['s3']}"


def _s3_client(state: State) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=_s3_url(state),
        region_name="us-east-1",
        aws_access_key_id=state.access_key,
        aws_secret_access_key=state.secret_key,
        config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=5),
    )


def _s3_works(state: State) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        _s3_client(state).list_buckets()
    except (BotoCoreError, ClientError):
        return False
    return True


def _create_bucket(state: State) -> None:
    """The bucket, and the proof that it takes writes: the gateway answers before a volume can be written."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = _s3_client(state)
    deadline = time.monotonic() + 60
    while True:
        try:
            if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key=".ready", Body=b"ready")
            client.delete_object(Bucket=BUCKET, Key=".ready")
            return
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline:
                raise StackError(
                    f"seaweedfs answers but takes no writes after 60 s ({error}); it keeps 1 % of the disk free: "
                    "is the disk full?"
                ) from error
            time.sleep(0.2)


def _http(url: str, token: str = "") -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def _within(ready: Callable[[], bool], timeout_s: float) -> bool:
    """Whether ``ready`` holds now or, polled, before the time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if ready():
                return True
        except OSError:
            pass  # refused or reset: nobody is listening (yet)
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)


def _kill(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _write_private(path: Path, text: str) -> None:
    """Whole or not at all, and readable by its owner only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.touch(mode=0o600)
    temporary.write_text(text)
    temporary.replace(path)


def _say(text: str) -> None:
    """Progress goes to stderr: stdout of ``up`` is for eval."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StackError(f"another stack.sh is working on {folder}; wait for it to end") from error
        yield


def main() -> None:
    """Parse, check the platform and the packages, act."""
    parser = argparse.ArgumentParser(prog="infra/stack.sh", description="SeaweedFS, MLflow and a Ray head on loopback")
    parser.add_argument("action", choices=["up", "status", "down"])
    parser.add_argument("folder", nargs="?", default=".parallax/stack", type=Path)
    arguments = parser.parse_args()
    stack = Stack(arguments.folder.resolve())
    try:
        if not Path("/proc/self/environ").exists():
            raise StackError("stack.sh finds its processes through /proc, which only Linux has")
        missing = [name for name in ("boto3", "mlflow", "ray") if importlib.util.find_spec(name) is None]
        if missing:
            raise StackError(
                f"{sys.executable} has no {', '.join(missing)}: run pip install -e '.[stack]', or set PYTHON"
            )
        if arguments.action == "status":
            sys.exit(0 if stack.status() else 1)
        with _locked(stack.folder):
            stack.up() if arguments.action == "up" else stack.down()
    except StackError as error:
        sys.exit(f"stack.sh: {error}")


if __name__ == "__main__":
    main()
