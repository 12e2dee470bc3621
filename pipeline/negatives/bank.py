"""A memory bank: one slot per sample id of the manifest (Wu et al. 2018, arXiv:1805.01978), one replica in every rank.

A slot is the running mean of its sample's embeddings, one update per epoch. All ranks make the same updates and draw
the same ids, so the replicas agree without a broadcast, and the checkpoint of one rank restores all.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import distributed
from pipeline.negatives.directions import directions

_BLOCK = 1 << 15  # slots that are made or compared at a time: 10 million need no float32 copy of themselves


class MemoryBank(nn.Module):
    """``num_samples`` slots of ``dim`` numbers, of length 1; random directions until their sample was seen.

    Implements ``base.Slots``. A bank takes its memory when it is first read, so one that is served takes none.
    """

    slots: Tensor

    def __init__(self, num_samples: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.num_samples = num_samples
        self.seed = int(torch.randint(2**62, (), device="cpu"))  # of the first directions and of all draws
        self.steps = 0  # updates so far; not on the device, where reading it would wait for the step
        self.register_buffer("slots", torch.empty(0, dim, dtype=dtype))  # (N, D), or (0, D) before it is first read
        self.register_state_dict_pre_hook(lambda bank, *_: bank.fill())
        self.register_load_state_dict_pre_hook(lambda bank, *_: bank._make_room())

    def fill(self) -> None:
        """Make the directions that the slots start from, unless they are there."""
        if len(self.slots):
            return
        self._make_room()
        for first in range(0, self.num_samples, _BLOCK):
            ids = torch.arange(first, min(first + _BLOCK, self.num_samples))
            self.slots[ids[0] : ids[-1] + 1] = torch.from_numpy(
                directions(self.seed, ids.numpy(), self.slots.shape[1])
            ).to(self.slots)

    def expect(self, sample_ids: Tensor, num_noise: int) -> None:
        """See ``base.Slots.expect``."""
        self._expected = sample_ids, drawn(self.seed, self.steps, num_noise, self.num_samples).to(sample_ids.device)

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """See ``base.Slots.read``."""
        self.fill()
        own, noise = self._expected
        self._own = widened(self.slots[own])
        return self._own, noise, widened(self.slots[noise])

    @torch.no_grad()
    def hardest(self, queries: Tensor, count: int) -> Tensor:
        """See ``base.Slots.hardest``."""
        own, _ = self._expected
        best, rows = queries.new_empty(len(queries), 0), own.new_empty(len(queries), 0)
        for first in range(0, self.num_samples, _BLOCK):
            similar = queries @ self.slots[first : first + _BLOCK].to(queries.dtype).T
            ids = torch.arange(first, first + similar.shape[1], device=own.device)
            similar.masked_fill_(own[:, None] == ids, -torch.inf)
            value, column = similar.topk(min(count, len(ids)), 1)
            best, rows = torch.cat([best, value], 1), torch.cat([rows, column + first], 1)
            best, top = best.topk(min(count, best.shape[1]), 1)
            rows = rows.gather(1, top)
        return widened(self.slots[rows])

    @torch.no_grad()
    def update(self, embeddings: Tensor, momentum: float) -> None:
        """See ``base.Slots.update``."""
        own, _ = self._expected
        ids, slots = distributed.all_gather(own), distributed.all_gather(moved(self._own, embeddings, momentum))
        # an id that comes twice gets its last row both times: which of two writes CUDA does last is undefined
        ordered, rows = ids.sort(stable=True)
        last = rows[torch.searchsorted(ordered, ids, right=True) - 1]
        self.slots.index_copy_(0, ids, slots[last].to(self.slots.dtype))
        self.steps += 1

    def gauges(self) -> dict[str, float]:
        """See ``base.Slots.gauges``."""
        return {"bank/step": float(self.steps)}

    def get_extra_state(self) -> Tensor:
        """``steps`` and ``seed``, for the checkpoint."""
        return torch.tensor([self.steps, self.seed])

    def set_extra_state(self, state: Any) -> None:
        """Restores them."""
        self.steps, self.seed = state.tolist()

    def _make_room(self) -> None:
        if not len(self.slots):
            self.slots = self.slots.new_empty(self.num_samples, self.slots.shape[1])


def drawn(seed: int, step: int, count: int, num_samples: int) -> Tensor:
    """(count,) sample ids, uniform with replacement: those of a step are the same on all ranks and after a restart."""
    return torch.randint(num_samples, (count,), generator=torch.Generator().manual_seed(seed + step))


def moved(slots: Tensor, embeddings: Tensor, momentum: float) -> Tensor:
    """(B, D): ``momentum`` x the old direction and 1 - ``momentum`` x the new one, of length 1."""
    return F.normalize(momentum * slots + (1 - momentum) * embeddings, dim=1)


def widened(slots: Tensor) -> Tensor:
    """In at least float32."""
    return slots.to(torch.promote_types(slots.dtype, torch.float32))
