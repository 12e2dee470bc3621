"""Tune's schedulers and searcher with what was added to them; no cluster."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.experiment import Trial

from pipeline.cluster import searching, trial
from pipeline.cluster.inbox import Started
from pipeline.cluster.sweep import _Bookkeeper
from pipeline.cluster.trial import WORST, Job, Pointer, PretrainTrial, stretch
from pipeline.sweep.config import Sweep, load_sweep
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.results import EpochScore, RunResult, Status, SweepFolder, SweepResults
from tests.data.images import write_digits

RANGES = (
    "sweep.space={method.temperature: {log_uniform: [0.05, 1]}, "
    "method.ema_decay: {one_minus_log_uniform: [0.9, 0.9999]}}"
)


def load(folder: Path, *arguments: str) -> Sweep:
    sweep = load_sweep("configs/sweep/digits-moco.yaml", [f"storage.url={folder}", RANGES, *arguments])
    return sweep._replace(train_images=3200)


def trial_of(job: Job, config: dict[str, Any]) -> PretrainTrial:
    """A trial in this process; Tune binds the job to it through its object store."""

    class Bound(PretrainTrial):
        def setup(self, config: dict[str, Any]) -> None:  # type: ignore[override]
            super().setup(config, job)

    return Bound(config)


def test_asha_knows_after_a_restart_what_it_knew(tmp_path: Path) -> None:
    sweep = load(tmp_path, "sweep.searcher=random", "sweep.trials=9")
    runs = tuple(
        RunResult(
            trial=f"t{i:03d}", seed=0, values={}, status="running" if i == 3 else "stopped",
            scores=(EpochScore(epoch=1, knn=knn, loss=1.0),),
        )
        for i, knn in enumerate((0.5, 0.6, 0.7, 0.99))
    )  # fmt: skip
    restarted = searching.scheduler(sweep, sweep.no_results("s").model_copy(update={"runs": runs}))
    (bracket,) = restarted._brackets
    rungs = {milestone: sorted(recorded.values()) for milestone, recorded in bracket._rungs}
    assert rungs == {9.0: [], 3.0: [], 1.0: [0.5, 0.6, 0.7]}, "the one that goes on tells its score again"
    new = SimpleNamespace(trial_id="x")
    assert bracket.on_result(new, 1, 0.55) == "STOP"


def test_pbt_perturbs_on_the_scale_of_the_key(tmp_path: Path) -> None:
    sweep = load(
        tmp_path, "sweep.searcher=random", "sweep.trials=4", "sweep.scheduler={name: pbt, every_epochs: 3, resample: 0}"
    )
    found: set[tuple[float, float]] = set()
    for seed in range(20):
        values: Any = sweep.perturbed(
            {"method.temperature": 0.2, "method.ema_decay": 0.99}, np.random.default_rng(seed)
        )
        found.add((values["method.temperature"], values["method.ema_decay"]))
    assert found == {(t, m) for t in (0.16, 0.24) for m in (0.988, 0.992)}, "1 - m x 0.8 or 1.2"
    at_the_end: Any = sweep.perturbed({"method.temperature": 1.0, "method.ema_decay": 0.9}, np.random.default_rng(0))
    assert 0.05 <= at_the_end["method.temperature"] <= 1.0
    assert 0.9 <= at_the_end["method.ema_decay"] <= 0.9999


def test_pbt_keeps_the_checkpoints_that_a_trial_may_begin_with(tmp_path: Path) -> None:
    sweep = load(tmp_path, "sweep.searcher=random", "sweep.trials=4", "sweep.scheduler={name: pbt, every_epochs: 3}")
    config = sweep.trial_config("x", {"method.temperature": 0.2}, 0)
    assert config.train.checkpoint_every_steps == 3 * sweep.steps_per_epoch(config)
    assert config.train.keep_checkpoints >= 3


def test_a_stretch_is_named_after_where_it_begins(tmp_path: Path) -> None:
    job = Job(load(tmp_path, "sweep.searcher=tpe", "sweep.trials=2"), "s-0123456789", "", None)  # type: ignore[arg-type]
    assert stretch(job, "t001", None).name == "s-0123456789"
    own = Pointer("t001", "s-0123456789-t001-e4-abc", 6)
    assert stretch(job, "t001", own) == ("s-0123456789-t001-e4", 6, None), "its own run goes on"
    other = Pointer("t002", "s-0123456789-def", 4)
    assert stretch(job, "t001", other) == ("s-0123456789-t001-e4", 4, other), "a new one begins with the other's"


def test_values_that_make_no_run_end_the_trial_and_not_the_sweep(tmp_path: Path) -> None:
    manifest = write_digits(f"{tmp_path}/shards", {"train": 600, "validation": 20})
    sweep = load(tmp_path, "sweep.searcher=tpe", "sweep.trials=2").for_data(manifest)
    job = Job(sweep, "s-0123456789", manifest.url, None)  # type: ignore[arg-type]
    ledger = Ledger(
        SweepFolder(str(tmp_path), "s"), sweep.no_results("s"),
        open_run=lambda run: run.run_id, close_run=lambda run: None, on_change=lambda results: None,
    )  # fmt: skip
    drawn = searching.configuration(0, {"method.queue_size": 16, "method.temperature": 0.2})
    told: Any = SimpleNamespace(config=drawn, checkpoint=None)
    _Bookkeeper(job, manifest, ledger, {}).on_trial_start(0, [], told)
    (run,) = ledger.results.runs
    assert (run.status, run.reason.partition(";")[0]) == (
        "failed",
        "method.queue_size=16 does not hold the 64 keys of a global batch",
    )
    result = trial_of(job, drawn).step()
    assert (result["done"], result["status"], result["reason"], result["knn"]) == (True, "failed", run.reason, WORST)


def test_a_controller_that_starts_too_late_is_aborted_and_is_not_the_next_trial_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a cluster: what Ray Train does here is to announce its controller when it can."""
    manifest = write_digits(f"{tmp_path}/shards", {"train": 600, "validation": 20})
    sweep = load(tmp_path, "sweep.searcher=tpe", "sweep.trials=2").for_data(manifest)
    job: Any = Job(sweep, "s-0123456789", manifest.url, SimpleNamespace(put=SimpleNamespace(remote=print)))  # type: ignore[arg-type]
    go_on, asked = threading.Event(), threading.Event()
    aborted: list[Any] = []

    def pretrain(config: Any, *manifest: Any, on_start: Callable[[Started], None], **options: Any) -> None:
        asked.set()
        assert go_on.wait(30)
        on_start(Started(f"of {config.method.temperature}"))  # type: ignore[arg-type]

    monkeypatch.setattr(trial, "pretrain", pretrain)
    monkeypatch.setattr(trial, "_abort", aborted.append)
    monkeypatch.setattr(trial, "_ABORT_S", 0.2)
    first, second = (searching.configuration(n, {"method.temperature": 0.1 + n}) for n in range(2))
    stopped = trial_of(job, first)
    stopped._begin()
    assert asked.wait(30)
    threads = stopped._threads
    stopped.reset_config(second)
    stopped._begin()
    go_on.set()
    for thread in threads + stopped._threads:  # one that outlives the test would train in earnest
        thread.join(60)
    assert aborted == ["of 0.1"]
    assert [*stopped._controllers.values()] == ["of 1.1"]


