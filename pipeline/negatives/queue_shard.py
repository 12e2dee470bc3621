"""One shard of a queue of keys: numbered rows that many ranks push, and that come out in complete steps.

Keys are numbered through the whole run in the order of the global batches, so key n is of step n // batch whatever the
number of ranks, and a push that arrives twice is recognised by its numbers. Shard i of S holds the numbers n with
n % S == i: shares of equal size for any batch, any queue and any slicing into ranks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.negatives.shard import DTYPE_BYTES, ServiceError, Shard


@dataclass(frozen=True)
class QueueSpec:
    """What all ranks and all shards of a queue must agree on."""

    size: int  # K
    dim: int
    dtype: str  # of DTYPE_BYTES
    batch: int  # keys of a step, over all ranks
    num_shards: int
    steps_in_flight: int  # steps that may arrive before the oldest of them is complete

    @property
    def row_bytes(self) -> int:
        """The bytes of one key."""
        return self.dim * DTYPE_BYTES[self.dtype]

    def shard(self, index: int) -> "QueueShard":
        """See ``Spec``."""
        return QueueShard(index)


@dataclass(frozen=True)
class Rows:
    """The keys of one shard among those numbered start to stop - 1."""

    start: int
    stop: int
    keys: NDArray[np.uint8]  # (n, row_bytes), numbers in the queue's dtype
    sample_ids: NDArray[np.int64]  # (n,)

    def share(self, index: int, num_shards: int) -> "Rows":
        """What shard ``index`` gets of rows that are no shard's alone yet."""
        mine = own_numbers(self.start, self.stop, index, num_shards)
        return Rows(self.start, self.stop, self.keys[mine], self.sample_ids[mine])


def own_numbers(start: int, stop: int, index: int, num_shards: int) -> slice:
    """Which of the rows numbered start to stop - 1 are shard ``index``'s."""
    return slice((index - start) % num_shards, stop - start, num_shards)


class QueueShard(Shard):
    """The last ``size`` keys that are this shard's, and room for those in flight, in one ring."""

    spec: QueueSpec

    def fill(self, generation: int, spec: QueueSpec, content: Rows) -> None:
        """Hold ``content``, this shard's of the keys before ``content.stop``, and be open.

        ServiceError if ``content`` does not end with a step; see ``Shard.fill``.
        """
        self.refuse_older(generation)
        if generation == self.generation and self.is_open:
            return
        if content.stop % spec.batch:
            raise ServiceError(
                f"the queue was saved after {content.stop} keys, which are no whole number of steps of {spec.batch}; "
                "resume with the train.global_batch_size of the run that saved it"
            )
        rows = -(-(spec.size + spec.steps_in_flight * spec.batch) // spec.num_shards)
        self.spec, self.generation, self.is_open = spec, generation, False
        self._keys = np.zeros((rows, spec.row_bytes), np.uint8)
        self._sample_ids = np.full(rows, -1, np.int64)
        self._arrived: dict[int, dict[int, int]] = {}  # first number of a step -> {start: stop} of the pushes so far
        self.complete = content.stop
        self._write(content)
        self.is_open = True

    def push(self, generation: int, rows: Rows) -> None:
        """Take one rank's keys of one step; keys that are here already are counted and left out.

        ServiceError if the rows are not of the queue's width, or too many steps ahead of the last complete one.
        """
        self.require(generation)
        batch, start = self.spec.batch, rows.start
        step = start - start % batch
        if start < self.complete or start in self._arrived.get(step, {}):
            self.duplicates += 1
            return
        if step >= self.complete + self.spec.steps_in_flight * batch:
            raise ServiceError(
                f"a rank pushed the keys of step {step // batch} while step {self.complete // batch} is not complete; "
                f"at most {self.spec.steps_in_flight} steps may be in flight"
            )
        self._write(rows)
        self.received_bytes += rows.keys.nbytes + rows.sample_ids.nbytes
        self._arrived.setdefault(step, {})[start] = rows.stop
        while sum(stop - start for start, stop in self._arrived.get(self.complete, {}).items()) == batch:
            del self._arrived[self.complete]
            self.complete += batch

    def read(self, generation: int, start: int) -> Rows:
        """A copy of the keys from ``start`` to the last complete step; ServiceError if the oldest of them is gone."""
        self.require(generation)
        start = min(start, self.complete)
        if start < self.complete - self.spec.size:
            raise ServiceError(
                f"a rank has the keys below {start} only, and the queue holds those from "
                f"{self.complete - self.spec.size}; use method.queue_size >= (negatives.max_staleness + 1) x batch"
            )
        parts = self._slots(start, self.complete)
        keys, sample_ids = (np.concatenate([ring[part] for part in parts]) for ring in (self._keys, self._sample_ids))
        return Rows(start, self.complete, keys, sample_ids)

    def status(self) -> dict[str, Any]:
        """See ``Shard.status``."""
        filled = min(self.complete / self.spec.size, 1)
        return {
            "holds": f"queue {self.spec.size} x {self.spec.dim} {self.spec.dtype}, {filled:.0%} full",
            "step": self.complete // self.spec.batch,
            "steps_in_flight": len(self._arrived),
            "held_bytes": self._keys.nbytes + self._sample_ids.nbytes,
        }

    def _slots(self, start: int, stop: int) -> tuple[slice, slice]:
        """Where this shard's keys among those numbered start to stop - 1 lie: up to the ring's end, and from its
        beginning. Slices, because copying 32 MiB row by row takes longer than the rest of a pull."""
        owned = range(start, stop)[own_numbers(start, stop, self.index, self.spec.num_shards)]
        if not owned:
            return slice(0), slice(0)
        size, first = len(self._keys), owned[0] // self.spec.num_shards % len(self._keys)
        return slice(first, first + len(owned)), slice(0, max(first + len(owned) - size, 0))

    def _write(self, rows: Rows) -> None:
        tail, head = self._slots(rows.start, rows.stop)
        count = len(range(rows.start, rows.stop)[own_numbers(rows.start, rows.stop, self.index, self.spec.num_shards)])
        expected = (count, self.spec.row_bytes)
        if rows.keys.shape != expected or rows.sample_ids.shape != expected[:1]:
            raise ServiceError(
                f"keys {rows.start} to {rows.stop - 1} came as {rows.keys.shape[0]} rows of {rows.keys.shape[-1]} "
                f"bytes; this queue takes {expected[0]} rows of {expected[1]} bytes: {self.spec.dim} numbers in "
                f"{self.spec.dtype}"
            )
        before_end = count - head.stop
        for ring, values in ((self._keys, rows.keys), (self._sample_ids, rows.sample_ids)):
            ring[tail] = values[:before_end]
            ring[head] = values[before_end:]
