"""The driver's account of a sweep: what Tune tells of its trials becomes ``results.json``, at once.

Scores come from the runs' own folders in the end (selection.py writes them before the checkpoint of the same step), so
a sweep that was killed tells them again and nothing is counted twice: an epoch's score replaces the one before.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import JsonValue

from pipeline.sweep.results import EpochScore, RunResult, Segment, Status, SweepFolder, SweepResults


class Ledger:
    """``results``, kept up to date in ``folder``.

    ``open_run`` is called when a run begins or goes on, and returns its MLflow run; ``close_run`` when it ends, before
    that is written: a kill in between ends it once more. ``on_change`` sees each new state.
    """

    def __init__(
        self,
        folder: SweepFolder,
        results: SweepResults,
        *,
        open_run: Callable[[RunResult], str],
        close_run: Callable[[RunResult], None],
        on_change: Callable[[SweepResults], None],
    ) -> None:
        self._folder, self.results = folder, results
        self._open_run, self._close_run, self._on_change = open_run, close_run, on_change
        self._since: dict[tuple[str, int], float] = {}

    def begin(
        self,
        trial: str,
        values: Mapping[str, JsonValue],
        run_ids: Mapping[int, str],
        segment: Segment | None = None,
    ) -> None:
        """A trial starts, or goes on; ``run_ids`` by seed. With PBT it may be in another ``segment`` than before.

        Tune, whose state is some seconds older after a kill, may begin one that has finished: it tells its scores again
        and trains nothing, and nothing here changes.
        """
        for seed, run_id in run_ids.items():
            if self._run(trial, seed).status == "finished":
                continue
            self._since[trial, seed] = time.monotonic()
            self._put(trial, seed, values=dict(values), run_id=run_id, status="running", reason="")
            if segment is not None:
                run = self._run(trial, seed)
                lineage = [old for old in run.lineage if old.first_epoch < segment.first_epoch] + [segment]
                scores = [score for score in run.scores if score.epoch <= segment.first_epoch]
                self._put(trial, seed, lineage=tuple(lineage), scores=tuple(scores))
            self._put(trial, seed, mlflow_run_id=self._open_run(self._run(trial, seed)))
        self._commit()

    def score(self, trial: str, epoch: int, by_seed: Mapping[int, tuple[float, float]]) -> None:
        """(kNN, loss) of each seed after ``epoch`` epochs; later ones are forgotten, since the run redoes them."""
        for seed, (knn, loss) in by_seed.items():
            if self._run(trial, seed).status == "finished":
                continue
            earlier = [score for score in self._run(trial, seed).scores if score.epoch < epoch]
            self._put(trial, seed, scores=(*earlier, EpochScore(epoch=epoch, knn=knn, loss=loss)))
        self._commit()

    def end(self, trial: str, status: Status, reason: str = "") -> None:
        """All runs of a trial end."""
        for run in self.results.runs:
            if run.trial == trial and run.status == "running":
                began = self._since.pop((trial, run.seed), time.monotonic())
                seconds = round(run.seconds + time.monotonic() - began, 1)
                self._put(trial, run.seed, status=status, reason=reason, seconds=seconds)
                self._close_run(self._run(trial, run.seed))
        self._commit()

    def refuse(self, trial: str, values: Mapping[str, JsonValue], seeds: Iterable[int], reason: str) -> None:
        """No run can have what a trial is to start with, or to go on with."""
        self.end(trial, "failed", reason)
        for seed in seeds:
            self._put(trial, seed, values=dict(values), status="failed", reason=reason)
        self._commit()

    def update(self, **changes: Any) -> None:
        """Fields of the sweep as a whole."""
        self.results = self.results.model_copy(update=changes)
        self._commit()

    def _run(self, trial: str, seed: int) -> RunResult:
        known = (run for run in self.results.runs if (run.trial, run.seed) == (trial, seed))
        return next(known, RunResult(trial=trial, seed=seed, values={}))

    def _put(self, trial: str, seed: int, **changes: Any) -> None:
        runs = {(run.trial, run.seed): run for run in self.results.runs}
        runs[trial, seed] = self._run(trial, seed).model_copy(update=changes)
        self.results = self.results.model_copy(update={"runs": tuple(runs[key] for key in sorted(runs))})

    def _commit(self) -> None:
        self._folder.save(self.results)
        self._on_change(self.results)
