"""How a rank reaches the shards of its negatives, whatever carries the calls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.negatives.shard import Spec


class ShardsLostError(Exception):
    """A shard did not answer or is not open; nothing is known about what it took."""


@dataclass(frozen=True)
class Reply:
    """What one shard answers to an exchange."""

    life: int  # changes when the shard's process does
    duplicates: int
    answer: Any  # of ``Shard.read``; None if nothing was asked


class Shards(Protocol):
    """The shards as a rank reaches them; one argument and one answer per shard, in order.

    A call may be repeated after ShardsLostError: whatever part of it had arrived takes effect once.
    """

    def __len__(self) -> int: ...

    def open(self, generation: int, spec: Spec) -> list[int | None]:
        """See ``Shard.open``. The shards' lives; None: it has to be filled first."""
        ...

    def fill(self, generation: int, spec: Spec, contents: Sequence[Any]) -> None:
        """See ``Shard.fill``; nothing for a shard whose content is None."""
        ...

    def exchange(
        self,
        generation: int,
        lives: Sequence[int],
        pushes: Sequence[Sequence[Any]],
        requests: Sequence[Any],
        *,
        caller: Mapping[str, float],
        at_least: int,
        wait_s: float,
    ) -> list[Reply]:
        """Push, then read what is requested (nothing where that is None): as soon as the shard's ``complete`` reaches
        ``at_least``, after ``wait_s``, or at once from a shard that has another life than the caller knows.

        ``caller``: the rank and its gauges, which the shards show.
        """
        ...
