"""First runs that start together, are killed, or find what cannot work: one message, and the next attempt succeeds."""

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline import storage
from pipeline.registry import database
from pipeline.registry.address import RegistryError, sqlite_uri
from pipeline.registry.tracking import Tracker, connect, probe, server_errors
from pipeline.storage import DeniedError, StorageError
from tests.conftest import S3

# Forks of a process that has imported MLflow: the race for the database begins at once, not after 2 to 5 s of imports.
FIRST_RUNS = """
import os, signal, sys, time, traceback
from pathlib import Path
from pipeline.registry import database
from pipeline.registry.address import sqlite_uri
from pipeline.registry.tracking import Tracker

def fork(work):
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def first_run(path, number):
    with Tracker(sqlite_uri(path), "first", f"run-{number}") as tracker:
        tracker.log_final({"loss": 1.0})

folder = Path(sys.argv[1])
path = folder / "two" / "mlflow.db"
pids = [fork(lambda: first_run(path, number)) for number in range(2)]
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
assert sorted(os.listdir(path.parent)) == [".mlflow.db.lock", "mlflow.db"]

path, left_over = folder / "killed" / "mlflow.db", 0
path.parent.mkdir()
path.touch()  # what a process leaves that was killed between two lines of sqlite's
for wait_s in (0.1, 0.5):
    pid = fork(lambda: database.prepare(path))
    time.sleep(wait_s)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    left_over += path.with_name(".mlflow.db.new").exists()
    if path.exists() and path.stat().st_size:  # then it is whole
        database.prepare(path)
        path.unlink()
assert left_over, "none was killed half way"
first_run(path, 0)
assert not path.with_name(".mlflow.db.new").exists()
"""


def test_first_runs_at_once_succeed_and_after_killed_ones_the_next_does(tmp_path: Path) -> None:
    """MLflow's own way: of two at once one crashes in alembic, and what a killed one leaves fails for ever."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_RUNS, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/two/mlflow.db")
    assert len(client.search_runs([client.get_experiment_by_name("first").experiment_id])) == 2


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with one run."""
    path = tmp_path_factory.mktemp("used") / "mlflow.db"
    Tracker(sqlite_uri(path), "parallax", "run").finish("FINISHED")
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("DELETE FROM runs; CREATE TABLE _alembic_tmp_experiments (a INT)", "half made.*holds no run; delete it"),
        ("DELETE FROM runs; DROP TABLE webhooks", "half made.*holds no run; delete it"),
        ("CREATE TABLE _alembic_tmp_experiments (a INT)", "broken off; copy the file.*mlflow db upgrade 'sqlite:///"),
        ("DROP TABLE webhooks", "another version of MLflow.*mlflow db upgrade 'sqlite:///"),
        ("UPDATE alembic_version SET version_num = 'abc'", "out-of-date database schema.*mlflow db upgrade"),
    ],
)
def test_what_an_older_process_left_is_one_message(used: Path, tmp_path: Path, change: str, words: str) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copy(used, path)
    with sqlite3.connect(path) as connection:
        connection.executescript(change)
    before = path.read_bytes()
    for attempt in (lambda uri: connect(uri, must_exist=True), lambda uri: probe(uri, "parallax", rehearse=True)):
        with pytest.raises(RegistryError, match=words):
            attempt(sqlite_uri(path))
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_one_message_at_once(used: Path, tmp_path: Path) -> None:
    """MLflow would try ten times over 100 s."""
    (tmp_path / "text").write_text("not a database " * 1000)
    content = used.read_bytes()
    (tmp_path / "damaged").write_bytes(content[:4096] + bytes(len(content) - 4096))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # as /dev/null: it was taken for an empty file, and replaced
    for name in ("text", "damaged", "folder", "pipe"):
        with pytest.raises(RegistryError, match=f"{name} cannot be read as a sqlite database"):
            connect(sqlite_uri(tmp_path / name))
    assert (tmp_path / "pipe").is_fifo()


