"""One shard of a memory bank: the slots of the samples n with n % S == i, which live here and nowhere else.

A step of a rank is a read and then a write. Writes are kept apart until those of all ranks have come, which says that
all ranks have read; then the step is complete, and the next one's reads are answered. So every read sees all steps
before its own and nothing of its own, however far apart the ranks are.

A write sets slots to values that the rank computed from what it read: repeated, it changes nothing, and the shard
needs neither the momentum nor an arithmetic in bfloat16. A write is known by its step and rank.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.negatives.directions import directions
from pipeline.negatives.shard import DTYPE_BYTES, NotOpenError, ServiceError, Shard

# slots that are made or compared at a time: 8 MiB of similarities for 256 queries. What is freed stays with the
# process, and all that it has besides the slots should be a tenth of 100 MB
_BLOCK = 1 << 13


@dataclass(frozen=True)
class BankSpec:
    """What all ranks and all shards of a bank must agree on."""

    num_samples: int  # N
    dim: int
    dtype: str  # of DTYPE_BYTES
    seed: int  # of the directions that slots start from
    ranks: int  # that write in each step
    num_shards: int

    @property
    def row_bytes(self) -> int:
        """The bytes of one slot."""
        return self.dim * DTYPE_BYTES[self.dtype]

    def shard(self, index: int) -> "BankShard":
        """See ``Spec``."""
        return BankShard(index)

    def own_ids(self, index: int) -> range:
        """The samples of shard ``index``; the r-th of them has its row r."""
        return range(index, self.num_samples, self.num_shards)


@dataclass(frozen=True)
class Part:
    """What a shard's rows ``first`` to ``stop`` - 1 held after ``steps`` steps; without values: before any."""

    steps: int
    first: int
    stop: int
    slots: NDArray[np.uint8] | None  # (stop - first, row_bytes)


@dataclass(frozen=True)
class Write:
    """The slots that one rank moved in one step."""

    step: int
    rank: int
    sample_ids: NDArray[np.int64]  # (n,)
    slots: NDArray[np.uint8]  # (n, row_bytes)
    saved: int  # the last step that rank 0 knows to be in a checkpoint

    def share(self, index: int, num_shards: int) -> "Write":
        """What shard ``index`` gets of it."""
        mine = self.sample_ids % num_shards == index
        return Write(self.step, self.rank, self.sample_ids[mine], self.slots[mine], self.saved)


@dataclass(frozen=True)
class Read:
    """Slots as they are before a step."""

    step: int
    sample_ids: NDArray[np.int64]  # (n,), this shard's


@dataclass(frozen=True)
class Search:
    """The slots most similar to each query before a step, its own sample's left out."""

    step: int
    queries: NDArray[Any]  # (B, D), float32 or float64
    sample_ids: NDArray[np.int64]  # (B,) of the queries
    count: int  # k


@dataclass(frozen=True)
class Found:
    """Of one shard, in no order."""

    sample_ids: NDArray[np.int64]  # (B, k); -1 where it has no more
    similarities: NDArray[Any]  # (B, k); there -inf


@dataclass(frozen=True)
class Answer:
    """To a Read the slots (n, row_bytes), to a Search what was found."""

    value: NDArray[np.uint8] | Found
    saved: int  # see ``Write``: no rank needs to keep its older writes


