"""Embed shards with a registered encoder: a pool of actors takes shard after shard, each writes its own Parquet.

What travels through the driver is a count per shard. The encoder's files and the manifest go through the object
store, one copy per node (NumPy columns are read in place), so workers need neither the registry nor the alias, and all
of them have the same bytes. A shard's file is written atomically under a name made from the shard's: running again
embeds what is missing.

Plain actors and not Ray Data: its threads outlive an iteration that ends early, and one that asks Ray for something
after ``ray.shutdown`` ends the process with exit code 1 and without the error.
"""

import io
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayActorError

from pipeline import storage
from pipeline.archive import load_archive
from pipeline.data.assemble import MAX_BAD_SHARE
from pipeline.data.loader import read_images
from pipeline.data.manifest import Manifest, build_manifest
from pipeline.errors import UserError
from pipeline.export import check_golden, read_preprocessing

HEADER = "_embeddings.json"  # Parquet readers skip names with an underscore
_TRIES = 4  # of a shard whose actor dies; actors start again as often as nodes are lost


class EmbedError(UserError):
    """The embeddings cannot be written as asked; the message says what would work."""


class Encoder(NamedTuple):
    """A registry entry, ready to travel."""

    name: str
    version: int
    files: dict[str, bytes]  # model.pt2, config.json, golden.npz

    @classmethod
    def read(cls, name: str, version: int, entry: Path) -> "Encoder":
        """Take what embedding needs from a pulled entry's folder."""
        paths = [
            entry / "data" / "model.pt2",
            *(entry / "extra_files" / file for file in ("config.json", "golden.npz")),
        ]
        return cls(name, version, {path.name: path.read_bytes() for path in paths})


class Embedded(NamedTuple):
    """Progress, and at the end the result."""

    shards: int  # complete ones, those of earlier runs included
    of_shards: int
    images: int  # embedded by this run
    undecodable: int  # left out by this run
    seconds: float


def embed_shards(
    encoder: Encoder,
    manifest: Manifest,
    out_url: str,
    *,
    splits: tuple[str, ...],
    batch_size: int,
    max_actors: int,
    cpus_per_actor: float,
    gpus_per_actor: float,
    on_progress: Callable[[Embedded], None],
) -> Embedded:
    """Write ``<out_url>/<shard>.parquet`` for every shard of ``splits``, on the connected Ray.

    Columns: sample_id int64 (the manifest's), embedding float32 (fixed-size list), model_name, model_version int32.
    Images that cannot be decoded have no row. Raises EmbedError if they are more than MAX_BAD_SHARE of the splits, if
    ``out_url`` holds the embeddings of another encoder or of other data, or if a shard is damaged, cannot be read or
    ends its actor time and again; what was written until then stays and is not done again, but for shards of which
    images are missing where those are too many.
    """
    started = time.monotonic()
    shards = [i for i, split in enumerate(manifest.shards.split) if split in splits]
    _claim(out_url, encoder, manifest)
    present = storage.list_sizes(out_url)
    missing = [i for i in shards if _file_name(manifest, i) not in present]
    done = Embedded(len(shards) - len(missing), len(shards), 0, 0, 0.0)
    on_progress(done)
    if not missing:
        return done
    total = int(manifest.shards.count[shards].sum())

    actor = ray.remote(_ShardEmbedder).options(
        num_cpus=cpus_per_actor, num_gpus=gpus_per_actor, max_restarts=-1, max_task_retries=_TRIES - 1
    )
    actors = [actor.remote(out_url, batch_size) for _ in range(min(max_actors, len(missing)))]
    with_gaps: list[str] = []
    for shard, images, error in _in_any_order(actors, [ray.put(encoder), ray.put(manifest)], missing):
        if error:
            raise EmbedError(f"{manifest.shard_url(shard)}: {error}")
        gap = int(manifest.shards.count[shard]) - images
        undecodable = done.undecodable + gap
        if gap:
            with_gaps.append(storage.join(out_url, _file_name(manifest, shard)))
        seconds = time.monotonic() - started
        done = Embedded(done.shards + 1, done.of_shards, done.images + images, undecodable, seconds)
        on_progress(done)
        if undecodable > MAX_BAD_SHARE * total:
            for url in with_gaps:  # the next attempt has to count them again
                storage.delete(url)
            raise EmbedError(
                f"{undecodable} of {total} images cannot be decoded, the last ones in "
                f"{manifest.shard_url(shard)}; at most {MAX_BAD_SHARE:.0%} may be left out: "
                "mend or rewrite the shards; the actors' logs name each image"
            )
    return done


