"""What a sweep found: every run with its scores by epoch, kept as JSON in ``<storage.url>/sweeps/<sweep id>/``.

A *trial* is a configuration (a value for each searched key); it has one *run* per seed. Trials are ranked by the mean
over their seeds of the kNN accuracy on the selection split after the last epoch, never by the loss: its scale moves
with the temperature.
"""

import statistics
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from pipeline import storage

Status = Literal[
    "running",
    "finished",  # all epochs
    "stopped",  # by the scheduler, before the last epoch
    "collapsed",  # CollapseError
    "diverged",  # NonFiniteLossError
    "failed",  # anything else
]
Scale = Literal["categories", "linear", "log", "one_minus_log"]  # one_minus_log: the axis shows 1 - value, in logs


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EpochScore(_Record):
    """One run after an epoch."""

    epoch: int  # epochs done: 1 after the first
    knn: float  # accuracy in [0, 1] on the selection split
    loss: float  # of training


class Segment(_Record):
    """A stretch of a PBT run under one set of values."""

    run_id: str
    first_epoch: int  # epochs done when it began
    values: dict[str, JsonValue]
    parent: str | None = None  # the run whose weights it began with, if another one's


class RunResult(_Record):
    """One training run: a trial under one seed."""

    trial: str  # t000, t001 ...
    seed: int
    values: dict[str, JsonValue]  # dotted key -> value, of every searched key that is active; overrides of the base
    status: Status = "running"
    reason: str = ""  # why it collapsed, diverged or failed
    scores: tuple[EpochScore, ...] = ()  # ascending epochs: every one, or as evaluate.selection.every_epochs says
    run_id: str = ""  # of its folder <storage.url>/runs/<run id>
    mlflow_run_id: str = ""  # the child of the sweep's
    seconds: float = 0.0  # of wall time, the start of its workers included, over all sessions
    lineage: tuple[Segment, ...] = ()  # PBT only, oldest first

    @property
    def outcome(self) -> str:
        """The status, and the first line of why: ``failed: <reason>``."""
        reason = self.reason.strip().partition("\n")[0]
        return f"{self.status}: {reason}" if reason else self.status


class TrialResult(_Record):
    """A trial over its seeds, at the last epoch that all of them have reached."""

    trial: str
    values: dict[str, JsonValue]
    status: Status  # "finished" if all seeds are, else that of the first seed that is not
    runs: tuple[RunResult, ...]

    @property
    def outcome(self) -> str:
        """That of the first run with the trial's status and a reason, if one has."""
        alike = [run for run in self.runs if run.status == self.status]
        return next((run.outcome for run in alike if run.reason), self.status)

    @property
    def epoch(self) -> int:
        """The last epoch that all seeds have a score of; 0 before the first."""
        return max(set.intersection(*({score.epoch for score in run.scores} for run in self.runs)), default=0)

    @property
    def knn(self) -> float | None:
        """Mean kNN accuracy over the seeds at ``epoch``."""
        return self.knn_at(self.epoch)

    @property
    def spread(self) -> float | None:
        """Standard deviation (n - 1) over the seeds at ``epoch``; None with one seed."""
        scores = self._at(self.epoch)
        return statistics.stdev(score.knn for score in scores) if len(scores) > 1 else None

    @property
    def loss(self) -> float | None:
        """Mean training loss over the seeds at ``epoch``."""
        scores = self._at(self.epoch)
        return statistics.fmean(score.loss for score in scores) if scores else None

    def knn_at(self, epoch: int) -> float | None:
        """Mean kNN accuracy over the seeds after ``epoch`` epochs; None unless all of them have a score of it."""
        scores = self._at(epoch)
        return statistics.fmean(score.knn for score in scores) if len(scores) == len(self.runs) else None

    def _at(self, epoch: int) -> list[EpochScore]:
        return [score for run in self.runs for score in run.scores if score.epoch == epoch]


class SearchedKey(_Record):
    """An axis of the space."""

    key: str
    scale: Scale


class Final(_Record):
    """The best trial's run, evaluated on the validation split, which chose nothing."""

    trial: str
    seed: int  # of the run that is registered: the base's, since to choose among seeds would flatter again
    run_id: str
    selection_knn: float  # of this run
    validation_knn: float
    validation_linear: float | None
    encoder: str  # models:/<name>@<alias>, as registered
    model_uri: str
    version: str
    doubts: tuple[str, ...] = ()  # whether it is better than raw pixels


class SweepResults(_Record):
    """``results.json``."""

    sweep_id: str
    base: str  # YAML of the resolved base config, the sweep's ``set`` included
    epochs: int  # of a full run
    keys: tuple[SearchedKey, ...]
    split: str  # that the scores are of
    mlflow_run_id: str = ""  # the parent of the runs'
    tracking_uri: str = ""
    runs: tuple[RunResult, ...] = ()
    final: Final | None = None

    def trials(self) -> list[TrialResult]:
        """All trials: finished ones first, the best first (ties: the smaller spread, then the earlier trial)."""
        by_trial: dict[str, list[RunResult]] = {}
        for run in self.runs:
            by_trial.setdefault(run.trial, []).append(run)
        found = [
            TrialResult(
                trial=trial,
                values=runs[0].values,
                status=next((run.status for run in runs if run.status != "finished"), "finished"),
                runs=tuple(sorted(runs, key=lambda run: run.seed)),
            )
            for trial, runs in by_trial.items()
        ]
        rank = {"finished": 0, "running": 1, "stopped": 1}  # what failed comes last
        return sorted(found, key=lambda t: (rank.get(t.status, 2), -t.epoch, -(t.knn or 0.0), t.spread or 0.0, t.trial))

    def best(self) -> TrialResult | None:
        """The finished trial with the highest mean score; None if none has finished."""
        return next((trial for trial in self.trials() if trial.status == "finished"), None)


class SweepFolder:
    """``<storage.url>/sweeps/<sweep id>/``."""

    def __init__(self, storage_url: str, sweep_id: str) -> None:
        self.url = storage.join(storage_url, "sweeps", sweep_id)

    def results(self) -> SweepResults | None:
        """``results.json``, if the sweep was begun before."""
        url = storage.join(self.url, "results.json")
        return SweepResults.model_validate_json(storage.read_bytes(url)) if storage.exists(url) else None

    def save(self, results: SweepResults) -> None:
        """Write ``results.json``, atomically."""
        self.write("results.json", results.model_dump_json(indent=1).encode())

    def write(self, name: str, content: bytes) -> None:
        """Write another file beside it."""
        storage.write_bytes(storage.join(self.url, name), content)
