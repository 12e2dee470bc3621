"""An exported encoder becomes one version in the MLflow registry, however often and from wherever it is tried.

One LoggedModel holds everything: ``data/model.pt2`` behind MLflow's pytorch and pyfunc flavours, and
``extra_files/{config.json, model.safetensors, golden.npz, card.json, README.md}``; entry.py ties them to the registry.
Four stages follow each other (create, upload, version, alias); each first looks for what an earlier attempt left
behind, so a process that was killed between two of them is continued by the next call.
"""

import logging
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from mlflow import MlflowClient, pyfunc
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from mlflow.utils.environment import _PythonEnv

from pipeline.export import BundleManifest, check_bundle, read_golden, read_preprocessing
from pipeline.provenance import git_sha
from pipeline.registry.address import RegistryError
from pipeline.registry.entry import ARCHIVE, EXTRA_FILES, FILES_TAG, fetch, seal
from pipeline.registry.tracking import connect, server_errors
from pipeline.runs import Registration, Run

DIGEST_TAG = "parallax.export_digest"  # which encoder it is; entry.FILES_TAG says which files it came as

_logger = logging.getLogger(__name__)


class Registered(NamedTuple):
    """Where an encoder stands in the registry."""

    name: str
    version: int
    alias: str
    model_uri: str  # models:/m-..., the LoggedModel; never changes what it points at


def register_encoder(
    bundle: Path, *, tracking_uri: str, mlflow_run_id: str, model_name: str, alias: str, tags: Mapping[str, str]
) -> Registered:
    """Register the files of ``export_encoder`` as a version of ``model_name`` and let ``alias`` point at it.

    The same encoder again, or at the same time, gives the same version. Raises ExportError if the
    bundle is damaged, RegistryError if the server does not answer.
    """
    manifest = check_bundle(bundle)
    client = connect(tracking_uri)
    tags = {**tags, DIGEST_TAG: manifest.digest}
    with server_errors(tracking_uri):
        version = _find_version(client, model_name, manifest.digest)
        if version is None:
            model = _find_or_create_model(client, mlflow_run_id, manifest, tags)
            if model.status != LoggedModelStatus.READY:
                model = _upload(client, model, bundle)
            _link_to_run(client, model, mlflow_run_id, manifest)
            tags[FILES_TAG] = model.tags[FILES_TAG]
            version = _create_version(client, model_name, model, mlflow_run_id, tags)
        _point_alias(client, model_name, alias, version)
    return Registered(model_name, int(version.version), alias, version.source)


def register_run(run: Run, mlflow_run_id: str, tags: Mapping[str, str]) -> Registration:
    """Register the encoder of an evaluated run where its config says, and mark the run as complete."""
    config = run.config
    with run.local_encoder() as bundle:
        entry = register_encoder(
            bundle,
            tracking_uri=config.tracking_uri,
            mlflow_run_id=mlflow_run_id,
            model_name=config.registry.model_name,
            alias=config.registry.alias,
            tags={
                "parallax.run_id": run.id,
                "parallax.data_digest": run.data_digest,
                "parallax.git_sha": git_sha(),
                "parallax.method": config.method.name,
                **tags,
            },
        )
    registration = Registration(
        tracking_uri=config.tracking_uri,
        mlflow_run_id=mlflow_run_id,
        name=entry.name,
        version=str(entry.version),
        alias=entry.alias,
        model_uri=entry.model_uri,
    )
    return run.save_registration(registration)


def registered(run: Run) -> Registration | None:
    """The run's mark, if the registry still has this version: it may be deleted, and its number be given anew."""
    entry = run.registration()
    if entry is None:
        return None
    client = connect(run.config.tracking_uri)
    with server_errors(run.config.tracking_uri):
        try:
            version = client.get_model_version(entry.name, entry.version)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
    return entry if version.source == entry.model_uri and FILES_TAG in version.tags else None


def _find_version(client: MlflowClient, name: str, digest: str) -> ModelVersion | None:
    """The first version of this encoder that can be pulled, which is the one that counts."""
    found = client.search_model_versions(f"name = '{name}' and tag.`{DIGEST_TAG}` = '{digest}'")
    sealed = [version for version in found if FILES_TAG in version.tags]
    return min(sealed, key=lambda version: int(version.version), default=None)


def _find_or_create_model(
    client: MlflowClient, mlflow_run_id: str, manifest: BundleManifest, tags: Mapping[str, str]
) -> LoggedModel:
    experiment_id = client.get_run(mlflow_run_id).info.experiment_id

    def oldest() -> LoggedModel | None:
        # A filter on the status finds nothing in mlflow 3.17; an unfinished model is finished, not replaced.
        found = client.search_logged_models([experiment_id], f"tags.`{DIGEST_TAG}` = '{manifest.digest}'")
        by_age = sorted(found, key=lambda model: (model.creation_timestamp, model.model_id))
        return next((model for model in by_age if _is_usable(model)), None)

    if (model := oldest()) is not None:
        return model
    created = client.create_logged_model(
        experiment_id,
        name="encoder",
        source_run_id=mlflow_run_id,
        tags=dict(tags),
        params=manifest.card.hyperparameters,
        model_type="encoder",
    )
    # Another process may have been faster. Ours stays, empty: a third may have taken it for the oldest meanwhile.
    return oldest() or created


