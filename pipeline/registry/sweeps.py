"""A sweep in MLflow: one run for the sweep, and below it a run for each that it trains.

Everything is logged from the sweep's driver, which alone needs to reach the server. A server that is away costs a
warning and the metrics of that time, not the sweep: the scores are in ``results.json`` in any case.
"""

import logging
import threading
from collections.abc import Callable
from typing import Literal

from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.progress import Progress
from pipeline.registry.address import RegistryError
from pipeline.registry.tracking import PARENT_TAG, Tracker
from pipeline.selection import METRIC
from pipeline.sweep.results import RunResult, Status

_ENDED: dict[Status, Literal["FINISHED", "KILLED"]] = {"finished": "FINISHED", "stopped": "KILLED"}

_logger = logging.getLogger(__name__)


class SweepTracker:
    """The MLflow runs below the sweep's."""

    def __init__(
        self, parent: Tracker, sweep_id: str, config_of: Callable[[RunResult], Config], manifest: Manifest
    ) -> None:
        """``config_of``: what a run is trained with."""
        self._parent, self._sweep_id, self._config_of, self._manifest = parent, sweep_id, config_of, manifest
        self._open: dict[tuple[str, int], tuple[str, Tracker]] = {}  # (trial, seed) -> its run now
        self._lock = threading.Lock()  # reports come in another thread than the sweep's decisions

    def begin(self, run: RunResult) -> str:
        """Its MLflow run, found or created; "" if the server does not answer."""
        config = self._config_of(run)
        tags = {
            PARENT_TAG: self._parent.mlflow_run_id,
            "parallax.sweep_id": self._sweep_id,
            "parallax.trial": run.trial,
            **({"parallax.parent_run_id": run.lineage[-1].parent} if run.lineage and run.lineage[-1].parent else {}),
        }
        self._close(run, "FINISHED")  # the PBT segment before this one, if there is one
        try:
            tracker = Tracker(config.tracking_uri, config.tracking.experiment, run.run_id, tags)
            tracker.log_config(config.flat())
            tracker.log_dataset(self._manifest.url, self._manifest.digest)
        except RegistryError as error:
            _logger.warning("%s is not tracked: %s", run.run_id, error)
            return run.mlflow_run_id
        with self._lock:
            self._open[run.trial, run.seed] = run.run_id, tracker
        return tracker.mlflow_run_id

    def log(self, run_id: str, progress: Progress) -> None:
        """What a run reports."""
        with self._lock:
            tracker = next((tracker for open_id, tracker in self._open.values() if open_id == run_id), None)
            if tracker is not None:
                tracker.log(progress.step, progress.logged)

    def end(self, run: RunResult) -> None:
        """Close the MLflow run of one that ended, with the scores whose reports are on their way or were lost with
        a driver; those closed before stay closed."""
        steps_per_epoch = self._manifest.split("train").num_samples // self._config_of(run).train.global_batch_size
        first_epoch = run.lineage[-1].first_epoch if run.lineage else 0
        with self._lock:
            if (run.trial, run.seed) in self._open:
                _, tracker = self._open[run.trial, run.seed]
                for score in run.scores:
                    if score.epoch > first_epoch:
                        tracker.log(score.epoch * steps_per_epoch, {f"train/{METRIC}": score.knn})
        self._close(run, _ENDED.get(run.status, "FAILED"))

    def _close(self, run: RunResult, status: Literal["FINISHED", "KILLED", "FAILED"]) -> None:
        with self._lock:
            run_id, tracker = self._open.pop((run.trial, run.seed), ("", None))
        if tracker is not None:
            try:
                tracker.finish(status)
            except RegistryError as error:
                _logger.warning("the MLflow run of %s stays open: %s", run_id, error)
