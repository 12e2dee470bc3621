"""In which precision losses compute: never less than float32, autocast or not, except for products on accelerators."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LARGEST_LOGIT = 60.0  # exp(60) * 1e6 and exp(-60) are normal float32 numbers
SMALLEST_TEMPERATURE = 0.0015  # exp(1 / 0.0015) * 1e18 and exp(-1 / 0.0015) are normal float64 numbers


def full_precision(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``loss`` with autocast off and its tensors widened to float32 (float64 stays): sums over a batch need it."""

    @functools.wraps(loss)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            wide = [a.to(torch.promote_types(a.dtype, torch.float32)) if isinstance(a, Tensor) else a for a in args]
            return loss(*wide, **kwargs)

    return wrapped


def compute_dtype(embeddings: Tensor, temperature: float) -> torch.dtype:
    """The dtype of products of embeddings of length 1 divided by ``temperature``.

    On an accelerator autocast's, where it is on. On the CPU at least float32: torch's bf16 products there return
    bf16, and take 2x the time of float32 on an Intel Xeon without AMX (0.65 against 0.32 s at N = 4096), though 2/3
    of it on an AMD Zen 4. Below a temperature of 1/60 exponentials of logits no longer fit float32: then float64.
    """
    if 1 / temperature > LARGEST_LOGIT:
        return torch.float64
    device = embeddings.device.type
    if device != "cpu" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(embeddings.dtype, torch.float32)
