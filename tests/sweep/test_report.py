"""What a person reads after a sweep, and the config it leaves."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from pipeline.config import load_config
from pipeline.sweep.display import SweepDisplay
from pipeline.sweep.report import (
    NoBestError,
    best_config,
    early_and_final,
    loss_and_knn,
    rank_correlation,
    summary,
    table,
    tied_with_best,
)
from pipeline.sweep.results import EpochScore, Final, RunResult
from tests.sweep.sweeps import DECAY, TEMPERATURE, one_run, sweep

KEYS = {TEMPERATURE: "log", DECAY: "one_minus_log"}


def seeds(trial: int, temperature: float, knns: list[float], **settings: object) -> list[RunResult]:
    values: dict[str, float | str] = {TEMPERATURE: temperature, DECAY: 0.996}
    return [one_run(trial, values, knn, seed=seed, **settings) for seed, knn in enumerate(knns)]  # type: ignore[arg-type]


RUNS = [
    *seeds(0, 0.4, [0.70, 0.72]),
    *seeds(1, 0.2, [0.93, 0.95], loss=2.0),
    *seeds(2, 0.1, [0.92, 0.95], loss=3.0),
    *seeds(3, 0.8, [0.50, 0.51], epochs=3, status="stopped"),
    *seeds(4, 0.05, [0.97, 0.10], epochs=2, status="collapsed", reason="the embeddings have collapsed\nand more"),
]


def test_the_table_ranks_by_knn_shares_ranks_within_the_spread_and_puts_failures_last() -> None:
    head, *rows = table(sweep(RUNS, KEYS)).splitlines()
    assert head.split() == [
        "rank",
        "trial",
        "temperature",
        "ema_decay",
        "kNN",
        "+-",
        "seeds",
        "epochs",
        "loss",
        "status",
    ]
    assert [row.split()[:2] for row in rows] == [
        ["1=", "t001"],
        ["1=", "t002"],
        ["3", "t000"],
        ["-", "t003"],
        ["-", "t004"],
    ]
    assert rows[0].split() == ["1=", "t001", "0.2", "0.996", "94.0%", "1.4", "2", "9/9", "2.000", "finished"]
    assert rows[3].split()[4:8] == ["50.5%", "0.7", "2", "3/9"]
    assert rows[4].endswith("collapsed: the embeddings have collapsed"), "the first line of the reason"
    assert len({row.index("finished") for row in rows[:3]}) == 1, "columns are aligned"


def test_the_summary_names_the_tie_and_the_optimism() -> None:
    results = sweep(RUNS, KEYS)
    final = Final(
        trial="t001", seed=0, run_id="r", selection_knn=0.95, validation_knn=0.931, validation_linear=None,
        encoder="models:/toy@champion", model_uri="models:/m", version="1",
    )  # fmt: skip
    text = summary(results.model_copy(update={"final": final}), early_epoch=1)
    assert tied_with_best(results) == ["t001", "t002"]
    assert "a tie: t001, t002" in text
    assert "kNN after epoch 1 with the final: +1.00 (3 trials)" in text
    assert "final loss with the final kNN: -1.00 (3 trials)" in text
    assert "95.0% on 'selection', which chose it, 93.1% on validation, which did not" in text
    assert "one seed each" in summary(sweep([run for run in RUNS if run.seed == 0], KEYS))


def test_keys_that_end_alike_are_told_apart_and_inactive_ones_are_blank() -> None:
    keys = {"optim.name": "categories", "method.name": "categories", DECAY: "one_minus_log"}
    runs = [
        one_run(0, {"optim.name": "lars", "method.name": "byol", DECAY: 0.996}, 0.9),
        one_run(1, {"optim.name": "sgd", "method.name": "simclr"}, 0.8),
    ]
    head, byol, simclr = table(sweep(runs, keys)).splitlines()
    assert head.split()[2:5] == ["optim.name", "method.name", "ema_decay"]
    assert byol.split()[2:5] == ["lars", "byol", "0.996"]
    assert simclr.split()[2:5] == ["sgd", "simclr", "-"]


def test_a_sweep_without_a_finished_trial_has_a_table_and_no_best() -> None:
    results = sweep([one_run(0, {TEMPERATURE: 0.1}, 0.5, epochs=1, status="running")], {TEMPERATURE: "log"})
    assert "fewer than 3 finished trials" in summary(results, early_epoch=1)
    assert tied_with_best(results) == []
    with pytest.raises(NoBestError, match=r"no finished trial to take a config from: t000 running"):
        best_config(results, load_config("configs/quickstart.yaml"))


def test_what_failed_is_told_with_its_reason() -> None:
    reason = f"OSError: [Errno 28] No space left on device: {'/a-long-path' * 8}"
    failed = one_run(0, {TEMPERATURE: 0.1}, 0.5, epochs=1, status="failed", reason=f"{reason}\nand more")
    results = sweep([failed], {TEMPERATURE: "log"})
    with pytest.raises(NoBestError) as caught:
        best_config(results, load_config("configs/quickstart.yaml"))
    assert str(caught.value).endswith(f": t000 failed: {reason}")
    stream = io.StringIO()
    SweepDisplay(stream).show(results)
    assert stream.getvalue().endswith(f"temperature 0.1  failed: {reason}\n")
    assert "No space left on device" in table(results)


def test_rank_correlation_is_scipy_s_with_ties_and_counts_its_points() -> None:
    random = np.random.default_rng(0)
    xs, ys = random.integers(0, 6, 20).tolist(), random.normal(size=20).tolist()
    found = rank_correlation(xs, ys)
    assert found is not None
    ranks = [scipy.stats.rankdata(values) for values in (xs, ys)]
    assert found.rho == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found.points == 20
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
    constant = rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    assert constant is not None
    assert math.isnan(constant.rho)


def test_only_finished_trials_that_have_the_early_score_count() -> None:
    runs = [one_run(i, {TEMPERATURE: 0.1 * (i + 1)}, knn) for i, knn in enumerate([0.5, 0.6, 0.7, 0.8])]
    late = runs[3].model_copy(update={"scores": (EpochScore(epoch=9, knn=0.8, loss=1.0),)})
    results = sweep([*runs[:3], late, one_run(4, {TEMPERATURE: 1.0}, 0.1, epochs=3, status="stopped")], KEYS)
    early, at_the_end = early_and_final(results, 1), loss_and_knn(results)
    assert early is not None
    assert at_the_end is not None
    assert (early.points, at_the_end.points) == (3, 4)


def test_the_best_config_is_ready_to_run_and_says_where_it_comes_from(tmp_path: Path) -> None:
    base = load_config("configs/quickstart.yaml", ["method={name: moco_v2, queue_size: 1024}"])
    file = tmp_path / "best.yaml"
    file.write_text(best_config(sweep(RUNS, KEYS), base))
    best = load_config(file)
    assert best.name == "quickstart-best"
    assert best.flat() == {**base.flat(), TEMPERATURE: "0.2", DECAY: "0.996", "name": "quickstart-best"}
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    for words in (
        "best of 5 trials of sweep toy-0123456789, 3 of which ran to the end",
        "94.0% +- 1.4 weighted kNN on the split 'selection' after 9 epochs",
        "Trial t001: method.temperature=0.2, method.ema_decay=0.996",
        "Runs: toy-001-0, toy-001-1",
        "MLflow: run abc at sqlite:///m.db",
        "python -m jobs.pretrain",
    ):
        assert any(words in line for line in header), words


def test_a_long_name_stays_a_name(tmp_path: Path) -> None:
    base = load_config("configs/quickstart.yaml", [f"name={'a' * 35}-{'b' * 5}"])
    file = tmp_path / "best.yaml"
    decay = "optim.weight_decay"
    file.write_text(best_config(sweep([one_run(0, {decay: 1e-05}, 0.5)], {decay: "log"}), base))
    best = load_config(file)
    assert (best.name, best.flat()[decay]) == (f"{'a' * 35}-best", "1e-05")
