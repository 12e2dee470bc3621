"""Manifests for tars that other tools wrote (webdataset, img2dataset), by one walk over their bytes.

Python's tarfile ends quietly at a damaged header and at a cut between two members (cpython#120740). This walk checks
every header's checksum and the end of the archive: what is not whole is an error, never fewer samples, and so is an
image that is a link or sparse: a manifest's images lie in a shard one behind the other. A walk that was killed goes on
where it stopped.
"""

import json
import logging
import re
import reprlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from deflate import crc32

from pipeline import storage
from pipeline.data.fetch import Fetch, open_fetch, read_range
from pipeline.data.manifest import HEADER, Manifest, build_manifest
from pipeline.data.receipts import Receipts, ShardRows, fingerprint
from pipeline.data.sources import IMAGE_EXTENSIONS, number_labels
from pipeline.data.writer import commit_manifest
from pipeline.storage import StorageError

_BLOCK = 512
_READ_BYTES = 8 * 2**20
_MAX_META_BYTES = 2**20  # of a .json that is searched for a label
_MAX_IMAGE_BYTES = 2**31 - 1  # a manifest counts them in 32 bits
_LABEL = re.compile(r"([+-]?[0-9]{1,18})(\.0*)?")  # 18 digits: an int64
_LABEL_FIELDS = ("label", "cls", "class", "class_id")
_SPLIT_WORDS = {"train": "train", "training": "train", "val": "validation", "valid": "validation"}
_SPLIT_WORDS |= {"validation": "validation", "test": "test"}
_META_ENDINGS = (".cls", ".json")
_SAMPLE_ENDINGS = (*_META_ENDINGS, *(f".{extension}" for extension in IMAGE_EXTENSIONS))
_AGAIN_WITHOUT_LINKS = "pack it again with `tar --dereference --hard-dereference`"
_INDIRECT = {  # types of members whose bytes do not lie behind their header as they are
    b"1": ("a hard link", _AGAIN_WITHOUT_LINKS),
    b"2": ("a symbolic link", _AGAIN_WITHOUT_LINKS),
    b"S": ("sparse", "pack it again without `--sparse`"),
}


@dataclass(frozen=True)
class Member:
    """A file in a tar; ``data`` only where it is small and asked for."""

    name: str
    offset: int
    size: int
    crc32: int
    data: bytes


@dataclass(frozen=True)
class Indexed:
    """A manifest that was made, and what was passed over."""

    manifest: Manifest
    without_image: int  # groups of members that hold no image
    bad_labels: int  # samples without a label because what is there is none
    bad_label: str  # one of these


