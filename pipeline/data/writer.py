"""Write images as WebDataset shards (tars) with a manifest.

A sample is ``<key>.<ext>`` and, with a label, ``<key>.cls`` beside it, so webdataset and img2dataset read the
shards too. Headers carry no time and no owner: the same samples give the same bytes, hence the same digest.
"""

import functools
import io
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deflate import crc32

from pipeline import storage
from pipeline.data.manifest import HEADER, Manifest, build_manifest, save_manifest
from pipeline.data.receipts import Receipts, ShardRows
from pipeline.errors import UserError
from pipeline.storage import Listed, StorageError

MAX_SHARD_BYTES = 64 * 2**20  # a block of a lane is a few MiB: a shard is worth several, and quick to upload
MAX_SHARD_SAMPLES = 10_000


class SampleError(UserError):
    """A sample that no reader could make sense of later."""


@dataclass(frozen=True)
class Sample:
    """One encoded image."""

    key: str  # unique in its split, no dots and no leading slash (WebDataset's ``__key__``)
    image: bytes  # JPEG, PNG, WebP ... as it is
    extension: str  # "jpg", "png" ...
    split: str  # "train", "validation" ...
    label: int = -1  # index into the class names; -1 = none


def write_shards(
    samples: Iterable[Sample],
    url: str,
    *,
    class_names: tuple[str, ...] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    max_shard_samples: int = MAX_SHARD_SAMPLES,
) -> Manifest:
    """Write ``samples`` in their order, each split to shards of its own, then the manifest.

    Samples should come shuffled: what is neighbour in a shard is often neighbour in a batch. The manifest is
    written last, and that of another set which lay there goes first, so a folder with one is complete. SampleError
    on a key with a dot, an empty image or a label without a class name; StorageError where ``url`` cannot be written.
    """
    url = storage.resolve(url)
    open_shards: dict[str, _OpenShard] = {}
    closed: dict[str, list[ShardRows]] = {}
    with _temporary_folder() as folder:
        for sample in samples:
            check_sample(sample, class_names)
            done = closed.setdefault(sample.split, [])
            shard = open_shards.get(sample.split)
            if shard and shard.is_full(len(sample.image), max_shard_bytes, max_shard_samples):
                done.append(shard.close(url))
                shard = None
            if shard is None:
                name = f"{sample.split}-{len(done):06d}.tar"
                shard = open_shards[sample.split] = _OpenShard(name, sample.split, folder)
            shard.add(sample)
        for split, shard in open_shards.items():
            closed[split].append(shard.close(url))
    if not closed:
        raise SampleError(f"no samples to write to {url}; the source is empty")
    return _finish(url, class_names, [rows for done in closed.values() for rows in done])


@dataclass(frozen=True)
class ShardTask:
    """A shard that can be written on its own."""

    name: str
    split: str
    fingerprint: str  # of what it will hold: a shard of an earlier attempt counts only if this is equal
    samples: Callable[[], Iterable[Sample]]


def write_tasks(
    tasks: list[ShardTask],
    url: str,
    *,
    class_names: tuple[str, ...],
    num_threads: int = 8,
    on_shard: Callable[[ShardRows], object] = lambda rows: None,
) -> Manifest:
    """Write shards in parallel, those of a split side by side in ``tasks``; what an earlier attempt finished stays.

    Reading files and sending shards is what takes the time, so threads do. ``on_shard`` is called in one thread, in
    order.
    """
    url = storage.resolve(url)
    files = storage.list_files(url) if storage.exists(url) else {}
    receipts = Receipts(url, files)
    with _temporary_folder() as folder, ThreadPoolExecutor(num_threads) as threads:

        def write(task: ShardTask) -> ShardRows:
            finished = receipts.find(task.name, task.fingerprint)
            if finished is not None and files.get(task.name) == Listed(finished.size, finished.version):
                return finished  # and no other writer has replaced it since
            shard = _OpenShard(task.name, task.split, folder)
            for sample in task.samples():
                check_sample(sample, class_names)
                shard.add(sample)
            rows = shard.close(url)
            receipts.keep(rows, task.fingerprint)
            return rows

        done = []
        try:
            for rows in threads.map(write, tasks):
                on_shard(rows)
                done.append(rows)
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
    manifest = _finish(url, class_names, done)
    receipts.clear()
    return manifest


def _finish(url: str, class_names: tuple[str, ...], shards: list[ShardRows]) -> Manifest:
    """Commit the manifest if every shard is still what was written. What is left of another set goes before.

    Several writers of one set, e.g. runs that start together, do each other no harm: they write the same bytes.
    """
    files = storage.list_files(url)
    replaced = [rows.name for rows in shards if not _is_there(url, rows, files.get(rows.name))]
    if replaced:
        if len(replaced) < len(shards):  # shards of two sets: a manifest of the other writer's is false
            storage.delete(storage.join(url, HEADER))
        raise StorageError(
            f"{url}: another writer has replaced or deleted {len(replaced)} of {len(shards)} shards, e.g. "
            f"{replaced[0]}, since this one wrote them; give each writer a folder of its own, and write this set again"
        )
    leftovers = (_earlier_shards(url) & files.keys()) - {rows.name for rows in shards}
    if leftovers:
        storage.delete(storage.join(url, HEADER))
    for name in leftovers:
        storage.delete(storage.join(url, name))
    return commit_manifest(url, class_names, shards)


