"""A bounded copy of what was read, on a local disk: the second epoch costs the object store nothing.

The unit is an aligned chunk of a shard, one file, named by the hash of (shard URL, digest of the manifest) and the
chunk's number. Files appear by rename, so a reader sees all of one or none, whoever else reads, writes or is
killed meanwhile; every sample is checked against the manifest's checksum after that all the same.
"""

import hashlib
import os
import random
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from pipeline.data.fetch import CHUNK_BYTES, Fetch, read_range
from pipeline.data.manifest import Manifest
from pipeline.storage import StorageError

_TRIM_EVERY = 32  # chunks written between two looks at the folder's size
_TRIM_TO = 0.9  # of the bound, so that a trim is not needed at once again


class MirrorConfig(BaseModel):
    """Where the mirror lies, on every node, and how large it may grow."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str  # on a local disk, e.g. /mnt/nvme/parallax; all processes of a node share it
    max_gib: float = Field(default=100, gt=0)


class MirrorFetch:
    """Reads ranges from the mirror, and what it lacks from ``source``."""

    chunk_bytes = 1  # it asks the source for whole chunks by itself

    def __init__(self, manifest: Manifest, source: Fetch, config: MirrorConfig) -> None:
        """``max_gib`` bounds the folder, shared by all processes that use it, to within 32 chunks of each.

        StorageError where the folder cannot be written.
        """
        self._manifest = manifest
        self._source = source
        self._folder = Path(config.folder).expanduser().absolute()
        self._max_bytes = config.max_gib * 2**30
        self._written = random.randrange(_TRIM_EVERY)  # processes trim at different times
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise StorageError(f"the mirror {self._folder} cannot be written: {error}") from error

    def fill(self, shard: int, start: int, buffer: memoryview) -> None:
        """Copy what is there, read what is missing in whole chunks and keep it."""
        end = start + len(buffer)
        chunks = list(range(start // CHUNK_BYTES, -(-end // CHUNK_BYTES)))
        missing = [chunk for chunk in chunks if not self._copy(shard, chunk, start, end, buffer)]
        for first, last in _consecutive(missing):
            self._read(shard, first, last, start, end, buffer)

    def refill(self, shard: int, start: int, buffer: memoryview) -> None:
        """From the source; the chunks in doubt leave the mirror."""
        for chunk in range(start // CHUNK_BYTES, -(-(start + len(buffer)) // CHUNK_BYTES)):
            self._path(shard, chunk).unlink(missing_ok=True)
        self._source.refill(shard, start, buffer)

    def _copy(self, shard: int, chunk: int, start: int, end: int, buffer: memoryview) -> bool:
        """Copy what [start, end) shares with a chunk from the mirror; False where the mirror lacks it."""
        low, high = self._overlap(shard, chunk, start, end)
        try:
            with self._path(shard, chunk).open("rb", buffering=0) as file:
                file.seek(low - chunk * CHUNK_BYTES)
                complete = file.readinto(buffer[low - start : high - start]) == high - low
                os.utime(file.fileno())  # the oldest leave first
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageError(
                f"cannot read the mirror {self._folder}: {error}; is its disk whole, is the folder another user's?"
            ) from error
        return complete

    def _read(self, shard: int, first: int, last: int, start: int, end: int, buffer: memoryview) -> None:
        """Read chunks [first, last] whole, keep them, copy what [start, end) needs."""
        base = first * CHUNK_BYTES
        size = int(self._manifest.shards.size[shard])
        data = read_range(self._source, shard, base, min((last + 1) * CHUNK_BYTES, size))
        for chunk in range(first, last + 1):
            low, high = self._overlap(shard, chunk, start, end)
            buffer[low - start : high - start] = data[low - base : high - base]
            self._keep(shard, chunk, data[(chunk - first) * CHUNK_BYTES : (chunk - first + 1) * CHUNK_BYTES])

    def _overlap(self, shard: int, chunk: int, start: int, end: int) -> tuple[int, int]:
        return max(start, chunk * CHUNK_BYTES), min(end, (chunk + 1) * CHUNK_BYTES)

    def _keep(self, shard: int, chunk: int, data: memoryview) -> None:
        path = self._path(shard, chunk)
        part = path.with_name(f".part-{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            part.replace(path)
        except FileNotFoundError:
            return  # deleted meanwhile: another process trims
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise StorageError(f"cannot write to the mirror {self._folder}: {error}; is its disk full?") from error
        self._written += 1
        if self._written % _TRIM_EVERY == 0:
            self._trim()

    def _trim(self) -> None:
        """Delete what was not used for longest, until the folder is within its bound."""
        files = []
        for entry in self._folder.glob("*/*"):
            try:
                stat = entry.stat()
            except FileNotFoundError:
                continue  # another process trimmed it
            files.append((stat.st_mtime_ns, stat.st_size, entry))
        total = sum(size for _, size, _ in files)
        if total <= self._max_bytes:
            return
        for _, size, entry in sorted(files):
            entry.unlink(missing_ok=True)
            total -= size
            if total <= _TRIM_TO * self._max_bytes:
                return

    def _path(self, shard: int, chunk: int) -> Path:
        name = f"{self._manifest.shard_url(shard)} {self._manifest.digest}"
        return self._folder / hashlib.sha256(name.encode()).hexdigest()[:32] / f"{chunk:06d}"


def _consecutive(chunks: list[int]) -> list[tuple[int, int]]:
    """[1, 2, 3, 7] -> [(1, 3), (7, 7)]."""
    ranges: list[tuple[int, int]] = []
    for chunk in chunks:
        if ranges and ranges[-1][1] == chunk - 1:
            ranges[-1] = ranges[-1][0], chunk
        else:
            ranges.append((chunk, chunk))
    return ranges
