"""One encoder, one version: tried twice, killed between two stages, or from many processes at once."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.models import Model

from pipeline.export import ExportError, check_bundle
from pipeline.registry.entry import FILES_TAG
from pipeline.registry.register import DIGEST_TAG, Registered, register_encoder
from pipeline.registry.tracking import Tracker
from tests.encoders import export_tiny, of_another_run
from tests.servers import MLflowServer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("register") / "encoder")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return request.node.name.replace("[", "-").replace("]", "")


@pytest.fixture
def tracker(mlflow_server: MLflowServer, name: str) -> Tracker:
    return Tracker(mlflow_server.uri, name, "run-1")


def register(uri: str, run: str, bundle: Path, name: str) -> Registered:
    tags = {"parallax.run_id": "run-1", "parallax.method": "simclr"}
    return register_encoder(bundle, tracking_uri=uri, mlflow_run_id=run, model_name=name, alias="champion", tags=tags)


def test_one_entry_holds_everything(mlflow_server: MLflowServer, tracker: Tracker, bundle: Path, name: str) -> None:
    entry = register(mlflow_server.uri, tracker.mlflow_run_id, bundle, name)
    client = MlflowClient(mlflow_server.uri)
    version = client.get_model_version_by_alias(name, "champion")
    assert (entry.name, entry.version, entry.alias) == (name, int(version.version), "champion")
    assert version.source == entry.model_uri
    assert version.run_id == tracker.mlflow_run_id
    tags = {"parallax.run_id": "run-1", "parallax.method": "simclr", DIGEST_TAG: check_bundle(bundle).digest}
    assert version.tags.items() >= tags.items()

    model = client.get_logged_model(entry.model_uri.removeprefix("models:/"))
    assert model.status == "READY"
    assert model.tags.items() >= tags.items()
    assert version.tags[FILES_TAG] == model.tags[FILES_TAG]
    assert model.params == {"method.temperature": "0.2", "optim.name": "lars"}
    assert {metric.key: metric.value for metric in model.metrics} == {
        "model/knn/encoder": 0.9,
        "model/knn/raw_pixels": 0.8,
        "model/knn/random_init": 0.7,
        "model/rank_me/encoder": 31.5,
    }
    outputs = client.get_run(tracker.mlflow_run_id).outputs.model_outputs
    assert [output.model_id for output in outputs] == [model.model_id]
    signature = Model.load(entry.model_uri).signature
    assert signature.inputs.inputs[0].shape == (-1, 3, 28, 28)
    assert signature.outputs.inputs[0].shape == (-1, 64)


def test_registering_again_gives_the_same_version(
    mlflow_server: MLflowServer, tracker: Tracker, bundle: Path, tmp_path: Path, name: str
) -> None:
    uri, run = mlflow_server.uri, tracker.mlflow_run_id
    first = register(uri, run, bundle, name)
    assert register(uri, run, bundle, name) == first
    other = register(uri, run, of_another_run(bundle, tmp_path / "other", "run-2"), name)
    assert other.version == first.version + 1
    client = MlflowClient(uri)
    assert len(client.search_model_versions(f"name='{name}'")) == 2
    # Of the same encoder under another name, only the version is new.
    elsewhere = register(uri, run, bundle, f"{name}-elsewhere")
    assert elsewhere.model_uri == first.model_uri


KILLED_BEFORE = [
    "log_model_artifacts",
    "finalize_logged_model",
    "log_outputs",
    "log_batch",
    "create_model_version",
    "set_registered_model_alias",
]


@pytest.mark.parametrize("call", KILLED_BEFORE)
def test_a_registration_killed_between_two_stages_is_continued(
    mlflow_server: MLflowServer, tracker: Tracker, bundle: Path, name: str, call: str
) -> None:
    code = f"""
import os, signal
from pathlib import Path
from mlflow import MlflowClient
from tests.registry.test_register import register
setattr(MlflowClient, {call!r}, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
register({mlflow_server.uri!r}, {tracker.mlflow_run_id!r}, Path({str(bundle)!r}), {name!r})
"""
    killed = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    entry = register(mlflow_server.uri, tracker.mlflow_run_id, bundle, name)
    client = MlflowClient(mlflow_server.uri)
    (version,) = client.search_model_versions(f"name='{name}'")
    (model,) = client.search_logged_models([tracker.experiment_id])
    assert (entry.version, version.source, model.status) == (1, model.model_uri, "READY")
    assert client.get_model_version_by_alias(name, "champion").version == version.version
    assert len(client.get_run(tracker.mlflow_run_id).outputs.model_outputs) == 1
    for key in ("model/knn/encoder", "model/rank_me/encoder"):
        assert len(client.get_metric_history(tracker.mlflow_run_id, key)) == 1


def test_concurrent_registrations_of_many_encoders_get_a_version_each(
    mlflow_server: MLflowServer, tracker: Tracker, bundle: Path, tmp_path: Path, name: str
) -> None:
    bundles = [of_another_run(bundle, tmp_path / str(i), f"run-{i}") for i in range(8)]
    entries = together(mlflow_server.uri, tracker.mlflow_run_id, bundles, name)
    assert sorted(entry.version for entry in entries) == list(range(1, 9))
    assert len({entry.model_uri for entry in entries}) == 8


def test_concurrent_registrations_of_one_encoder_get_one_version(
    mlflow_server: MLflowServer, tracker: Tracker, bundle: Path, name: str
) -> None:
    entries = together(mlflow_server.uri, tracker.mlflow_run_id, [bundle] * 8, name)
    assert len(set(entries)) == 1
    client = MlflowClient(mlflow_server.uri)
    (version,) = client.search_model_versions(f"name='{name}'")
    assert client.get_logged_model(version.source.removeprefix("models:/")).status == "READY"


def together(uri: str, run: str, bundles: list[Path], name: str) -> list[Registered]:
    barrier = threading.Barrier(len(bundles))

    def at_once(bundle: Path) -> Registered:
        barrier.wait()
        return register(uri, run, bundle, name)

    with ThreadPoolExecutor(len(bundles)) as pool:
        return list(pool.map(at_once, bundles))


def test_a_damaged_bundle_never_reaches_the_registry(
    mlflow_server: MLflowServer, tracker: Tracker, bundle: Path, tmp_path: Path, name: str
) -> None:
    copy = of_another_run(bundle, tmp_path / "copy", "run-1")
    os.truncate(copy / "model.pt2", 1000)
    with pytest.raises(ExportError, match=r"model\.pt2 is damaged"):
        register(mlflow_server.uri, tracker.mlflow_run_id, copy, name)
    assert MlflowClient(mlflow_server.uri).search_registered_models(f"name='{name}'") == []


def test_sqlite_alone_is_enough_and_leaves_the_working_directory_alone(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    uri = f"sqlite:///{tmp_path}/tracking/mlflow.db"
    with Tracker(uri, "sqlite", "run-1") as tracker:
        first = register(uri, tracker.mlflow_run_id, bundle, "tiny")
        assert register(uri, tracker.mlflow_run_id, bundle, "tiny") == first
    assert list((tmp_path / "cwd").iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "tracking").iterdir()) == [
        ".mlflow.db.lock", "mlartifacts", "mlflow.db",
    ]  # fmt: skip