def _is_usable(model: LoggedModel) -> bool:
    """Whether it is unfinished, or holds what was uploaded: a new version of changed files could never be pulled."""
    if model.status != LoggedModelStatus.READY:
        return True
    try:
        with TemporaryDirectory(prefix="parallax-register-") as folder:
            fetch(model.model_uri, model.tags.get(FILES_TAG, ""), Path(folder))
    except RegistryError as error:
        _logger.warning("%s is passed over, the encoder is uploaded again: %s", model.model_uri, error)
        return False
    return True


def _upload(client: MlflowClient, model: LoggedModel, bundle: Path) -> LoggedModel:
    with TemporaryDirectory(prefix="parallax-register-") as folder:
        _lay_out(bundle, Path(folder), model)
        digest = seal(Path(folder))
        client.log_model_artifacts(model.model_id, folder)
    client.set_logged_model_tags(model.model_id, {FILES_TAG: digest})
    return client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _lay_out(bundle: Path, folder: Path, model: LoggedModel) -> None:
    """The folder that MLflow's pytorch flavour would have saved, around the model.pt2 that was verified.

    The same bytes from the same bundle each time: several processes may upload one model at once.
    """
    (folder / "data").mkdir()
    (folder / "extra_files").mkdir()
    shutil.copy(bundle / ARCHIVE, folder / "data")
    for name in EXTRA_FILES:
        shutil.copy(bundle / name, folder / "extra_files")

    feature_dim = read_golden(bundle / "golden.npz")[1].shape[1]
    size = read_preprocessing(bundle).image_size
    requirements = [f"torch=={torch.__version__.split('+')[0]}", "mlflow>=3.17,<4", "numpy>=2"]
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n")
    _PythonEnv(build_dependencies=[], dependencies=["-r requirements.txt"]).to_yaml(folder / "python_env.yaml")

    description = Model(
        model_id=model.model_id,
        model_uuid=model.model_id.removeprefix("m-"),
        run_id=model.source_run_id,
        utc_time_created=datetime.fromtimestamp(model.creation_timestamp / 1000, UTC).replace(tzinfo=None),
        signature=ModelSignature(  # unnamed tensors: MLflow then feeds numpy arrays straight into model.pt2
            inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 3, size, size))]),
            outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, feature_dim))]),
        ),
    )
    description.add_flavor(
        "pytorch",
        model_data="data",
        pytorch_version=str(torch.__version__),
        code=None,
        extra_files=[{"path": f"extra_files/{name}"} for name in EXTRA_FILES],
    )
    pyfunc.add_to_model(
        description,
        loader_module="mlflow.pytorch",
        data="data",
        python_env="python_env.yaml",
        model_config={"device": None},
    )
    description.save(folder / "MLmodel")


def _link_to_run(client: MlflowClient, model: LoggedModel, mlflow_run_id: str, manifest: BundleManifest) -> None:
    """The run names the model as its output; the model carries the card's metrics."""

    def is_output() -> bool:
        outputs = client.get_run(mlflow_run_id).outputs
        return outputs is not None and model.model_id in {output.model_id for output in outputs.model_outputs}

    if not is_output():
        try:
            client.log_outputs(mlflow_run_id, [LoggedModelOutput(model.model_id, step=0)])
        except MlflowException:  # a unique key of the server's database; it has no error code of its own
            if not is_output():  # else another process was faster
                raise
    linked = {metric.key for metric in client.get_logged_model(model.model_id).metrics or []}
    rows = {
        f"model/{score.metric}/{representation}": value
        for score in manifest.card.metrics
        for representation in ("encoder", "raw_pixels", "random_init")
        if (value := getattr(score, representation)) is not None
    }
    points = [
        Metric(key, value, model.creation_timestamp, 0, model_id=model.model_id, run_id=mlflow_run_id)
        for key, value in rows.items()
        if key not in linked
    ]
    if points:
        client.log_batch(mlflow_run_id, metrics=points)


def _create_version(
    client: MlflowClient, name: str, model: LoggedModel, mlflow_run_id: str, tags: Mapping[str, str]
) -> ModelVersion:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    mine = client.create_model_version(
        name, model.model_uri, run_id=mlflow_run_id, tags=dict(tags), model_id=model.model_id
    )
    # The server numbers versions one after the other, so of two that race exactly one finds no lower one.
    first = _find_version(client, name, tags[DIGEST_TAG])
    if first is not None and int(first.version) < int(mine.version):
        client.delete_model_version(name, mine.version)
        return first
    return mine


def _point_alias(client: MlflowClient, name: str, alias: str, version: ModelVersion) -> None:
    """The last caller wins; a first alias that two processes insert together fails one of them with a unique key."""
    try:
        client.set_registered_model_alias(name, alias, str(version.version))
    except MlflowException as error:
        if error.error_code != "BAD_REQUEST" or alias not in client.get_registered_model(name).aliases:
            raise
        client.set_registered_model_alias(name, alias, str(version.version))  # the row is there now: an update
