"""One trial of a sweep as Tune's ``Trainable``: threads that drive ``trainer.pretrain``, one per seed.

Tune asks for one ``step`` after the other, and training does not wait for it: ``step`` hands over the score of the next
epoch once all seeds have it. What Tune calls a checkpoint is a pointer to a checkpoint of ours: PBT hands it to another
trial, whose run then begins as a copy of that checkpoint, under values and a name of its own.
"""

import json
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from pipeline.cluster.inbox import Addressed, Report, Started
from pipeline.cluster.trainer import pretrain
from pipeline.collapse import CollapseError, NonFiniteLossError
from pipeline.data.manifest import Manifest
from pipeline.evaluate.report import NonFiniteFeaturesError
from pipeline.progress import Progress
from pipeline.runs import Run
from pipeline.secrets import redacted
from pipeline.selection import METRIC, read_scores
from pipeline.sweep.config import Sweep
from pipeline.sweep.results import Status

SCORE, EPOCH = "knn", "epoch"  # the metric and the clock of searchers and schedulers
WORST = 0.0  # the score of a trial that failed: searchers learn from it, and it is never the best
_POINTER = "pointer.json"
_ABORT_S = 20.0
_CHECKPOINT_S = 120.0


@dataclass(frozen=True)
class Job:
    """What every trial is given."""

    sweep: Sweep
    sweep_id: str
    manifest_url: str
    inbox: ActorHandle


class Pointer(NamedTuple):
    """A checkpoint of a run of a PBT trial."""

    trial: str
    run_id: str
    epoch: int


class Stretch(NamedTuple):
    """What a trial trains next: its run's name, and the checkpoint that a new run begins with."""

    name: str
    first_epoch: int = 0  # scores up to here are known
    parent: Pointer | None = None


def stretch(job: Job, trial: str, pointer: Pointer | None) -> Stretch:
    """Without a pointer the trial's own run, with one of its own the run it points at, else a new one."""
    if pointer is None:
        return Stretch(job.sweep_id)
    if pointer.trial == trial:
        return Stretch(pointer.run_id.rpartition("-")[0], pointer.epoch)
    return Stretch(f"{job.sweep_id}-{trial}-e{pointer.epoch}", pointer.epoch, pointer)


def read_pointer(folder: str | Path) -> Pointer:
    """What ``PretrainTrial`` left in a checkpoint of Tune's."""
    return Pointer(**json.loads((Path(folder) / _POINTER).read_text()))


class _Score(NamedTuple):
    seed: int
    epoch: int
    knn: float
    loss: float


class _End(NamedTuple):
    seed: int
    status: Status
    reason: str = ""


_Told = queue.Queue[_Score | _End]


