"""Two corrections of a contrastive loss's sum over negatives: debiased (arXiv:2007.00224), hard (arXiv:2010.04592)."""

from collections.abc import Callable

import torch
from torch import Tensor


def corrected(
    own: Tensor,
    log_sum_exp: Callable[[float], Tensor],
    counts: Tensor,
    temperature: float,
    *,
    positive_prior: float,
    hardness: float,
) -> Tensor:
    """(B,) -> (B,): the log of what takes the place of sum_n e^{q.n/T} for each query; without corrections that sum's.

    Args:
        own: (B,) logits q.k+/T of the positives.
        log_sum_exp: temperature -> (B,), log sum_n e^{q.n/temperature} over each query's negatives.
        counts: N, how many negatives a query has: (B,) or a scalar, float64.
        positive_prior: tau+, the share of negatives that are positives in truth, whose part is subtracted
            (Chuang et al. 2020, equation 8); in [0, 1).
        hardness: beta >= 0 weighs each negative by e^{beta q.n/T} (Robinson et al. 2021, equation 4; the released
            code, like here, multiplies the logit that has T in it).
    """
    if hardness:
        # N * sum(e^l * e^{beta l}) / sum(e^{beta l}): the weighted sum is itself a ratio of sums of exponentials
        others = log_sum_exp(temperature / (1 + hardness)) - log_sum_exp(temperature / hardness) + counts.log()
    else:
        others = log_sum_exp(temperature)
    return _debiased(own, others, counts, temperature, positive_prior) if positive_prior else others


def _debiased(own: Tensor, others: Tensor, counts: Tensor, temperature: float, positive_prior: float) -> Tensor:
    """log max((e^others - tau+ N e^own) / (1 - tau+), N e^{-1/T}), each (B,).

    Relative to the largest logit, 1/T, so that nothing overflows; the floor as a logarithm, so that it is no 0.
    """
    tiny = torch.finfo(torch.float64).tiny  # whose logarithm has a slope, which that of 0 has not
    largest = 1 / temperature
    own, others = own.double() - largest, others.double() - largest
    debiased = (others.exp() - positive_prior * counts * own.exp()) / (1 - positive_prior)
    floor = counts.log() - 2 * largest
    return torch.where(debiased > tiny, debiased.clamp(min=tiny).log(), floor).clamp(min=floor) + largest
