"""A sweep on Ray Tune: each trial is a driver of its own worker groups, one per seed (trial.py).

What keeps N trials from starving each other: the drivers take no CPU (a sliver of the head node's own resource places
them there), and no more trials run at a time than whole worker groups fit on the nodes. A stopped trial aborts its
groups and waits until they are gone; then its driver takes the next trial. Of a driver that is killed, Ray ends the
workers, but their placement group stays: it is removed here.

Tune keeps its state (which trials are done, the searcher) in ``<sweep folder>/tune``, where a sweep that was killed is
taken up again; each run resumes from its own checkpoint, and tells the scores of its folder again.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.experiment import Trial

from pipeline import storage
from pipeline.cluster.connection import workers_that_fit
from pipeline.cluster.inbox import Addressed, Inbox, Report, Started
from pipeline.cluster.searching import configuration, scheduler, searcher
from pipeline.cluster.startup import ClusterError
from pipeline.cluster.trial import EPOCH, SCORE, Job, Pointer, PretrainTrial, read_pointer, stretch
from pipeline.config import ClusterConfig
from pipeline.data.manifest import Manifest
from pipeline.sweep.config import Pbt, Sweep
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.results import Segment

_HEAD = "node:__internal_head__"  # Ray gives every head node 1.0 of it
_SNAPSHOT_S = 5  # how much of Tune's own state a killed driver loses at most; the runs' scores are not in it

OnReport = Callable[[str, Report], None]  # (run id, report)


def trials_at_a_time(cluster: ClusterConfig, seeds: int) -> int:
    """How many trials the connected cluster holds; ClusterError if it does not hold one."""
    workers = workers_that_fit(cluster)
    needed = cluster.num_workers * seeds
    if workers < needed:
        raise ClusterError(
            f"one trial needs {needed} workers ({seeds} seeds x {cluster.num_workers}) of "
            f"{cluster.cpus_per_worker:g} CPUs and {cluster.gpus_per_worker:g} GPUs, and this cluster's nodes hold "
            f"{workers}; lower sweep.seeds, cluster.num_workers, cluster.cpus_per_worker (0.5: two share a core) or "
            "cluster.gpus_per_worker, or add nodes"
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

    job = Job(sweep, sweep_id, manifest.url, inbox.actor)
    # Tune's own loggers would write each result three times more, and its tables hide ours.
    os.environ |= {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": str(_SNAPSHOT_S),
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would return from an interrupted sweep as if it were done
    }
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    with inbox.forwarding(forward):
        _tuner(job, folder_url, concurrent, _Bookkeeper(job, manifest, ledger, groups), ledger).fit()


def arrow_uri(url: str) -> str:
    """``url`` as Tune has to be given it: Arrow reads escapes, queries and fragments in a URI, and none in a path."""
    return quote(url, safe="/:") if storage.is_remote(url) else url


def _tuner(job: Job, folder_url: str, concurrent: int, callback: Callback, ledger: Ledger) -> Tuner:
    sweep, root = job.sweep, arrow_uri(folder_url)
    path = storage.join(root, "tune")
    is_known = Tuner.can_restore(path)
    # The searcher does not hold back PBT's population, nor trials that are taken up again: they wait for the head's
    # resource. Otherwise a sliver of it leaves room for another sweep.
    waits = is_known or isinstance(sweep.config.scheduler, Pbt)
    driver = {_HEAD: math.floor(9900 / concurrent) / 10_000 if waits else 0.001}
    trainable = tune.with_resources(tune.with_parameters(PretrainTrial, job=job), driver)
    if is_known:
        tuner = Tuner.restore(path, trainable, resume_errored=True)
        # What it restores are pickled copies from the sweep's first start.
        tuner._local_tuner.get_run_config().callbacks = [callback]
        tuner._local_tuner._tune_config.scheduler = scheduler(sweep, ledger.results)
        tuner._local_tuner._tune_config.search_alg = searcher(sweep, concurrent)
        return tuner
    is_tpe = sweep.config.searcher == "tpe"
    listed = [] if is_tpe else sweep.config.configurations(sweep.base)
    configurations = [configuration(n, values)["configuration"] for n, values in enumerate(listed)]
    return Tuner(
        trainable,
        param_space=None if is_tpe else {"configuration": tune.grid_search(configurations)},
        tune_config=TuneConfig(
            metric=SCORE,
            mode="max",
            search_alg=searcher(sweep, concurrent),
            num_samples=sweep.config.trials or 1 if is_tpe else 1,
            scheduler=scheduler(sweep, ledger.results),
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=RunConfig(
            name="tune",
            storage_path=root,
            failure_config=FailureConfig(max_failures=sweep.base.cluster.max_failures),
            checkpoint_config=CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            callbacks=[callback],
            verbose=0,
        ),
    )


def _name(trial: Trial) -> str:
    return str(trial.config["configuration"]["trial"])


def _pointer(trial: Trial) -> Pointer | None:
    if trial.checkpoint is None:
        return None
    with trial.checkpoint.as_directory() as folder:
        return read_pointer(folder)


class _Bookkeeper(Callback):
    """Tells the ledger what Tune decides, and removes what dead drivers leave behind."""

    def __init__(
        self, job: Job, manifest: Manifest, ledger: Ledger, groups: Mapping[str, Mapping[str, Started]]
    ) -> None:
        self._job, self._manifest, self._ledger, self._groups = job, manifest, ledger, groups

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks; a sweep that is taken up again gets new ones

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        sweep, name, values = self._job.sweep, _name(trial), trial.config["configuration"]["values"]
        if reason := sweep.objection(values, self._manifest):
            self._ledger.refuse(name, values, sweep.seeds(), reason)
            return  # and its first step ends it
        now = stretch(self._job, name, _pointer(trial))
        run_ids = {
            seed: sweep.trial_config(now.name, values, seed).run_id(self._manifest.digest) for seed in sweep.seeds()
        }
        segment = None
        if isinstance(sweep.config.scheduler, Pbt):
            (run_id,) = run_ids.values()
            parent = now.parent.run_id if now.parent else None
            segment = Segment(run_id=run_id, first_epoch=now.first_epoch, values=values, parent=parent)
        self._ledger.begin(name, values, run_ids, segment)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if result.get("scores"):
            self._ledger.score(_name(trial), result[EPOCH], result["scores"])
        if "status" in result:
            self._ledger.end(_name(trial), result["status"], result.get("reason", ""))

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
