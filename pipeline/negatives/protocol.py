"""How a rank reaches the shards of a queue, whatever carries the calls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.negatives.shard import QueueSpec, Rows


class ShardsLostError(Exception):
    """A shard did not answer or is not open; nothing is known about what it took."""


@dataclass(frozen=True)
class Reply:
    """What one shard answers to an exchange."""

    life: int  # changes when the shard's process does
    duplicates: int
    rows: Rows


class Shards(Protocol):
    """The shards of one queue as a rank reaches them; one argument and one answer per shard, in order.

    A call may be repeated after ShardsLostError: whatever part of it had arrived takes effect once.
    """

    def __len__(self) -> int: ...

    def open(self, generation: int, spec: QueueSpec, contents: Sequence[Rows | None]) -> list[int]:
        """See ``QueueShard.open``. The shards' lives."""
        ...

    def exchange(
        self,
        generation: int,
        lives: Sequence[int],
        pushes: Sequence[Sequence[Rows]],
        *,
        caller: Mapping[str, float],
        start: int,
        at_least: int,
        wait_s: float,
    ) -> list[Reply]:
        """Push, then answer with the complete steps from key ``start``: as soon as they reach ``at_least``, after
        ``wait_s``, or at once from a shard that has another life than the caller knows.

        ``caller``: the rank and its gauges, which the shards show.
        """
        ...
