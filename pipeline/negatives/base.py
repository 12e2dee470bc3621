"""What a method sees of its negatives, wherever they are kept."""

from typing import Protocol

from torch import Tensor


class Negatives(Protocol):
    """A first-in, first-out store of keys from earlier batches."""

    def negatives(self) -> Tensor:
        """(K, D), embeddings of length 1, without gradient. Not to be changed, and valid until the next ``enqueue``."""
        ...

    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys by ``keys`` (W*B, D): the global batch's, in rank order, the same on every rank."""
        ...
