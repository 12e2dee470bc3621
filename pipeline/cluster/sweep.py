"""A sweep on Ray Tune: each trial is a driver of its own worker groups, one per seed, that ``trainer.pretrain`` runs.

What keeps N trials from starving each other: the drivers take no CPU (a sliver of the head node's own resource places
them there), and no more trials run at a time than whole worker groups fit on the nodes. A stopped trial aborts its
groups and its driver takes the next trial; the CPUs are free within a second. Of a driver that is killed, Ray
ends the workers, but their placement group stays: it is removed here.

Tune keeps its state (which trials are done, the searcher, the scheduler) in ``<sweep folder>/tune``, where a sweep that
was killed is taken up again; each run resumes from its own checkpoint, and tells the scores of its folder again.
"""

import functools
import logging
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
import ray
from ray import tune
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from pipeline import storage
from pipeline.cluster.connection import ClusterError
from pipeline.cluster.inbox import Addressed, Inbox, Report, Started
from pipeline.cluster.trainer import HopelessError, pretrain
from pipeline.config import ClusterConfig
from pipeline.data.manifest import Manifest
from pipeline.progress import Progress
from pipeline.runs import Run
from pipeline.selection import METRIC, read_scores
from pipeline.sweep.config import Asha, Entry, Sweep, SweepConfig
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.results import Status

_SCORE, _EPOCH = "knn", "epoch"
_DRIVER = {"node:__internal_head__": 0.001}  # Ray gives every head node 1.0 of it
_ABORT_S = 20.0
_SNAPSHOT_S = 5  # how much of Tune's own state a killed driver loses at most; the runs' scores are not in it
_STATUS: dict[str, Status] = {
    "CollapseError": "collapsed",
    "NonFiniteLossError": "diverged",
    "NonFiniteFeaturesError": "diverged",
}

OnReport = Callable[[str, Report], None]  # (run id, report)


@dataclass(frozen=True)
class _Score:
    seed: int
    epoch: int
    knn: float
    loss: float


@dataclass(frozen=True)
class _End:
    seed: int
    status: Status
    reason: str = ""


@dataclass(frozen=True)
class _Job:
    """What every trial is given."""

    sweep: Sweep
    sweep_id: str
    manifest_url: str
    inbox: ActorHandle