def index_shards(
    url: str, *, num_threads: int = 8, on_progress: Callable[[int, int], object] = lambda done, total: None
) -> Indexed:
    """Walk every ``*.tar`` below ``url`` and write the manifest beside them.

    Shards that an earlier attempt has walked, and that have not changed since (in size or ETag, locally in size or
    time), are not walked again. ``on_progress`` gets the bytes that are done and all bytes, after each shard.

    A shard that a manifest lists already keeps its split. Else it is the first of train, val(idation), test in its
    name, or "train". A sample's label is in its ``.cls``, or in a field "label", "cls", "class" or "class_id" of its
    ``.json``, or there is none. Labels below the count of the class names of a manifest that is there already keep
    these; otherwise what does not number classes, e.g. keys of a database, names them (``sources.number_labels``).
    StorageError where there are no tars, or one is damaged, truncated, or has a key at two places.
    """
    url = storage.resolve(url)
    files = storage.list_files(url)
    receipts = Receipts(url, files)
    tars = {name: file for name, file in files.items() if name.endswith(".tar")}
    if not tars:
        raise StorageError(f"{url} holds no *.tar; give the folder in which the shards lie, at any depth")
    known_splits, known_names = _known(url)
    splits = {name: known_splits.get(name) or split_of(name) for name in tars}
    names = sorted(tars, key=lambda name: (_split_rank(splits[name]), name))
    sizes = [tars[name].size for name in names]
    total = sum(sizes)
    table = {
        "name": names,
        "split": [splits[name] for name in names],
        "size": sizes,
        "count": [0] * len(names),
    }
    empty = build_manifest(url, (), table, {"offset": [], "length": [], "crc32": [], "label": []})
    fetch = open_fetch(empty)

    def index(shard: int) -> ShardRows:
        version = fingerprint([names[shard], splits[names[shard]], sizes[shard], tars[names[shard]].version])
        rows = receipts.find(names[shard], version)
        if rows is None:
            rows = _index_shard(empty, fetch, shard)
            receipts.keep(rows, version)
        return rows

    walked, done = [], 0
    with ThreadPoolExecutor(num_threads) as threads:
        for rows in threads.map(index, range(len(names))):
            walked.append(rows)
            done += rows.size
            on_progress(done, total)
    shards = [rows for rows in walked if rows.columns["key"]]
    if not shards:
        raise StorageError(f"{url}: no images in {len(names)} tars; extensions: {', '.join(IMAGE_EXTENSIONS)}")
    labels = {label for rows in shards for label in rows.columns["label"]}
    class_names, numbers = number_labels(labels)
    if max(labels) < len(known_names):
        class_names, numbers = known_names, {label: label for label in labels}
    for rows in shards:
        rows.columns["label"] = [numbers[label] for label in rows.columns["label"]]
    manifest = commit_manifest(url, class_names, shards)
    receipts.clear()
    return Indexed(
        manifest,
        sum(rows.without_image for rows in walked),
        sum(rows.bad_labels for rows in walked),
        next((rows.bad_label for rows in walked if rows.bad_labels), ""),
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


def split_of(name: str) -> str:
    """The split that a shard's name tells: "imagenet/val-0003.tar" -> "validation"."""
    for word in re.split(r"[^a-z]+", name.lower()):
        if word in _SPLIT_WORDS:
            return _SPLIT_WORDS[word]
    return "train"


def _split_rank(split: str) -> tuple[int, str]:
    return {"train": 0, "validation": 1}.get(split, 2), split


def _index_shard(manifest: Manifest, fetch: Fetch, shard: int) -> ShardRows:
    name = manifest.shards.name[shard]
    rows = ShardRows(name, manifest.shards.split[shard], int(manifest.shards.size[shard]))
    seen: set[str] = set()
    where = manifest.shard_url(shard)
    for key, members in groups(walk_tar(manifest, fetch, shard), where):
        if key in seen:
            raise StorageError(f"{where}: the key {key!r} comes at two places; sort the archive")
        seen.add(key)
        image = _image_of(members)
        if image is None:
            rows.without_image += 1
            continue
        if image.size > _MAX_IMAGE_BYTES:
            raise StorageError(
                f"{where}: {image.name} has {image.size} bytes, an image has at most {_MAX_IMAGE_BYTES}; is it one?"
            )
        label, bad_label = label_of(members)
        if bad_label:
            rows.bad_labels += 1
            rows.bad_label = bad_label
        for column, value in zip(
            ("key", "offset", "length", "crc32", "label"),
            (key, image.offset, image.size, image.crc32, label),
            strict=True,
        ):
            rows.columns[column].append(value)
    return rows


def groups(members: Iterator[Member], where: str) -> Iterator[tuple[str, dict[str, Member]]]:
    """Neighbours with the same key: (key, extension -> member). StorageError if two have the same extension, too."""
    current, group = "", dict[str, Member]()
    for member in members:
        folder, slash, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        if not stem or not extension:
            continue  # hidden files, and what has no extension
        key, extension = str(PurePosixPath(folder + slash, stem)), extension.lower()
        if key != current and group:
            yield current, group
            group = {}
        if extension in group:
            raise StorageError(
                f"{where}: {group[extension].name!r} and {member.name!r} have the same key and extension, one would be "
                "lost; give each sample a name of its own"
            )
        current = key
        group[extension] = member
    if group:
        yield current, group


def _image_of(members: dict[str, Member]) -> Member | None:
    """``key.jpg`` before ``key.mask.png``, then by the order of IMAGE_EXTENSIONS."""
    images = [extension for extension in members if extension.rpartition(".")[2] in IMAGE_EXTENSIONS]
    if not images:
        return None
    return members[min(images, key=lambda e: (e.count("."), IMAGE_EXTENSIONS.index(e.rpartition(".")[2])))]


def label_of(members: dict[str, Member]) -> tuple[int, str]:
    """A sample's label, -1 if it has none; and, where there is but what is none, that."""
    bad = ""
    for name, value in _label_values(members):
        if match := _LABEL.fullmatch(str(value).strip()) if isinstance(value, str | int | float) else None:
            return max(int(match[1]), -1), ""
        bad = bad or f"{name}: {reprlib.repr(value)}"
    return -1, bad


def _label_values(members: dict[str, Member]) -> Iterator[tuple[str, object]]:
    """What may be a sample's label, best first: (where it is from, value)."""
    for extension in ("cls", "json"):
        if (member := members.get(extension)) is None:
            continue
        if member.size > _MAX_META_BYTES:
            yield member.name, f"{member.size} bytes"
        elif extension == "cls":
            yield member.name, _text(member.data).strip()
        else:
            try:
                fields = json.loads(member.data)
            except (ValueError, RecursionError):
                yield member.name, _text(member.data)
                continue
            if isinstance(fields, dict):
                present = (field for field in _LABEL_FIELDS if fields.get(field) is not None)
                yield from ((f"{member.name}, {field}", fields[field]) for field in present)


def walk_tar(manifest: Manifest, fetch: Fetch, shard: int) -> Iterator[Member]:
    """The regular files of a ustar, GNU or pax archive, each read once. StorageError unless it is whole.

    A block of zeros ends it, so only zeros may follow: what lies behind a hole in a file, or in a second archive behind
    the first, would be lost to every reader of tars.
    """
    where = manifest.shard_url(shard)
    stream = _Stream(fetch, shard, int(manifest.shards.size[shard]), where)
    attributes: dict[str, str] = {}  # pax: of the next member
    while True:
        at = stream.position
        if stream.left < _BLOCK:
            raise StorageError(f"{where} ends at byte {at} without the end-of-archive mark: it is truncated")
        header = stream.take(_BLOCK)
        if not any(header):
            if (beyond := stream.skip_zeros()) is not None:
                raise StorageError(
                    f"{where}: the block of zeros at byte {at} ends the archive, but byte {beyond} is not zero; where "
                    "the file has a hole, fetch it again; where it is several tars in one, give each a file of its own"
                )
            return
        if sum(header[:148]) + 8 * 32 + sum(header[156:]) != _number(header[148:156]):
            raise StorageError(f"{where}: the tar header at byte {at} is damaged (its checksum is wrong)")
        kind, size = header[156:157], _number(header[124:136])
        if size < 0:
            raise StorageError(f"{where}: the tar header at byte {at} is damaged (its size is {header[124:136]!r})")
        if kind in (b"L", b"x", b"X"):  # GNU's long name, pax attributes: of the next member
            data = stream.take(size)
            records = {"path": _until_nul(data)} if kind == b"L" else _pax_records(data)
            if records is None:
                raise StorageError(f"{where}: the pax records behind the tar header at byte {at} are damaged")
            attributes |= records
            stream.checksum(-size % _BLOCK)
            continue
        if kind in (b"K", b"g"):  # the target of the next link, attributes of all members
            stream.checksum(size + -size % _BLOCK)
            continue
        name = attributes.get("GNU.sparse.name") or attributes.get("path") or _name(header)
        size = int(attributes.get("size", size))
        form = b"S" if any(record.startswith("GNU.sparse.") for record in attributes) else kind
        attributes = {}
        if form in _INDIRECT and name.lower().endswith(_SAMPLE_ENDINGS):
            what, remedy = _INDIRECT[form]
            raise StorageError(f"{where}: {name} is {what}, so its bytes do not lie there as they are; {remedy}")
        if form in (b"0", b"\0", b"7"):
            wanted = name.lower().endswith(_META_ENDINGS) and size <= _MAX_META_BYTES
            offset = stream.position
            data = stream.take(size) if wanted else b""
            checksum = crc32(data) if wanted else stream.checksum(size)
            yield Member(name, offset, size, checksum, data)
            stream.checksum(-size % _BLOCK)
        elif form not in (b"1", b"2", b"3", b"4", b"5", b"6"):  # what these say of a size is not to be believed
            more = kind == b"S" and header[482]  # the list of its parts goes on in blocks that the size does not count
            while more:
                more = stream.take(_BLOCK)[504]
            stream.checksum(size + -size % _BLOCK)


def _pax_records(data: bytes) -> dict[str, str] | None:
    """``<length> <key>=<value>\\n`` each, whose length in bytes is the whole record's; None if they are damaged."""
    records, at = dict[str, str](), 0
    while data[at : at + 1].strip(b"\0"):
        length = re.compile(rb"([1-9][0-9]{0,8}) ").match(data, at)
        if not length:
            return None
        end = at + int(length[1])
        key, equals, value = data[length.end() : end - 1].partition(b"=")
        if not equals or data[end - 1 : end] != b"\n":
            return None
        records[_text(key)], at = _text(value), end
    return records if re.fullmatch(r"[0-9]{1,18}", records.get("size", "0")) else None


def _name(header: bytes) -> str:
    name, prefix = _until_nul(header[:100]), _until_nul(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:262] == b"ustar" and header[262:263] == b"\0" else name


def _until_nul(field: bytes) -> str:
    return _text(field.partition(b"\0")[0])


def _text(field: bytes) -> str:
    """UTF-8; bytes that are none, as of old archives in Latin-1, stay apart as "\\xe9"."""
    return field.decode(errors="backslashreplace")


def _number(digits: bytes) -> int:
    """What a header's field says, read as Python's tarfile does; -1 if it is no number."""
    if digits[0] & 0x80:  # GNU: binary, for more than 8 GiB
        return int.from_bytes(digits[1:], "big")
    text = digits.partition(b"\0")[0].strip(b" ")
    return int(text or b"0", 8) if re.fullmatch(rb"[0-7]*", text) else -1


class _Stream:
    """A shard from front to back, a few MiB at a time."""

    def __init__(self, fetch: Fetch, shard: int, size: int, where: str) -> None:
        self._fetch, self._shard, self._size, self._where = fetch, shard, size, where
        self._chunk = memoryview(b"")
        self._chunk_start = 0
        self.position = 0

    @property
    def left(self) -> int:
        return self._size - self.position

    def take(self, count: int) -> bytes:
        return b"".join(self._parts(count))

    def checksum(self, count: int) -> int:
        value = 0
        for part in self._parts(count):
            value = crc32(part, value)
        return value

    def skip_zeros(self) -> int | None:
        """Where the first byte from here on lies that is not zero; None, at the end of the shard, if there is none."""
        at = self.position
        for part in self._parts(self.left):
            if (nonzero := np.frombuffer(part, np.uint8) != 0).any():
                return at + int(nonzero.argmax())
            at += len(part)
        return None

    def _parts(self, count: int) -> Iterator[memoryview]:
        if count > self.left:
            raise StorageError(f"{self._where} ends inside the member at byte {self.position}: it is truncated")
        while count:
            at = self.position - self._chunk_start
            if at >= len(self._chunk):
                end = min(self.position + _READ_BYTES, self._size)
                self._chunk, self._chunk_start = read_range(self._fetch, self._shard, self.position, end), self.position
                at = 0
            part = self._chunk[at : at + count]
            self.position += len(part)
            count -= len(part)
            yield part