def step_by_step(
    scheduler: Any, *trials: Trial, statuses: tuple[str, ...]
) -> tuple[Any, list[tuple[Trial, dict[str, Any]]]]:
    """The scheduler's view of Tune's loop with these trials, and what it asks to save."""
    saved: list[tuple[Trial, dict[str, Any]]] = []
    loop = SimpleNamespace(
        search_alg=None,
        get_trials=lambda: trials,
        _schedule_trial_save=lambda trial, result: saved.append((trial, result)),
    )
    scheduler.set_search_properties("knn", "max")
    for one, status in zip(trials, statuses, strict=True):
        one.set_status(status)
        scheduler.on_trial_add(loop, one)
    return loop, saved


def tune_trial(number: int) -> Trial:
    return Trial("unregistered", config=searching.configuration(number, {"method.temperature": 0.2}), stub=True)


def test_pbt_that_is_taken_up_again_decides_where_checkpoints_are(tmp_path: Path) -> None:
    """Restored at epoch 3 of every 3, a trial tells of epoch 4 next, of which there is no checkpoint to wait for."""
    sweep = load(tmp_path, "sweep.searcher=random", "sweep.trials=4", "sweep.scheduler={name: pbt, every_epochs: 3}")
    pbt: Any = searching.scheduler(sweep, sweep.no_results("s"))
    going, waiting = tune_trial(0), tune_trial(1)
    loop, saved = step_by_step(pbt, going, waiting, statuses=(Trial.RUNNING, Trial.PAUSED))
    pbt._trial_state[waiting].last_score = 0.1
    decisions = {epoch: pbt.on_trial_result(loop, going, {"epoch": epoch, "knn": 0.9}) for epoch in (4, 5, 6, 7)}
    assert decisions == {4: "CONTINUE", 5: "CONTINUE", 6: "PAUSE", 7: "CONTINUE"}
    assert [result["epoch"] for _, result in saved] == [6]


