"""Momentum encoders: copies that no gradient reaches and that ``train.py`` moves towards their originals."""

import copy
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def momentum_copy(module: M) -> M:
    """A copy with the same weights, without gradients. Its BatchNorm statistics become its own."""
    return copy.deepcopy(module).requires_grad_(False)