def trials_at_a_time(cluster: ClusterConfig, seeds: int) -> int:
    """How many trials the connected cluster holds; ClusterError if it does not hold one."""
    per_worker = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    workers = sum(
        int(min((node.get(name, 0) + 1e-9) // amount for name, amount in per_worker.items() if amount))
        for node in nodes
    )
    needed = cluster.num_workers * seeds
    if workers < needed:
        raise ClusterError(
            f"one trial needs {needed} workers ({seeds} seeds x {cluster.num_workers}) of {per_worker['CPU']:g} CPUs "
            f"and {per_worker['GPU']:g} GPUs, and the nodes of this cluster hold {workers}; lower sweep.seeds, "
            "cluster.num_workers, cluster.cpus_per_worker or cluster.gpus_per_worker, or add nodes"
        )
    return workers // needed


def run_sweep(
    sweep: Sweep,
    sweep_id: str,
    manifest: Manifest,
    *,
    folder_url: str,
    ledger: Ledger,
    on_report: OnReport,
) -> None:
    """Run the trials that are not done yet, on the connected cluster; what comes of them goes to ``ledger``.

    ``on_report`` is called in a thread, with what the runs report between their scores.
    """
    concurrent = trials_at_a_time(sweep.base.cluster, sweep.config.seeds)
    concurrent = min(concurrent, sweep.config.max_concurrent or concurrent)
    inbox = Inbox()
    groups: dict[str, dict[str, Started]] = {}

    def forward(told: Addressed) -> None:
        if isinstance(told.content, Started):
            groups.setdefault(told.trial, {})[told.run_id] = told.content
        else:
            on_report(told.run_id, told.content)

    job = _Job(sweep, sweep_id, manifest.url, inbox.actor)
    trainable = tune.with_resources(tune.with_parameters(_Trial, job=job), _DRIVER)
    # Tune's own loggers would write each result three times more, and its tables hide ours.
    os.environ |= {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": str(_SNAPSHOT_S),
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    callback = _Bookkeeper(job, manifest.digest, ledger, groups)
    with inbox.forwarding(forward):
        _tuner(sweep, trainable, folder_url, concurrent, callback).fit()


def _tuner(sweep: Sweep, trainable: Any, folder_url: str, concurrent: int, callback: Callback) -> Tuner:
    path = storage.join(folder_url, "tune")
    if Tuner.can_restore(path):
        tuner = Tuner.restore(path, trainable, resume_errored=True)
        tuner._local_tuner.get_run_config().callbacks = [callback]
        return tuner
    search: dict[str, Any]
    if sweep.config.searcher == "tpe":
        search = {"search_alg": _tpe(sweep), "num_samples": sweep.config.trials}
        space = None
    else:
        search = {}
        space = {
            "configuration": tune.grid_search(
                [
                    {"trial": _trial_name(number), "values": values}
                    for number, values in enumerate(sweep.config.configurations(sweep.base))
                ]
            )
        }
    return Tuner(
        trainable,
        param_space=space,
        tune_config=TuneConfig(
            metric=_SCORE,
            mode="max",
            scheduler=_scheduler(sweep),
            max_concurrent_trials=concurrent,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
            **search,
        ),
        run_config=RunConfig(
            name="tune",
            storage_path=folder_url,
            failure_config=FailureConfig(max_failures=sweep.base.cluster.max_failures),
            checkpoint_config=CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            callbacks=[callback],
            verbose=0,
        ),
    )


def _scheduler(sweep: Sweep) -> TrialScheduler:
    scheduler = sweep.config.scheduler
    if isinstance(scheduler, Asha):
        return ASHAScheduler(
            time_attr=_EPOCH,
            max_t=sweep.base.train.epochs,
            grace_period=scheduler.grace_epochs,
            reduction_factor=scheduler.reduction,
        )
    return FIFOScheduler()


def _tpe(sweep: Sweep) -> Searcher:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), over the keys that apply."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", optuna.exceptions.ExperimentalWarning
        )  # group: for keys that do not always apply
        sampler = optuna.samplers.TPESampler(seed=sweep.config.seed, multivariate=True, group=True)
    suggest = functools.partial(_suggest, sweep.config, sweep.base.model_dump(mode="json"))
    return OptunaSearch(suggest, metric=_SCORE, mode="max", sampler=sampler)


def _suggest(config: SweepConfig, base: Mapping[str, Any], trial: optuna.Trial) -> dict[str, Any]:
    """What Optuna's trial becomes for Tune. Listed values are suggested by their place, ranges as they are spaced."""

    def choose(key: str, entry: Entry) -> float:
        if entry.grid is not None:
            return trial.suggest_int(key, 0, len(entry.grid) - 1)
        if entry.choice is not None:
            return int(trial.suggest_categorical(key, range(len(entry.choice))))
        if entry.bounds is None:
            return 0.0
        return entry.rounded(trial.suggest_float(key, *entry.bounds, log=entry.is_log))

    values = config.resolve(base, choose)
    return {"configuration": {"trial": _trial_name(trial.number), "values": values}}


def _trial_name(number: int) -> str:
    return f"t{number:03d}"


class _Trial(tune.Trainable):
    """Drives the runs of one trial in threads; ``step`` waits for the next epoch's score of all of them."""

    def setup(self, config: dict[str, Any], job: _Job) -> None:
        self._job = job
        self._begin(config["configuration"])

    def step(self) -> dict[str, Any]:
        """The mean score of the next epoch, or why the trial is over. A failed trial has the worst score, 0."""
        while True:
            told = self._told.get()
            if isinstance(told, _Score):
                self._scores.setdefault(told.epoch, {})[told.seed] = told
                is_whole = len(self._scores[told.epoch]) == len(self._threads)
                # The last score waits for the last checkpoint: Tune may stop a trial upon it.
                if is_whole and told.epoch < self._job.sweep.base.train.epochs:
                    return self._result(told.epoch)
            elif told.status == "finished":
                self._done += 1
                if self._done == len(self._threads):
                    return {**self._result(max(self._scores)), "done": True, "status": "finished"}
            else:
                self._abort()
                return {
                    **self._last,
                    _SCORE: 0.0,
                    "scores": {},
                    "done": True,
                    "status": told.status,
                    "reason": told.reason,
                }

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in this process, which saves it the import of torch."""
        self._abort()
        self._begin(new_config["configuration"])
        return True

    def cleanup(self) -> None:
        """Free the workers."""
        self._abort()

    def _begin(self, configuration: dict[str, Any]) -> None:
        self._trial, self._values = configuration["trial"], configuration["values"]
        self._told: queue.Queue[_Score | _End] = queue.Queue()
        self._controllers: dict[int, ActorHandle] = {}
        self._scores: dict[int, dict[int, _Score]] = {}
        self._last: dict[str, Any] = {_EPOCH: 0, _SCORE: 0.0}
        self._done, self._aborted = 0, threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(seed, self._told, self._aborted), name=f"seed-{seed}", daemon=True)
            for seed in self._job.sweep.seeds()
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, seed: int, told: "queue.Queue[_Score | _End]", aborted: threading.Event) -> None:
        try:
            self._pretrain(seed, told)
            told.put(_End(seed, "finished"))
        except HopelessError as error:
            told.put(_End(seed, _STATUS.get(error.kind, "failed"), str(error)))
        except Exception as error:  # noqa: BLE001 - told to the driver, whichever it is
            if not aborted.is_set():
                told.put(_End(seed, "failed", f"{type(error).__name__}: {error}"))

    def _pretrain(self, seed: int, told: "queue.Queue[_Score | _End]") -> None:
        trial, job = self._trial, self._job
        config = job.sweep.trial_config(job.sweep_id, self._values, seed)
        manifest = Manifest.load(job.manifest_url)
        run = Run(config, manifest.digest)
        run.save_config()
        done = run.checkpoints.latest_step() or 0
        for scored in read_scores(run.checkpoints.url):
            if scored.step <= done:
                told.put(_Score(seed, scored.epochs, scored.knn, scored.loss))

        def on_report(report: Report) -> None:
            job.inbox.put.remote(Addressed(trial, run.id, report))
            if isinstance(report, Progress) and METRIC in report.metrics:
                told.put(_Score(seed, report.epoch + 1, report.metrics[METRIC], report.metrics["loss"]))

        def on_start(started: Started) -> None:
            self._controllers[seed] = started.controller
            job.inbox.put.remote(Addressed(trial, run.id, started))

        if done < config.train.epochs * (manifest.split("train").num_samples // config.train.global_batch_size):
            pretrain(config, manifest, mlflow_run_id="", on_report=on_report, on_start=on_start)

    def _result(self, epoch: int) -> dict[str, Any]:
        scores = self._scores[epoch]
        self._last = {
            _EPOCH: epoch,
            _SCORE: sum(score.knn for score in scores.values()) / len(scores),
            "scores": {seed: (score.knn, score.loss) for seed, score in scores.items()},
        }
        return self._last

    def _abort(self) -> None:
        """End the runs that are still going, and wait until their workers are gone."""
        self._aborted.set()
        deadline = time.monotonic() + _ABORT_S
        for seed, thread in zip(self._job.sweep.seeds(), self._threads, strict=True):
            while thread.is_alive() and seed not in self._controllers and time.monotonic() < deadline:
                time.sleep(0.1)  # its controller has yet to start
            if thread.is_alive() and seed in self._controllers:
                controller = self._controllers[seed]
                try:
                    ray.get(controller.abort.remote(), timeout=_ABORT_S)
                except RayActorError:
                    pass  # an abort ends in the end of the controller
                except GetTimeoutError:
                    ray.kill(controller)
                thread.join(_ABORT_S)


def _name(trial: Trial) -> str:
    return str(trial.config["configuration"]["trial"])


class _Bookkeeper(Callback):
    """Tells the ledger what Tune decides, and removes what dead drivers leave behind."""

    def __init__(
        self, job: _Job, manifest_digest: str, ledger: Ledger, groups: Mapping[str, Mapping[str, Started]]
    ) -> None:
        self._job, self._digest, self._ledger, self._groups = job, manifest_digest, ledger, groups

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks; a sweep that is taken up again gets new ones

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name, values = trial.config["configuration"]["trial"], trial.config["configuration"]["values"]
        configs = {
            seed: self._job.sweep.trial_config(self._job.sweep_id, values, seed) for seed in self._job.sweep.seeds()
        }
        self._ledger.begin(name, values, {seed: config.run_id(self._digest) for seed, config in configs.items()})

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        name = _name(trial)
        if result.get("scores"):
            self._ledger.score(name, result[_EPOCH], result["scores"])
        if "status" in result:
            self._ledger.end(name, result["status"], result.get("reason", ""))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ledger.end(_name(trial), "stopped")

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._release(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._release(trial)
        self._ledger.end(_name(trial), "failed", "its driver was lost too often")

    def _release(self, trial: Trial) -> None:
        for started in self._groups.get(_name(trial), {}).values():
            if started.placement_group is not None:
                ray.util.remove_placement_group(started.placement_group)
