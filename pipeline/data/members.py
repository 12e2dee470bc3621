"""What lies in a tar, by one walk over its bytes that believes nothing it has not checked.

Python's tarfile ends quietly at a damaged header and at a cut between two members (cpython#120740). This walk checks
every header's checksum and the end of the archive: what is not whole is an error, never fewer members, and so is an
image that is a link or sparse: a manifest's images lie in a shard one behind the other.
"""

import json
import re
import reprlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from deflate import crc32

from pipeline.data.fetch import Fetch, read_range
from pipeline.data.labels import is_no_label
from pipeline.data.manifest import Manifest
from pipeline.data.sources import IMAGE_EXTENSIONS
from pipeline.storage import StorageError

META_ENDINGS = (".cls", ".json")
UNPACK = {  # endings of shards that can only be read from their beginning on
    ".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.z": "gunzip",
    ".tar.bz2": "bunzip2", ".tbz2": "bunzip2", ".tbz": "bunzip2",
    ".tar.xz": "unxz", ".txz": "unxz", ".tar.lzma": "unxz", ".tlz": "unxz",
    ".tar.zst": "zstd -d --rm", ".tzst": "zstd -d --rm",
    ".tar.lz4": "lz4 -d -m --rm",
}  # fmt: skip
_COMPRESSED = {  # how such a shard begins
    b"\x1f\x8b": ".tar.gz", b"BZh": ".tar.bz2", b"\xfd7zXZ": ".tar.xz", b"\x28\xb5\x2f\xfd": ".tar.zst",
    b"\x04\x22\x4d\x18": ".tar.lz4",
}  # fmt: skip
_BLOCK = 512
_READ_BYTES = 8 * 2**20
_HEAD_BYTES = 16
_MAX_META_BYTES = 2**20  # of a .json that is searched for a label, of a long name, of pax records
_PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,8}) ")
_OCTAL = re.compile(rb"[0-7]*")
_LABEL = re.compile(r"\+?([0-9]{1,18})(\.0*)?")  # 18 digits: an int64
_LABEL_FIELDS = ("label", "cls", "class", "class_id")
_SAMPLE_ENDINGS = (*META_ENDINGS, *(f".{extension}" for extension in IMAGE_EXTENSIONS))
_AGAIN_WITHOUT_LINKS = "pack it again with `tar --dereference --hard-dereference`"
_INDIRECT = {  # types of members whose bytes do not lie behind their header as they are
    b"1": ("a hard link", _AGAIN_WITHOUT_LINKS),
    b"2": ("a symbolic link", _AGAIN_WITHOUT_LINKS),
    b"S": ("sparse", "pack it again without `--sparse`"),
}


class ShardError(StorageError):
    """A shard that cannot be indexed as it is: damaged, cut off, or with two samples of one name."""


class Member(NamedTuple):  # made 1 us faster than a frozen dataclass, of 8 us that a member takes
    """A file in a tar, and what a ``.cls`` or ``.json`` says."""

    name: str
    offset: int
    size: int
    crc32: int
    head: bytes  # its first bytes; none of a link
    is_link: bool = False  # or sparse: its bytes do not lie there as they are
    label: int | None = None  # -1: it says that there is none; None: it says nothing
    bad_label: str = ""  # what stands there and is no label


