"""The intervals hold what they promise: over many draws, 95 % of them contain the truth."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from pipeline.evaluate.intervals import accuracy_interval, difference_interval


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (937, 1000), (20, 20), (1, 3), (599, 1000)])
def test_an_accuracy_has_wilson_s_interval_as_scipy_has_it(hits: int, n: int) -> None:
    mask = torch.arange(n) < hits
    peer = binomtest(hits, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(accuracy_interval(mask), (peer.low, peer.high), atol=1e-6)


@pytest.mark.parametrize("n", [300, 1000])
@pytest.mark.parametrize(
    ("both", "only_first", "only_second"), [(0.9, 0.03, 0.02), (0.5, 0.2, 0.1), (0.55, 0.05, 0.05)]
)
def test_the_interval_of_a_difference_contains_it_in_95_of_100_draws(
    n: int, both: float, only_first: float, only_second: float
) -> None:
    generator = np.random.default_rng(0)
    outcomes = generator.choice(
        4, size=(2000, n), p=[both, only_first, only_second, 1 - both - only_first - only_second]
    )
    first, second = (
        torch.from_numpy((outcomes == 0) | (outcomes == 1)),
        torch.from_numpy((outcomes == 0) | (outcomes == 2)),
    )
    intervals = [difference_interval(a, b) for a, b in zip(first, second, strict=True)]
    held = np.mean([low <= only_first - only_second <= high for low, high in intervals])
    assert 0.935 <= held <= 0.98  # 2,000 draws tell 0.95 to within 0.01; with few differing images it is cautious


def test_it_is_narrower_than_two_intervals_apart() -> None:
    """Two representations that err on the same images differ by less than what chance does to each."""
    first = torch.arange(1000) < 950
    second = torch.arange(1000) < 935
    low, high = difference_interval(first, second)
    assert 0 < low < 0.015 < high
    assert accuracy_interval(first)[0] < accuracy_interval(second)[1]  # they overlap
