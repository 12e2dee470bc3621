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


class Slots(Protocol):
    """One slot per sample: a step expects its samples, reads, and updates, each once and in this order."""

    num_samples: int  # N
    steps: int  # updates so far in the whole run

    def expect(self, sample_ids: Tensor, num_noise: int) -> None:
        """Say what the step will read: the slots of this rank's samples (B,), and of ``num_noise`` ids, which are drawn
        by the step alone, the same on all ranks. Called before the samples are embedded, so that a fetch has time."""
        ...

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """(B, D), (num_noise,), (num_noise, D): own slots, drawn ids and their slots, as all steps before left them, in
        at least float32."""
        ...

    def hardest(self, queries: Tensor, count: int) -> Tensor:
        """(B, count, D): of all N slots those most similar to each query (B, D), a constant; never the query's own.

        It compares each query with the whole bank: B x N x D multiply-adds, at N = 1.28 million 0.16 GMAC a query,
        beside the 12 of a ResNet-50's training step at 224 px. So it pays where the bank has at most some ten million
        slots and the encoder is no toy. The local backend does all of it on the rank; the service's shards each search
        their N / S slots, side by side, and only ids, similarities and the ``count`` winners travel. Called between
        ``read`` and ``update``; the step waits for it. Slots that are equally similar but for rounding may be swapped
        between backends.
        """
        ...

    def update(self, embeddings: Tensor, momentum: float) -> None:
        """Move the slots of all ranks' samples to ``momentum`` x the old direction and 1 - ``momentum`` x that of this
        rank's embeddings (B, D). Of a sample that comes twice, the last one in the last rank counts."""
        ...

    def gauges(self) -> dict[str, float]:
        """Name -> value for the log."""
        ...
