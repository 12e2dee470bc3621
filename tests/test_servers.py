"""The fixtures themselves: credentials are enforced, a stall stalls, a stopped server leaves nothing."""

import signal
import socket
import sys
import urllib.request
from pathlib import Path

import boto3
import botocore.exceptions
import pytest
from botocore.config import Config as BotoConfig

from tests import servers
from tests.conftest import S3


def test_s3_takes_the_credentials_from_the_environment_and_refuses_others(s3: S3):
    bucket = s3.url.removeprefix("s3://")
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key="a/b", Body=b"12345")
    assert client.get_object(Bucket=bucket, Key="a/b", Range="bytes=1-2")["Body"].read() == b"23"
    stranger = boto3.client("s3", aws_access_key_id="x", aws_secret_access_key="y")
    with pytest.raises(botocore.exceptions.ClientError, match=r"InvalidAccessKeyId|403"):
        stranger.get_object(Bucket=bucket, Key="a/b")


def test_s3_creates_no_bucket_by_itself(s3: S3):
    client = boto3.client("s3")
    with pytest.raises(client.exceptions.NoSuchBucket):
        client.put_object(Bucket="missing", Key="a", Body=b"")


def test_each_test_gets_an_empty_bucket(s3: S3):
    assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket=s3.url.removeprefix("s3://"))


def test_a_paused_s3_server_stalls_and_then_goes_on(s3: S3):
    config = BotoConfig(read_timeout=1, connect_timeout=1, retries={"max_attempts": 0})
    client = boto3.client("s3", config=config)
    s3.server.pause()
    try:
        with pytest.raises(botocore.exceptions.ReadTimeoutError):
            client.list_buckets()
    finally:
        s3.server.resume()
    assert client.list_buckets()["Buckets"]


def test_mlflow_server_serves_its_api(mlflow_server: servers.MLflowServer):
    with urllib.request.urlopen(f"{mlflow_server.uri}/version", timeout=10) as reply:
        assert reply.read().decode().startswith("3.")


def test_stop_ends_descendants_that_left_the_session_and_ignore_sigterm(tmp_path: Path):
    grandchild = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = (
        "import subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, '-c', {grandchild!r}], start_new_session=True); time.sleep(600)"
    )
    server = servers.Server("tree", [sys.executable, "-c", child], tmp_path, {})
    server.wait_until(lambda: len(server.pids()) == 2, timeout_s=30)
    server.signal(signal.SIGSTOP)  # a paused tree must end too
    server.stop(grace_s=2)
    assert server.pids() == []


def test_a_server_that_dies_says_so_with_its_last_lines(tmp_path: Path):
    command = [sys.executable, "-c", "raise SystemExit('port 80 is taken')"]
    server = servers.Server("crash", command, tmp_path, {})
    with pytest.raises(servers.ServerError, match=r"crash exited with status 1[\s\S]*port 80 is taken"):
        server.wait_until(lambda: False, timeout_s=30)


def test_free_ports_skips_a_port_in_use(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        used = taken.getsockname()[1]
        draws = iter([used, used, used + 1, used + 2, used + 3])
        monkeypatch.setattr(servers.random, "randrange", lambda *_: next(draws))
        assert used not in servers.free_ports(1)
