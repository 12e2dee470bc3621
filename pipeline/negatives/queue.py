"""MoCo's queue of keys (He et al. 2019, arXiv:1911.05722), one replica in every rank.

Every rank enqueues the same gathered keys, so the replicas agree without a broadcast, and the checkpoint of one rank
restores all. The queue is read in place: a clone of 65,536 x 128 costs 16 ms a step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MomentumQueue(nn.Module):
    """A ring of ``size`` keys of ``dim`` numbers; random directions until it has filled. Its state is two buffers."""

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1).to(dtype))  # (K, D)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))  # the oldest key

    def negatives(self) -> Tensor:
        """(K, D), the buffer itself."""
        return self.keys

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys; a batch may wrap around the end. ValueError if it is larger than the queue."""
        size = len(self.keys)
        if len(keys) > size:
            raise ValueError(
                f"a global batch of {len(keys)} keys does not fit a queue of {size}; "
                f"use train.global_batch_size <= {size} or method.queue_size >= {len(keys)}"
            )
        slots = (self.pointer + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, slots, keys.to(self.keys.dtype))
        self.pointer.copy_((self.pointer + len(keys)) % size)