def _is_there(url: str, rows: ShardRows, file: Listed | None) -> bool:
    """Whether what lies there is what was written, or the same again."""
    if file is None or file.size != rows.size:
        return False
    return file.version == rows.version or crc32(storage.read_bytes(storage.join(url, rows.name))) == rows.crc32


def _make_way(url: str, rows: ShardRows) -> None:
    """Delete the manifest of a set that has another shard of this name, which is about to be replaced."""
    header_url = storage.join(url, HEADER)
    try:
        manifest = _manifest_there(url, storage.read_bytes(header_url))
    except storage.MissingError:
        return
    if manifest is None or not _lists(manifest, rows):
        storage.delete(header_url)


@functools.lru_cache(maxsize=1)  # asked for each shard
def _manifest_there(url: str, header: bytes) -> Manifest | None:
    try:
        return Manifest.load(url)
    except StorageError:
        return None


def _lists(manifest: Manifest, rows: ShardRows) -> bool:
    """Whether a manifest's shard of this name holds these samples."""
    if rows.name not in manifest.shards.name:
        return False
    shard = manifest.shards.name.index(rows.name)
    first = int(manifest.shards.count[:shard].sum())
    samples = slice(first, first + int(manifest.shards.count[shard]))
    return int(manifest.shards.size[shard]) == rows.size and all(
        np.array_equal(getattr(manifest.samples, column)[samples], rows.columns[column])
        for column in ("offset", "length", "crc32", "label")
    )


def _earlier_shards(url: str) -> set[str]:
    """Those of the set that lay here before, as far as they have names of this writer's. Its header is gone already."""
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(url, "shards.parquet"))), columns=["name"])
    except (storage.MissingError, pa.ArrowException, OSError):  # there was none, or it is no Parquet
        return set()
    return {name for name in table["name"].to_pylist() if re.fullmatch(r"[a-z][a-z0-9_]*-\d{6}\.tar", name)}


def commit_manifest(
    url: str, class_names: tuple[str, ...], shards: list[ShardRows], passed_over: Mapping[str, int] | None = None
) -> Manifest:
    """Build and save the manifest of shards that lie at ``url`` already, those of a split side by side.

    ``passed_over``: how much of what lies there is not in it, by reason.
    """
    columns = {name: [v for shard in shards for v in shard.columns[name]] for name in shards[0].columns}
    keys = columns.pop("key")
    table = {
        "name": [shard.name for shard in shards],
        "split": [shard.split for shard in shards],
        "size": [shard.size for shard in shards],
        "count": [len(shard.columns["key"]) for shard in shards],
    }
    manifest = build_manifest(url, class_names, table, columns, passed_over)
    save_manifest(manifest, keys)
    return manifest


def check_sample(sample: Sample, class_names: tuple[str, ...]) -> None:
    """SampleError on what no reader could make sense of later."""
    if not sample.key or "." in sample.key or sample.key.startswith("/"):
        raise SampleError(
            f"the key {sample.key!r} is empty, has a dot or starts with a slash; WebDataset splits names at the "
            "first dot, so a key is a relative name such as 'n01440764/0000123'"
        )
    if not sample.image:
        raise SampleError(f"the image of {sample.key!r} is empty (0 bytes)")
    highest = len(class_names) - 1 if class_names else 2**31 - 1  # int32 in the manifest
    if not -1 <= sample.label <= highest:
        raise SampleError(
            f"{sample.key!r} has the label {sample.label}; with {len(class_names)} class names labels go from 0 to "
            f"{highest}, and -1 means none"
        )


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with _room_for_shards():
        folder = tempfile.TemporaryDirectory(prefix="parallax-shards-")
    with folder as name:
        yield Path(name)


@contextmanager
def _room_for_shards() -> Iterator[None]:
    """Around what writes to the temporary folder: a disk that is full, a limit of file sizes."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write a shard to the temporary folder {tempfile.tempdir or 'of this machine'}: {error}; it "
            f"takes up to {MAX_SHARD_BYTES // 2**20} MiB for each thread; set TMPDIR to a folder with room"
        ) from error


class _OpenShard:
    """A tar in the making, in a local folder."""

    def __init__(self, name: str, split: str, folder: Path) -> None:
        self._rows = ShardRows(name, split)
        self._path = folder / name
        with _room_for_shards():
            self._tar = tarfile.open(self._path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  closed in close()

    def is_full(self, next_bytes: int, max_bytes: int, max_samples: int) -> bool:
        return len(self._rows.columns["key"]) >= max_samples or self._tar.offset + next_bytes > max_bytes

    def add(self, sample: Sample) -> None:
        if sample.label >= 0:  # before the image: a reader that stops at the image has the label already
            self._member(f"{sample.key}.cls", str(sample.label).encode())
        offset = self._member(f"{sample.key}.{sample.extension}", sample.image)
        for name, value in (
            ("key", sample.key),
            ("offset", offset),
            ("length", len(sample.image)),
            ("crc32", crc32(sample.image)),
            ("label", sample.label),
        ):
            self._rows.columns[name].append(value)

    def _member(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        with _room_for_shards():
            self._tar.addfile(info, io.BytesIO(data))
        return self._tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def close(self, url: str) -> ShardRows:
        with _room_for_shards():
            self._tar.close()
        target = storage.join(url, self._rows.name)
        self._rows.size, self._rows.crc32 = self._path.stat().st_size, crc32(self._path.read_bytes())
        _make_way(url, self._rows)
        storage.upload(self._path, target)
        self._rows.version = storage.look_at(target).version
        self._path.unlink()
        return self._rows
