"""Fixtures that hand out real servers: S3 (SeaweedFS), MLflow, a Ray cluster of two nodes."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests import servers


@dataclass(frozen=True)
class S3:
    """An empty bucket of the session's S3 server; this process's AWS_* environment points at it."""

    url: str  # s3://<bucket>
    server: servers.S3Server


@pytest.fixture(autouse=True)
def no_registry_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the person who runs the tests has set is not where their runs are tracked. A test may set all of these, also
    by pipeline/registry/address.py, which moves a password into the last two."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so that it is taken back afterwards
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3Server]:
    server = servers.S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> S3:
    for key, value in s3_server.env.items():
        monkeypatch.setenv(key, value)
    return S3(url=s3_server.new_bucket(), server=s3_server)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.MLflowServer]:
    server = servers.MLflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory, s3_server: servers.S3Server) -> Iterator[servers.RayCluster]:
    cluster = servers.RayCluster(tmp_path_factory.mktemp("ray"), node_env=s3_server.env)
    yield cluster
    cluster.stop()
