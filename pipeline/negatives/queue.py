"""MoCo's queue of keys (He et al. 2019, arXiv:1911.05722), one replica in every rank.

Every rank enqueues the same gathered keys, so the replicas agree without a broadcast, and the checkpoint of one rank
restores all. The queue is read in place: a clone of 65,536 x 128 costs 16 ms a step.

Keys are numbered through the whole run, in the order of the global batches: key n lies in row n % K.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import distributed


class MomentumQueue(nn.Module):
    """A ring of ``size`` keys of ``dim`` numbers; random directions until it has filled. Its state is its buffers."""

    keys: Tensor
    sample_ids: Tensor
    written: Tensor

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1).to(dtype))  # (K, D)
        self.register_buffer("sample_ids", torch.full((size,), -1))  # (K,)
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))  # keys of the whole run so far

    def negatives(self) -> Tensor:
        """(K, D), the buffer itself."""
        return self.keys

    def enqueue(self, keys: Tensor, sample_ids: Tensor) -> None:
        """Gather the keys of all ranks, which replace the oldest ones."""
        self.write(distributed.all_gather(keys), distributed.all_gather(sample_ids))

    @torch.no_grad()
    def write(self, keys: Tensor, sample_ids: Tensor) -> None:
        """Append (N, D) and (N,), for any N: what does not fit the ring any more leaves it, oldest first."""
        size, kept = len(self.keys), min(len(keys), len(self.keys))
        self.written += len(keys)
        rows = (self.written - kept + torch.arange(kept, device=self.keys.device)) % size
        self.keys.index_copy_(0, rows, keys[len(keys) - kept :].to(self.keys, non_blocking=True))
        self.sample_ids.index_copy_(0, rows, sample_ids[len(keys) - kept :].to(self.sample_ids, non_blocking=True))

    def enqueued(self) -> int:
        """The keys written so far."""
        return int(self.written)

    def gauges(self) -> dict[str, float]:
        """The share of the ring that real keys fill."""
        return {"queue/fill": min(int(self.written) / len(self.keys), 1.0)}