def test_a_database_that_another_process_holds_is_one_message(
    used: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(database, "_BUSY_S", 0.1)
    with sqlite3.connect(used) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(RegistryError, match="database is locked; another process has been writing"):
            connect(sqlite_uri(used))
        holder.rollback()
    assert "Traceback" not in capfd.readouterr().err


def test_a_stopped_process_that_holds_the_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_PATIENCE_S", 0.1)
    with database._locked(tmp_path / "mlflow.db"), pytest.raises(RegistryError, match="is it stopped"):
        connect(sqlite_uri(tmp_path / "mlflow.db"))


def test_what_goes_wrong_below_mlflow_is_one_message(used: Path, tmp_path: Path) -> None:
    """A disk that takes no artifacts, a bucket without credentials, a table that is gone under a running job."""
    uri = sqlite_uri(shutil.copy(used, tmp_path / "mlflow.db"))
    (tmp_path / "file").write_text("no folder")
    client = connect(uri)
    client.create_experiment("on a file", artifact_location=f"{tmp_path}/file/below")
    with pytest.raises(RegistryError, match=r"did not do its part: .*file"):
        Tracker(uri, "on a file", "run").log_artifact(tmp_path / "file")
    with pytest.raises(StorageError, match=r"file/below"):
        probe(uri, "on a file")
    tracker = Tracker(uri, "parallax", "run")
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("DROP TABLE metrics")
    with pytest.raises(RegistryError, match="no such table: metrics"):
        tracker.log_final({"loss": 1.0})


def test_a_disk_that_fills_while_the_database_is_made_is_one_message(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        for rehearse in (True, False):
            with pytest.raises(RegistryError, match=r"did not do its part: .*(full|I/O).*; .*(space|disk)"):
                probe(sqlite_uri(tmp_path / "mlflow.db"), "parallax", rehearse=rehearse)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "mlflow.db").exists()


def test_errors_of_our_own_pass_unchanged() -> None:
    with pytest.raises(KeyError), server_errors("http://127.0.0.1:5000"):
        raise KeyError("a mistake in this program")
    with pytest.raises(StorageError, match=r"^as it was$"), server_errors("http://127.0.0.1:5000"):
        raise StorageError("as it was")


def test_a_dry_run_finds_what_the_run_would_and_leaves_nothing(used: Path, tmp_path: Path) -> None:
    probe(sqlite_uri(tmp_path / "new/mlflow.db"), "parallax", rehearse=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(RegistryError, match=r"cannot write .*file/mlflow\.db"):
        probe(sqlite_uri(tmp_path / "file/mlflow.db"), "parallax", rehearse=True)
    uri = sqlite_uri(shutil.copy(used, tmp_path / "mlflow.db"))
    experiment = connect(uri).get_experiment_by_name("parallax")
    connect(uri).delete_experiment(experiment.experiment_id)
    with pytest.raises(RegistryError, match=f"'parallax' was deleted.*--experiment-id {experiment.experiment_id}"):
        probe(uri, "parallax", rehearse=True)


def test_a_full_disk_is_named_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.probe_writable(str(tmp_path))
    monkeypatch.setattr(storage, "MIN_FREE_BYTES", 2**60)
    with pytest.raises(StorageError, match=r"MiB left on its disk.* at least 1,099,511,627,776 MiB"):
        storage.probe_writable(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


class Damaged(BaseHTTPRequestHandler):
    """An S3 server whose objects do not have the checksum that it says they have."""

    def do_GET(self) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": "3", "x-amz-checksum-crc32": "AAAAAA==", "ETag": '"0"'}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"012" if self.command == "GET" else b"")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Not on the terminal."""


@pytest.fixture
def damaging_endpoint() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Damaged) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "NoCredentialsError.* under FSSPEC_S3_ANON=true"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "PartialCredentialsError.*set both"),
        ({"AWS_PROFILE": "nobody"}, "ProfileNotFound.*AWS_PROFILE has to name a profile"),
        ({"AWS_CONFIG_FILE": __file__}, "ConfigParseError.*what AWS_CONFIG_FILE names"),
        ({"AWS_DEFAULT_REGION": "here !"}, "InvalidRegionError.*such as us-east-1"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "EndpointConnectionError.*nothing answers there"),
        ({"AWS_ENDPOINT_URL": "127.0.0.1:9"}, "Invalid endpoint: 127.0.0.1:9; check the URL, AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "https{endpoint}"}, "SSLError.*without TLS is http://"),
        ({"AWS_ENDPOINT_URL": "https{endpoint}", "AWS_CA_BUNDLE": "/nowhere"}, "AWS_CA_BUNDLE, if set, has to name"),
        ({"AWS_ENDPOINT_URL": "{damaging}"}, "FlexibleChecksumError.*AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"),
    ],
)
def test_what_s3_lacks_is_one_message_that_says_what_to_do(
    s3: S3,
    damaging_endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    words: str,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.aws
    for key, value in environment.items():
        if value:
            endpoint = s3.server.endpoint.removeprefix("http")
            monkeypatch.setenv(key, value.format(endpoint=endpoint, damaging=damaging_endpoint))
        else:
            monkeypatch.delenv(key)
    with pytest.raises(StorageError, match=words) as caught:
        storage.read_bytes(f"{s3.url}/x")
    assert str(caught.value).startswith(f"cannot read {s3.url}/x: ")
    assert "\n" not in str(caught.value)


def test_a_bucket_that_cannot_be_named_or_signed_for_is_one_message(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"ParamValidationError.*3 to 63 lower-case letters"):
        storage.read_bytes("s3://No_Bucket!/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DeniedError, match="AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID"):
        storage.list_files(s3.url)


def test_a_public_bucket_is_read_without_credentials(s3: S3, tmp_path: Path) -> None:
    bucket = s3.url.removeprefix("s3://")
    storage.write_bytes(f"{s3.url}/x", b"0123")
    s3.server.client.put_bucket_policy(
        Bucket=bucket,
        Policy=f"""{{"Version": "2012-10-17", "Statement": [{{"Effect": "Allow", "Principal": "*",
            "Action": ["s3:GetObject", "s3:ListBucket"],
            "Resource": ["arn:aws:s3:::{bucket}", "arn:aws:s3:::{bucket}/*"]}}]}}""",
    )
    code = f"""
import urllib.request
from pipeline import storage
print(storage.read_bytes("{s3.url}/x"), storage.list_sizes("{s3.url}"), storage.sign("{s3.url}/x"))
print(urllib.request.urlopen(storage.sign("{s3.url}/x")).read())
"""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("AWS_") or key == "AWS_ENDPOINT_URL"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path), "FSSPEC_S3_ANON": "true"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == [f"b'0123' {{'x': 4}} {s3.server.endpoint}/{bucket}/x", "b'0123'"], done.stderr
