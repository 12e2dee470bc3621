"""Ray's beginnings: what Ray says after half a minute, or deep inside, is one message before it is even imported."""

import ast
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from jobs import pretrain, sweep
from pipeline.cluster import startup
from pipeline.cluster.connection import connected
from pipeline.cluster.startup import ClusterError, check_folder, check_startup, temporary_folder
from pipeline.config import ClusterConfig
from tests.jobs.refusals import refused
from tests.servers import free_ports
from tests.strangers.digits import SMALL, few_digits

TWO = ClusterConfig(num_workers=2)
LONGEST = 39  # bytes of a temporary folder that leave Ray's sockets 107


@pytest.fixture(autouse=True)
def as_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("TMPDIR", "/tmp/" + "x" * 60, ["too long for Ray", "107 is the limit", f"at most {LONGEST} bytes"]),
        ("RAY_TMPDIR", "/tmp/" + "é" * 18, ["too long for Ray"]),  # 23 letters, 41 bytes
        ("RAY_TMPDIR", "", ["RAY_TMPDIR=''", "no absolute path", "RAY_TMPDIR=/tmp"]),
        ("RAY_TMPDIR", "~/ray", ["RAY_TMPDIR='~/ray'", "no absolute path"]),
        ("TMPDIR", "", ["TMPDIR=''", "no absolute path"]),
        ("RAY_TMPDIR", "/etc/passwd", ["sockets in /etc/passwd", "Not a directory"]),
        ("TMPDIR", "/proc", ["sockets in /proc", "RAY_TMPDIR"]),
        ("RAY_ADDRESS", "http://127.0.0.1:8265", ["no Ray answers at http://127.0.0.1:8265", "6379"]),
    ],
)
def test_where_ray_cannot_live_is_told_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: list[str]
) -> None:
    monkeypatch.setenv(variable, value)
    for attempt in (lambda: check_startup(TWO, 2), lambda: connected(TWO, {}).__enter__()):
        with pytest.raises(ClusterError) as caught:
            attempt()
        for word in words:
            assert word in str(caught.value)


def test_ray_tmpdir_wins_over_tmpdir_and_what_is_not_there_is_not_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 60)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/parallax-not-there")
    assert "/tmp/parallax-not-there/ray" in check_startup(TWO, 2)
    assert not os.path.exists("/tmp/parallax-not-there")
    assert check_folder(temporary_folder()) > 0


def test_the_last_byte_of_a_socket_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """That Ray runs in the longest folder that is allowed shows in test_secrets.py."""
    check_folder(Path("/tmp/" + "x" * (LONGEST - len("/tmp/"))))
    with pytest.raises(ClusterError, match="108 bytes"):
        check_folder(Path("/tmp/" + "x" * (LONGEST + 1 - len("/tmp/"))))


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(startup, "MIN_FREE_BYTES", 2**60)
    with pytest.raises(ClusterError, match=r"/tmp/?\S* has [\d,]+ MiB free, and Ray wants 1,099,511,627,776 MiB"):
        check_startup(TWO, 2)


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cluster = ClusterConfig(num_workers=2, gpus_per_worker=0.5)
    with pytest.raises(ClusterError, match=r"0 GPUs, which hold 0 workers of 1 CPUs and 0\.5 GPUs; 2 are wanted"):
        check_startup(cluster, 2)


@pytest.fixture(params=["nothing", "a web server", "silence"])
def no_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address without a Ray: Ray itself was still trying after 286 s where a web server answers."""
    monkeypatch.setattr(startup, "_ANSWER_S", 1)
    (port,) = free_ports(1)
    if request.param == "nothing":
        yield f"127.0.0.1:{port}"
    elif request.param == "silence":
        with socket.create_server(("127.0.0.1", port)):
            yield f"127.0.0.1:{port}"
    else:
        with HTTPServer(("127.0.0.1", port), SimpleHTTPRequestHandler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"127.0.0.1:{port}"
            server.shutdown()


@pytest.mark.timeout(60)
def test_an_address_where_no_ray_answers(no_ray: str) -> None:
    with pytest.raises(ClusterError, match=f"no Ray answers at {no_ray}: .*cluster.address as <head's ip>:6379"):
        check_startup(ClusterConfig(address=no_ray), 2)


def test_what_ray_raises_while_it_starts_becomes_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_object_spilling_config", "no JSON")  # Ray: a bare JSONDecodeError
    with (
        pytest.raises(ClusterError, match=r"Ray does not start .*: JSONDecodeError: .*/ray/session_latest/logs"),
        connected(TWO, {}),
    ):
        pass


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return few_digits(str(tmp_path_factory.mktemp("shards")))


@pytest.mark.parametrize(
    ("main", "command"),
    [
        (pretrain.main, ["configs/quickstart.yaml"]),
        (sweep.main, ["configs/sweep/digits-moco.yaml", "train.epochs=2", "sweep.seeds=2"]),
    ],
)
def test_a_dry_run_tries_what_ray_needs(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    shards: str,
    main: Callable[[], None],
    command: list[str],
) -> None:
    command = ["job", command[0], *SMALL, *command[1:], f"data.shards={shards}", f"storage.url={tmp_path}", "--dry-run"]
    monkeypatch.setattr(sys, "argv", [*command, "cluster.cpus_per_worker=0.5"])
    main()
    assert re.search(r"ray +starts one in /tmp/ray, [\d,]+ GiB free", capsys.readouterr().out)

    for variable, value, reason in [
        ("RAY_TMPDIR", "/tmp/" + "x" * 60, "too long for Ray's temporary folder"),
        ("RAY_ADDRESS", f"127.0.0.1:{free_ports(1)[0]}", "no Ray answers"),
    ]:
        monkeypatch.setenv(variable, value)
        refused(monkeypatch, main, *command)
        printed = capsys.readouterr()
        assert reason in printed.err
        assert "everything is in place" not in printed.out
        monkeypatch.delenv(variable)


def test_a_sweeps_dry_run_counts_the_workers_of_all_seeds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], shards: str
) -> None:
    seeds = 10 * (os.cpu_count() or 1)
    command = ["job", "configs/sweep/digits-moco.yaml", *SMALL, "train.epochs=2", f"data.shards={shards}"]
    refused(monkeypatch, sweep.main, *command, f"storage.url={tmp_path}", f"sweep.seeds={seeds}", "--dry-run")
    assert f"{seeds} are wanted" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["pipeline/cluster/startup.py", "jobs/pretrain.py", "jobs/sweep.py"])
def test_no_check_waits_for_the_import_of_ray(path: str) -> None:
    """Of pipeline/cluster, which alone imports Ray, startup.py is all that they import at the top."""
    imports = [node.module or "" for node in ast.parse(Path(path).read_text()).body if isinstance(node, ast.ImportFrom)]
    assert {name for name in imports if name.startswith("pipeline.cluster")} <= {"pipeline.cluster.startup"}
    assert imports
