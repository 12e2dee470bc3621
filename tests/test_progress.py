"""Progress for a person: lines where there is no terminal, a bar on a real one."""

import io
import os
import pty
from dataclasses import replace

from pipeline.progress import Progress, ProgressDisplay


def report(step: int) -> Progress:
    return Progress(step=step, total_steps=100, epoch=1, images_per_s=256.0, data_wait=0.031, metrics={"loss": 1.23456})


def test_lines_elsewhere_with_an_eta_in_time() -> None:
    stream = io.StringIO()
    display = ProgressDisplay(global_batch_size=128, stream=stream)
    display.show(report(10))
    display.note("rank 1 failed")
    display.close()
    assert stream.getvalue() == (
        "step 10/100  epoch 1  loss 1.2346  256 images/s  waiting for data 3%  ETA 0:45\nrank 1 failed\n"
    )


def test_a_bar_on_a_terminal_that_starts_where_a_resumed_run_does() -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        display = ProgressDisplay(global_batch_size=128, stream=terminal)
        display.show(replace(report(40), metrics={"loss": 2.0, "selection/knn": 0.9312}))
        display.show(report(50))
        display.close()
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "50/100" in shown
    assert "loss 1.2346  256 images/s  waiting for data 3%  selection kNN 93.1%" in shown, "the last score stays"
    assert "0/100" not in shown.replace("50/100", "").replace("40/100", "")


def test_a_score_stands_in_its_line() -> None:
    stream = io.StringIO()
    display = ProgressDisplay(global_batch_size=128, stream=stream)
    display.show(replace(report(10), metrics={"loss": 1.0, "selection/knn": 0.9312}))
    display.show(report(20))
    first, second = stream.getvalue().splitlines()
    assert "waiting for data 3%  selection kNN 93.1%  ETA" in first
    assert "kNN" not in second


def test_what_a_tracker_gets_is_named_by_kind() -> None:
    assert report(10).logged == {
        "train/loss": 1.23456,
        "train/epoch": 1.0,
        "speed/images_per_s": 256.0,
        "speed/data_wait": 0.031,
        "data/bad_samples": 0.0,
    }
