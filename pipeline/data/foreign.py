"""Manifests for tars that other tools wrote (webdataset, img2dataset), by one walk over their bytes.

Every image becomes a sample (groups.py says how names are read). What does not is counted by reason, in the manifest
too, and too much of what may be images is an error. A walk that was killed goes on where it stopped.
"""

import logging
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.data.fetch import Fetch, open_fetch
from pipeline.data.groups import COMPANION, HIDDEN_IMAGE, NO_IMAGE, groups, label_of, samples_of
from pipeline.data.manifest import HEADER, Manifest, build_manifest
from pipeline.data.members import UNPACK, ShardError, walk_tar
from pipeline.data.receipts import Receipts, ShardRows, fingerprint
from pipeline.data.sources import IMAGE_EXTENSIONS, number_labels
from pipeline.data.splits import splits_within
from pipeline.data.writer import commit_manifest
from pipeline.storage import Listed, StorageError

MAX_PASSED_OVER = 0.1  # of what may be images
_MAX_IMAGE_BYTES = 2**31 - 1  # a manifest counts them in 32 bits
_ARCHIVES = (".zip", ".7z", ".rar")
_MAX_COMPANIONS = 8  # kinds of images that may come with samples, such as masks and depths
_MORE_COMPANIONS = f"{COMPANION} of other kinds"
_NUMBERED_COMPANIONS = f"{COMPANION} told apart by a number"  # views of a sample, or masks of its objects
_ADVICE = {  # on what may be images
    HIDDEN_IMAGE: "Names of images must not begin with a dot",
    _NUMBERED_COMPANIONS: "Write a_view0.jpg for a.view0.jpg if each is a sample",
    _MORE_COMPANIONS: "An a.b.jpg beside a.jpg counts as its companion, like a mask: write a_b.jpg if it is a sample",
    NO_IMAGE: f"Formats that are read are {', '.join(IMAGE_EXTENSIONS)}",
}
_BAD_LABEL = "labels that are not the number of a class"
_EMPTY_SHARD, _SKIPPED_SHARD = "shards without an image", "damaged shards"


@dataclass(frozen=True)
class Found:
    """The shards below a URL, each with its split, before they are read."""

    url: str
    files: Mapping[str, Listed]  # all that lies there
    splits: Mapping[str, str]  # shard -> split, in the order of the manifest
    class_names: tuple[str, ...]  # of the manifest that lies there


@dataclass(frozen=True)
class Indexed:
    """A manifest that was made."""

    manifest: Manifest
    examples: Mapping[str, str]  # one of each reason of its ``passed_over``
    damaged: tuple[ShardError, ...]  # shards that were skipped


def find_shards(url: str, splits: Sequence[tuple[str, str]] = ()) -> Found:
    """Every ``*.tar`` below ``url``, in any case, by one listing.

    A shard's split is that of the last of ``splits`` (pattern of its name, split) that matches; else the one which a
    manifest that is there gives it; else the one split that the words of its relative path name; else "train".
    StorageError where there are no tars, a name holds two splits, a pattern matches none, or a shard is compressed.
    """
    url = storage.resolve(url)
    files = storage.list_files(url)
    tars = [name for name in files if _is_tar(name)]
    there = {name.lower() for name in tars}
    packed = {
        name: ending
        for name in files
        if (ending := _unread_ending(name)) in UNPACK and name[: -len(ending)].lower() + ".tar" not in there
    }
    if packed:
        raise StorageError(f"{url}: {_how_to_unpack(packed)}")
    if not tars:
        raise StorageError(f"{url} holds no *.tar{_instead(files)}")
    known, class_names = _known(url)
    for pattern, split in splits:
        matching = {name: split for name in tars if name == pattern or fnmatchcase(name, pattern)}
        if not matching:
            raise StorageError(f"{url}: no shard's name matches {pattern!r}; a name is, e.g., {tars[0]!r}")
        known |= matching
    split_by_name = known | _splits_in_names(url, [name for name in tars if name not in known])
    in_order = sorted(tars, key=lambda name: (_split_rank(split_by_name[name]), name))
    return Found(url, files, {name: split_by_name[name] for name in in_order}, class_names)


