"""Schedules as pure functions of the global step, so that a resumed run continues exactly where it was."""

import math


def cosine(step: int, *, total_steps: int, start: float, end: float) -> float:
    """Half a cosine from ``start`` at step 0 to ``end`` at ``total_steps``, and ``end`` from there on.

    BYOL's decay (arXiv:2006.07733), 1 - (1 - tau0) * (cos(pi*k/K) + 1) / 2, is ``cosine(k, total_steps=K,
    start=tau0, end=1.0)``.
    """
    progress = min(step / total_steps, 1.0) if total_steps > 0 else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, peak: float, end: float = 0.0) -> float:
    """Linear from 0 to ``peak`` over ``warmup_steps``, then half a cosine to ``end`` at ``total_steps``.

    As in SimCLR, BYOL and Barlow Twins: step 0 has learning rate 0, step ``warmup_steps`` has ``peak``.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    return cosine(step - warmup_steps, total_steps=total_steps - warmup_steps, start=peak, end=end)
