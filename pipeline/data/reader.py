"""Blocks of samples from the shards, read ahead, each sample checked against its checksum when it is taken.

A block is what a lane shuffles (pipeline/data/plan.py): 32 MiB in one or a few byte ranges. Payloads are
sliced by the manifest's offsets; tar headers are never parsed, so a damaged one cannot lose a sample.

A lane goes through a shard from front to back. Where the store keeps a shard in chunks, a block is read to the end of
the chunk in which it ends, and the next begins with what is there already: all requests are for whole chunks, and no
byte is asked for twice.

At a start, at whichever step, the first batch does not wait for 64 blocks: where that is quicker, its samples are read
one by one, and blocks from the second on.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from deflate import crc32  # 0.10 CPU-s/GB of what is not in the cache; isal 0.12, zlib 0.36
from numpy.typing import NDArray

from pipeline.data.fetch import Fetch
from pipeline.data.manifest import Manifest, Samples
from pipeline.data.plan import Plan, Run, ids_of
from pipeline.storage import StorageError
from pipeline.waiting import Waiting

BlockKey = tuple[int, int, int]  # epoch, lane, block

FETCH_THREADS = 4  # they wait for sockets; 1.1x the bytes of 2 on loopback, more where answers take longer
REQUEST_BYTES = 2**20  # a request costs at least as much: SeaweedFS 3 ms of CPU, these 2; S3 25 ms, these 12
_REFETCHES = 2  # of a sample whose checksum is wrong: a flipped bit on the way is not there twice


class IntegrityError(StorageError):
    """What lies in a shard is not what was written: its checksum is wrong, time and again."""


class SampleReader:
    """Reads runs of a split's samples, each run with one request."""

    def __init__(self, manifest: Manifest, samples: Samples, fetch: Fetch) -> None:
        self._manifest = manifest
        self._samples = samples
        self._fetch = fetch

    def num_bytes(self, runs: Sequence[Run], then: Run | None = None) -> int:
        """How long a buffer ``read`` needs: the samples, the tar headers between them, what is read beyond them."""
        return sum(end - start for _, start, end in map(self._range, runs)) + self._num_beyond(runs[-1], then)

    def read(
        self,
        runs: Sequence[Run],
        order: NDArray[np.int64],
        buffer: NDArray[np.uint8],
        start: int = 0,
        before: "Before | None" = None,
        then: Run | None = None,
    ) -> "Block":
        """A block of the samples of ``runs``, in the ``order`` (n,) of their places there, read into ``buffer``.

        ``before`` is the previous block, which may still be read, and ``then`` what the next one begins with.
        """
        filled = 0
        shifts = []  # from where a run lies in its shard to where in the buffer
        beyond = self._num_beyond(runs[-1], then)
        for number, run in enumerate(runs):
            shard, low, high = self._range(run)
            known = self._num_known(before.last, run) if before is not None and number == 0 else 0
            upto = high + beyond if number == len(runs) - 1 else high
            into = buffer.data[filled : filled + upto - low]
            if known < len(into):
                self._fetch.fill(shard, low + known, into[known:])
            if before is not None and known:
                self._copy_known(before.block, shard, low, into[:known])
            shifts.append(filled - low)
            filled += high - low
        ids = ids_of(runs)[order]
        rows = ids - self._samples.first_id
        starts = self._samples.offset[rows] + np.repeat(shifts, [run.count for run in runs])[order]
        ends = starts + self._samples.length[rows]
        crcs = self._samples.crc32[rows]
        return Block(self, ids, starts, ends, crcs, buffer, start, buffer.data[filled : filled + beyond])

    def read_run(self, run: Run) -> "Block":
        """A block of one run's samples in the order of their ids, in memory of its own."""
        return self.read([run], np.arange(run.count), np.empty(self.num_bytes([run]), np.uint8))

    def read_again(self, sample_id: int, payload: memoryview, crc: int) -> None:
        """Fill ``payload`` from the source until its checksum is right; IntegrityError if it never is."""
        row = sample_id - self._samples.first_id
        shard, offset = int(self._samples.shard[row]), int(self._samples.offset[row])
        for _ in range(_REFETCHES):
            self._fetch.refill(shard, offset, payload)
            if crc32(payload) == crc:
                return
        raise IntegrityError(
            f"sample {sample_id} (bytes {offset} to {offset + len(payload)} of {self._manifest.shard_url(shard)}) has "
            f"the crc32 {crc32(payload):08x}, the manifest says {crc:08x}, after {_REFETCHES} more reads; the shard is "
            "damaged or another one: restore it; `python -m jobs.write_shards --verify` lists all such"
        )

    def _range(self, run: Run) -> tuple[int, int, int]:
        """(shard, first byte, end) of a run."""
        first = run.first - self._samples.first_id
        last = first + run.count - 1
        end = int(self._samples.offset[last]) + int(self._samples.length[last])
        return int(self._samples.shard[first]), int(self._samples.offset[first]), end

    def _num_beyond(self, run: Run, then: Run | None) -> int:
        """Bytes from a run's end to the end of its chunk, as far as ``then`` goes on in the same shard."""
        if then is None or then.first != run.first + run.count:
            return 0
        (shard, _, end), (next_shard, _, next_end) = self._range(run), self._range(then)
        return min(-end % self._fetch.chunk_bytes, next_end - end) if next_shard == shard else 0

    def _num_known(self, last: Run, run: Run) -> int:
        """Bytes of a run, from its first on, that are read beyond the end of the one before it."""
        beyond = self._num_beyond(last, run)
        return max(self._range(last)[2] + beyond - self._range(run)[1], 0) if beyond else 0

    def _copy_known(self, before: "Future[Block]", shard: int, low: int, known: memoryview) -> None:
        """Fill ``known``, the bytes of ``shard`` from ``low`` on that the block before has; if it failed, read them."""
        try:
            known[:] = before.result().beyond[-len(known) :]
        except (StorageError, CancelledError):
            self._fetch.fill(shard, low, known)