def index_shards(
    found: Found,
    *,
    num_threads: int = 8,
    skip_damaged: bool = False,
    max_passed_over: float = MAX_PASSED_OVER,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Indexed:
    """Walk every shard and write the manifest beside them.

    Shards that an earlier attempt has walked, and that have not changed since (in size or ETag, locally in size or
    time), are not walked again. ``on_progress`` gets the bytes that are done and all bytes, after each shard.

    A sample's label is in its ``.cls``, or in its ``.json``: a bare number, or a field "label", "cls", "class" or
    "class_id"; or there is none. Labels below the count of the class names of a manifest that is there already keep
    these; otherwise what does not number classes, e.g. keys of a database, names them (``sources.number_labels``).
    StorageError lists all shards that are damaged or have a key at two places, unless ``skip_damaged``; and it tells
    where more than the share ``max_passed_over`` of what may be images is not in the manifest.
    """
    url, receipts = found.url, Receipts(found.url, found.files)
    walked, damaged = _walk(found, receipts, num_threads, on_progress)
    if damaged and not skip_damaged:
        raise ShardError(_all_of(damaged, len(found.splits)))
    shards = [rows for rows in walked if rows.columns["key"]]
    passed_over, examples = _passed_over(found, walked, damaged)
    if not shards:
        raise StorageError(
            f"{url}: no images in {len(found.splits)} tars; extensions: {', '.join(IMAGE_EXTENSIONS)}; passed over: "
            f"{listed(passed_over, examples) or 'nothing'}"
        )
    _check_passed_over(url, sum(len(rows.columns["key"]) for rows in shards), passed_over, examples, max_passed_over)
    labels = {label for rows in shards for label in rows.columns["label"]}
    class_names, numbers = number_labels(labels)
    if max(labels) < len(found.class_names):
        class_names, numbers = found.class_names, {label: label for label in labels}
    for rows in shards:
        rows.columns["label"] = [numbers[label] for label in rows.columns["label"]]
    manifest = commit_manifest(url, class_names, shards, passed_over)
    if not damaged:  # when these are mended, only they are walked
        receipts.clear()
    return Indexed(manifest, examples, tuple(damaged))


def shards_beside(manifest: Manifest, files: Iterable[str]) -> list[str]:
    """Tars beside a manifest that it does not list, if they are more than were passed over when it was made."""
    beside = set(filter(_is_tar, files)) - set(manifest.shards.name)
    known = sum(manifest.passed_over.get(reason, 0) for reason in (_EMPTY_SHARD, _SKIPPED_SHARD))
    return sorted(beside) if len(beside) > known else []


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _instead(files: Iterable[str]) -> str:
    """What lies there, and what to do where it is no tar."""
    kinds = Counter(PurePosixPath(name).suffix.lower() or "without extension" for name in sorted(files))
    there = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5))
    return (
        f"{there and f', but {there}'}; give the folder in which the shards lie, at any depth; images that lie in "
        "folders become shards with `python -m jobs.write_shards`"
    )