def walk_tar(manifest: Manifest, fetch: Fetch, shard: int) -> Iterator[Member]:
    """The regular files of a ustar, GNU or pax archive, each read once. ShardError unless it is whole.

    A block of zeros ends it, so only zeros may follow: what lies behind a hole in a file, or in a second archive behind
    the first, would be lost to every reader of tars.
    """
    where = manifest.shard_url(shard)
    stream = _Stream(fetch, shard, int(manifest.shards.size[shard]), where)
    attributes: dict[str, str] = {}  # pax: of the next member
    while True:
        at = stream.position
        if stream.left < _BLOCK:
            raise ShardError(f"{where} ends at byte {at} without the end-of-archive mark: it is truncated")
        header = stream.take(_BLOCK)
        if not any(header):
            if (beyond := stream.skip_zeros()) is not None:
                raise ShardError(
                    f"{where}: the block of zeros at byte {at} ends the archive, but byte {beyond} is not zero; where "
                    "the file has a hole, fetch it again; where it is several tars in one, give each a file of its own"
                )
            return
        if sum(header[:148]) + 8 * 32 + sum(header[156:]) != _number(header[148:156]):
            raise ShardError(f"{where}{_no_header(header, at)}")
        kind, size = header[156:157], _number(header[124:136])
        if size < 0:
            raise ShardError(f"{where}: the tar header at byte {at} is damaged (its size is {header[124:136]!r})")
        if kind in (b"L", b"x", b"X"):  # GNU's long name, pax attributes: of the next member
            if size > _MAX_META_BYTES:
                raise ShardError(f"{where}: the tar header at byte {at} is damaged (a name of {size} bytes)")
            data = stream.take(size)
            records = {"path": _until_nul(data)} if kind == b"L" else _pax_records(data)
            if records is None:
                raise ShardError(f"{where}: the pax records behind the tar header at byte {at} are damaged")
            attributes |= records
            stream.skip(-size % _BLOCK)
            continue
        if kind in (b"K", b"g"):  # the target of the next link, attributes of all members
            stream.skip(size + -size % _BLOCK)
            continue
        name = attributes.get("GNU.sparse.name") or attributes.get("path") or _name(header)
        size = int(attributes.get("size", size))
        form = b"S" if any(record.startswith("GNU.sparse.") for record in attributes) else kind
        attributes = {}
        if form in _INDIRECT:
            if name.lower().endswith(_SAMPLE_ENDINGS):
                what, remedy = _INDIRECT[form]
                raise ShardError(f"{where}: {name} is {what}, so its bytes do not lie there as they are; {remedy}")
            yield Member(name, stream.position, 0, 0, b"", is_link=True)
        if form in (b"0", b"\0", b"7"):
            is_meta = name.lower().endswith(META_ENDINGS)
            offset = stream.position
            data, checksum = stream.read(size, size if is_meta and size <= _MAX_META_BYTES else _HEAD_BYTES)
            label, bad_label = _said(name, size, data) if is_meta else (None, "")
            yield Member(name, offset, size, checksum, data[:_HEAD_BYTES], label=label, bad_label=bad_label)
            stream.skip(-size % _BLOCK)
        elif form not in (b"1", b"2", b"3", b"4", b"5", b"6"):  # what these say of a size is not to be believed
            more = kind == b"S" and header[482]  # the list of its parts goes on in blocks that the size does not count
            while more:
                more = stream.take(_BLOCK)[504]
            stream.skip(size + -size % _BLOCK)


def _no_header(block: bytes, at: int) -> str:
    """What is wrong where the checksum of a header is."""
    ending = next((ending for start, ending in _COMPRESSED.items() if not at and block.startswith(start)), "")
    if ending:
        return f" is compressed; rename it so that it ends in {ending}, then `{UNPACK[ending]}` it"
    no_tar = "" if at else f", or this is no tar: it begins with {block[:16]!r}"
    return f": the tar header at byte {at} is damaged (its checksum is wrong){no_tar}"


def _said(name: str, size: int, data: bytes) -> tuple[int | None, str]:
    """The label in a ``.cls`` or ``.json``, as ``Member`` has it."""
    bad = ""
    for where, value in _label_values(name, size, data):
        if is_no_label(value):
            return -1, ""
        if match := _LABEL.fullmatch(str(value).strip()) if isinstance(value, str | int | float) else None:
            return int(match[1]), ""
        bad = bad or f"{where}: {reprlib.repr(value)}"
    return None, bad


def _label_values(name: str, size: int, data: bytes) -> Iterator[tuple[str, object]]:
    """What may be a sample's label, best first: (where it is from, value)."""
    if size > _MAX_META_BYTES:
        yield name, f"{size} bytes"
    elif name.lower().endswith(".cls"):
        yield name, _text(data).strip()
    else:
        try:
            content = json.loads(data or b"null")
        except (ValueError, RecursionError):
            yield name, _text(data)
            return
        if isinstance(content, dict):
            present = (field for field in _LABEL_FIELDS if content.get(field) is not None)
            yield from ((f"{name}, {field}", content[field]) for field in present)
        elif not isinstance(content, list):
            yield name, content


def _pax_records(data: bytes) -> dict[str, str] | None:
    """``<length> <key>=<value>\\n`` each, whose length in bytes is the whole record's; None if they are damaged."""
    records, at = dict[str, str](), 0
    while data[at : at + 1].strip(b"\0"):
        length = _PAX_LENGTH.match(data, at)
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
    return int(text or b"0", 8) if _OCTAL.fullmatch(text) else -1


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

    def read(self, count: int, keep: int) -> tuple[bytes, int]:
        """The first ``keep`` of the next bytes, and the CRC-32 of all."""
        kept, checksum = b"", 0
        for part in self._parts(count):
            kept += part[: keep - len(kept)]
            checksum = crc32(part, checksum)
        return kept, checksum

    def skip(self, count: int) -> None:
        """Pass over bytes that nobody needs, without fetching them."""
        self._check(count)
        self.position += count

    def skip_zeros(self) -> int | None:
        """Where the first byte from here on lies that is not zero; None, at the end of the shard, if there is none."""
        at = self.position
        for part in self._parts(self.left):
            if (nonzero := np.frombuffer(part, np.uint8) != 0).any():
                return at + int(nonzero.argmax())
            at += len(part)
        return None

    def _check(self, count: int) -> None:
        if count > self.left:
            raise ShardError(f"{self._where} ends inside the member at byte {self.position}: it is truncated")

    def _parts(self, count: int) -> Iterator[memoryview]:
        self._check(count)
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