@pytest.mark.parametrize("name", ["none", "asha"])
def test_what_failed_is_to_run_again_and_what_ended_is_not(tmp_path: Path, name: str) -> None:
    sweep = load(tmp_path, "sweep.searcher=random", "sweep.trials=4", f"sweep.scheduler={{name: {name}}}")
    statuses: tuple[Status, ...] = ("failed", "collapsed", "stopped", "finished")
    runs = tuple(RunResult(trial=f"t{n:03d}", seed=0, values={}, status=status) for n, status in enumerate(statuses))
    restored = [tune_trial(n) for n in range(4)]
    restored[0].run_metadata.num_failures = 4
    scheduler = searching.scheduler(sweep, sweep.no_results("s").model_copy(update={"runs": runs}))
    step_by_step(scheduler, *restored, statuses=(Trial.TERMINATED,) * 4)
    assert [one.status for one in restored] == [Trial.PENDING, *[Trial.TERMINATED] * 3]
    assert restored[0].run_metadata.num_failures == 0


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_as_many_run_at_a_time_as_the_cluster_holds_now(tmp_path: Path, kind: str) -> None:
    sweep = load(tmp_path, f"sweep.searcher={kind}", "sweep.trials=9")
    before, now = searching.searcher(sweep, 1), searching.searcher(sweep, 3)
    now.set_state(before.get_state())
    assert now.max_concurrent == 3  # type: ignore[union-attr]


def test_tpe_learns_where_the_best_are_and_skips_keys_that_do_not_apply(tmp_path: Path) -> None:
    space = (
        "sweep.space={optim.name: {choice: [sgd, lars]}, method.temperature: {log_uniform: [0.05, 1]}, "
        "optim.momentum: {uniform: [0.5, 0.95], when: {optim.name: sgd}}}"
    )
    sweep = load(tmp_path, space, "sweep.searcher=tpe", "sweep.trials=60")
    searcher = searching.tpe(sweep)
    temperatures = []
    for number in range(60):
        config = searcher.suggest(str(number))["configuration"]
        values = config["values"]
        assert config["trial"] == f"t{number:03d}"
        assert ("optim.momentum" in values) == (values["optim.name"] == "sgd")
        temperatures.append(values["method.temperature"])
        knn = 1 - abs(np.log(values["method.temperature"] / 0.2)) - 0.2 * (values["optim.name"] == "lars")
        searcher.on_trial_complete(str(number), {"knn": knn})
    spread = np.abs(np.log(np.array(temperatures) / 0.2))
    assert spread[40:].mean() < 0.5 * spread[:10].mean()


@pytest.mark.parametrize("name", ["none", "asha"])
def test_the_scheduler_is_the_one_asked_for(tmp_path: Path, name: str) -> None:
    sweep = load(tmp_path, "sweep.searcher=random", "sweep.trials=4", f"sweep.scheduler={{name: {name}}}")
    empty: SweepResults = sweep.no_results("s")
    kinds = {"none": "_Fifo", "asha": "_Asha"}
    assert type(searching.scheduler(sweep, empty)).__name__ == kinds[name]