def _known(url: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Each shard's split and the class names, of the manifest that lies there: what was held out is told nowhere else.

    None of them where there is no manifest; a warning where it cannot be read.
    """
    try:
        manifest = Manifest.load(url)
    except StorageError as error:
        if storage.exists(storage.join(url, HEADER)):
            logging.getLogger(__name__).warning(
                "the manifest that is there cannot be read, so the splits follow from the names of the shards, and "
                "classes have no names: %s", error,
            )  # fmt: skip
        return {}, ()
    return dict(zip(manifest.shards.name, manifest.shards.split, strict=True)), manifest.class_names


def _splits_in_names(url: str, names: Iterable[str]) -> dict[str, str]:
    """The splits that the shards' names tell: "imagenet/val-0003.tar" -> "validation"; "train" where one tells none."""
    found = {name: splits_within(name) or ("train",) for name in names}
    unclear = {name: splits for name, splits in found.items() if len(splits) > 1}
    if unclear:
        name, splits = next(iter(unclear.items()))
        raise StorageError(
            f"{url}: {len(unclear):,} shards have two splits in their names, e.g. {name!r}: {' and '.join(splits)}; "
            f"say which one it is in with --split {shlex.quote(f'{name}={splits[-1]}')}, which takes patterns too, or "
            f"give all shards one with --split {splits[-1]}"
        )
    return {name: splits[0] for name, splits in found.items()}


def _split_rank(split: str) -> tuple[int, str]:
    return {"train": 0, "validation": 1}.get(split, 2), split


def _unread_ending(name: str) -> str:
    """The ending of a file that may be a shard and is not read: ".tar.gz", ".zip", ".tar.*"; "" of all others."""
    lower = name.lower()
    if lower.startswith(".") or "/." in lower:
        return ""  # such as the receipts of an index
    ending = next((ending for ending in (*UNPACK, *_ARCHIVES) if lower.endswith(ending)), "")
    return ending or (".tar.*" if ".tar." in lower.rpartition("/")[2] else "")


def _how_to_unpack(packed: Mapping[str, str]) -> str:
    first = dict[str, str]()
    for name, ending in packed.items():
        first.setdefault(UNPACK[ending], shlex.quote(name))
    commands = ", ".join(f"`{command} {name}`" for command, name in first.items())
    more = ", ..." if len(packed) > 5 else ""
    return (
        f"{len(packed):,} shards are compressed ({', '.join(list(packed)[:5])}{more}): no image can be read from their "
        f"middle; unpack each in its place (of a bucket: a copy), e.g. {commands}"
    )


def _all_of(damaged: list[ShardError], num_shards: int) -> str:
    lines = "".join(f"\n  {error}" for error in damaged)
    return (
        f"{len(damaged):,} of {num_shards:,} shards cannot be indexed; mend them and index again, which walks only "
        f"these, or leave them out with --skip-damaged:{lines}"
    )


def _passed_over(
    found: Found, walked: list[ShardRows], damaged: list[ShardError]
) -> tuple[Counter[str], dict[str, str]]:
    """What is not in the manifest: how much by reason, and one example of each."""
    counts, examples = Counter[str](), dict[str, str]()

    def add(reason: str, count: int, example: str) -> None:
        counts[reason] += count
        examples.setdefault(reason, example)

    for name in found.files:
        if ending := _unread_ending(name):
            add(f"files *{ending}", 1, name)
    for error in damaged:
        add(_SKIPPED_SHARD, 1, str(error))
    for rows in walked:
        if not rows.columns["key"]:
            add(_EMPTY_SHARD, 1, rows.name)
        for reason, count in rows.passed_over.items():
            add(reason, count, f"{rows.examples[reason]} in {rows.name}")
    companions = [reason for reason, _ in counts.most_common() if reason.startswith(COMPANION)]
    words = Counter(map(_without_numbers, companions))
    numbered = [reason for reason in companions if words[_without_numbers(reason)] > 1]
    others = [reason for reason in companions if reason not in numbered][_MAX_COMPANIONS:]
    for kind, reasons in ((_NUMBERED_COMPANIONS, numbered), (_MORE_COMPANIONS, others)):
        for reason in reasons:
            add(kind, counts.pop(reason), examples.pop(reason))
    return counts, examples


def _without_numbers(reason: str) -> str:
    return re.sub(r"[0-9]+", "", reason)


def _check_passed_over(
    url: str, num_images: int, passed_over: Counter[str], examples: Mapping[str, str], limit: float
) -> None:
    lost = Counter({reason: passed_over[reason] for reason in _ADVICE if passed_over[reason]})
    total = num_images + lost.total()
    if lost.total() > limit * total:
        raise StorageError(
            f"{url}: {lost.total():,} of {total:,} samples would be passed over, more than {limit:.0%}: "
            f"{listed(lost, examples)}. {'; '.join(_ADVICE[reason] for reason in lost)}. If it is right to pass them "
            "over, raise the limit with --max-passed-over"
        )


def listed(counts: Mapping[str, int], examples: Mapping[str, str]) -> str:
    """The most frequent first, with an example: "3 hidden files, e.g. .x in 0.tar; 1 shards without an image"."""
    ordered = sorted(counts.items(), key=lambda reason: -reason[1])
    return "; ".join(f"{count:,} {reason}, e.g. {examples[reason]}" for reason, count in ordered)


def _walk(
    found: Found, receipts: Receipts, num_threads: int, on_progress: Callable[[int, int], object]
) -> tuple[list[ShardRows], list[ShardError]]:
    """The shards that are whole, in their order, and what is wrong with the others."""
    names = list(found.splits)
    sizes = [found.files[name].size for name in names]
    table = {"name": names, "split": list(found.splits.values()), "size": sizes, "count": [0] * len(names)}
    empty = build_manifest(found.url, (), table, {"offset": [], "length": [], "crc32": [], "label": []})
    fetch = open_fetch(empty)

    def index(shard: int) -> ShardRows | ShardError:
        name = names[shard]
        version = fingerprint([name, sizes[shard], found.files[name].version])
        rows = receipts.find(name, version)
        if rows is None:
            try:
                rows = _index_shard(empty, fetch, shard)
            except ShardError as error:
                return error
            receipts.keep(rows, version)
        rows.split = found.splits[name]
        return rows

    walked, damaged, done = list[ShardRows](), list[ShardError](), 0
    with ThreadPoolExecutor(num_threads) as threads:
        for size, rows in zip(sizes, threads.map(index, range(len(names))), strict=True):
            if isinstance(rows, ShardError):
                damaged.append(rows)
            else:
                walked.append(rows)
            done += size
            on_progress(done, sum(sizes))
    return walked, damaged


def _index_shard(manifest: Manifest, fetch: Fetch, shard: int) -> ShardRows:
    name, where = manifest.shards.name[shard], manifest.shard_url(shard)
    rows = ShardRows(name, manifest.shards.split[shard], int(manifest.shards.size[shard]))
    for group in groups(walk_tar(manifest, fetch, shard), where, rows.pass_over):
        for key, image in samples_of(group, rows.pass_over).items():
            if image.size > _MAX_IMAGE_BYTES:
                raise ShardError(
                    f"{where}: {image.name} has {image.size} bytes, an image has at most {_MAX_IMAGE_BYTES}; is it one?"
                )
            label, bad_label = label_of(image, group)
            if bad_label:
                rows.pass_over(_BAD_LABEL, bad_label)
            for column, value in zip(
                ("key", "offset", "length", "crc32", "label"),
                (key, image.offset, image.size, image.crc32, label),
                strict=True,
            ):
                rows.columns[column].append(value)
    return rows
