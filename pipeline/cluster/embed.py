"""Embed shards with a registered encoder: a pool of actors takes shard after shard, each writes its own Parquet.

What travels through the driver is a count per shard. The encoder's files and the manifest go through the object
store, one copy per node (NumPy columns are read in place), so workers need neither the registry nor the alias, and all
of them have the same bytes. A shard's file is written atomically under a name made from the shard's: running again
embeds what is missing.

Plain actors and not Ray Data: its threads outlive an iteration that ends early, and one that asks Ray for something
after ``ray.shutdown`` ends the process with exit code 1 and without the error.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError

from pipeline.archive import load_archive
from pipeline.data.assemble import MAX_BAD_SHARE
from pipeline.data.loader import read_images
from pipeline.data.manifest import Manifest, build_manifest
from pipeline.embeddings import EmbedError, Origin, write
from pipeline.errors import UserError
from pipeline.export import check_golden, read_golden, read_preprocessing

_TRIES = 4  # of a shard whose actor dies; actors start again as often as nodes are lost


class Embedded(NamedTuple):
    """Progress, and at the end the result."""

    shards: int  # complete ones, those of earlier runs included
    of_shards: int
    images: int  # embedded by this run
    undecodable: int  # left out, by earlier runs included
    seconds: float


def read_encoder(entry: Path) -> dict[str, bytes]:
    """The files of a pulled entry that embedding needs: model.pt2, config.json, golden.npz."""
    paths = [entry / "data" / "model.pt2", *(entry / "extra_files" / name for name in ("config.json", "golden.npz"))]
    return {path.name: path.read_bytes() for path in paths}


def embed_shards(
    encoder: dict[str, bytes],
    manifest: Manifest,
    origin: Origin,
    out_url: str,
    *,
    splits: tuple[str, ...],
    done: Mapping[int, int],
    batch_size: int,
    max_actors: int,
    cpus_per_actor: float,
    gpus_per_actor: float,
    on_progress: Callable[[Embedded], None],
) -> Embedded:
    """Write the file of every shard of ``splits`` into ``out_url``, which is claimed, on the connected Ray.

    ``encoder``: as of ``read_encoder``. ``done``: the shards that have a file, each with its images that could not be
    decoded; such images have no row. Raises EmbedError if they are more than MAX_BAD_SHARE of the splits, or if a shard
    is damaged, cannot be read or ends its actor time and again; what was written until then stays, and counts.
    """
    started = time.monotonic()
    shards = [i for i, split in enumerate(manifest.shards.split) if split in splits]
    total = int(manifest.shards.count[shards].sum())
    missing = [i for i in shards if i not in done]
    before = {i: done[i] for i in shards if i in done}
    state = Embedded(len(before), len(shards), 0, sum(before.values()), 0.0)
    on_progress(state)
    _check_share(manifest, state.undecodable, total, max(before, key=before.__getitem__, default=0))
    if not missing:
        return state

    actor = ray.remote(_ShardEmbedder).options(
        num_cpus=cpus_per_actor, num_gpus=gpus_per_actor, max_restarts=-1, max_task_retries=_TRIES - 1
    )
    actors = [actor.remote(origin, out_url, batch_size) for _ in range(min(max_actors, len(missing)))]
    for shard, images, error in _in_any_order(actors, [ray.put(encoder), ray.put(manifest)], missing):
        if error:
            raise EmbedError(f"{manifest.shard_url(shard)}: {error}")
        undecodable = state.undecodable + int(manifest.shards.count[shard]) - images
        seconds = time.monotonic() - started
        state = Embedded(state.shards + 1, state.of_shards, state.images + images, undecodable, seconds)
        on_progress(state)
        _check_share(manifest, undecodable, total, shard)
    return state


def _check_share(manifest: Manifest, undecodable: int, total: int, shard: int) -> None:
    """``undecodable`` and ``total``: images of all shards and attempts; ``shard``: one of those that lack images."""
    if undecodable > MAX_BAD_SHARE * total:
        raise EmbedError(
            f"{undecodable} of {total} images cannot be decoded, some of them in {manifest.shard_url(shard)}; at most "
            f"{MAX_BAD_SHARE:.0%} may be left out: mend or rewrite the shards; the actors' logs name each image"
        )


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

    def __init__(self, origin: Origin, out_url: str, batch_size: int) -> None:
        self._origin, self._out_url, self._batch_size = origin, out_url, batch_size
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

    def _load(self, encoder: dict[str, bytes], manifest: Manifest) -> None:
        self._manifest = manifest
        self._device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        with TemporaryDirectory(prefix="parallax-embed-") as folder:
            for name, data in encoder.items():
                (Path(folder) / name).write_bytes(data)
            self._model = load_archive(encoder["model.pt2"], self._device)
            check_golden(self._model, Path(folder), self._device)
            self._preprocessing = read_preprocessing(Path(folder))
            self._feature_dim = read_golden(Path(folder) / "golden.npz")[1].shape[1]
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
        all_ids = np.concatenate(ids)
        write(self._out_url, self._origin, self._manifest, shard, all_ids, np.concatenate(embeddings))
        return len(all_ids)


def _one_shard(manifest: Manifest, shard: int) -> tuple[int, Manifest]:
    """A manifest of one shard, whose ids begin at 0, and the id that its first sample has in ``manifest``."""
    first_id = int(manifest.shards.count[:shard].sum())
    rows = slice(first_id, first_id + int(manifest.shards.count[shard]))
    shards = {column: [getattr(manifest.shards, column)[shard]] for column in ("name", "split", "size", "count")}
    samples = {column: getattr(manifest.samples, column)[rows] for column in ("offset", "length", "crc32", "label")}
    return first_id, build_manifest(manifest.url, manifest.class_names, shards, samples)
