"""Blocks of samples from the shards, read ahead, each sample checked against its checksum.

A block is what a lane shuffles (pipeline/data/plan.py): a few MiB in one or a few byte ranges. Payloads are
sliced by the manifest's offsets; tar headers are never parsed, so a damaged one cannot lose a sample.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from isal.isal_zlib import crc32  # zlib's crc32 at 10x its speed: 0.02 instead of 0.24 CPU-s/GB

from pipeline.data.fetch import Fetch
from pipeline.data.manifest import Manifest, Samples
from pipeline.data.plan import Plan, Run
from pipeline.storage import StorageError

BlockKey = tuple[int, int, int]  # epoch, lane, block

_FETCH_THREADS = 2  # they wait for sockets and run crc32, both without the interpreter's lock
_REFETCHES = 2  # of a sample whose checksum is wrong: a flipped bit on the way is not there twice


class IntegrityError(StorageError):
    """What lies in a shard is not what was written: its checksum is wrong, time and again."""


class Block:
    """The payloads of one block, all checked."""

    def __init__(self, payloads: dict[int, memoryview]) -> None:
        self._payloads = payloads

    def __getitem__(self, sample_id: int) -> memoryview:
        return self._payloads[sample_id]


class BlockReader:
    """Keeps the blocks of the steps that come next in memory."""

    def __init__(self, manifest: Manifest, samples: Samples, plan: Plan, fetch: Fetch) -> None:
        self._manifest = manifest
        self._samples = samples
        self._plan = plan
        self._fetch = fetch
        self._blocks: dict[BlockKey, Future[Block]] = {}
        self._threads = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="parallax-fetch")

    def want(self, keys: Iterable[BlockKey]) -> None:
        """Start reading these blocks, in this order, and drop all others."""
        wanted = dict.fromkeys(keys)
        for key in [key for key in self._blocks if key not in wanted]:
            self._blocks.pop(key).cancel()
        for key in wanted:
            if key not in self._blocks:
                self._blocks[key] = self._threads.submit(self._read, key)

    def __getitem__(self, key: BlockKey) -> Block:
        """A block; waits for it. Raises what reading it raised."""
        if key not in self._blocks:
            self._blocks[key] = self._threads.submit(self._read, key)
        return self._blocks[key].result()

    def close(self) -> None:
        """Forget the blocks and let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._blocks.clear()

    def _read(self, key: BlockKey) -> Block:
        payloads: dict[int, memoryview] = {}
        for run in self._plan.block_runs(*key):
            payloads.update(read_run(self._manifest, self._samples, self._fetch, run))
        return Block(payloads)


def read_run(manifest: Manifest, samples: Samples, fetch: Fetch, run: Run) -> dict[int, memoryview]:
    """id -> payload of consecutive samples of one shard, by one read. IntegrityError after refetches in vain."""
    first = run.first - samples.first_id
    rows = slice(first, first + run.count)
    shard = int(samples.shard[first])
    offsets, lengths = samples.offset[rows].tolist(), samples.length[rows].tolist()
    start, end = offsets[0], offsets[-1] + lengths[-1]
    data = fetch(shard, start, end)
    payloads = {}
    for sample_id, offset, length, crc in zip(
        range(run.first, run.first + run.count), offsets, lengths, samples.crc32[rows].tolist(), strict=True
    ):
        payload = data[offset - start : offset - start + length]
        for _ in range(_REFETCHES):
            if crc32(payload) != crc:
                payload = fetch.again(shard, offset, offset + length)
        if crc32(payload) != crc:
            raise IntegrityError(
                f"sample {sample_id} (bytes {offset} to {offset + length} of {manifest.shard_url(shard)}) has the "
                f"crc32 {crc32(payload):08x}, the manifest says {crc:08x}, after {_REFETCHES} more reads; the "
                "shard is damaged or another one: restore it; `python -m jobs.write_shards --verify` lists all such"
            )
        payloads[sample_id] = payload
    return payloads


def blocks_ahead(plan: Plan, lanes: range, step: int, end_step: int) -> list[BlockKey]:
    """The blocks that ``lanes`` need from global ``step`` on, nearest first; a quarter of a block or epoch ahead.

    Blocks cut short at an epoch's edge may be missing; the reader reads those when they are asked for.
    """
    steps_per_block = max(plan.block_length // plan.batch_per_lane, 1)
    horizon = min(step + max(min(steps_per_block, plan.steps_per_epoch) // 4, 4), end_step - 1)
    keys: dict[BlockKey, None] = {}
    for at in [*range(step, horizon, steps_per_block), horizon]:
        epoch, local = divmod(at, plan.steps_per_epoch)
        keys.update(((epoch, lane, plan.block_of(local, lane)), None) for lane in lanes)
    return list(keys)
