"""A memory bank: one slot per sample id of the manifest (Wu et al. 2018, arXiv:1805.01978), one replica in every rank.

A slot is the running mean of its sample's embeddings, one update per epoch. All ranks make the same updates and draw
the same ids, so the replicas agree without a broadcast, and the checkpoint of one rank restores all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import distributed


class MemoryBank(nn.Module):
    """``num_samples`` slots of ``dim`` numbers, of length 1; random directions until their sample was seen."""

    slots: Tensor

    def __init__(self, num_samples: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("slots", torch.empty(num_samples, dim, dtype=dtype))  # (N, D)
        for block in self.slots.split(1 << 16):  # 10 million slots need no float32 copy of themselves
            block.copy_(F.normalize(torch.randn(block.shape), dim=1))
        self.steps = 0  # updates so far; not on the device, where reading it would wait for the step

    def read(self, sample_ids: Tensor) -> Tensor:
        """(n,) -> (n, D), a copy in at least float32."""
        rows = self.slots[sample_ids]
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def draw(self, count: int) -> Tensor:
        """(count,) ids of this step, uniform with replacement: the same on all ranks, and after a restart."""
        generator = torch.Generator().manual_seed(self.steps)
        return torch.randint(len(self.slots), (count,), generator=generator).to(self.slots.device)

    @torch.no_grad()
    def update(self, sample_ids: Tensor, embeddings: Tensor, momentum: float) -> None:
        """Move the slots of all ranks' samples, (B,) and (B, D) of this rank, to ``momentum`` x the old direction and
        1 - ``momentum`` x the new one."""
        ids, new = distributed.all_gather(sample_ids), distributed.all_gather(embeddings)
        moved = F.normalize(momentum * self.read(ids) + (1 - momentum) * new, dim=1)
        self.slots.index_copy_(0, ids, moved.to(self.slots.dtype))
        self.steps += 1

    def get_extra_state(self) -> Tensor:
        """``steps``, for the checkpoint."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Restores ``steps``."""
        self.steps = int(state)