class BankShard(Shard):
    """N / S slots, and the writes of the steps in flight: one, unless ranks repeat what a lost shard had."""

    spec: BankSpec

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._slots = np.empty((0, 0), np.uint8)
        self._filled = 0  # rows, of a shard that is not open
        self._saved = 0  # see ``Write``
        self._arrived: dict[int, dict[int, Write]] = {}  # by step and rank

    def fill(self, generation: int, spec: BankSpec, content: Part) -> None:
        """Take the next rows, from row 0 on; with the last the shard is open.

        NotOpenError if others are missing, ServiceError if they are of another size, or of another step than row 0.
        """
        self.refuse_older(generation)
        if generation == self.generation and self.is_open:
            return
        if content.first == 0:
            rows = len(spec.own_ids(self.index))
            if self._slots.shape != (rows, spec.row_bytes):
                self._slots = np.empty((rows, spec.row_bytes), np.uint8)
            self.spec, self.generation, self.is_open = spec, generation, False
            self.complete, self._filled, self._saved = content.steps, 0, 0
            self._arrived = {}
        if generation != self.generation or content.first != self._filled:
            raise NotOpenError
        expected = (content.stop - content.first, spec.row_bytes)
        fits = content.slots is None or content.slots.shape == expected
        if content.steps != self.complete or content.stop > len(self._slots) or not fits:
            raise ServiceError(
                f"rows {content.first} to {content.stop - 1} after {content.steps} steps came as "
                f"{None if content.slots is None else content.slots.shape} bytes; shard {self.index} takes {expected} "
                f"of {len(self._slots)} rows after {self.complete} steps"
            )
        if content.slots is not None:
            self._slots[content.first : content.stop] = content.slots
        else:
            own = spec.own_ids(self.index)[content.first : content.stop]
            for first in range(0, len(own), _BLOCK):
                ids = np.array(own[first : first + _BLOCK])
                made = slice(content.first + first, content.first + first + len(ids))
                self._slots[made] = encoded(directions(spec.seed, ids, spec.dim), spec.dtype)
        self._filled = content.stop
        self.is_open = self._filled == len(self._slots)

    def push(self, generation: int, rows: Write) -> None:
        """Take one rank's slots of one step. ServiceError if they are not of the bank's width."""
        self.require(generation)
        expected = (len(rows.sample_ids), self.spec.row_bytes)
        if rows.slots.shape != expected:
            raise ServiceError(
                f"slots of step {rows.step} came as {rows.slots.shape}, not {expected} bytes: "
                f"{self.spec.dim} numbers in {self.spec.dtype} for each of {expected[0]} samples"
            )
        self._saved = max(self._saved, rows.saved)
        if rows.step < self.complete or rows.rank in self._arrived.get(rows.step, {}):
            self.duplicates += 1
            return
        self._arrived.setdefault(rows.step, {})[rows.rank] = rows
        self.received_bytes += rows.slots.nbytes + rows.sample_ids.nbytes
        while len(self._arrived.get(self.complete, ())) == self.spec.ranks:
            # in rank order, as the local bank's: of a sample that comes twice, the last slot stays
            for _, write in sorted(self._arrived.pop(self.complete).items()):
                self._slots[write.sample_ids // self.spec.num_shards] = write.slots
            self.complete += 1

    def read(self, generation: int, request: Read | Search) -> Answer | None:
        """None before the request's step has come. ServiceError if it is over: no rank asks for what it wrote."""
        self.require(generation)
        if self.complete < request.step:
            return None
        if self.complete > request.step:
            raise ServiceError(f"a rank asked for the slots before step {request.step}, which is complete")
        if isinstance(request, Search):
            return Answer(self._most_similar(request), self._saved)
        return Answer(self._slots[request.sample_ids // self.spec.num_shards], self._saved)

    def status(self) -> dict[str, Any]:
        """See ``Shard.status``."""
        pending = [write for step in self._arrived.values() for write in step.values()]
        return {
            "holds": f"{len(self._slots)} of {self.spec.num_samples} slots x {self.spec.dim} {self.spec.dtype}",
            "step": self.complete,
            "steps_in_flight": len(self._arrived),
            "held_bytes": self._slots.nbytes + sum(write.slots.nbytes for write in pending),
        }

    def _most_similar(self, search: Search) -> Found:
        queries, count = search.queries, search.count
        similarities = np.full((len(queries), count), -np.inf, queries.dtype)
        rows = np.zeros((len(queries), count), np.int64)
        is_mine = search.sample_ids % self.spec.num_shards == self.index
        own = np.where(is_mine, search.sample_ids // self.spec.num_shards, -1)  # (B,), the row of the query's sample
        for first in range(0, len(self._slots), _BLOCK):
            block = decoded(self._slots[first : first + _BLOCK], self.spec.dtype).astype(queries.dtype, copy=False)
            similar = queries @ block.T
            here = (own >= first) & (own < first + len(block))
            similar[here, own[here] - first] = -np.inf
            # few slots of a block beat a query's k-th so far, so the sort sees few
            better = np.flatnonzero((similar > similarities.min(1, keepdims=True)).any(0))
            all_similar = np.concatenate([similarities, similar[:, better]], 1)
            all_rows = np.concatenate([rows, np.broadcast_to(better + first, (len(queries), len(better)))], 1)
            top = np.argpartition(all_similar, -count, 1)[:, -count:]
            similarities, rows = np.take_along_axis(all_similar, top, 1), np.take_along_axis(all_rows, top, 1)
        return Found(np.where(np.isneginf(similarities), -1, rows * self.spec.num_shards + self.index), similarities)


def encoded(values: NDArray[np.float32], dtype: str) -> NDArray[np.uint8]:
    """(n, D) finite numbers -> (n, row_bytes) in ``dtype``, rounded to nearest even as torch does."""
    if dtype == "bfloat16":  # NumPy has none: the upper half of a float32
        bits = values.view(np.uint32)
        bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        return (bits >> np.uint32(16)).astype(np.uint16).view(np.uint8)
    return values.astype(dtype).view(np.uint8)


def decoded(rows: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    """(n, row_bytes) in ``dtype`` -> (n, D), in at least float32."""
    if dtype == "bfloat16":
        return (rows.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return rows.view(dtype).astype(np.float64 if dtype == "float64" else np.float32, copy=False)