@dataclass(frozen=True)
class Before:
    """The block before one that is to be read: its last run, and the block once it is there."""

    last: Run
    block: "Future[Block]"


class Block:
    """Samples in memory, in the order in which batches take them."""

    def __init__(
        self,
        reader: SampleReader,
        ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
        crcs: NDArray[np.uint32],
        buffer: NDArray[np.uint8],
        start: int,
        beyond: memoryview,
    ) -> None:
        self.start = start  # in the lane, in samples
        self.ids: memoryview[int] = ids.data  # a list's integers lie all over memory: 0.02 CPU-s/GB more
        self.buffer = buffer
        self.beyond = beyond  # what was read of its last shard after its end
        self._reader = reader
        self._data = buffer.data
        self._starts: memoryview[int] = starts.data
        self._ends: memoryview[int] = ends.data
        self._crcs: memoryview[int] = crcs.data

    def payload(self, place: int) -> memoryview:
        """What sample ``ids[place]`` holds, checked, valid until the reader moves past the block.

        Sliced on demand: views kept for every sample of a block cost the garbage collector 0.1 CPU-s/GB. Checked on
        demand: that brings it into the cache for the decoder, and a checksum per sample in the fetching threads has
        them fight for the interpreter's lock. IntegrityError where reading it again does not help.
        """
        payload = self._data[self._starts[place] : self._ends[place]]
        if crc32(payload) != self._crcs[place]:
            self._reader.read_again(self.ids[place], payload, self._crcs[place])
        return payload


class Singles:
    """A block's samples, read one by one."""

    def __init__(self, reader: SampleReader, ids: list[int], start: int) -> None:
        self.start = start
        self.ids = ids
        self._reader = reader
        self._ahead: dict[int, Future[Block]] = {}  # by id

    def read_ahead(self, ids: list[int], threads: ThreadPoolExecutor) -> None:
        """Have the threads read these; others are read when their turn comes."""
        self._ahead = {sample_id: threads.submit(self._read, sample_id) for sample_id in ids}

    def payload(self, place: int) -> memoryview:
        """As ``Block.payload``. Raises what reading raised."""
        sample_id = self.ids[place]
        if sample_id not in self._ahead:
            return self._read(sample_id).payload(0)
        with Waiting(lambda: f"sample {sample_id} of the first batch"):
            return self._ahead[sample_id].result().payload(0)

    def _read(self, sample_id: int) -> Block:
        return self._reader.read_run(Run(sample_id, 1))


