"""What a folder of shards holds: a header, and one row per sample with a dense id, byte range and checksum.

``manifest.json`` is the header, ``shards.parquet`` has a row per shard, ``samples.parquet`` a row per sample.
A sample's id is its row number. Shards belong to one split, and a split's rows are contiguous. 100 million
samples take 2.0 GB in memory (20 bytes each); the names of samples stay in the file until someone asks.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.errors import UserError
from pipeline.storage import StorageError

HEADER = "manifest.json"
_SHARDS = "shards.parquet"
_SAMPLES = "samples.parquet"
_FORMAT = 1
_SHARD_COLUMNS = pa.schema([("name", pa.string()), ("split", pa.string()), ("size", pa.int64()), ("count", pa.int64())])
_SAMPLE_COLUMNS = pa.schema(
    [("offset", pa.int64()), ("length", pa.int32()), ("crc32", pa.uint32()), ("label", pa.int32())]
)
_KEY_COLUMN = pa.schema([("key", pa.string())])
_REFETCHES = 2  # of a manifest that comes damaged: a bit that was flipped on the way is not there twice
_REMEDY = "copy the folder again, or make the manifest anew with `python -m jobs.index`"
_T = TypeVar("_T")


class _DamagedError(StorageError):
    """What comes is not the manifest that was written."""


class MissingSplitError(UserError):
    """The shards have no split of this name; the message names those that they have."""


@dataclass(frozen=True)
class Samples:
    """The rows of one split, ordered by id: columns of equal length N.

    A sample's image is bytes [offset, offset + length) of its shard; ``crc32`` is zlib's over those bytes.
    """

    first_id: int  # ids are dense over the whole manifest
    shard: NDArray[np.int32]  # row in Manifest.shards
    offset: NDArray[np.int64]
    length: NDArray[np.int32]
    crc32: NDArray[np.uint32]
    label: NDArray[np.int32]  # -1 = none

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.offset)

    @property
    def id(self) -> NDArray[np.int64]:
        """(N,) int64."""
        return np.arange(self.first_id, self.first_id + self.num_samples)


@dataclass(frozen=True)
class Shards:
    """One row per shard, in the order of the sample ids."""

    name: tuple[str, ...]  # relative to the manifest's folder
    split: tuple[str, ...]
    size: NDArray[np.int64]  # bytes
    count: NDArray[np.int64]  # samples


@dataclass(frozen=True)
class Manifest:
    """A validated manifest; ``digest`` identifies the data, wherever the shards lie."""

    url: str
    class_names: tuple[str, ...]
    shards: Shards
    samples: Samples
    digest: str  # sha256 over shards, samples, labels and class names
    passed_over: Mapping[str, int] = field(default_factory=dict)  # what lies there and is not in it, by reason

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, in the order of their ids."""
        return tuple(dict.fromkeys(self.shards.split))

    def split(self, name: str) -> Samples:
        """The samples of one split. MissingSplitError names the splits that exist."""
        if name not in self.splits:
            raise MissingSplitError(
                f"{self.url} has no split {name!r}; its splits are {', '.join(self.splits)}. Write shards with it; "
                "--split of `python -m jobs.write_shards` and `python -m jobs.index` says what belongs to which split"
            )
        start = int(self.shards.count[: self.shards.split.index(name)].sum())
        end = start + int(sum(n for n, s in zip(self.shards.count, self.shards.split, strict=True) if s == name))
        rows = self.samples
        return Samples(
            first_id=start,
            shard=rows.shard[start:end],
            offset=rows.offset[start:end],
            length=rows.length[start:end],
            crc32=rows.crc32[start:end],
            label=rows.label[start:end],
        )

    def shard_url(self, shard: int) -> str:
        """Where a shard lies."""
        return storage.join(self.url, self.shards.name[shard])

    def keys(self) -> list[str]:
        """Every sample's name in the shards without its extension, by id; read from storage at each call.

        WebDataset's ``__key__``, unless the name has more dots.
        """
        keys: list[str] = _undamaged(lambda: _read_columns(self.url, _SAMPLES, _KEY_COLUMN))["key"]
        return keys

    def verify_present(self) -> None:
        """StorageError unless every shard is there in full size; one listing, no shard is read."""
        sizes = storage.list_sizes(self.url)
        wrong = []
        for name, size in zip(self.shards.name, self.shards.size.tolist(), strict=True):
            if name not in sizes:
                wrong.append(f"{name} is missing")
            elif sizes[name] != size:
                wrong.append(f"{name} has {sizes[name]} bytes, not {size}")
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise StorageError(
                f"{self.url}: {'; '.join(wrong[:5])}{more}; write the shards again, copy the whole folder, or "
                "make a manifest of what is there with `python -m jobs.index`"
            )

    @classmethod
    def load(cls, shards_url: str) -> "Manifest":
        """Read and check the manifest of a folder. StorageError where there is none or it is damaged."""
        return _undamaged(lambda: _load(storage.resolve(shards_url)))


def _undamaged(read: Callable[[], _T]) -> _T:
    """What is read; if it comes damaged, what is read then."""
    for _ in range(_REFETCHES):
        with suppress(_DamagedError):
            return read()
    return read()


