"""Who is in which batch: a pure function of (manifest, seed, epoch, step).

Philox(seed, epoch) permutes the shards; the concatenated sequence of samples is cut into C equal lanes at sample
granularity; each lane is shuffled in blocks of 32 MiB. Global batch k takes B / C consecutive samples from
every lane, so a rank that takes a slice of the batch reads few lanes, each front to back. The world size only
slices, and a resumed run computes its position: nothing is replayed. Random numbers are Philox's raw 64-bit
words, ranked; they stay the same under any release of numpy (``Generator`` promises no such thing).

The N mod B samples that fill no batch are left out of the epoch: a window over the ids that moves on with the
epoch, so that none is left out twice before every other was left out once.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import Shards

MAX_LANES = 64  # more ranks x loader workers than lanes read some bytes more than once
# Per lane and block, at the split's mean size of a sample: 64 lanes hold 2 GiB in all, over all ranks, and 0.8 GiB of
# what comes next: a quarter of the lanes read ahead, and reads end with whole chunks (pipeline/data/reader.py). From
# SeaweedFS 8 MiB cost 1.2x the CPU on both sides, 2 MiB twice.
BLOCK_BYTES = 32 * 2**20

# Words 2 and 3 of Philox's 256-bit counter: streams that must never meet.
_SHARD_STREAM, _BLOCK_STREAM, _AUGMENT_STREAM = 1, 2, 3


@dataclass(frozen=True)
class Run:
    """Consecutive ids [first, first + count)."""

    first: int
    count: int


def ids_of(runs: Sequence[Run]) -> NDArray[np.int64]:
    """The ids of one run after the other."""
    return np.concatenate([np.arange(run.first, run.first + run.count) for run in runs])


class Plan:
    """The order of one split's samples at a global batch size and seed."""

    def __init__(self, shards: Shards, split: str, global_batch_size: int, seed: int) -> None:
        """ValueError where the split does not fill one batch. Needs no row per sample, so it is quick at any size."""
        in_split = np.array([name == split for name in shards.split])
        counts = shards.count[in_split]
        self.num_samples = int(counts.sum())
        self.global_batch_size = global_batch_size
        self.seed = seed
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} must lie in [0, 2**64)")
        if not 1 <= global_batch_size <= self.num_samples:
            raise ValueError(
                f"global_batch_size={global_batch_size} does not fit the split's {self.num_samples} samples; "
                f"sizes from 1 to {self.num_samples} work"
            )
        self.steps_per_epoch = self.num_samples // global_batch_size
        self.remainder = self.num_samples % global_batch_size  # samples left out of each epoch
        self.lanes = max(n for n in range(1, MAX_LANES + 1) if global_batch_size % n == 0)
        self.batch_per_lane = global_batch_size // self.lanes
        self.lane_length = self.steps_per_epoch * self.batch_per_lane
        mean_bytes = max(int(shards.size[in_split].sum()) // self.num_samples, 1)
        self.block_length = max(BLOCK_BYTES // mean_bytes // self.batch_per_lane, 1) * self.batch_per_lane
        self.block_bytes = min(self.block_length, self.lane_length) * mean_bytes  # about, of a whole block
        steps_per_block = self.block_length // self.batch_per_lane
        self._phases = np.arange(self.lanes) * steps_per_block // self.lanes * self.batch_per_lane
        self._first_id = int(shards.count[: shards.split.index(split)].sum())
        self._shard_starts = np.cumsum(counts) - counts
        self.block_order = functools.lru_cache(maxsize=4 * MAX_LANES)(self._block_order)
        self._sequence = functools.lru_cache(maxsize=2)(self._permuted_segments)  # two epochs meet at the boundary

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """The ids (B,) of the global batch at ``step`` of ``epoch``: lane after lane."""
        return np.concatenate([self.lane_batch(epoch, step, lane) for lane in range(self.lanes)])

    def lane_batch(self, epoch: int, step: int, lane: int) -> NDArray[np.int64]:
        """The B / C ids that ``lane`` gives to the global batch."""
        block = self.block_of(step, lane)
        start = step * self.batch_per_lane - self.block_start(lane, block)
        return self.block_ids(epoch, lane, block)[start : start + self.batch_per_lane]

    def block_of(self, step: int, lane: int) -> int:
        """The block of ``lane`` that holds ``step``. Lanes change blocks at different steps, so reads are even."""
        return (step * self.batch_per_lane + int(self._phases[lane])) // self.block_length

    def blocks_at(self, step: int) -> NDArray[np.int64]:
        """``block_of`` for all lanes (C,)."""
        return (step * self.batch_per_lane + self._phases) // self.block_length

    def block_start(self, lane: int, block: int) -> int:
        """Where in the lane a block begins, in samples."""
        return self._block_bounds(block, lane)[0]

    def block_runs(self, epoch: int, lane: int, block: int) -> list[Run]:
        """What to read for a block, in the order in which it lies in the shards. No run spans two shards."""
        lane_start = lane * self.lane_length
        start, end = (lane_start + bound for bound in self._block_bounds(block, lane))
        firsts, ends = self._sequence(epoch)
        runs = []
        segment = int(np.searchsorted(ends, start, side="right"))
        while start < end:
            upto = min(end, int(ends[segment]))
            segment_start = int(ends[segment - 1]) if segment else 0
            runs.append(Run(int(firsts[segment]) + start - segment_start, upto - start))
            start = upto
            segment += 1
        return runs

    def block_ids(self, epoch: int, lane: int, block: int) -> NDArray[np.int64]:
        """The ids of a block in the order in which batches take them."""
        return ids_of(self.block_runs(epoch, lane, block))[self.block_order(epoch, lane, block)]

    def _block_order(self, epoch: int, lane: int, block: int) -> NDArray[np.int64]:
        """Where in a block's runs lies what batches take first, second, ..."""
        start, end = self._block_bounds(block, lane)
        order = _permutation(end - start, self.seed, epoch, _BLOCK_STREAM, lane, block)
        order.flags.writeable = False  # shared through the cache
        return order

    def left_out(self, epoch: int) -> NDArray[np.int64]:
        """The ids of the N mod B samples that ``epoch`` does without."""
        start = epoch * self.remainder
        return self._first_id + np.arange(start, start + self.remainder) % self.num_samples

    def _block_bounds(self, block: int, lane: int) -> tuple[int, int]:
        start = block * self.block_length - int(self._phases[lane])
        return max(start, 0), min(start + self.block_length, self.lane_length)

    def _permuted_segments(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's segments in order: the first id (S,) of each and where it ends in the sequence (S,)."""
        hole_start = epoch * self.remainder % self.num_samples
        hole_end = hole_start + self.remainder
        if hole_end <= self.num_samples:
            kept = [(0, hole_start), (hole_end, self.num_samples)]
        else:
            kept = [(hole_end - self.num_samples, hole_start)]
        starts, counts = [], []
        for start, end in kept:
            if start == end:
                continue
            inner = self._shard_starts[(self._shard_starts > start) & (self._shard_starts < end)]
            edges = np.concatenate([[start], inner, [end]])
            starts.append(edges[:-1])
            counts.append(np.diff(edges))
        order = _permutation(sum(map(len, starts)), self.seed, epoch, _SHARD_STREAM)
        return self._first_id + np.concatenate(starts)[order], np.cumsum(np.concatenate(counts)[order])


def uniform_rows(seed: int, epoch: int, position: int, count: int, width: int) -> NDArray[np.float64]:
    """(count, width) in [0, 1): rows of a table that only (seed, epoch, position in the epoch) index.

    ``width`` is a multiple of 4: Philox counts in steps of four words.
    """
    philox = np.random.Philox(key=_philox_key(seed, epoch), counter=[0, 0, 0, _AUGMENT_STREAM])
    words = philox.advance(position * width // 4).random_raw(count * width)
    return np.asarray((words >> np.uint64(11)).reshape(count, width) * 2.0**-53, np.float64)


def _philox_key(seed: int, epoch: int) -> NDArray[np.uint64]:
    """(2,): one key per epoch of a run."""
    return np.array([seed, epoch], np.uint64)  # a list would go through float64 and lose the seed's low bits


def _permutation(n: int, seed: int, epoch: int, stream: int, lane: int = 0, block: int = 0) -> NDArray[np.int64]:
    """A permutation of range(n) that depends on nothing else."""
    words = np.random.Philox(key=_philox_key(seed, epoch), counter=[0, block, lane, stream]).random_raw(n)
    return np.argsort(words, kind="stable")
