"""InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) as MoCo uses it: gradient to the query, none to the keys.

Because keys are constants, the query's gradient is a weighted mean of keys, and one pass over blocks of keys gives both
the loss and the gradient: no (B, K) matrix, no copy of the queue, nothing to recompute. All embeddings have length 1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pipeline.losses.precision import compute_dtype


def info_nce(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """The mean over the queries of -log(e^{q.k+/T} / (e^{q.k+/T} + sum_n e^{q.n/T})), MoCo's equation 1.

    Args:
        query: (B, D); positive: (B, D), row i belongs to query i, no gradient; negatives: (K, D), the queue.
            A bf16 queue makes the products bf16 on an accelerator and is widened block by block on the CPU.
    """
    own = (query * positive.detach()).sum(1) / temperature  # (B,)
    others = log_sum_exp_similarity(query, negatives, temperature)
    return (torch.logaddexp(own, others) - own).mean()


def log_sum_exp_similarity(query: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """(B, D), (K, D) -> (B,): log sum_k exp(q.k / temperature), differentiable in the query alone."""
    value: Tensor = _LogSumExpSimilarity.apply(query, keys, temperature, compute_dtype(query, temperature))
    return value


CPU_BLOCK = 512  # keys at a time: 0.5 MiB of logits at B = 256 stays in a core's cache
ACCELERATOR_BLOCK = 16384


class _LogSumExpSimilarity(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            scaled = (query / temperature).to(dtype)
            sums = query.new_zeros(len(query), dtype=exact)
            weighted = query.new_zeros(query.shape, dtype=exact)  # sum_k exp(q.k / T) * k
            for block in keys.split(CPU_BLOCK if keys.device.type == "cpu" else ACCELERATOR_BLOCK):
                block = block.to(dtype)
                exp = (scaled @ block.T).to(exact).exp_()
                sums += exp.sum(1)
                if dtype == exact:
                    weighted.addmm_(exp, block)
                else:
                    weighted += exp.to(dtype) @ block
        ctx.save_for_backward(weighted.div_(sums[:, None]).div_(temperature))  # d log sum / d query
        ctx.query_dtype = query.dtype
        return sums.log_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grad[:, None]).to(ctx.query_dtype), None, None, None
