"""The memory bank whose slots live on shards: a rank holds those of its step, and nobody holds all.

The step says what it will read before it embeds its images; the courier fetches that during the forward pass, and
carries the slots that the rank moved away during the backward pass. What is computed is what the local bank computes,
with the same numbers, so both have the same trajectory, bit for bit; but the hardest slots are found by other products,
and where two are equal but for rounding their order, or the choice, may differ.

A shard that is lost starts from the newest checkpoint (or the first directions), and every rank writes again what it
has written since: it keeps its writes until a checkpoint has them. That takes, at 500 steps of 32 slots of 128 float32
numbers between two checkpoints, 8 MB.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import distributed
from pipeline.negatives.bank import MemoryBank, drawn, moved, widened
from pipeline.negatives.bank_shard import Answer, BankSpec, Found, Part, Read, Search, Write
from pipeline.negatives.courier import Courier, HostCopy
from pipeline.negatives.protocol import Shards
from pipeline.negatives.shard import ServiceError

_PART = 1 << 15  # slots of a shard in one call, 16 MiB of 128 float32: a call takes 0.1 s and never all memory


class Checkpoints(Protocol):
    """Where the run's states are saved."""

    def latest_step(self) -> int | None:
        """The newest step with a complete checkpoint; None if there is none."""
        ...

    def load(self, step: int) -> Mapping[str, Any]:
        """Its state; under "method" that of the method."""
        ...


class _Fetched:
    """What a job brings the step."""

    value: Tensor | None = None