class LaneReader:
    """Keeps the current blocks of the lanes of some rows of the global batch in memory, and those that come next."""

    def __init__(self, manifest: Manifest, samples: Samples, plan: Plan, fetch: Fetch, rows: range) -> None:
        self._reader = SampleReader(manifest, samples, fetch)
        self._plan = plan
        self._rows = rows
        self._lanes = range(rows.start // plan.batch_per_lane, -(-rows.stop // plan.batch_per_lane))
        self._slice = slice(self._lanes.start, self._lanes.stop)
        self._current: dict[int, tuple[BlockKey, Future[Block]]] = {}
        self._blocks: dict[int, Block] = {}  # theirs
        self._ahead: dict[BlockKey, Future[Block]] = {}
        self._asked: list[tuple[int, bytes]] = []  # what the last call looked at
        self._started = False
        # Buffers: fresh memory costs 0.3 CPU-s/GB in page faults. All have one size, which most blocks keep to (what is
        # never written to takes no memory); what a longer one wrote to would be held by the short ones after it.
        self._free: list[NDArray[np.uint8]] = []
        self._buffer_bytes = plan.block_bytes * 5 // 4 + fetch.chunk_bytes
        self._threads = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="parallax-fetch")

    def at(self, step: int, end_step: int) -> Mapping[int, Block | Singles]:
        """lane -> block at global ``step``; reads ahead, at most to ``end_step``. Raises what reading raised."""
        epoch, local = divmod(step, self._plan.steps_per_epoch)
        if not self._started:
            self._started = True
            if self._plan.batch_per_lane * REQUEST_BYTES < self._plan.block_bytes:
                return self._singles(epoch, local)  # blocks with the next call: these would have to share the cores
        looked_at = self._look(step, end_step)
        if looked_at != self._asked:
            self._asked = []  # should this fail, the blocks of the last call are no more
            for lane in [lane for lane, (key, _) in self._current.items() if key[0] != epoch]:
                self._release(*self._current.pop(lane))  # before the new epoch's blocks ask for theirs
            self._ask(looked_at)
            with Waiting(lambda: f"the blocks of step {step}"):
                for lane, block in zip(self._lanes, self._plan.blocks_at(local)[self._slice].tolist(), strict=True):
                    key = epoch, lane, block
                    if lane not in self._current or self._current[lane][0] != key:
                        self._blocks[lane] = self._move(key)
            self._asked = looked_at
        return self._blocks

    def read(self, key: BlockKey, before: Future[Block] | None = None) -> Block:
        """Any lane's block, read now; ``before`` is the one before it, where that was asked for earlier.

        The threads take up blocks in the order asked for, so none waits for one that no thread has taken up.
        """
        epoch, lane, block = key
        runs, then = self._plan.block_runs(*key), self._plan.block_runs(epoch, lane, block + 1)
        buffer = self._buffer(self._reader.num_bytes(runs, then[0] if then else None))
        return self._reader.read(
            runs,
            self._plan.block_order(*key),
            buffer,
            self._plan.block_start(lane, block),
            Before(self._plan.block_runs(epoch, lane, block - 1)[-1], before) if before is not None else None,
            then[0] if then else None,
        )

    def close(self) -> None:
        """Forget the blocks and let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._current.clear()
        self._ahead.clear()

    def _singles(self, epoch: int, local: int) -> dict[int, Singles]:
        """lane -> the block at step ``local``, of which the threads read the rows of that step."""
        singles = {}
        for lane in self._lanes:
            block = self._plan.block_of(local, lane)
            ids = self._plan.block_ids(epoch, lane, block).tolist()
            singles[lane] = Singles(self._reader, ids, self._plan.block_start(lane, block))
            first_row = lane * self._plan.batch_per_lane
            mine = slice(max(self._rows.start - first_row, 0), self._rows.stop - first_row)
            singles[lane].read_ahead(self._plan.lane_batch(epoch, local, lane)[mine].tolist(), self._threads)
        return singles

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
                self._ahead[key] = self._submit(key)

    def _submit(self, key: BlockKey) -> Future[Block]:
        epoch, lane, block = key
        before_key = epoch, lane, block - 1
        held_key, held = self._current.get(lane, (None, None))
        before = held if held_key == before_key else self._ahead.get(before_key)
        return self._threads.submit(self.read, key, before)

    def _move(self, key: BlockKey) -> Block:
        """A lane's next current block; the one before it is released."""
        lane = key[1]
        future = self._ahead.pop(key, None) or self._submit(key)
        block = future.result()
        if lane in self._current:
            self._release(*self._current[lane])
        self._current[lane] = key, future
        return block

    def _release(self, key: BlockKey, future: Future[Block]) -> None:
        """Nobody takes its samples any more: another may have its buffer, unless the next one will copy from it."""
        epoch, lane, block = key
        after = self._ahead.get((epoch, lane, block + 1))
        buffer = future.result().buffer
        if len(buffer) == self._buffer_bytes and (after is None or after.done()):
            self._free.append(buffer)

    def _buffer(self, size: int) -> NDArray[np.uint8]:
        if size > self._buffer_bytes:
            return np.empty(size, np.uint8)
        try:  # another thread may be quicker: then there is nothing to take
            return self._free.pop()
        except IndexError:
            return np.empty(self._buffer_bytes, np.uint8)
