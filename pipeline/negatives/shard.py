"""One shard of a queue of keys: numbered rows that many ranks push, and that come out in complete steps.

Keys are numbered through the whole run in the order of the global batches, so key n is of step n // batch whatever the
number of ranks, and a push that arrives twice is recognised by its numbers. Shard i of S holds the numbers n with
n % S == i: shares of equal size for any batch, any queue and any slicing into ranks.

Plain NumPy over bytes, without torch: the process around a shard starts in a second and takes 100 MB.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class QueueError(UserError):
    """The service and those who use it do not agree on what the queue is."""


class NotOpenError(Exception):
    """The shard holds no queue yet, or lost it with its process: it is to be opened, and newer keys sent again."""


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


@dataclass(frozen=True)
class Rows:
    """The keys of one shard among those numbered start to stop - 1."""

    start: int
    stop: int
    keys: NDArray[np.uint8]  # (n, row_bytes), numbers in the queue's dtype
    sample_ids: NDArray[np.int64]  # (n,)


def own_numbers(start: int, stop: int, index: int, num_shards: int) -> slice:
    """Which of the rows numbered start to stop - 1 are shard ``index``'s."""
    return slice((index - start) % num_shards, stop - start, num_shards)


class QueueShard:
    """The last ``size`` keys that are this shard's, and room for those in flight, in one ring.

    A worker group opens the shard under a generation, higher than that of every group before it; calls of an older
    group are refused, so a rank that was given up for dead cannot write into its successors' queue.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.generation = 0
        self.complete = 0  # all keys below this number have arrived
        self.duplicates = 0  # pushes that came again
        self.received_bytes = 0
        self.spec: QueueSpec

    def open(self, generation: int, spec: QueueSpec, content: Rows | None) -> None:
        """Agree on ``spec``; a shard that is not open yet then holds ``content``, the keys before ``content.stop``.

        QueueError if a newer worker group has the shard, its queue is another one, or ``content`` does not end with a
        step; NotOpenError if it is not open and the caller has no content.
        """
        self._refuse_older(generation)
        if generation == self.generation:
            if spec != self.spec:
                raise QueueError(f"the service was opened for {self.spec}, and this rank has {spec}")
            return
        if content is None:
            raise NotOpenError
        if content.stop % spec.batch:
            raise QueueError(
                f"the queue was saved after {content.stop} keys, which are no whole number of steps of {spec.batch}; "
                "resume with the train.global_batch_size of the run that saved it"
            )
        rows = -(-(spec.size + spec.steps_in_flight * spec.batch) // spec.num_shards)
        self.spec = spec
        self._keys = np.zeros((rows, spec.row_bytes), np.uint8)
        self._sample_ids = np.full(rows, -1, np.int64)
        self._arrived: dict[int, dict[int, int]] = {}  # first number of a step -> {start: stop} of the pushes so far
        self.complete = content.stop
        self._write(content)
        self.generation = generation  # last: a shard whose opening failed is not open

    def push(self, generation: int, rows: Rows) -> None:
        """Take one rank's keys of one step; keys that are here already are counted and left out.

        QueueError if the rows are not of the queue's width, or too many steps ahead of the last complete one.
        """
        self.require(generation)
        batch, start = self.spec.batch, rows.start
        step = start - start % batch
        if start < self.complete or start in self._arrived.get(step, {}):
            self.duplicates += 1
            return
        if step >= self.complete + self.spec.steps_in_flight * batch:
            raise QueueError(
                f"a rank pushed the keys of step {step // batch} while step {self.complete // batch} is not complete; "
                f"at most {self.spec.steps_in_flight} steps may be in flight"
            )
        self._write(rows)
        self.received_bytes += rows.keys.nbytes + rows.sample_ids.nbytes
        self._arrived.setdefault(step, {})[start] = rows.stop
        while sum(stop - start for start, stop in self._arrived.get(self.complete, {}).items()) == batch:
            del self._arrived[self.complete]
            self.complete += batch

    def since(self, generation: int, start: int) -> Rows:
        """A copy of the keys from ``start`` to the last complete step; QueueError if the oldest of them is gone."""
        self.require(generation)
        start = min(start, self.complete)
        if start < self.complete - self.spec.size:
            raise QueueError(
                f"a rank has the keys below {start} only, and the queue holds those from "
                f"{self.complete - self.spec.size}; use method.queue_size >= (negatives.max_staleness + 1) x batch"
            )
        parts = self._slots(start, self.complete)
        keys, sample_ids = (np.concatenate([ring[part] for part in parts]) for ring in (self._keys, self._sample_ids))
        return Rows(start, self.complete, keys, sample_ids)

    def require(self, generation: int) -> None:
        """NotOpenError before the shard is open; QueueError if a newer worker group has it."""
        self._refuse_older(generation)
        if generation > self.generation:
            raise NotOpenError

    def status(self) -> dict[str, Any]:
        """What the shard holds, for people."""
        if not self.generation:
            return {"open": False}
        return {
            "open": True,
            "size": self.spec.size,
            "dim": self.spec.dim,
            "dtype": self.spec.dtype,
            "batch": self.spec.batch,
            "complete": self.complete,
            "steps_in_flight": len(self._arrived),
            "duplicates": self.duplicates,
            "received_bytes": self.received_bytes,
            "held_bytes": self._keys.nbytes + self._sample_ids.nbytes,
        }

    def _refuse_older(self, generation: int) -> None:
        if generation < self.generation:
            raise QueueError("another worker group has taken over this queue; this one no longer counts and must end")

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
            raise QueueError(
                f"keys {rows.start} to {rows.stop - 1} came as {rows.keys.shape[0]} rows of {rows.keys.shape[-1]} "
                f"bytes; this queue takes {expected[0]} rows of {expected[1]} bytes: {self.spec.dim} numbers in "
                f"{self.spec.dtype}"
            )
        before_end = count - head.stop
        for ring, values in ((self._keys, rows.keys), (self._sample_ids, rows.sample_ids)):
            ring[tail] = values[:before_end]
            ring[head] = values[before_end:]
