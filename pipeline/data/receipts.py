"""What has been found out about single shards: of all of them it becomes the manifest.

Until then each finished shard leaves a receipt below ``<url>/.progress``, so a job that was killed goes on where it
stopped. A receipt counts only for the fingerprint of what its shard was made or read from.
"""

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline import storage

_FOLDER = ".progress"


@dataclass
class ShardRows:
    """What the manifest will say about one shard."""

    name: str
    split: str
    size: int = 0
    version: str = ""  # of the file, as a listing tells it; only of a shard that was written here, as the next
    crc32: int = 0  # of the whole file
    columns: dict[str, list[Any]] = field(
        default_factory=lambda: {"key": [], "offset": [], "length": [], "crc32": [], "label": []}
    )
    passed_over: dict[str, int] = field(
        default_factory=dict
    )  # what of another tool's tar is not in the columns, by why
    examples: dict[str, str] = field(default_factory=dict)  # one of each

    def pass_over(self, reason: str, example: str) -> None:
        """Count what does not become a row, or a label."""
        self.passed_over[reason] = self.passed_over.get(reason, 0) + 1
        self.examples.setdefault(reason, example)


class Receipts:
    """The receipts in one folder of shards; safe to use from several threads."""

    def __init__(self, url: str, names: Collection[str]) -> None:
        """``names``: what a listing of ``url`` has found."""
        self._url = url
        self._names = names

    def find(self, shard: str, fingerprint: str) -> ShardRows | None:
        """What an earlier attempt found out about a shard, if it was the same."""
        name = _name(shard, fingerprint)
        if name not in self._names:
            return None
        try:
            return ShardRows(**json.loads(storage.read_bytes(storage.join(self._url, name))))
        except (ValueError, TypeError):  # empty or cut by a crash of the machine, or another version's
            return None

    def keep(self, rows: ShardRows, fingerprint: str) -> None:
        """For a later attempt."""
        storage.write_bytes(storage.join(self._url, _name(rows.name, fingerprint)), json.dumps(vars(rows)).encode())

    def clear(self) -> None:
        """The manifest is there."""
        storage.delete(storage.join(self._url, _FOLDER))


def fingerprint(parts: Iterable[object]) -> str:
    """A short digest of what determines a shard."""
    return hashlib.sha256("\n".join(map(str, parts)).encode(errors="surrogateescape")).hexdigest()[:16]


def _name(shard: str, fingerprint: str) -> str:
    return f"{_FOLDER}/{shard}.{fingerprint}.json"
