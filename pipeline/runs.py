"""The folder of one run: ``<storage.url>/runs/<run id>/``, and which of its stages are complete.

::

    config.yaml        the resolved config
    checkpoints/       see checkpoint.py; beside them the scores by epoch (selection.json), and what did not go well
                       (quarantine.json, non-finite-*.json)
    encoder/           model.pt2, model.safetensors, config.json, golden.npz, README.md
    report.json        the evaluation and the training images that could not be decoded; written after encoder/,
                       so it marks that stage as complete
    registered.json    the registry entry; written last
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import storage
from pipeline.checkpoint import CheckpointStore
from pipeline.config import Config, dump
from pipeline.data.assemble import BadSample
from pipeline.errors import UserError, first_problem
from pipeline.evaluate.config import EvaluateConfig
from pipeline.evaluate.report import EvaluationReport
from pipeline.export import check_bundle


class RunReport(BaseModel):
    """What ``report.json`` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: EvaluateConfig  # of the evaluation
    report: EvaluationReport
    quarantine: tuple[BadSample, ...] = ()  # of all ranks, by id
    run_id: str = ""  # "": written by a version that did not say


class Registration(BaseModel):
    """Where the run's encoder stands in the registry."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tracking_uri: str
    mlflow_run_id: str
    name: str
    version: str
    alias: str
    model_uri: str
    run_id: str = ""  # as in RunReport; ``Run.save_registration`` sets it


_Mark = TypeVar("_Mark", RunReport, Registration)


class Run:
    """One run's folder."""

    def __init__(self, config: Config, manifest_digest: str) -> None:
        self.config = config
        self.data_digest = manifest_digest
        self.id = config.run_id(manifest_digest)
        self.url = storage.join(config.storage.url, "runs", self.id)
        self.encoder_url = storage.join(self.url, "encoder")
        self.report_url = storage.join(self.url, "report.json")
        self.checkpoints = self.checkpoints_of(self.id)

    def checkpoints_of(self, run_id: str) -> CheckpointStore:
        """Those of this run, or of another one that lies beside it."""
        url = storage.join(self.config.storage.url, "runs", run_id, "checkpoints")
        return CheckpointStore(url, run_id, self.config.train.keep_checkpoints)

    def save_config(self) -> None:
        """Write the resolved config beside the results."""
        storage.write_bytes(storage.join(self.url, "config.yaml"), dump(self.config).encode())

    def report(self) -> RunReport | None:
        """What came of the run, if it is evaluated under the present settings."""
        saved = self._read("report.json", RunReport)
        return saved if saved is not None and saved.config == self.config.evaluate.of_report() else None

    def save_report(self, report: EvaluationReport, quarantine: tuple[BadSample, ...]) -> None:
        """Mark the evaluation as complete."""
        saved = RunReport(config=self.config.evaluate.of_report(), report=report, quarantine=quarantine, run_id=self.id)
        self._write("report.json", saved.model_dump_json(indent=1))

    @contextmanager
    def local_report(self) -> Iterator[Path]:
        """``report.json`` as a local file."""
        with TemporaryDirectory(prefix="parallax-report-") as folder:
            path = Path(folder) / "report.json"
            storage.download(self.report_url, path)
            yield path

    def registration(self) -> Registration | None:
        """The registry entry, if this run is registered where the config says."""
        entry = self._read("registered.json", Registration)
        if entry is None:
            return None
        wanted = (self.config.tracking_uri, self.config.registry.model_name, self.config.registry.alias)
        return entry if (entry.tracking_uri, entry.name, entry.alias) == wanted else None

    def save_registration(self, entry: Registration) -> Registration:
        """Mark the run as complete; returns the mark, which names the run."""
        mark = entry.model_copy(update={"run_id": self.id})
        self._write("registered.json", mark.model_dump_json(indent=1))
        return mark

    def save_encoder(self, folder: Path) -> None:
        """Upload an exported encoder's files."""
        for file in sorted(folder.iterdir()):
            storage.upload(str(file), storage.join(self.encoder_url, file.name))

    @contextmanager
    def local_encoder(self) -> Iterator[Path]:
        """The exported encoder's files in a local folder. ExportError if one is damaged; UserError of another run's."""
        with TemporaryDirectory(prefix="parallax-encoder-") as folder:
            for name in storage.list_sizes(self.encoder_url):
                storage.download(storage.join(self.encoder_url, name), str(Path(folder) / name))
            self._require_own(self.encoder_url, check_bundle(Path(folder)).card.run_id)
            yield Path(folder)

    def _read(self, name: str, kind: type[_Mark]) -> _Mark | None:
        url = storage.join(self.url, name)
        if not storage.exists(url):
            return None
        try:
            mark = kind.model_validate_json(storage.read_bytes(url))
        except ValidationError as error:
            raise UserError(
                f"{url} is damaged: {first_problem(error)}; delete it and submit the run again, which then repeats the "
                "stage that it marks as complete"
            ) from error
        self._require_own(url, mark.run_id or self.id)
        return mark

    def _require_own(self, url: str, run_id: str) -> None:
        if run_id != self.id:
            raise UserError(
                f"{url} is of the run {run_id}, not of {self.id}: it was copied here; delete it and {self.report_url}, "
                "and submit the run again, which then repeats its stage"
            )

    def _write(self, name: str, text: str) -> None:
        storage.write_bytes(storage.join(self.url, name), text.encode())
