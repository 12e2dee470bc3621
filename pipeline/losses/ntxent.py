"""NT-Xent, the contrastive loss of SimCLR (Chen et al. 2020, arXiv:2002.05709, equation 1), over the global batch.

This is the paper's mean over all 2N anchors; the released TensorFlow code sums two means and is twice as large.

The 2N x 2N matrix of similarities is never held: square tiles of it are computed forward, and again backward, each
for its mirror image too, and the ranks share the tiles. Memory grows with N, and so does the work of a rank with
N^2 / W. Embeddings have length 1, so no logit exceeds 1 / temperature, and exp needs no maximum to be found first.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from pipeline import distributed
from pipeline.losses.corrections import corrected
from pipeline.losses.precision import compute_dtype

CPU_TILE = 512  # rows of a square tile: 1 MiB of float32 stays in a core's cache
ACCELERATOR_TILE = 4096  # larger: there the launches cost


def ntxent(z1: Tensor, z2: Tensor, temperature: float, *, positive_prior: float = 0.0, hardness: float = 0.0) -> Tensor:
    """The mean over all 2N anchors of the global batch of their cross-entropy against the 2N - 1 other embeddings.

    Every rank returns this same global mean; the gradient that it sends to its own rows is W times theirs, which
    DistributedDataParallel's mean over ranks undoes. Under autocast an accelerator multiplies tiles in bf16;
    exponentials and their sums are float32 always (float64 for float64 embeddings, or temperatures below 1/60).

    Args:
        z1, z2: (B, D) embeddings of this rank's two views, of any length; row i of both is sample i.
        positive_prior, hardness: see ``corrected``; each anchor has 2N - 2 negatives. Hardness takes the tiles twice.
    """
    dtype = compute_dtype(z1, temperature / (1 + hardness))
    exact = torch.promote_types(dtype, torch.float32)
    with torch.autocast(z1.device.type, enabled=False):
        z = F.normalize(torch.cat([z1, z2]).to(exact), dim=1)  # (2B, D)
        own = (z[: len(z1)] * z[len(z1) :]).sum(1) / temperature
        own = distributed.all_gather_grad(torch.cat([own, own]))  # (2N,), the logits of all anchors' positives
        others = corrected(
            own,
            lambda t: _LogSumExpOfNegatives.apply(z, t, dtype),
            torch.tensor(len(own) - 2, dtype=torch.float64, device=own.device),
            temperature,
            positive_prior=positive_prior,
            hardness=hardness,
        ).to(own.dtype)
        return (torch.logaddexp(own, others) - own).mean()


class _LogSumExpOfNegatives(Function):
    """z (2B, D) -> (2N,), for all rows i of all ranks log sum_j exp(z_i . z_j / temperature), over the j that are
    neither i nor the other view of its sample."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
        rows = distributed.all_gather(z)  # (M, D), M = 2B * W
        scaled = (rows / temperature**0.5).to(dtype)  # so that a product of two rows is a logit
        sums = rows.new_zeros(len(rows))
        for a, b, exp in _tiles(scaled, len(z), rows.dtype):
            sums[a] += exp.sum(1)
            if a != b:
                sums[b] += exp.sum(0)
        sums = distributed.all_reduce_sum(sums)
        ctx.save_for_backward(scaled, sums)
        ctx.temperature, ctx.local = temperature, len(z)
        return sums.log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        scaled, sums = ctx.saved_tensors
        # d loss / d exp_ij by way of the sum of row i; one that underflowed has a slope of 0, as its exponentials have
        weights = grad / sums.clamp(min=torch.finfo(sums.dtype).tiny)
        grad_rows = torch.zeros(scaled.shape, dtype=sums.dtype, device=sums.device)
        for a, b, exp in _tiles(scaled, ctx.local, sums.dtype):
            # exp_ij is in the sums of row i and, mirrored, of row j
            exp *= weights[a, None] + weights[None, b]
            pull = exp.to(scaled.dtype)
            _add_product(grad_rows[a], pull, scaled[b])
            if a != b:
                _add_product(grad_rows[b], pull.T, scaled[a])
        local = distributed.reduce_scatter_sum(grad_rows)
        return local.mul_(distributed.world_size() / ctx.temperature**0.5), None, None


def _tiles(rows: Tensor, local: int, exact: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """This rank's share of the tiles (a, b) on and above the diagonal: exp(rows[a] @ rows[b].T), where a row meets
    itself or the other view of its sample 0. ``local``: rows of a rank, first all its first views, then the second."""
    size = CPU_TILE if rows.device.type == "cpu" else ACCELERATOR_TILE
    blocks = [slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    pairs = [(a, b) for i, a in enumerate(blocks) for b in blocks[i:]]
    buffer = torch.empty(min(size, len(rows)) ** 2, dtype=exact, device=rows.device)
    for a, b in pairs[distributed.rank() :: distributed.world_size()]:
        shape = a.stop - a.start, b.stop - b.start
        exp = buffer[: shape[0] * shape[1]].view(shape)
        if rows.dtype == exact:
            torch.mm(rows[a], rows[b].T, out=exp)
        else:
            exp.copy_(rows[a] @ rows[b].T)
        exp.exp_()
        if a == b:
            exp.fill_diagonal_(0)
        half = local // 2
        for first in range(a.start - a.start % local, a.stop, local):  # the ranks whose rows are in a
            for start, shift in ((first, half), (first + half, -half)):  # their first views, their second ones
                low, high = max(start, a.start, b.start - shift), min(start + half, a.stop, b.stop - shift)
                if low < high:
                    across = slice(low + shift - b.start, high + shift - b.start)
                    exp[low - a.start : high - a.start, across].fill_diagonal_(0)
        yield a, b, exp


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
