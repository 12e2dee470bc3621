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
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service.utils import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from pipeline.errors import UserError
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


class RegistryError(UserError):
    """The tracking server or the registry cannot do what was asked; the message says what would work."""


def connect(tracking_uri: str, *, must_exist: bool = False) -> MlflowClient:
    """A client of this server, which becomes the process's default. RegistryError on a URI that cannot work.

    A sqlite file that is not there yet is created, unless it ``must_exist`` because somebody wants to read.

    The default matters: ``models:/`` URIs and parts of MLflow's own SQL store resolve against it, and without
    one they would create ``./mlflow.db``.
    """
    uri = _normalized(tracking_uri)
    # MLflow retries 7 times at up to 120 s: minutes of silence when a server is down.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for chatty in ("alembic", "mlflow"):  # 60 INFO lines for each new database
        logging.getLogger(chatty).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="mlflow")
    if path := _sqlite_path(uri):
        if must_exist and not path.exists():
            raise RegistryError(
                f"tracking URI {tracking_uri}: there is no file {path}; name the one that runs were tracked in"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return MlflowClient(uri, uri)


def probe(tracking_uri: str) -> None:
    """Return within 10 s if runs can be tracked at this URI, else raise RegistryError."""
    uri = _normalized(tracking_uri)
    if path := _sqlite_path(uri):
        folder = next(p for p in path.parents if p.exists())
        if not (os.access(folder, os.W_OK) and folder.is_dir()) or (path.exists() and not os.access(path, os.W_OK)):
            raise RegistryError(f"tracking.uri={tracking_uri}: cannot write {path}; name a file in a folder of yours")
        return
    try:
        answer = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/search",
            "POST",
            json={"max_results": 1},
            max_retries=0,
            timeout=_PROBE_TIMEOUT_S,
            raise_on_status=False,
        )
    except MlflowException as error:
        raise RegistryError(
            f"no MLflow server answers at tracking.uri={tracking_uri} ({_reason(error)}); start one with "
            "`mlflow server`, correct the address, or leave tracking.uri empty to track in a local sqlite file"
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
    """Around calls to MLflow: what it raises becomes a RegistryError that names the server and the reason."""
    try:
        yield
    except MlflowException as error:
        raise RegistryError(f"the MLflow server at {tracking_uri} did not do its part: {_reason(error)}") from error


class Tracker:
    """The MLflow run of one Parallax run. As a context manager it ends the run as FINISHED, FAILED or KILLED.

    A server that goes away in between costs nothing but the delay: metrics stay in memory and are sent with the next
    batch. Only ``finish`` insists.
    """

    def __init__(self, tracking_uri: str, experiment: str, run_id: str, tags: Mapping[str, str] | None = None) -> None:
        """``tags`` are set on the run if it is new."""
        self._client = connect(tracking_uri)
        with server_errors(tracking_uri):
            self.experiment_id = _experiment_id(self._client, _normalized(tracking_uri), experiment)
            run = self._find_or_create(run_id, tags or {})
        self.mlflow_run_id: str = run.info.run_id
        self._params: dict[str, str] = run.data.params
        # A metric's last logged step. Replayed steps are dropped: MLflow would keep both points.
        self._last_step: dict[str, int] = {m.key: m.step for m in run.data.to_proto().metrics}
        self._logged: dict[str, float] = run.data.metrics  # before this tracker
        self._uri = redacted(tracking_uri)  # for messages
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
            except MlflowException as error:
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
        path = _sqlite_path(uri)
        location = (path.parent / "mlartifacts" / name).as_uri() if path else None
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # somebody else was faster
    if found is None or found.lifecycle_stage != "active":
        raise RegistryError(
            f"the MLflow experiment {name!r} was deleted; restore it with `mlflow experiments restore`, "
            "or set tracking.experiment to another name"
        )
    return found.experiment_id


def _normalized(tracking_uri: str) -> str:
    if tracking_uri.startswith(("http://", "https://")):
        return tracking_uri.rstrip("/")
    if tracking_uri.startswith("sqlite:///") and tracking_uri != "sqlite:///":
        return f"sqlite:///{Path(tracking_uri.removeprefix('sqlite:///')).absolute()}"
    raise RegistryError(
        f"tracking.uri={tracking_uri!r} is neither a server nor a sqlite file; "
        "e.g. http://127.0.0.1:5000 or sqlite:////home/me/mlflow.db"
    )


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: MLflow and urllib3 wrap it five times."""
    text = redacted(str(error))
    for marker in ("Connection refused", "Name or service not known", "timed out", "Max retries exceeded"):
        if marker in text:
            return marker.lower()
    return text.splitlines()[0][:200] if text else type(error).__name__
