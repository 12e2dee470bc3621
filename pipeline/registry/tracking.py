"""One MLflow run per Parallax run: found again by our run id, so a resumed run goes on where its log ended.

Everything goes through MlflowClient with explicit ids. The fluent API keeps its state in globals, and
MLFLOW_RUN_ID in the environment overrides what it was told (mlflow#15713).
"""

import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import mlflow
from alembic.util import CommandError
from botocore.exceptions import BotoCoreError, ClientError
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service.utils import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from sqlalchemy.exc import SQLAlchemyError

from pipeline import storage
from pipeline.registry import database
from pipeline.registry.address import RegistryError, normalized, sqlite_path
from pipeline.secrets import redacted, without_secret_values, without_secrets

RUN_ID_TAG = "parallax.run_id"
PARENT_TAG = "mlflow.parentRunId"  # nests a run below another in MLflow's table
_PROBE_TIMEOUT_S = 5
_FLUSH_INTERVAL_S = 10.0
_BATCH_METRICS = 1000  # MLflow's limits for one log_batch
_BATCH_PARAMS = 100
_PARAM_CHARACTERS = 6000
_DIGEST_CHARACTERS = 36

_logger = logging.getLogger(__name__)


# What MLflow raises, and lets through from its database, its artifacts' disk or bucket, and requests (an OSError).
_FAILURES = (MlflowException, SQLAlchemyError, CommandError, OSError, BotoCoreError, ClientError)


