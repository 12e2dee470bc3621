"""Schedules at the points that the papers define."""

import math

import pytest

from pipeline.schedules import cosine, warmup_cosine


def test_cosine_runs_from_start_to_end_and_stays_there() -> None:
    values = [cosine(step, total_steps=100, start=0.99, end=1.0) for step in range(0, 131, 10)]
    assert values[0] == pytest.approx(0.99)
    assert values[5] == pytest.approx(0.995)
    assert values[10:] == pytest.approx([1.0] * 4)
    assert values == sorted(values)


@pytest.mark.parametrize("step", [0, 1, 250, 999])
def test_cosine_is_the_decay_that_byol_publishes(step: int) -> None:
    tau0, steps = 0.996, 1000
    published = 1 - (1 - tau0) * (math.cos(math.pi * step / steps) + 1) / 2
    assert cosine(step, total_steps=steps, start=tau0, end=1.0) == pytest.approx(published, abs=1e-15)


def test_warmup_is_linear_from_zero_and_joins_the_cosine_at_the_peak() -> None:
    def at(step: int) -> float:
        return warmup_cosine(step, warmup_steps=10, total_steps=110, peak=4.8, end=0.2)

    assert at(0) == 0
    assert at(5) == pytest.approx(2.4)
    assert at(10) == pytest.approx(4.8)
    assert at(60) == pytest.approx(2.5)
    assert at(110) == pytest.approx(0.2)


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert warmup_cosine(0, warmup_steps=0, total_steps=10, peak=1.0) == 1.0
