"""What the folders above the images of a set mean: which one names the split, which one the class.

A layout has a part for each depth: the name of a folder, ``{split}``, ``{class}`` or ``*``, any folder; deeper folders
mean nothing. ``images/{split}/{class}`` is one, as text. Where nobody gives one it follows from the names. What can be
read in two ways is not guessed, as nobody would notice validation images that are trained on: LayoutError lists the
ways, and the options of jobs.write_shards that choose one.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePosixPath

from pipeline.data.splits import split_of, splits_within

SPLIT, CLASS, ANY = "{split}", "{class}", "*"
LOOSE = "."  # stands for the folder of images that lie in none at some depth
_MAX_NAMED = 12  # folders that a suggested command names one by one

Folders = tuple[str, ...]  # those above an image, from the root of the set on
Layout = tuple[str, ...]
Names = Mapping[str, str]  # names that stand for splits, besides those of ``splits.split_of``


class LayoutError(Exception):
    """It is not clear what names splits and what names classes. ``ways``: a meaning -> the options that say it."""

    def __init__(self, problem: str, ways: Mapping[str, list[str]] | None = None) -> None:
        super().__init__(problem)
        self.ways = ways or {}


def parse_layout(template: str) -> Layout:
    """``images/{split}/{class}`` -> its parts. LayoutError where it is no template."""
    layout = PurePosixPath(template.strip("/")).parts
    wrong = [part for part in layout if part not in (SPLIT, CLASS, ANY) and re.search(r"[{}*]", part)]
    times = layout.count(SPLIT), layout.count(CLASS)
    if wrong or max(times) != 1:
        why = f"{wrong[0]!r} is no part of one" if wrong else f"it has {times[0]} {SPLIT} and {times[1]} {CLASS}"
        raise LayoutError(
            f"--split-by {template!r} is no template: {why}; the parts are {SPLIT} or {CLASS} or one of each, names of "
            f"folders, and {ANY} for any folder, e.g. images/{SPLIT}/{CLASS}"
        )
    return layout


def infer_layout(found: Collection[Folders], names: Names) -> Layout:
    """The layout that the folders of all images tell.

    Folders that are all splits, at the first depth or below a single folder, are the splits, and those in them the
    classes. Without any split, the folders of the first depth are the classes. LayoutError where splits lie beside
    other folders or below several, where all folders in splits are splits again, and where names only hold such a word.
    """
    shared = _shared(found)
    for depth in range(len(shared) + 1):
        if all(split_named(name, names) for name in _at(found, depth)):
            _check_below(found, shared[:depth], names)
            return (*shared[:depth], SPLIT, CLASS)
    depths = range(max(map(len, found)))
    whole = [depth for depth in depths if any(split_named(name, names) for name in _at(found, depth))]
    within = [depth for depth in depths if any(splits_within(name) for name in _at(found, depth))]
    if whole or within:
        raise _unclear(found, shared, (*whole, *within)[0], names)
    return (CLASS,)


def read_layout(found: Collection[Folders], layout: Layout, names: Names) -> dict[Folders, tuple[str, str]]:
    """The split, and the class or "", of the images in each of these folders.

    LayoutError where they do not lie as the layout says, and where one of ``names`` is no folder of a split.
    """
    template = "/".join(layout)
    if astray := [folders for folders in found if not _fits(folders, layout)]:
        raise LayoutError(
            f"--split-by {template}: the images in {'/'.join(min(astray)) or LOOSE!r} do not lie there; at the first "
            f"depth lie {listed(_at(found, 0))}"
        )
    of_split = layout.index(SPLIT) if SPLIT in layout else None
    of_class = layout.index(CLASS) if CLASS in layout else None
    splits = {} if of_split is None else {name: split_named(name, names) or "" for name in _at(found, of_split)}
    if unknown := [name for name, split in splits.items() if not split]:
        raise LayoutError(
            f"--split-by {template} reads {listed(unknown)} as splits, and no split is called so",
            naming("if they are splits", splits, names, "--split-by", template),
        )
    check_used(names, splits)
    return {
        folders: (
            "train" if of_split is None else splits[_folder(folders, of_split)],
            "" if of_class is None or len(folders) <= of_class else folders[of_class],
        )
        for folders in found
    }


def deeper_classes(found: Collection[Folders], layout: Layout) -> str:
    """The template by which the folders in the only class are the classes; "" if there are none, or more classes."""
    if layout[-1] != CLASS:
        return ""
    *above, _ = layout
    classes, below = _at(found, len(above)), _at(found, len(layout)) - {LOOSE}
    return "/".join((*above, *classes, CLASS)) if len(classes) == 1 and len(below) > 1 else ""


def split_named(name: str, names: Names) -> str | None:
    """The split that a name stands for, if any."""
    return names.get(name) or split_of(name)


def naming(meaning: str, found: Iterable[str], names: Names, *options: str) -> dict[str, list[str]]:
    """The way that says which split each of these names is, after ``options``; none if they are too many to list."""
    said = {name: names.get(name) or next(iter(splits_within(name)), "train") for name in sorted(found)}
    pairs = [f"{name}={split}" for name, split in said.items() if name in names or not split_of(name)]
    if len(pairs) > _MAX_NAMED:
        return {}
    return {meaning: [*options, *(word for pair in pairs for word in ("--split", pair))]}


def check_used(names: Names, found: Collection[str]) -> None:
    """LayoutError unless every name that was said to be a split was found."""
    for name in sorted(names.keys() - set(found)):
        raise LayoutError(f"--split {name}={names[name]}: no split is called {name!r} there, but {listed(found)}")


def listed(names: Iterable[str]) -> str:
    """At most five of them, for a message."""
    quoted = ["images in no folder" if name == LOOSE else repr(name) for name in sorted(names)]
    return ", ".join(quoted[:5]) + (f" and {len(quoted) - 5} more" if len(quoted) > 5 else "") or "none"


def _shared(found: Collection[Folders]) -> Folders:
    """The folders that lie above all images."""
    pairs = zip(min(found), max(found), strict=False)
    return tuple(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _fits(folders: Folders, layout: Layout) -> bool:
    return all(part in (SPLIT, CLASS, ANY, _folder(folders, depth)) for depth, part in enumerate(layout))


def _at(found: Iterable[Folders], depth: int) -> set[str]:
    return {_folder(folders, depth) for folders in found}


def _folder(folders: Folders, depth: int) -> str:
    return folders[depth] if depth < len(folders) else LOOSE


def _check_below(found: Collection[Folders], above: Folders, names: Names) -> None:
    """LayoutError where the folders in splits are all splits, too: train/train/x.jpg, test/train/x.jpg."""
    inner = _at(found, len(above) + 1) - {LOOSE}
    if inner and all(split_named(name, names) for name in inner):
        outer = _at(found, len(above))
        raise LayoutError(
            f"the folders {listed(outer)} are splits, and so are {listed(inner)} in them",
            naming("if the outer ones are the splits", outer, names, "--split-by", "/".join((*above, SPLIT, CLASS)))
            | naming("if the inner ones are", inner, names, "--split-by", "/".join((*above, ANY, SPLIT, CLASS))),
        )


def _unclear(found: Collection[Folders], shared: Folders, depth: int, names: Names) -> LayoutError:
    """The folders at ``depth`` look like splits, and may be classes; those in ``shared`` lie above all images."""
    here = _at(found, depth)
    alike = {name for name in here if split_named(name, names) or splits_within(name)}
    others = here - alike
    example = next(folders for folders in sorted(found) if _folder(folders, depth) in alike)
    between = (CLASS, *(ANY,) * (depth - len(shared) - 1)) if depth > len(shared) else ()
    template = ["--split-by", "/".join((*shared, *between, SPLIT))] if between else []
    ways = naming("if all of them are splits", here, names, *template)
    ways["if none is, and all images are to be trained on"] = ["--split-by", "/".join((*shared, CLASS))]
    beside = f", and beside them lie {listed(others)}" if others else ""
    return LayoutError(f"the folders {listed(alike)} look like splits{beside} (e.g. {'/'.join(example)}/)", ways)
