"""Read every sample of a manifest once and check its bytes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from deflate import crc32

from pipeline.data.fetch import open_fetch, read_range
from pipeline.data.manifest import Manifest
from pipeline.storage import StorageError

_READ_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Damage:
    """A shard that is not what was written."""

    shard: str
    problem: str


def verify(
    manifest: Manifest, *, num_threads: int = 8, on_shard: Callable[[str], object] = lambda name: None
) -> list[Damage]:
    """What is damaged, shard by shard; empty = every checksum is right. ``on_shard`` is told each shard's name."""
    fetch = open_fetch(manifest)
    rows = manifest.samples
    starts = np.concatenate([[0], np.cumsum(manifest.shards.count)]).tolist()

    def check(shard: int) -> str:
        wrong: list[int] = []
        row, end = starts[shard], starts[shard + 1]
        while row < end:
            start = int(rows.offset[row])
            count = int(np.count_nonzero(rows.offset[row:end] < start + _READ_BYTES))
            lengths = rows.length[row : row + count].tolist()
            offsets = (rows.offset[row : row + count] - start).tolist()
            try:
                data = read_range(fetch, shard, start, start + offsets[-1] + lengths[-1])
            except StorageError as error:
                return str(error)
            sums = [crc32(data[at : at + length]) for at, length in zip(offsets, lengths, strict=True)]
            wrong += (row + np.flatnonzero(np.array(sums) != rows.crc32[row : row + count])).tolist()
            row += count
        return f"wrong checksum of {len(wrong)} samples: {', '.join(map(str, wrong[:20]))}" if wrong else ""

    damages = []
    with ThreadPoolExecutor(num_threads) as threads:
        for name, problem in zip(manifest.shards.name, threads.map(check, range(len(starts) - 1)), strict=True):
            on_shard(name)
            if problem:
                damages.append(Damage(name, problem))
    return damages
