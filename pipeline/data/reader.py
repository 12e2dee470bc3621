"""Blocks of samples from the shards, read ahead, each sample checked against its checksum.

A block is what a lane shuffles (pipeline/data/plan.py): a few MiB in one or a few byte ranges. Payloads are
sliced by the manifest's offsets; tar headers are never parsed, so a damaged one cannot lose a sample.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from isal.isal_zlib import crc32  # zlib's crc32 at 10x its speed: 0.02 instead of 0.24 CPU-s/GB
from numpy.typing import NDArray

from pipeline.data.fetch import Fetch
from pipeline.data.manifest import Manifest, Samples
from pipeline.data.plan import Plan, Run
from pipeline.storage import StorageError

BlockKey = tuple[int, int, int]  # epoch, lane, block

_FETCH_THREADS = 2  # they wait for sockets and run crc32, both without the interpreter's lock
_REFETCHES = 2  # of a sample whose checksum is wrong: a flipped bit on the way is not there twice
_MIB = 2**20


class IntegrityError(StorageError):
    """What lies in a shard is not what was written: its checksum is wrong, time and again."""


class Block:
    """A block in memory: ids and checked payloads in the order in which batches take them."""

    def __init__(
        self, start: int, ids: list[int], starts: list[int], ends: list[int], buffer: NDArray[np.uint8]
    ) -> None:
        self.start = start  # in the lane, in samples
        self.ids = ids
        self.buffer = buffer
        self._starts, self._ends = starts, ends

    def payload(self, place: int) -> memoryview:
        """What sample ``ids[place]`` holds, valid until the reader moves past the block.

        Sliced on demand: views kept for every sample of a block cost the garbage collector 0.1 CPU-s/GB.
        """
        return self.buffer.data[self._starts[place] : self._ends[place]]


class LaneReader:
    """Keeps the current blocks of some lanes in memory, and those that come next."""

    def __init__(self, manifest: Manifest, samples: Samples, plan: Plan, fetch: Fetch, lanes: range) -> None:
        self._manifest = manifest
        self._samples = samples
        self._plan = plan
        self._fetch = fetch
        self._lanes = lanes
        self._slice = slice(lanes.start, lanes.stop)
        self._current: dict[int, tuple[BlockKey, Block]] = {}
        self._ahead: dict[BlockKey, Future[Block]] = {}
        self._asked: list[tuple[int, bytes]] = []  # what the last call looked at
        self._free: list[NDArray[np.uint8]] = []  # buffers: fresh memory costs 0.3 CPU-s/GB in page faults
        self._largest = 0
        self._threads = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="parallax-fetch")

    def at(self, step: int, end_step: int) -> dict[int, Block]:
        """lane -> block at global ``step``; reads ahead, at most to ``end_step``. Raises what reading raised."""
        looked_at = self._look(step, end_step)
        if looked_at != self._asked:
            self._ask(looked_at)
            self._asked = looked_at
            epoch, local = divmod(step, self._plan.steps_per_epoch)
            for lane in self._lanes:
                self._move(lane, (epoch, lane, self._plan.block_of(local, lane)))
            self._blocks = {lane: block for lane, (_, block) in self._current.items()}
        return self._blocks

    def read(self, key: BlockKey) -> Block:
        """Any lane's block, read now."""
        runs = self._plan.block_runs(*key)
        edges = np.cumsum([0, *(run_bytes(self._samples, run) for run in runs)]).tolist()
        buffer = self._buffer(edges[-1])
        places = [
            np.array(read_run(self._manifest, self._samples, self._fetch, run, buffer.data[low:high])) + low
            for run, low, high in zip(runs, edges, edges[1:], strict=False)
        ]
        read = np.concatenate([np.arange(run.first, run.first + run.count) for run in runs])
        ids = self._plan.block_ids(*key)
        by_id = np.argsort(read)
        starts, ends = np.concatenate(places)[by_id[np.searchsorted(read, ids, sorter=by_id)]].T.tolist()
        _, lane, block = key
        return Block(self._plan.block_start(lane, block), ids.tolist(), starts, ends, buffer)

    def close(self) -> None:
        """Forget the blocks and let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._current.clear()
        self._ahead.clear()

    def _look(self, step: int, end_step: int) -> list[tuple[int, bytes]]:
        """The blocks of all lanes now and up to a quarter of a block or epoch ahead: (epoch, int64 blocks).

        Two steps of an epoch that are looked at lie at most a block apart, so no block between them is missed.
        """
        plan = self._plan
        steps_per_block = max(plan.block_length // plan.batch_per_lane, 1)
        horizon = min(step + max(min(steps_per_block, plan.steps_per_epoch) // 4, 4), end_step - 1)
        looked_at = []
        while step <= horizon:
            epoch, local = divmod(step, plan.steps_per_epoch)
            last = min(plan.steps_per_epoch - 1, local + horizon - step)
            looked_at += [
                (epoch, plan.blocks_at(at)[self._slice].tobytes())
                for at in [*range(local, last, steps_per_block), last]
            ]
            step += last - local + 1
        return looked_at

    def _ask(self, looked_at: list[tuple[int, bytes]]) -> None:
        wanted: dict[BlockKey, None] = {}
        for epoch, blocks in looked_at:
            numbers = np.frombuffer(blocks, np.int64).tolist()
            wanted.update(((epoch, lane, block), None) for lane, block in zip(self._lanes, numbers, strict=True))
        for key in [key for key in self._ahead if key not in wanted]:
            self._ahead.pop(key).cancel()
        held = {key for key, _ in self._current.values()}
        for key in wanted:
            if key not in self._ahead and key not in held:
                self._ahead[key] = self._threads.submit(self.read, key)

    def _move(self, lane: int, key: BlockKey) -> None:
        if lane in self._current:
            if self._current[lane][0] == key:
                return
            self._free.append(self._current.pop(lane)[1].buffer)
        future = self._ahead.pop(key, None) or self._threads.submit(self.read, key)
        self._current[lane] = key, future.result()

    def _buffer(self, size: int) -> NDArray[np.uint8]:
        self._largest = max(self._largest, -(-size // _MIB) * _MIB)
        try:  # another thread may be quicker: then there is nothing to take
            while len(buffer := self._free.pop()) < size:
                pass  # dropped, so that the small ones do not add up
        except IndexError:
            return np.empty(self._largest, np.uint8)  # what is never written to takes no memory
        return buffer


def run_bytes(samples: Samples, run: Run) -> int:
    """How many bytes ``read_run`` reads: samples of one shard and the tar headers between them."""
    return int(_bounds(samples, run)[1, -1])


def _bounds(samples: Samples, run: Run) -> NDArray[np.int64]:
    """(2, n): where each sample starts and ends, in bytes from the first one's start."""
    first = run.first - samples.first_id
    rows = slice(first, first + run.count)
    starts = samples.offset[rows] - samples.offset[first]
    return np.stack([starts, starts + samples.length[rows]])


