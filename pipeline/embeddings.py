"""A folder of embeddings: one Parquet file per shard, each of which says what it was made from.

``_embeddings.json`` claims the folder for one encoder and one set of shards. The same facts stand in the metadata of
every file, with the shard and the number of images without a row, so a file from another folder is told apart, and an
attempt that goes on with the work of another knows what that one left out. Only footers are read.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import storage
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError, first_problem

HEADER = "_embeddings.json"  # Parquet readers skip names with an underscore
_METADATA_KEY = b"parallax.embeddings"
_TAIL = 64 * 2**10  # bytes; a footer of ours has about 3,000
_REQUESTS = 16  # at once


class EmbedError(UserError):
    """The embeddings cannot be written as asked; the message says what would work."""


class Origin(BaseModel):
    """What embeddings are made from. Two origins that differ anywhere never share a folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model_name: str
    model_version: int
    encoder_digest: str  # of all files of the registry entry
    registry_uri: str
    data_digest: str  # the manifest's

    def differences(self, other: "Origin") -> tuple[str, str]:
        """What differs, as it is here and as it is in ``other``."""
        mine, its = ({key: getattr(origin, key) for key in Origin.model_fields} for origin in (self, other))
        keys = [key for key in mine if mine[key] != its[key]]
        here, there = (", ".join(f"{key} {values[key]}" for key in keys) for values in (mine, its))
        return here, there


class _Header(Origin):
    data_url: str  # where the shards lay; not compared, they may be moved

    def resumed_by(self, origin: Origin) -> str:
        """The options that go on with this folder; none where only the files of the encoder differ."""
        moved = self.registry_uri != origin.registry_uri
        options = {
            f"--model models:/{self.model_name}/{self.model_version}": moved
            or (self.model_name, self.model_version) != (origin.model_name, origin.model_version),
            f"--tracking-uri {self.registry_uri}": moved,
            f"--data {self.data_url}": self.data_digest != origin.data_digest,
        }
        return " ".join(option for option, needed in options.items() if needed)


class _OfShard(Origin):
    shard: str
    undecodable: int  # images without a row


@dataclass(frozen=True)
class Held:
    """What earlier attempts left in a folder."""

    undecodable: dict[int, int]  # of each shard that is done
    damaged: tuple[str, ...]  # files that are not whole; their shards are not done


def file_name(shard: str) -> str:
    """The Parquet file of a shard."""
    return shard.removesuffix(".tar") + ".parquet"


def claim(out_url: str, origin: Origin, data_url: str) -> None:
    """Say in the folder what its embeddings are made from; EmbedError if they are made from something else.

    Of two claims at once one wins. ``data_url``: where the shards lie now.
    """
    url = storage.join(out_url, HEADER)
    mine = _Header(**origin.model_dump(), data_url=data_url)
    storage.create(url, mine.model_dump_json(indent=1).encode())
    try:
        found = _Header.model_validate_json(storage.read_bytes(url))
    except ValidationError as error:
        raise EmbedError(
            f"{url} is damaged or from an older version, so nothing says what these embeddings were made from: "
            f"{first_problem(error)}; delete that file and run the same command again, which makes it anew and checks "
            "every other file of the folder, or name another folder, if an older version wrote them all"
        ) from error
    here, wanted = found.differences(origin)
    if here:
        resume = found.resumed_by(origin)
        raise EmbedError(
            f"--out {out_url} holds embeddings with {here}, these would have {wanted}; "
            f"{f'go on with those by {resume}, or ' if resume else ''}name another folder, e.g. "
            f"{out_url}-{origin.model_name}-v{origin.model_version}, or delete that one"
        )


def held(out_url: str, origin: Origin, manifest: Manifest) -> Held:
    """Which shards are done; one listing, and the footer of each file. EmbedError names a file of another origin."""
    sizes = storage.list_sizes(out_url)
    files = {file_name(name): shard for shard, name in enumerate(manifest.shards.name)}
    strangers = sorted(name for name in sizes if name.endswith(".parquet") and name not in files)
    if strangers:
        raise EmbedError(
            f"{storage.join(out_url, strangers[0])} belongs to no shard of {manifest.url}, but is read with the "
            f"folder ({len(strangers)} such files); move it away, or name another folder"
        )
    present = [name for name in files if name in sizes]

    def footer_of(name: str) -> _OfShard | None:
        url = storage.join(out_url, name)
        return _footer(url, sizes[name], origin, manifest, files[name])

    with ThreadPoolExecutor(_REQUESTS) as pool:
        footers = dict(zip(present, pool.map(footer_of, present), strict=True))
    return Held(
        undecodable={files[name]: footer.undecodable for name, footer in footers.items() if footer is not None},
        damaged=tuple(name for name, footer in footers.items() if footer is None),
    )


def write(
    out_url: str, origin: Origin, manifest: Manifest, shard: int, ids: NDArray[np.int64], vectors: NDArray[np.float32]
) -> None:
    """The Parquet file of one shard, atomically: ``ids`` (N,) of the manifest, ``vectors`` (N, D)."""
    name = manifest.shards.name[shard]
    undecodable = int(manifest.shards.count[shard]) - len(ids)
    metadata = _OfShard(**origin.model_dump(), shard=name, undecodable=undecodable).model_dump_json()
    table = pa.table(
        {
            "sample_id": pa.array(ids, pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), vectors.shape[1]),
            "model_name": pa.array([origin.model_name] * len(ids)).dictionary_encode(),
            "model_version": pa.array(np.full(len(ids), origin.model_version), pa.int32()),
        }
    ).replace_schema_metadata({_METADATA_KEY: metadata})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(storage.join(out_url, file_name(name)), buffer.getvalue())


def _footer(url: str, size: int, origin: Origin, manifest: Manifest, shard: int) -> _OfShard | None:
    """What a file says of itself; None if it is not whole. EmbedError if it is not of this origin and shard."""
    if size == 0:  # S3 has no range of no bytes
        return None
    tail = storage.read_range(url, max(0, size - _TAIL), size)
    try:
        parquet = pq.read_metadata(io.BytesIO(tail))
    except (pa.ArrowException, OSError):
        return None
    text = (parquet.metadata or {}).get(_METADATA_KEY, b"")
    try:
        found = _OfShard.model_validate_json(text)
    except ValidationError as error:
        raise EmbedError(
            f"{url} does not say what its embeddings were made from ({first_problem(error)}); delete it and its shard "
            "is embedded again, or name another folder"
        ) from error
    name, count = manifest.shards.name[shard], int(manifest.shards.count[shard])
    here, expected = found.differences(origin)
    if found.shard != name:
        here, expected = f"shard {found.shard} {here}".rstrip(), f"shard {name} {expected}".rstrip()
    if here:
        raise EmbedError(
            f"{url} comes from another folder: it has {here}, this folder has {expected}; delete it and its shard is "
            "embedded again"
        )
    whole = parquet.num_rows + found.undecodable == count and _data_bytes(parquet) <= size - parquet.serialized_size
    return found if whole else None


def _data_bytes(parquet: pq.FileMetaData) -> int:
    groups = (parquet.row_group(i) for i in range(parquet.num_row_groups))
    return sum(group.column(i).total_compressed_size for group in groups for i in range(group.num_columns))