class ServedBank(nn.Module):
    """``base.Slots`` over shards. Its state is the local bank's; reading it fetches all slots, so one rank does.

    It cannot be loaded: restore first, then serve.
    """

    def __init__(self, replica: MemoryBank, shards: Shards, *, checkpoints: Checkpoints, name: str) -> None:
        """All ranks together. ``name``: of the bank in the method, as in the checkpoint's keys.

        ServiceError if the service is there for another bank, or does not answer.
        """
        super().__init__()
        self.num_samples, self.seed, self.steps = replica.num_samples, replica.seed, replica.steps
        self._dim, self._dtype, self._device = replica.slots.shape[1], replica.slots.dtype, replica.slots.device
        dtype = str(self._dtype).removeprefix("torch.")
        self._spec = BankSpec(
            self.num_samples, self._dim, dtype, self.seed, distributed.world_size(), num_shards=len(shards)
        )
        self._checkpoints, self._name = checkpoints, name
        self._unsaved: deque[Write] = deque()
        self._saved = self.steps  # the last step that is known to be in a checkpoint
        self._look_for_checkpoint = False
        # what the first shards are filled with; a lost one's successor looks for the newest checkpoint
        self._start: tuple[int, Tensor | None] | None = self.steps, replica.slots if len(replica.slots) else None
        self._courier = Courier(shards, self._spec, contents=self._contents, unsaved=self._unsaved)
        self._start = None

    def expect(self, sample_ids: Tensor, num_noise: int) -> None:
        """See ``base.Slots.expect``."""
        noise = drawn(self.seed, self.steps, num_noise, self.num_samples)
        self._ids = ids = HostCopy.of(sample_ids)
        self._noise = noise.to(sample_ids.device)
        self._fetched = self._order(lambda: torch.cat([*ids.arrived(), noise]))

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """See ``base.Slots.read``."""
        rows = self._wait(self._fetched).to(self._device, non_blocking=True)
        own, noise = rows.split([len(rows) - len(self._noise), len(self._noise)])
        self._own = widened(own)
        return self._own, self._noise, widened(noise)

    @torch.no_grad()
    def hardest(self, queries: Tensor, count: int) -> Tensor:
        """See ``base.Slots.hardest``."""
        step, ids, copy = self.steps, self._ids, HostCopy.of(queries)

        def best() -> Tensor:
            (asked,), (sample_ids,) = copy.arrived(), ids.arrived()
            return torch.from_numpy(self._search(Search(step, asked.numpy(), sample_ids.numpy(), count)).reshape(-1))

        rows = self._wait(self._order(best)).to(self._device, non_blocking=True)
        return widened(rows).view(len(queries), count, self._dim)

    @torch.no_grad()
    def update(self, embeddings: Tensor, momentum: float) -> None:
        """See ``base.Slots.update``."""
        step, ids = self.steps, self._ids
        copy = HostCopy.of(moved(self._own, embeddings, momentum).to(self._dtype))
        self.steps += 1
        self._courier.submit(lambda: self._write(step, ids, copy))

    def gauges(self) -> dict[str, float]:
        """Steps, the time that the loss waited for its slots and an exchange took, bytes, duplicates."""
        return {"bank/step": float(self.steps)} | {f"bank/{key}": x for key, x in self._courier.gauges.items()}

    def close(self) -> None:
        """End the courier when this rank's last slots are written. The shards stay as they are."""
        self._courier.close()

    def abandon(self) -> None:
        """See ``Courier.abandon``."""
        self._courier.abandon()

    def get_extra_state(self) -> Tensor:
        """As the local bank's."""
        return torch.tensor([self.steps, self.seed])

    def set_extra_state(self, state: Any) -> None:
        """ServiceError: the shards are filled when they open."""
        raise ServiceError("a served bank cannot be loaded: restore the method first, then serve its bank")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The local bank's keys. A part at a time, so that no call holds the bank twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        slots = torch.empty(self.num_samples, self._dim, dtype=self._dtype)
        for ids in torch.arange(self.num_samples).split(_PART * self._spec.num_shards):
            slots[ids[0] : ids[-1] + 1] = self._wait(self._order(lambda ids=ids: ids))  # type: ignore[misc]
        destination[prefix + "slots"] = slots
        self._look_for_checkpoint = True

    def _order(self, ids: Callable[[], Tensor]) -> _Fetched:
        """The slots of these samples as the last step left them; ``ids`` is called by the courier."""
        step, fetched = self.steps, _Fetched()
        self._courier.submit(lambda: self._fetch(step, ids(), fetched))
        return fetched

    def _wait(self, fetched: _Fetched) -> Tensor:
        with self._courier.changed:
            self._courier.wait_for(lambda: fetched.value is not None)
        assert fetched.value is not None
        return fetched.value

    # --- in the courier's thread ------------------------------------------------------------------------------------

    def _fetch(self, step: int, ids: Tensor, fetched: _Fetched) -> None:
        sample_ids, count = ids.numpy(), self._spec.num_shards
        mine = [np.flatnonzero(sample_ids % count == index) for index in range(count)]
        rows = torch.empty(len(ids), self._spec.row_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

        def take(answers: list[Answer | None]) -> bool:
            if not self._all_there(answers):
                return False
            for places, answer in zip(mine, answers, strict=True):
                assert answer is not None
                rows.numpy()[places] = answer.value
            return True

        self._courier.exchange(
            what=f"the slots before step {step}",
            requests=lambda: [Read(step, sample_ids[places]) for places in mine],
            at_least=step,
            take=take,
        )
        with self._courier.changed:
            fetched.value = rows.view(self._dtype)
            self._courier.gauges["step_bytes"] = float(rows.nbytes)
            self._courier.changed.notify_all()

    def _search(self, search: Search) -> NDArray[np.int64]:
        """(B, count) sample ids, the most similar first."""
        merged: list[NDArray[np.int64]] = []

        def take(answers: list[Answer | None]) -> bool:
            if not self._all_there(answers):
                return False
            parts = [answer.value for answer in answers if answer is not None and isinstance(answer.value, Found)]
            similarities = np.concatenate([part.similarities for part in parts], 1)
            best = np.argsort(-similarities, 1)[:, : search.count]
            merged.append(np.take_along_axis(np.concatenate([part.sample_ids for part in parts], 1), best, 1))
            return True

        self._courier.exchange(
            what=f"the slots most similar before step {search.step}",
            requests=lambda: [search] * self._spec.num_shards,
            at_least=search.step,
            take=take,
        )
        return merged[-1]

    def _write(self, step: int, ids: HostCopy, copy: HostCopy) -> None:
        if self._look_for_checkpoint and distributed.rank() == 0:  # once after a state was read, which is to save it
            self._look_for_checkpoint = False
            self._forget(self._checkpoints.latest_step() or 0)
        (sample_ids,), (slots,) = ids.arrived(), copy.arrived()
        write = Write(step, distributed.rank(), sample_ids.numpy(), slots.view(torch.uint8).numpy(), saved=self._saved)
        self._unsaved.append(write)
        self._courier.exchange([write])

    def _all_there(self, answers: list[Answer | None]) -> bool:
        there = [answer for answer in answers if answer is not None]
        if there:
            self._forget(max(answer.saved for answer in there))
        return len(there) == len(answers)

    def _forget(self, saved: int) -> None:
        """The writes of the steps that a checkpoint holds."""
        self._saved = max(self._saved, saved)
        while self._unsaved and self._unsaved[0].step < self._saved:
            self._unsaved.popleft()

    def _contents(self, empty: Collection[int]) -> Iterator[list[Part | None]]:
        """What the empty shards start from, a part of each at a time."""
        steps, slots = self._start or self._newest_checkpoint()
        for first in range(0, len(self._spec.own_ids(0)), _PART):
            indices = range(self._spec.num_shards)
            yield [self._part(index, first, steps, slots) if index in empty else None for index in indices]

    def _part(self, index: int, first: int, steps: int, slots: Tensor | None) -> Part | None:
        own = self._spec.own_ids(index)[first : first + _PART]
        if first and not own:
            return None  # this shard is smaller than shard 0
        values = None
        if slots is not None and own:
            values = slots[own[0] : own[-1] + 1 : own.step].cpu().contiguous().view(torch.uint8).numpy()
        return Part(steps, first, first + len(own), values)

    def _newest_checkpoint(self) -> tuple[int, Tensor | None]:
        saved = self._checkpoints.latest_step()
        if saved is None:
            return 0, None
        state = self._checkpoints.load(saved)["method"]
        steps, seed = state[f"{self._name}._extra_state"].tolist()
        slots: Tensor = state[f"{self._name}.slots"]
        own = (saved, self.seed, (self.num_samples, self._dim), self._dtype)
        if (steps, seed, tuple(slots.shape), slots.dtype) != own:
            raise ServiceError(
                f"the checkpoint of step {saved} holds a bank after {steps} steps with seed {seed}, "
                f"{tuple(slots.shape)} {slots.dtype}; this bank would be after {own[0]} steps with seed {own[1]}, "
                f"{own[2]} {own[3]}: the checkpoint is another bank's"
            )
        return steps, slots
