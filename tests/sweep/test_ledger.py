"""What becomes of Tune's events, repeated ones included."""

from pathlib import Path

import pytest

from pipeline.sweep.ledger import Ledger
from pipeline.sweep.results import RunResult, SearchedKey, Segment, SweepFolder, SweepResults


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    empty = SweepResults(sweep_id="s", base="", epochs=3, keys=(SearchedKey(key="k", scale="log"),), split="selection")

    def open_run(run: RunResult) -> str:
        return f"mlflow-{run.run_id}"

    return Ledger(
        SweepFolder(str(tmp_path), "s"), empty, open_run=open_run, close_run=lambda _: None, on_change=lambda _: None
    )


def test_every_event_is_on_the_disk_at_once(ledger: Ledger, tmp_path: Path) -> None:
    folder = SweepFolder(str(tmp_path), "s")
    for event in (
        lambda: ledger.begin("t000", {"k": 1.5}, {0: "a", 1: "b"}),
        lambda: ledger.score("t000", 1, {0: (0.5, 3.0), 1: (0.7, 2.0)}),
        lambda: ledger.end("t000", "stopped"),
    ):
        event()
        assert folder.results() == ledger.results
    (trial,) = ledger.results.trials()
    assert (trial.status, trial.epoch, trial.knn, trial.loss) == ("stopped", 1, 0.6, 2.5)
    assert [run.mlflow_run_id for run in trial.runs] == ["mlflow-a", "mlflow-b"]


def test_scores_that_are_told_again_are_not_counted_twice(ledger: Ledger) -> None:
    ledger.begin("t000", {}, {0: "a"})
    for epoch, knn in ((1, 0.1), (2, 0.2), (1, 0.1), (2, 0.2), (3, 0.3)):
        ledger.score("t000", epoch, {0: (knn, 1.0)})
    assert [(score.epoch, score.knn) for score in ledger.results.runs[0].scores] == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_what_ended_stays_as_it_ended(ledger: Ledger) -> None:
    """Tune tells of the end of a trial that has told of its own."""
    ledger.begin("t000", {}, {0: "a"})
    ledger.end("t000", "collapsed", "why")
    ledger.end("t000", "stopped")
    assert (ledger.results.runs[0].status, ledger.results.runs[0].reason) == ("collapsed", "why")


def test_a_finished_trial_that_is_begun_again_stays_as_it_is(ledger: Ledger) -> None:
    """Tune's own state may be older than its end."""
    ledger.begin("t000", {}, {0: "a"})
    ledger.score("t000", 1, {0: (0.1, 1.0)})
    ledger.score("t000", 2, {0: (0.2, 1.0)})
    ledger.end("t000", "finished")
    before = ledger.results
    ledger.begin("t000", {}, {0: "a"})
    ledger.score("t000", 1, {0: (0.1, 1.0)})
    assert ledger.results == before, "killed again at this moment, it has lost nothing"


def test_only_a_finished_trial_is_the_best(ledger: Ledger) -> None:
    for trial, knn, status in (("t0", 0.9, "stopped"), ("t1", 0.95, "diverged"), ("t2", 0.5, "finished")):
        ledger.begin(trial, {}, {0: trial})
        ledger.score(trial, 1, {0: (knn, 1.0)})
        ledger.end(trial, status)
    best = ledger.results.best()
    assert best is not None
    assert best.trial == "t2"


def test_a_segment_takes_the_place_of_what_it_does_again(ledger: Ledger) -> None:
    ledger.begin("t0", {"k": 1.0}, {0: "a"}, Segment(run_id="a", first_epoch=0, values={"k": 1.0}))
    ledger.score("t0", 2, {0: (0.2, 1.0)})
    ledger.score("t0", 3, {0: (0.3, 1.0)})
    segment = Segment(run_id="b", first_epoch=2, values={"k": 1.2}, parent="c")
    for _ in range(2):  # begun, and taken up again
        ledger.begin("t0", {"k": 1.2}, {0: "b"}, segment)
    (run,) = ledger.results.runs
    assert (run.run_id, run.values, [score.epoch for score in run.scores]) == ("b", {"k": 1.2}, [2])
    assert [(part.run_id, part.parent) for part in run.lineage] == [("a", None), ("b", "c")]


def test_a_trial_without_a_run_fails_with_its_reason(ledger: Ledger) -> None:
    ledger.begin("t001", {"k": 2}, {0: "a"})
    for trial in ("t000", "t001"):
        ledger.refuse(trial, {"k": 1.5}, [0], "why")
        ledger.end(trial, "stopped")
    assert [(run.status, run.reason, run.values, run.run_id) for run in ledger.results.runs] == [
        ("failed", "why", {"k": 1.5}, ""),
        ("failed", "why", {"k": 1.5}, "a"),
    ]