def connect(tracking_uri: str, *, must_exist: bool = False) -> MlflowClient:
    """A client of this server, which becomes the process's default. RegistryError on a URI that cannot work.

    A sqlite file that is not there yet is created, unless it ``must_exist`` because somebody wants to read.

    The default matters: ``models:/`` URIs and parts of MLflow's own SQL store resolve against it, and without
    one they would create ``./mlflow.db``. The environment stays as it is: MLflow would write the URI into it, and what
    was decided for one run would be taken for the user's wish by the next.
    """
    uri = normalized(tracking_uri)
    # MLflow retries 7 times at up to 120 s: minutes of silence when a server is down.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for chatty in ("alembic", "mlflow"):  # 60 INFO lines for each new database
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a stack trace beside what it raises
    warnings.filterwarnings("ignore", category=FutureWarning, module="mlflow")
    if path := sqlite_path(uri):
        if must_exist and not os.path.exists(path):
            raise RegistryError(
                f"tracking URI {tracking_uri}: there is no file {path}; name the one that runs were tracked in"
            )
        with server_errors(uri):
            database.prepare(path)
    with _unchanged_environment("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
    with server_errors(uri):
        return MlflowClient(uri, uri)


@contextmanager
def _unchanged_environment(*names: str) -> Iterator[None]:
    before = {name: os.environ[name] for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def probe(tracking_uri: str, experiment: str, *, rehearse: bool = False) -> None:
    """Return within 20 s if runs of this experiment can be tracked at this URI, else raise RegistryError or, where its
    artifacts cannot be stored, StorageError. To ``rehearse`` is to leave no database where there is none."""
    uri = normalized(tracking_uri)
    path = sqlite_path(uri)
    if path is None:
        _probe_server(uri)
    elif os.path.exists(path):  # a name that is too long is none
        database.check_writable(path)
    elif rehearse:
        with server_errors(uri):
            database.rehearse(path)
        return
    client = connect(uri)
    with server_errors(uri):
        client.search_registered_models(max_results=1)
        found = client.get_experiment_by_name(experiment)
    if found is not None:
        _check_active(found)
        if found.artifact_location.startswith(("/", "file:///", "s3://")):  # else the server stores what it is sent
            storage.probe_writable(found.artifact_location)


def _probe_server(tracking_uri: str) -> None:
    try:
        answer = http_request(
            get_default_host_creds(tracking_uri),
            "/api/2.0/mlflow/experiments/search",
            "POST",
            json={"max_results": 1},
            max_retries=0,
            timeout=_PROBE_TIMEOUT_S,
            raise_on_status=False,
        )
    except MlflowException as error:
        raise RegistryError(
            f"no MLflow server answers at {tracking_uri} ({_reason(error)}); start one with `mlflow server`, correct "
            "the address (tracking.uri or MLFLOW_TRACKING_URI), or leave it out to track in a local sqlite file"
        ) from error
    if answer.status_code in (401, 403):
        raise RegistryError(
            f"the MLflow server at {tracking_uri} refused the request with status {answer.status_code}; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; behind another host "
            "name than its own, the server needs --allowed-hosts"
        )
    if answer.status_code != 200:
        raise RegistryError(
            f"{tracking_uri} answers with status {answer.status_code}, so it is not a working MLflow server; "
            "tracking.uri is its root, e.g. http://127.0.0.1:5000"
        )


@contextmanager
def server_errors(tracking_uri: str) -> Iterator[None]:
    """Around calls to MLflow: what it raises becomes a RegistryError that names the server, the reason and a remedy."""
    try:
        yield
    except _FAILURES as error:
        kind = "database" if tracking_uri.startswith("sqlite:") else "server"
        advice = database.advice(error)
        raise RegistryError(
            f"the MLflow {kind} at {tracking_uri} did not do its part: {_reason(error)}{advice and f'; {advice}'}"
        ) from error


class Tracker:
    """The MLflow run of one Parallax run. As a context manager it ends the run as FINISHED, FAILED or KILLED.

    A server that goes away in between costs nothing but the delay: metrics stay in memory and are sent with the next
    batch. Only ``finish`` insists.
    """

    def __init__(self, tracking_uri: str, experiment: str, run_id: str, tags: Mapping[str, str] | None = None) -> None:
        """``tags`` are set on the run if it is new."""
        self._client = connect(tracking_uri)
        with server_errors(tracking_uri):
            self.experiment_id = _experiment_id(self._client, tracking_uri, experiment)
            run = self._find_or_create(run_id, tags or {})
        self.mlflow_run_id: str = run.info.run_id
        self._params: dict[str, str] = run.data.params
        # A metric's last logged step. Replayed steps are dropped: MLflow would keep both points.
        self._last_step: dict[str, int] = {m.key: m.step for m in run.data.to_proto().metrics}
        self._logged: dict[str, float] = run.data.metrics  # before this tracker
        self._uri = tracking_uri  # for messages
        self._buffer: list[Metric] = []
        self._next_flush = time.monotonic() + _FLUSH_INTERVAL_S

    def _find_or_create(self, run_id: str, tags: Mapping[str, str]) -> Run:
        found = self._client.search_runs(
            [self.experiment_id],
            f"tags.`{RUN_ID_TAG}` = '{run_id}'",
            max_results=1,
            order_by=["attributes.start_time ASC"],
        )
        if not found:
            tags = {**without_secret_values(tags), RUN_ID_TAG: run_id}
            return self._client.create_run(self.experiment_id, run_name=run_id, tags=tags)
        self._client.update_run(found[0].info.run_id, status="RUNNING")
        return found[0]

    def log_config(self, flat: Mapping[str, str]) -> None:
        """Log dotted keys as parameters. A parameter cannot change in MLflow: what a resumed run was given
        otherwise (its number of workers, say) becomes a tag ``changed.<key>``."""
        flat = {key: value[:_PARAM_CHARACTERS] for key, value in without_secret_values(flat).items()}
        new = [Param(key, value) for key, value in flat.items() if key not in self._params]
        changed = [RunTag(f"changed.{k}", v) for k, v in flat.items() if self._params.get(k, v) != v]
        with server_errors(self._uri):
            for start in range(0, len(new), _BATCH_PARAMS):
                self._client.log_batch(self.mlflow_run_id, params=new[start : start + _BATCH_PARAMS])
            self._client.log_batch(self.mlflow_run_id, tags=changed)
        self._params = {**flat, **self._params}

    def log_dataset(self, url: str, digest: str) -> None:
        """Link the run to its shards. ``digest`` is the manifest's."""
        url = without_secrets(url)
        dataset = Dataset(
            name=url.rstrip("/").rsplit("/", 1)[-1],
            digest=digest[:_DIGEST_CHARACTERS],
            source_type="parallax-manifest",
            source=json.dumps({"url": url, "digest": digest}),
        )
        with server_errors(self._uri):
            self._client.log_inputs(
                self.mlflow_run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
            )
            self._client.set_tag(self.mlflow_run_id, "parallax.data_digest", digest)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Buffer metrics; sent in batches, at most every 10 s. What was logged up to ``step`` before is dropped."""
        now_ms = int(time.time() * 1000)
        for key, value in metrics.items():
            if step > self._last_step.get(key, -1):
                self._buffer.append(Metric(key, float(value), now_ms, step))
                self._last_step[key] = step
        if len(self._buffer) >= _BATCH_METRICS or time.monotonic() >= self._next_flush:
            try:
                self._flush()
            except _FAILURES as error:
                _logger.warning("%s does not take metrics, %d wait: %s", self._uri, len(self._buffer), _reason(error))
            self._next_flush = time.monotonic() + _FLUSH_INTERVAL_S

    def log_final(self, metrics: Mapping[str, float]) -> None:
        """Log what the run amounts to, at its last step, at once. What an earlier tracker logged is left out, unless
        it has changed: the run was evaluated again."""
        step, now_ms = max(self._last_step.values(), default=0), int(time.time() * 1000)
        changed = {key: float(value) for key, value in metrics.items() if self._logged.get(key) != value}
        self._buffer += [Metric(key, value, now_ms, step) for key, value in changed.items()]
        with server_errors(self._uri):
            self._flush()

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a local file, below ``folder`` in the run's artifacts."""
        with server_errors(self._uri):
            self._client.log_artifact(self.mlflow_run_id, str(path), folder)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Send what waits and end the run. RegistryError if the server does not take it."""
        with server_errors(self._uri):
            self._flush()
            self._client.set_terminated(self.mlflow_run_id, status)

    def _flush(self) -> None:
        while self._buffer:
            batch = self._buffer[:_BATCH_METRICS]
            self._client.log_batch(self.mlflow_run_id, metrics=batch)
            del self._buffer[: len(batch)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish("FINISHED")
            return
        try:
            self.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        except RegistryError as unfinished:
            error.add_note(f"besides, the MLflow run stays open: {unfinished}")  # the first error is the one to read


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        # Without a server MLflow would put artifacts into ./mlruns of whoever comes first.
        path = sqlite_path(uri)
        location = (path.parent / "mlartifacts" / storage.folder_name(name)).as_uri() if path else None
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # somebody else was faster
            assert found is not None, "it exists already"
    _check_active(found)
    return found.experiment_id


def _check_active(experiment: Experiment) -> None:
    if experiment.lifecycle_stage != "active":
        raise RegistryError(
            f"the MLflow experiment {experiment.name!r} was deleted; restore it with `mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}`, or set tracking.experiment to another name"
        )


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: MLflow and urllib3 wrap it five times."""
    text = redacted(str(error))
    for marker in ("Connection refused", "Name or service not known", "timed out", "Max retries exceeded"):
        if marker in text:
            return marker.lower()
    lines = [line for line in text.splitlines() if not line.startswith("(raised as a result of")]
    return lines[0][:200] if lines else type(error).__name__
