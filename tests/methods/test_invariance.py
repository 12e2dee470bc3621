"""Every method is the same run at any world size. The table of the README comes from the same figures."""

import pytest
import torch

from pipeline.methods.base import method_names
from tests import gloo
from tests.methods.invariance import difference, differences, train


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("world", [2, 4])
def test_20_steps_in_float64_agree_to_1e_8(name: str, world: int) -> None:
    gaps = differences(name, world, torch.float64)
    assert max(gaps.values()) < 1e-8, gaps


@pytest.mark.parametrize("name", method_names())
def test_one_step_in_float32_agrees_to_rounding(name: str) -> None:
    """2^-24 = 6e-8, amplified by 20 layers of BatchNorm over 16 samples."""
    gaps = differences(name, 2, torch.float32, steps=1)
    assert max(gaps.values()) < 2e-5, gaps
    assert gaps["loss"] < 2e-6, gaps


def _with_all_options(dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    mochi = {"hardest": 10, "mixed": 8, "with_query": 4, "start_step": 2}
    options = {"exclude_own_keys": True, "positive_prior": 0.1, "hardness": 0.5, "mochi": mochi}
    return train("moco_v2", dtype, 8, **options)


def test_mixtures_and_corrected_losses_do_not_depend_on_the_number_of_ranks_either() -> None:
    expected = _with_all_options(torch.float64)
    for rank in gloo.run(2, _with_all_options, torch.float64):
        assert max(difference(rank[group], expected[group]) for group in expected) < 1e-8
    plain = train("moco_v2", torch.float64, 8)
    assert difference(plain["weights"], expected["weights"]) > 1e-4, "the options reached the loss"