def _in_any_order(actors: Sequence[Any], shared: list[Any], shards: Sequence[int]) -> Iterator[tuple[int, int, str]]:
    """Shard, images and error of each shard as it is done; an actor that finds no room in the cluster holds up none."""
    waiting, left = deque(shards), len(shards)
    busy: dict[Any, tuple[Any, int | None]] = {actor.__ray_ready__.remote(): (actor, None) for actor in actors}
    while left:
        (answer,), _ = ray.wait(list(busy))
        actor, shard = busy.pop(answer)
        if waiting:
            following = waiting.popleft()
            busy[actor.embed.remote(shared, following)] = actor, following
        if shard is None:
            continue
        left -= 1
        try:
            images, error = ray.get(answer)
        except RayActorError as failure:
            images, error = 0, f"{_TRIES} times its actor died; is --batch-size too large for its memory? {failure}"
        yield shard, images, error


class _ShardEmbedder:
    """One actor: the encoder, loaded and verified at its first shard.

    Not in the constructor: Ray warns of one that gets references, where the actor may start again (ray#53727).
    """

    def __init__(self, out_url: str, batch_size: int) -> None:
        self._out_url, self._batch_size = out_url, batch_size
        self._loaded = False

    def embed(self, shared: list[Any], shard: int) -> tuple[int, str]:
        """How many images have an embedding, or the user's error as text (Ray would bury it in one of its own).

        ``shared``: references to the encoder and the manifest; in a list, so that Ray reads them once an actor only.
        """
        try:
            if not self._loaded:
                self._load(*ray.get(shared))
            return self._embed(shard), ""
        except UserError as mistake:
            return 0, str(mistake)

    def _load(self, encoder: Encoder, manifest: Manifest) -> None:
        self._encoder, self._manifest = encoder, manifest
        self._device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        with TemporaryDirectory(prefix="parallax-embed-") as folder:
            for name, data in encoder.files.items():
                (Path(folder) / name).write_bytes(data)
            self._model = load_archive(encoder.files["model.pt2"], self._device)
            check_golden(self._model, Path(folder), self._device)
            self._preprocessing = read_preprocessing(Path(folder))
            with np.load(Path(folder) / "golden.npz", allow_pickle=False) as golden:
                self._feature_dim = golden["embeddings"].shape[1]
        self._loaded = True

    def _embed(self, shard: int) -> int:
        first_id, part = _one_shard(self._manifest, shard)
        ids, embeddings = [np.empty(0, np.int64)], [np.empty((0, self._feature_dim), np.float32)]
        size = self._preprocessing.image_size
        for batch_ids, images, _ in read_images(part, part.splits[0], size, self._batch_size, max_bad_share=1):
            pixels = torch.as_tensor(images).to(self._device, non_blocking=True)
            with torch.inference_mode():
                embeddings.append(self._model(self._preprocessing(pixels)).float().cpu().numpy())
            ids.append(np.asarray(batch_ids) + first_id)
        table = _table(np.concatenate(ids), np.concatenate(embeddings), self._encoder)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        storage.write_bytes(storage.join(self._out_url, _file_name(self._manifest, shard)), buffer.getvalue())
        return len(table)


def _one_shard(manifest: Manifest, shard: int) -> tuple[int, Manifest]:
    """A manifest of one shard, whose ids begin at 0, and the id that its first sample has in ``manifest``."""
    first_id = int(manifest.shards.count[:shard].sum())
    rows = slice(first_id, first_id + int(manifest.shards.count[shard]))
    shards = {column: [getattr(manifest.shards, column)[shard]] for column in ("name", "split", "size", "count")}
    samples = {column: getattr(manifest.samples, column)[rows] for column in ("offset", "length", "crc32", "label")}
    return first_id, build_manifest(manifest.url, manifest.class_names, shards, samples)


def _table(ids: NDArray[np.int64], embeddings: NDArray[np.float32], encoder: Encoder) -> pa.Table:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel(), pa.float32()), embeddings.shape[1])
    return pa.table(
        {
            "sample_id": pa.array(ids, pa.int64()),
            "embedding": vectors,
            "model_name": pa.array([encoder.name] * len(ids)).dictionary_encode(),
            "model_version": pa.array(np.full(len(ids), encoder.version), pa.int32()),
        }
    )


def _file_name(manifest: Manifest, shard: int) -> str:
    return manifest.shards.name[shard].removesuffix(".tar") + ".parquet"


def _claim(out_url: str, encoder: Encoder, manifest: Manifest) -> None:
    """Say in the folder what its embeddings are of; EmbedError if they are of something else."""
    mine = {"model_name": encoder.name, "model_version": encoder.version, "data_digest": manifest.digest}
    url = storage.join(out_url, HEADER)
    if not storage.exists(url):
        storage.write_bytes(url, json.dumps({**mine, "data_url": manifest.url}, indent=1).encode())
        return
    found = json.loads(storage.read_bytes(url))
    for key, value in mine.items():
        if found.get(key) != value:
            raise EmbedError(
                f"--out {out_url} holds embeddings with {key} {found.get(key)}, these would have {value}; "
                f"name another folder, e.g. {out_url}-{encoder.name}-v{encoder.version}, or delete that one"
            )
