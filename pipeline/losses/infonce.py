"""InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) as MoCo uses it: gradient to the query, none to the keys.

Because keys are constants, the query's gradient is a weighted mean of keys, and one pass over blocks of keys gives both
the loss and the gradient: no (B, K) matrix, no copy of the queue, nothing to recompute. All embeddings have length 1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pipeline.losses.corrections import corrected
from pipeline.losses.precision import compute_dtype


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float,
    *,
    sample_ids: tuple[Tensor, Tensor] | None = None,
    positive_prior: float = 0.0,
    hardness: float = 0.0,
    synthetic: Tensor | None = None,
) -> Tensor:
    """The mean over the queries of -log(e^{q.k+/T} / (e^{q.k+/T} + sum_n e^{q.n/T})), MoCo's equation 1.

    Args:
        query: (B, D); positive: (B, D), row i belongs to query i, no gradient; negatives: (K, D), the queue.
            A bf16 queue makes the products bf16 on an accelerator and is widened block by block on the CPU.
        sample_ids: of the queries (B,) and of the negatives (K,); a key of the query's own sample is then no negative.
        positive_prior, hardness: see ``corrected``.
        synthetic: (B, M, D), more negatives for each query, its own; the two corrections above leave them alone.
    """
    own = (query * positive.detach()).sum(1) / temperature  # (B,)
    others = corrected(
        own,
        lambda t: log_sum_exp_similarity(query, negatives, t, sample_ids),
        _counts(negatives, sample_ids),
        temperature,
        positive_prior=positive_prior,
        hardness=hardness,
    )
    if synthetic is not None:
        more = torch.einsum("bd,bmd->bm", query, synthetic.to(query.dtype)) / temperature
        others = torch.logaddexp(others, more.logsumexp(1))
    return (torch.logaddexp(own, others.to(own.dtype)) - own).mean()


def _counts(negatives: Tensor, sample_ids: tuple[Tensor, Tensor] | None) -> Tensor:
    """How many negatives a query has, float64: (B,), or a scalar where all have all."""
    if sample_ids is None:
        return torch.tensor(float(len(negatives)), dtype=torch.float64, device=negatives.device)
    own, of_keys = sample_ids
    return (own[:, None] != of_keys[None]).sum(1).double()


def log_sum_exp_similarity(
    query: Tensor, keys: Tensor, temperature: float, sample_ids: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """(B, D), (K, D) -> (B,): log sum_k exp(q.k / temperature), differentiable in the query alone.

    With ``sample_ids`` of queries (B,) and keys (K,), over the keys of other samples; -inf if there is none.
    """
    dtype = compute_dtype(query, temperature)
    value: Tensor = _LogSumExpSimilarity.apply(query, keys, temperature, dtype, sample_ids)
    return value


CPU_BLOCK = 512  # keys at a time: 0.5 MiB of logits at B = 256 stays in a core's cache
ACCELERATOR_BLOCK = 16384


class _LogSumExpSimilarity(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        temperature: float,
        dtype: torch.dtype,
        sample_ids: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            scaled = (query / temperature).to(dtype)
            sums = query.new_zeros(len(query), dtype=exact)
            weighted = query.new_zeros(query.shape, dtype=exact)  # sum_k exp(q.k / T) * k
            size = CPU_BLOCK if keys.device.type == "cpu" else ACCELERATOR_BLOCK
            for index, block in enumerate(keys.split(size)):
                block = block.to(dtype)
                exp = (scaled @ block.T).to(exact).exp_()
                if sample_ids is not None:
                    own, of_keys = sample_ids
                    exp.masked_fill_(own[:, None] == of_keys[None, index * size : index * size + len(block)], 0)
                sums += exp.sum(1)
                if dtype == exact:
                    weighted.addmm_(exp, block)
                else:
                    weighted += exp.to(dtype) @ block
        tiny = torch.finfo(exact).tiny  # a query without keys has a slope of 0
        ctx.save_for_backward(weighted.div_(sums[:, None].clamp(min=tiny)).div_(temperature))  # d log sum / d query
        ctx.query_dtype = query.dtype
        return sums.log_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grad[:, None]).to(ctx.query_dtype), None, None, None, None