def _load(url: str) -> Manifest:
    header_url = storage.join(url, HEADER)
    try:
        header = json.loads(storage.read_bytes(header_url))
    except storage.MissingError as error:
        raise storage.MissingError(
            f"{url} holds no {HEADER}; write shards with `python -m jobs.write_shards`, or make a manifest "
            "for tars that other tools wrote with `python -m jobs.index`"
        ) from error
    except ValueError as error:  # of the JSON or of its encoding
        raise _DamagedError(f"{header_url} is not JSON: {error}; {_REMEDY}") from error
    if not isinstance(header, dict):
        raise _DamagedError(f"{header_url} is not the header that was written but {header!r:.40}; {_REMEDY}")
    if header.get("format") != _FORMAT:
        raise _DamagedError(
            f"{header_url} has format {header.get('format')!r:.40}, this version reads {_FORMAT}; {_REMEDY}"
        )
    class_names, passed_over = header.get("class_names"), header.get("passed_over", {})
    if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
        raise _DamagedError(f"{header_url}: class_names is {class_names!r:.40}, not a list of names; {_REMEDY}")
    if not isinstance(passed_over, dict) or not all(isinstance(count, int) for count in passed_over.values()):
        raise _DamagedError(f"{header_url}: passed_over is {passed_over!r:.40}, not a count by reason; {_REMEDY}")
    manifest = build_manifest(
        url,
        tuple(class_names),
        _read_columns(url, _SHARDS, _SHARD_COLUMNS),
        _read_columns(url, _SAMPLES, _SAMPLE_COLUMNS),
        passed_over,
    )
    if manifest.digest != header.get("digest"):
        raise _DamagedError(
            f"{url}: the manifest's rows have the digest {manifest.digest[:12]}, its header says "
            f"{header.get('digest')!s:.12}; {_REMEDY}"
        )
    return manifest


def build_manifest(
    url: str,
    class_names: tuple[str, ...],
    shards: Mapping[str, Any],
    samples: Mapping[str, Any],
    passed_over: Mapping[str, int] | None = None,
) -> Manifest:
    """A manifest from columns; ``shards``: name, split, size, count; ``samples``: as ``Samples`` without id."""
    table = Shards(
        name=tuple(shards["name"]),
        split=tuple(shards["split"]),
        size=np.asarray(shards["size"], np.int64),
        count=np.asarray(shards["count"], np.int64),
    )
    num_samples = len(samples["offset"])
    if (table.count < 0).any() or table.count.sum() != num_samples:
        raise _DamagedError(
            f"{url}: the shards hold {table.count.sum()} samples, the manifest {num_samples}; {_REMEDY}"
        )
    rows = Samples(
        first_id=0,
        shard=np.repeat(np.arange(len(table.name), dtype=np.int32), table.count),
        offset=np.asarray(samples["offset"], np.int64),
        length=np.asarray(samples["length"], np.int32),
        crc32=np.asarray(samples["crc32"], np.uint32),
        label=np.asarray(samples["label"], np.int32),
    )
    changes = sum(a != b for a, b in zip(table.split, table.split[1:], strict=False))
    if changes and changes + 1 != len(set(table.split)):
        raise _DamagedError(f"{url}: the shards of a split are not contiguous in the manifest")
    return Manifest(url, class_names, table, rows, _digest(class_names, table, rows), passed_over or {})


def save_manifest(manifest: Manifest, keys: list[str]) -> None:
    """Write a manifest beside its shards; the header comes last, so a half-written manifest is none."""
    shards = pa.table(
        {
            "name": list(manifest.shards.name),
            "split": pa.array(manifest.shards.split, pa.string()).dictionary_encode(),
            "size": manifest.shards.size,
            "count": manifest.shards.count,
        }
    )
    rows = manifest.samples
    samples = pa.table(
        {"key": keys, "offset": rows.offset, "length": rows.length, "crc32": rows.crc32, "label": rows.label}
    )
    for name, table in ((_SHARDS, shards), (_SAMPLES, samples)):
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)  # the digest does not cover keys
        storage.write_bytes(storage.join(manifest.url, name), buffer.getvalue())
    header = {
        "format": _FORMAT,
        "digest": manifest.digest,
        "splits": {name: manifest.split(name).num_samples for name in manifest.splits},
        "class_names": list(manifest.class_names),
        "passed_over": dict(manifest.passed_over),
    }
    storage.write_bytes(storage.join(manifest.url, HEADER), json.dumps(header, indent=1).encode())


def _read_columns(url: str, name: str, columns: pa.Schema) -> dict[str, Any]:
    """Numbers as arrays, text as lists. StorageError where one is missing, of another type or has gaps."""
    file_url = storage.join(url, name)
    data = io.BytesIO(storage.read_bytes(file_url))
    try:
        table = (
            pq.ParquetFile(data, page_checksum_verification=True)
            .read(columns=columns.names)
            .select(columns.names)
            .cast(columns)
        )
    except (pa.ArrowException, OSError, KeyError) as error:
        raise _DamagedError(f"{file_url} is not the Parquet file that was written: {error}; {_REMEDY}") from error
    for column in columns.names:
        if table[column].null_count:
            raise _DamagedError(f"{file_url}: {table[column].null_count} rows have no {column}; {_REMEDY}")
    return {
        field.name: table[field.name].to_pylist() if field.type == pa.string() else table[field.name].to_numpy()
        for field in columns
    }


def _digest(class_names: tuple[str, ...], shards: Shards, rows: Samples) -> str:
    names = json.dumps([class_names, shards.name, shards.split])
    digest = hashlib.sha256(names.encode())
    for column in (shards.size, shards.count, rows.offset, rows.length, rows.crc32, rows.label):
        digest.update(np.ascontiguousarray(column, column.dtype.newbyteorder("<")).data)
    return digest.hexdigest()
