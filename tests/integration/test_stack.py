"""infra/stack.sh for real: what it starts works together, it is idempotent, heals, and leaves nothing behind."""

import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from infra.stack import EPHEMERAL, PORTS, Stack, StackError, _choose_ports

pytestmark = pytest.mark.integration
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A stack's folder, taken down again whatever the test did to it."""
    yield tmp_path / "stack"
    run_stack("down", tmp_path / "stack")


def run_stack(action: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """stack.sh as a user types it, from another folder."""
    return subprocess.run(
        [str(REPOSITORY / "infra/stack.sh"), action, str(folder)],
        env={**os.environ, "PYTHON": sys.executable},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )


def exported(stdout: str) -> dict[str, str]:
    """What `eval "$(infra/stack.sh up)"` would set."""
    words = [shlex.split(line) for line in stdout.splitlines()]
    assert all(word[0] == "export" and len(word) == 2 for word in words), stdout
    return dict(word[1].split("=", 1) for word in words)


def all_pids(stack: Stack) -> dict[str, list[int]]:
    return {part: stack.pids(part) for part in ("seaweedfs", "mlflow", "ray")}


USE_EVERYTHING = """
import os, pathlib, tempfile
import mlflow, ray

mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
with mlflow.start_run() as run, tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "note.txt").write_text("kept in S3")
    mlflow.log_artifact(f"{folder}/note.txt")

@ray.remote(num_cpus=1)
def key_of_the_node():
    return os.environ["AWS_ACCESS_KEY_ID"]

ray.init(runtime_env={"env_vars": {}})
assert ray.get(key_of_the_node.remote()) == os.environ["AWS_ACCESS_KEY_ID"]
print("used", run.info.run_id)
"""


@pytest.mark.heavy
def test_up_works_twice_heals_a_half_dead_stack_and_down_leaves_nothing(folder: Path):
    first = run_stack("up", folder)
    assert first.returncode == 0, first.stderr
    env = exported(first.stdout)
    stack = Stack(folder.resolve())
    pids = all_pids(stack)

    # The three are wired to each other: MLflow keeps artifacts in S3, Ray's workers hold the keys.
    used = subprocess.run(
        [sys.executable, "-c", USE_EVERYTHING], env={**os.environ, **env}, capture_output=True, text=True, timeout=200
    )
    assert used.returncode == 0, used.stderr
    client = boto3.client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        region_name=env["AWS_DEFAULT_REGION"],
    )
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="parallax")["Contents"]]
    assert [key for key in keys if key.startswith("mlflow/") and key.endswith("note.txt")]

    second = run_stack("up", folder)
    assert second.returncode == 0, second.stderr
    assert exported(second.stdout) == env
    assert all_pids(stack)["seaweedfs"] == pids["seaweedfs"]
    assert all_pids(stack)["mlflow"] == pids["mlflow"]
    assert stack.pids("ray")[0] == pids["ray"][0]

    # Half dead: Ray's head process is gone and its children hang about, MLflow hangs.
    os.kill(stack.pids("ray")[0], signal.SIGKILL)
    for pid in stack.pids("mlflow"):
        os.kill(pid, signal.SIGSTOP)
    broken = run_stack("status", folder)
    assert broken.returncode == 1
    assert "mlflow     not answering" in broken.stdout
    healed = run_stack("up", folder)
    assert healed.returncode == 0, healed.stderr
    assert exported(healed.stdout) == env
    assert stack.pids("seaweedfs") == pids["seaweedfs"]
    assert run_stack("status", folder).returncode == 0

    assert run_stack("down", folder).returncode == 0
    assert all_pids(stack) == {"seaweedfs": [], "mlflow": [], "ray": []}
    assert not stack.sockets.exists()
    for port in stack._load_state().ports.values():
        with socket.socket() as client_socket:
            assert client_socket.connect_ex(("127.0.0.1", port)) != 0, f"{port} is still open"
    assert run_stack("down", folder).returncode == 0
    assert run_stack("status", folder).returncode == 1


def test_a_service_that_cannot_start_says_why_with_its_log(folder: Path):
    folder.mkdir()

    (folder / "mlflow.db").write_text("no database")
    failed = run_stack("up", folder)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "stack.sh: mlflow exited with status" in failed.stderr
    assert "file is not a database" in failed.stderr
    assert Stack(folder.resolve()).pids("mlflow") == []


def test_a_taken_port_is_replaced_and_a_free_one_kept():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        used = taken.getsockname()[1]
        chosen = _choose_ports({"one": used, "two": 0, "three": 0})
    assert chosen["one"] in EPHEMERAL
    assert len(set(chosen.values())) == 3
    assert _choose_ports(chosen) == chosen
    assert set(_choose_ports(PORTS)) == set(PORTS)


def test_an_unreadable_state_file_is_refused(tmp_path: Path):
    (tmp_path / "stack.json").write_text("{")
    with pytest.raises(StackError, match=r"stack\.json is not readable"):
        Stack(tmp_path).up()


def test_a_second_stack_sh_on_the_same_folder_is_refused(tmp_path: Path):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = run_stack("down", tmp_path)
    assert refused.returncode == 1
    assert "another stack.sh is working on" in refused.stderr