class PretrainTrial(tune.Trainable):
    """Its config is ``{"configuration": {"trial": name, "values": dotted key -> value}}``."""

    def setup(self, config: dict[str, Any], job: Job) -> None:
        """Nothing runs before the first ``step``: a pointer may come in between."""
        self._job = job
        self._threads: list[threading.Thread] = []
        self._take(config)

    def step(self) -> dict[str, Any]:
        """The mean score of the next epoch, or why the trial is over."""
        if not self._threads:
            if reason := self._job.sweep.objection(self._values, Manifest.load(self._job.manifest_url)):
                return self._failure("failed", reason)
            self._begin()
        while True:
            told = self._told.get()
            if isinstance(told, _Score):
                self._scores.setdefault(told.epoch, {})[told.seed] = told
                is_whole = len(self._scores[told.epoch]) == len(self._threads)
                # The last score waits for the last checkpoint: Tune may stop a trial upon it.
                if is_whole and told.epoch < self._job.sweep.base.train.epochs:
                    return self._result(told.epoch)
            elif told.status == "finished":
                self._finished += 1
                if self._finished == len(self._threads):
                    return {**self._result(max(self._scores)), "done": True, "status": "finished"}
            else:
                self._abort()
                return self._failure(told.status, told.reason)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in this process, which saves it the import of torch."""
        self._abort()
        self._take(new_config)
        return True

    def cleanup(self) -> None:
        """Free the workers."""
        self._abort()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Point at the checkpoint of the last score that Tune has."""
        epoch = self._last[EPOCH]
        (seed,) = self._job.sweep.seeds()
        run = self._run_of(seed)
        deadline = time.monotonic() + _CHECKPOINT_S
        while not self._has(run, epoch):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{run.checkpoints.url} has no checkpoint of epoch {epoch}")
            time.sleep(0.2)  # it is written after the score
        pointer = Pointer(self._trial, run.id, epoch)
        (Path(checkpoint_dir) / _POINTER).write_text(json.dumps(pointer._asdict()))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Go on from where a pointer points."""
        self._abort()
        self._stretch = stretch(self._job, self._trial, read_pointer(checkpoint_dir))
        self._last[EPOCH] = self._stretch.first_epoch

    def _take(self, config: dict[str, Any]) -> None:
        self._trial, self._values = config["configuration"]["trial"], config["configuration"]["values"]
        self._stretch = stretch(self._job, self._trial, None)
        self._last: dict[str, Any] = {EPOCH: 0, SCORE: WORST}
        self._threads = []

    def _begin(self) -> None:
        self._told: _Told = queue.Queue()
        self._controllers: dict[int, ActorHandle] = {}
        self._scores: dict[int, dict[int, _Score]] = {}
        self._finished, self._aborted = 0, threading.Event()
        self._threads = [
            threading.Thread(
                target=self._drive,
                args=(seed, self._told, self._controllers, self._aborted),
                name=f"seed-{seed}",
                daemon=True,
            )
            for seed in self._job.sweep.seeds()
        ]
        for thread in self._threads:
            thread.start()

    def _drive(self, seed: int, told: _Told, controllers: dict[int, ActorHandle], aborted: threading.Event) -> None:
        try:
            self._pretrain(self._run_of(seed), told, controllers, aborted)
            told.put(_End(seed, "finished"))
        except CollapseError as error:
            told.put(_End(seed, "collapsed", str(error)))
        except (NonFiniteLossError, NonFiniteFeaturesError) as error:
            told.put(_End(seed, "diverged", str(error)))
        except Exception as error:  # noqa: BLE001 - told to the sweep's driver, whichever it is
            if not aborted.is_set():
                told.put(_End(seed, "failed", redacted(f"{type(error).__name__}: {error}")))

    def _pretrain(self, run: Run, told: _Told, controllers: dict[int, ActorHandle], aborted: threading.Event) -> None:
        """``told``, ``controllers`` and ``aborted`` are this trial's own: when a trial that was stopped gets its
        controller late, those of ``self`` are the next one's."""
        config, job, trial, stretch, seed = run.config, self._job, self._trial, self._stretch, run.config.seed
        manifest = Manifest.load(job.manifest_url)
        run.save_config()
        if stretch.parent is not None and run.checkpoints.latest_step() is None:
            self._adopt(run, stretch.parent)
        done = run.checkpoints.latest_step() or 0
        for scored in read_scores(run.checkpoints):
            if scored.step <= done and scored.epochs > stretch.first_epoch:
                told.put(_Score(seed, scored.epochs, scored.knn, scored.loss))

        def on_report(report: Report) -> None:
            job.inbox.put.remote(Addressed(trial, run.id, report))
            if isinstance(report, Progress) and METRIC in report.metrics:
                told.put(_Score(seed, report.epoch + 1, report.metrics[METRIC], report.metrics["loss"]))

        def on_start(started: Started) -> None:
            controllers[seed] = started.controller
            job.inbox.put.remote(Addressed(trial, run.id, started))
            if aborted.is_set():  # whoever stopped the trial has given up waiting for this controller
                _abort(started.controller)

        if not aborted.is_set() and done < config.train.epochs * job.sweep.steps_per_epoch(config):
            pretrain(config, manifest, mlflow_run_id="", on_report=on_report, on_start=on_start)

    def _run_of(self, seed: int) -> Run:
        config = self._job.sweep.trial_config(self._stretch.name, self._values, seed)
        return Run(config, Manifest.load(self._job.manifest_url).digest)

    def _adopt(self, run: Run, parent: Pointer) -> None:
        """Begin ``run`` with a copy of the parent's checkpoint."""
        run.checkpoints.adopt(
            run.checkpoints_of(parent.run_id), parent.epoch * self._job.sweep.steps_per_epoch(run.config)
        )

    def _has(self, run: Run, epoch: int) -> bool:
        return epoch * self._job.sweep.steps_per_epoch(run.config) in run.checkpoints.steps()

    def _result(self, epoch: int) -> dict[str, Any]:
        scores = self._scores[epoch]
        self._last = {
            EPOCH: epoch,
            SCORE: sum(score.knn for score in scores.values()) / len(scores),
            "scores": {seed: (score.knn, score.loss) for seed, score in scores.items()},
        }
        return self._last

    def _failure(self, status: Status, reason: str) -> dict[str, Any]:
        return {**self._last, SCORE: WORST, "scores": {}, "status": status, "reason": reason, "done": True}

    def _abort(self) -> None:
        """End the runs that are still going, and wait until their workers are gone."""
        deadline = time.monotonic() + _ABORT_S
        for seed, thread in zip(self._job.sweep.seeds(), self._threads, strict=False):
            self._aborted.set()
            while thread.is_alive() and seed not in self._controllers and time.monotonic() < deadline:
                time.sleep(0.1)  # its controller has yet to start
            if thread.is_alive() and seed in self._controllers:
                _abort(self._controllers[seed])
                thread.join(_ABORT_S)
        self._threads = []


def _abort(controller: ActorHandle) -> None:
    try:
        ray.get(controller.abort.remote(), timeout=_ABORT_S)
    except RayActorError:
        pass  # an abort ends in the end of the controller
    except GetTimeoutError:
        ray.kill(controller)