def read_run(manifest: Manifest, samples: Samples, fetch: Fetch, run: Run, buffer: memoryview) -> list[tuple[int, int]]:
    """Consecutive samples of one shard by one read into ``buffer`` (of ``run_bytes``); where each lies in it.

    Checksums are computed while the bytes arrive and are in the cache. IntegrityError where one is still wrong after
    refetches.
    """
    first = run.first - samples.first_id
    shard, offset = int(samples.shard[first]), int(samples.offset[first])
    places = list(zip(*_bounds(samples, run).tolist(), strict=True))
    crcs = samples.crc32[first : first + run.count].tolist()
    checked = 0
    wrong: list[int] = []

    def check(arrived: int) -> None:
        nonlocal checked
        while checked < len(places) and places[checked][1] <= arrived:
            start, end = places[checked]
            if crc32(buffer[start:end]) != crcs[checked]:
                wrong.append(checked)
            checked += 1

    fetch.fill(shard, offset, buffer, check)
    for row in wrong:
        start, end = places[row]
        _refetch(manifest, fetch, shard, offset + start, buffer[start:end], run.first + row, crcs[row])
    return places


def _refetch(
    manifest: Manifest, fetch: Fetch, shard: int, offset: int, payload: memoryview, sample_id: int, crc: int
) -> None:
    for _ in range(_REFETCHES):
        fetch.refill(shard, offset, payload)
        if crc32(payload) == crc:
            return
    raise IntegrityError(
        f"sample {sample_id} (bytes {offset} to {offset + len(payload)} of {manifest.shard_url(shard)}) has the crc32 "
        f"{crc32(payload):08x}, the manifest says {crc:08x}, after {_REFETCHES} more reads; the shard is damaged or "
        "another one: restore it; `python -m jobs.write_shards --verify` lists all such"
    )
