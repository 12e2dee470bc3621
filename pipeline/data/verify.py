"""Read every shard of a manifest once, headers and all, and check that it is what was written."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pipeline import storage
from pipeline.data.fetch import open_fetch
from pipeline.data.foreign import shards_beside
from pipeline.data.groups import groups, label_of, samples_of
from pipeline.data.manifest import Manifest
from pipeline.data.members import walk_tar
from pipeline.storage import StorageError

_REMEDY = "make it anew with `python -m jobs.index`"


@dataclass(frozen=True)
class Damage:
    """A shard that is not what was written."""

    shard: str
    problem: str


def verify(
    manifest: Manifest, *, num_threads: int = 8, on_shard: Callable[[str], object] = lambda name: None
) -> list[Damage]:
    """What is damaged, shard by shard; empty = sizes, tar headers, images and labels are right.

    A shard with samples that the manifest does not list is damaged, too, and one that it does not list at all, unless
    what was passed over when it was made tells why. ``on_shard`` is told each shard's name.
    """
    fetch = open_fetch(manifest)
    sizes = storage.list_sizes(manifest.url)
    samples = manifest.samples
    starts = np.concatenate([[0], np.cumsum(manifest.shards.count)]).tolist()

    def check(shard: int) -> str:
        size, expected = sizes.get(manifest.shards.name[shard]), int(manifest.shards.size[shard])
        if size != expected:
            return "is missing" if size is None else f"has {size} bytes, the manifest says {expected}"
        rows = slice(starts[shard], starts[shard + 1])
        images = zip(
            samples.offset[rows].tolist(), samples.length[rows].tolist(), samples.crc32[rows].tolist(), strict=True
        )
        unseen = dict(zip(images, range(rows.start, rows.stop), strict=True))
        wrong_labels, unlisted = [], []
        offsets = set(samples.offset[rows].tolist())
        try:
            for group in groups(walk_tar(manifest, fetch, shard), manifest.shard_url(shard)):
                unlisted += [image.name for image in samples_of(group).values() if image.offset not in offsets]
                for member in group.values():
                    row = unseen.pop((member.offset, member.size, member.crc32), None)
                    if row is not None and not _is_label(manifest, int(samples.label[row]), label_of(member, group)[0]):
                        wrong_labels.append(row)
        except StorageError as error:
            return str(error)
        wrong = {"checksum": list(unseen.values()), "label": wrong_labels}
        problems = [
            f"wrong {what} of {len(ids)} samples: {', '.join(map(str, ids[:20]))}" for what, ids in wrong.items() if ids
        ]
        if unlisted:
            problems.append(f"{len(unlisted)} images are not in the manifest, e.g. {unlisted[0]}; {_REMEDY}")
        return "; ".join(problems)

    damages = [
        Damage(name, f"is not in the manifest, nor counted as passed over; {_REMEDY}")
        for name in shards_beside(manifest, sizes)
    ]
    with ThreadPoolExecutor(num_threads) as threads:
        for name, problem in zip(manifest.shards.name, threads.map(check, range(len(starts) - 1)), strict=True):
            on_shard(name)
            if problem:
                damages.append(Damage(name, problem))
    return damages


def _is_label(manifest: Manifest, number: int, label: int) -> bool:
    """Whether a label in a shard has this number: it is the number, or the name of the class."""
    return label == number or manifest.class_names[number : number + 1] == (str(label),)
