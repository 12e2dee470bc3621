"""Tune's searchers and schedulers for a sweep, with what they lack."""

import functools
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch

from pipeline.cluster.trial import EPOCH, SCORE
from pipeline.sweep.config import Asha, Pbt, Sweep, SweepConfig
from pipeline.sweep.results import SweepResults
from pipeline.sweep.space import Entry


def configuration(trial: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Tune's config of a trial."""
    return {"configuration": {"trial": f"t{trial:03d}", "values": dict(values)}}


class _Limited:
    """As many trials at a time as the cluster holds now, not as when the sweep began: Tune restores that too."""

    max_concurrent: int

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state({**state, "max_concurrent": self.max_concurrent})  # type: ignore[misc]


class _Listed(_Limited, BasicVariantGenerator):
    """The configurations that Tune is given, in order."""


class _OneByOne(_Limited, ConcurrencyLimiter):
    """The next one is drawn when a trial has ended, by what came before."""


def searcher(sweep: Sweep, concurrent: int) -> SearchAlgorithm | Searcher:
    """What gives Tune the next trial, ``concurrent`` at a time."""
    if sweep.config.searcher == "tpe":
        return _OneByOne(tpe(sweep), max_concurrent=concurrent)
    # Of PBT's population those that pause would count as well: the drivers' resource alone makes the others wait.
    return _Listed(max_concurrent=0 if isinstance(sweep.config.scheduler, Pbt) else concurrent)


def tpe(sweep: Sweep) -> Searcher:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), over the keys that apply."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", optuna.exceptions.ExperimentalWarning
        )  # group: for keys that do not always apply
        sampler = optuna.samplers.TPESampler(seed=sweep.config.seed, multivariate=True, group=True)
    suggest = functools.partial(_suggest, sweep.config, sweep.base.model_dump(mode="json"))
    return OptunaSearch(suggest, metric=SCORE, mode="max", sampler=sampler)


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

    return configuration(trial.number, config.resolve(base, choose))


def scheduler(sweep: Sweep, results: SweepResults) -> TrialScheduler:
    """The one that the sweep asks for. ``results``: what it knew before the sweep was interrupted."""
    config = sweep.config.scheduler
    if isinstance(config, Asha):
        return _Asha(config, sweep.base.train.epochs, results)
    return _Pbt(sweep, config, results) if isinstance(config, Pbt) else _Fifo(results)


class _Retrying:
    """Runs a trial that failed again when the sweep is taken up, as Tune does only with those that lost their driver.

    A disk was full, or memory: that is mended, where a collapse would come again.
    """

    def __init__(self, results: SweepResults, **options: Any) -> None:
        super().__init__(**options)
        self._failed = {trial.trial for trial in results.trials() if trial.status == "failed"}

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        if trial.config["configuration"]["trial"] in self._failed:
            trial.set_status(Trial.PENDING)  # of a restored one Tune asks for the status next
            trial.run_metadata.num_failures = 0  # as many restarts as at first
        super().on_trial_add(tune_controller, trial)  # type: ignore[misc]


class _Fifo(_Retrying, FIFOScheduler):
    """Every trial to its end."""


class _Asha(_Retrying, ASHAScheduler):
    """Tune does not save a scheduler with its experiment: the rungs are filled again from the results."""

    def __init__(self, config: Asha, epochs: int, results: SweepResults) -> None:
        super().__init__(
            results,
            time_attr=EPOCH,
            max_t=epochs,
            grace_period=config.grace_epochs,
            reduction_factor=config.reduction,
        )
        (bracket,) = self._brackets
        for trial in results.trials():
            epochs_seen = sorted({score.epoch for run in trial.runs for score in run.scores})
            if trial.status not in ("running", "failed"):  # one that goes on tells its scores again
                for epoch in epochs_seen:
                    bracket.on_result(SimpleNamespace(trial_id=trial.trial), epoch, trial.knn_at(epoch))


class _Pbt(_Retrying, PopulationBasedTraining):
    """Perturbs on the scale that a key is searched on: a decay m by its 1 - m, and what is coupled to it follows."""

    def __init__(self, sweep: Sweep, config: Pbt, results: SweepResults) -> None:
        super().__init__(
            results,
            time_attr=EPOCH,
            perturbation_interval=config.every_epochs,
            quantile_fraction=config.quantile,
            custom_explore_fn=dict,  # PBT wants one; _get_new_config takes its place
            log_config=False,
        )
        self._sweep, self._every = sweep, config.every_epochs

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decides at multiples of ``every_epochs`` alone, where a checkpoint is: Tune counts from the last decision,
        and after a restart from 0, so that a trial restored at epoch 3 of every 3 would be due at epoch 4."""
        if result[EPOCH] % self._every:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        number = int(trial.config["configuration"]["trial"].removeprefix("t"))
        epoch = self._trial_state[trial].last_train_time
        random = np.random.default_rng([self._sweep.config.seed, number, epoch])
        of_clone = trial_to_clone.config["configuration"]["values"]
        return configuration(number, self._sweep.perturbed(of_clone, random)), {}
