"""Which members of a tar belong together, and which of them is the sample.

Every image is a sample. Names are read at their dots: the key of ``scan.0001.jpg`` is ``scan.0001``, and its label is
in ``scan.0001.jpg.cls``, ``scan.0001.cls`` or ``scan.cls``, the first of these that is there, or in a ``.json`` of such
a name. Beside ``a.jpg``, ``a.mask.png`` and ``a.png`` are its companions, no samples: what a word tells apart belongs
to the image of the shorter name. What a number tells apart is one of many: ``a.0001.jpg`` is a sample.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePosixPath

from pipeline.data.members import META_ENDINGS, Member, ShardError
from pipeline.data.sources import IMAGE_EXTENSIONS

COMPANION, HIDDEN_IMAGE, NO_IMAGE = "companion images", "hidden images", "samples without an image"
_HIDDEN, _LINK, _TEXT = "hidden files", "links and sparse files", "texts without an image"
_IMAGE_BYTES = re.compile(  # no TIFF: the raw files of most cameras begin like one
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|....ftypavif", re.DOTALL
)
_RANKS = {extension: place for place, extension in enumerate(IMAGE_EXTENSIONS)}
_BINARY = re.compile(rb"[\0-\x08\x0e-\x1f]")

PassOver = Callable[[str, str], object]  # is told the reason, and the name of what is passed over


def _in_silence(reason: str, name: str) -> None:
    pass


def groups(members: Iterable[Member], where: str, pass_over: PassOver = _in_silence) -> Iterator[dict[str, Member]]:
    """Neighbours whose names are the same up to the first dot, by path with the last extension in small letters.

    ShardError if two have the same path, or if what belongs together lies at two places.
    """
    current, group = "", dict[str, Member]()
    keys, begun = set[str](), set[str]()  # of the groups before, and what these keys begin with

    def closed() -> dict[str, Member]:
        here = {_key(path, member) for path, member in group.items()}
        for key in here:
            if key in keys or key in begun or not keys.isdisjoint(_shorter(key)):
                raise ShardError(f"{where}: the key {key!r} comes at two places; pack it again with `tar --sort=name`")
        keys.update(here)
        for key in here:
            begun.update(_shorter(key))
        return group

    for member in _visible(members, pass_over):
        path = _path(member)
        stem = _stem(path)
        if stem != current and group:
            yield closed()
            group = {}
        current = stem
        key = _without_extension(path)
        twin = group.setdefault(key + path[len(key) :].lower(), member)
        if twin is not member:
            raise ShardError(
                f"{where}: {twin.name!r} and {member.name!r} have the same key and extension, one would be "
                "lost; give each sample a name of its own"
            )
    if group:
        yield closed()


def samples_of(group: Mapping[str, Member], pass_over: PassOver = _in_silence) -> dict[str, Member]:
    """Key -> image, in the order of the archive."""
    images = {path: _key(path, member) for path, member in group.items() if _is_image(path, member)}
    samples = dict[str, Member]()
    for path, key in sorted(images.items(), key=lambda image: (image[1].count("."), _rank(image[0]))):
        longest = next((prefix for prefix in _prefixes(key) if prefix in samples), None)
        if longest is None or key[len(longest) + 1 :][:1].isdecimal():
            samples[key] = group[path]
        else:
            pass_over(f"{COMPANION} *{path[len(longest) :]}", group[path].name)
    begun = {prefix for key in samples for prefix in _prefixes(key)}
    alone = dict[str, list[Member]]()
    for path, member in ((path, member) for path, member in group.items() if path not in images):
        key = _key(path, member)
        if key not in begun and samples.keys().isdisjoint(_prefixes(key)):
            alone.setdefault(key, []).append(member)
    for members in alone.values():
        binary = [member for member in members if _BINARY.search(member.head)]
        pass_over(NO_IMAGE if binary else _TEXT, (binary or members)[0].name)
    return dict(sorted(samples.items(), key=lambda sample: sample[1].offset))


def label_of(image: Member, group: Mapping[str, Member]) -> tuple[int, str]:
    """An image's label, -1 if it has none; and, where there is but what is none, that."""
    bad = ""
    for prefix in _prefixes(_path(image)):
        for meta in (group[prefix + ending] for ending in META_ENDINGS if prefix + ending in group):
            if meta.label is not None:
                return meta.label, ""
            bad = bad or meta.bad_label
    return -1, bad


def _visible(members: Iterable[Member], pass_over: PassOver) -> Iterator[Member]:
    for member in members:
        if member.is_link:
            pass_over(_LINK, member.name)
        elif member.name.rpartition("/")[2].startswith("."):
            pass_over(HIDDEN_IMAGE if _IMAGE_BYTES.match(member.head) else _HIDDEN, member.name)
        elif not member.name.endswith("/"):  # a folder, in archives of before 1988
            yield member


def _path(member: Member) -> str:
    """Its name without parts that mean nothing: "./a//b.jpg" -> "a/b.jpg"."""
    name = member.name
    return str(PurePosixPath(name)) if "./" in name or "//" in name else name  # a PurePosixPath takes 3 us


def _prefixes(path: str) -> Iterator[str]:
    """What a path begins with, by the dots of its file name, the longest first: "d/a.b.jpg", "d/a.b", "d/a"."""
    yield path
    yield from _shorter(path)


def _shorter(path: str) -> Iterator[str]:
    """The prefixes that are not the whole path."""
    file, dot = path.rfind("/") + 1, len(path)
    while (dot := path.rfind(".", file, dot)) >= 0:
        yield path[:dot]


def _stem(path: str) -> str:
    """The shortest prefix."""
    dot = path.find(".", path.rfind("/") + 1)
    return path if dot < 0 else path[:dot]


def _without_extension(path: str) -> str:
    dot = path.rfind(".", path.rfind("/") + 1)
    return path if dot < 0 else path[:dot]


def _key(path: str, member: Member) -> str:
    """The path without its extension; an image's that only its bytes tell is whole: "scan.0001" may be one of many."""
    is_whole = not _has_extension_of_images(path) and _IMAGE_BYTES.match(member.head)
    return path if is_whole else _without_extension(path)


def _rank(path: str) -> int:
    """The place of a path's extension among those of images, behind the last if it is none of these."""
    return _RANKS.get(path.rpartition(".")[2], len(_RANKS))


def _has_extension_of_images(path: str) -> bool:
    return path.rpartition(".")[2] in _RANKS


def _is_image(path: str, member: Member) -> bool:
    return _has_extension_of_images(path) or _IMAGE_BYTES.match(member.head) is not None
