"""Which split a name stands for: one rule for folders, names of shards and columns of tables.

"Train", "TRAINING" and "train " are the train split; "val", "valid", "dev", "eval" the validation split. A name that
only holds such a word ("train2017", "val_images", "trainA") may be a split or a class ("train station"): whoever meets
it refuses it and names the option that says what it is.
"""

import re

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "validate", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing"),
}
SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}  # every word that names a split
SPLIT_NAME = r"[a-z][a-z0-9_]*"  # begins the names of its shards
_WORD = r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+"  # "ValImages" has two


def split_of(name: str) -> str | None:
    """The split that a whole name stands for, in any case and with spaces around; None if it names none."""
    return SPLIT_OF.get(name.strip().casefold())


def splits_within(name: str) -> tuple[str, ...]:
    """The splits that the words of a name stand for, in their order: "imagenet-Val2017.tar" -> ("validation",)."""
    words = [word.casefold().removesuffix("set") for word in re.findall(_WORD, name)]  # "testset"
    return tuple(dict.fromkeys(SPLIT_OF[word] for word in words if word in SPLIT_OF))
