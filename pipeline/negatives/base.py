"""What a method sees of its negatives, wherever they are kept."""

from typing import Protocol

from torch import Tensor


class Negatives(Protocol):
    """A first-in, first-out store of keys from earlier batches, with the ids of the samples they come from."""

    @property
    def sample_ids(self) -> Tensor:
        """(K,) int64, the sample of each row of ``negatives()``; -1 = a random direction, of no sample."""
        ...

    def negatives(self) -> Tensor:
        """(K, D), embeddings of length 1, without gradient. Not to be changed, and valid until the next call."""
        ...

    def enqueue(self, keys: Tensor, sample_ids: Tensor) -> None:
        """Hand over this rank's keys (B, D) and their sample ids (B,): the ranks' keys replace the oldest ones, in rank
        order. Called once a step by every rank, after ``negatives()``."""
        ...

    def enqueued(self) -> int:
        """How many keys all ranks have handed over in the whole run; it may wait for the device."""
        ...

    def gauges(self) -> dict[str, float]:
        """Name -> value for the log; it may wait for the device."""
        ...
