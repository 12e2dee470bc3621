"""Noise-contrastive estimation over a memory bank (Wu et al. 2018, arXiv:1805.01978, equations 4 to 8).

A query tells its own slot from ``num_noise`` slots drawn uniformly from all N, where P(i|q) = exp(q.m_i / T) / Z and Z
is a constant, estimated once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def nce(
    own: Tensor, noise: Tensor, is_own: Tensor, log_z: Tensor, num_samples: int, *, hard: Tensor | None = None
) -> Tensor:
    """The mean over queries of -log h(own) - sum log(1 - h(noise)), with h = P / (P + M/N), M noise slots a query.

    Args:
        own: (B,) logits q.m_i / T against the query's own slot; noise: (B, M), against the drawn ones.
        is_own: (B, M), True where the draw hit the query's own slot, which then is no noise.
        log_z: scalar, of ``log_normalizer``.
        hard: (B, k), against slots that were chosen, not drawn: each is one more term like the noise's, so the optimum
            is no longer that of the probability.
    """
    log_noise = math.log(noise.shape[1] / num_samples)  # of M x the uniform probability
    is_data = F.logsigmoid(own - log_z - log_noise)
    is_noise = F.logsigmoid(-(noise - log_z - log_noise)).masked_fill(is_own, 0)
    losses = is_data + is_noise.sum(1)
    if hard is not None:
        losses = losses + F.logsigmoid(-(hard - log_z - log_noise)).sum(1)
    return -losses.mean()


def chance(num_noise: int) -> float:
    """``nce`` where every slot has the probability 1/N."""
    return math.log1p(num_noise) + num_noise * math.log1p(1 / num_noise)


def log_normalizer(own: Tensor, noise: Tensor, is_own: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of exp(logits), number of logits) of a first batch; log Z = log(N x the sum / the number, over ranks)."""
    logits = torch.cat([own[:, None], noise.masked_fill(is_own, -torch.inf)], dim=1).detach()
    return logits.exp().sum(), (logits > -torch.inf).sum().to(logits.dtype)
