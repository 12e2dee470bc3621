"""Every method is the same run at any world size. The table of the README comes from the same figures."""

import pytest
import torch

from pipeline.methods.base import method_names
from tests.methods.invariance import differences


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
