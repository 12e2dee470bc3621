"""The run's bad samples: one list over all ranks and restarts, and the guard that stops a run that has too many.

Each rank's loader meets its own. They are put together where metrics are logged and checkpoints written (1.5 ms on
gloo), so all ranks hold the same list and stop together. ``quarantine.json`` keeps it for a resumed run, which meets
again only what comes after its checkpoint.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict

from pipeline import distributed, storage
from pipeline.checkpoint import CheckpointStore
from pipeline.data.assemble import BadSample, BadSamplesError, list_of
from pipeline.storage import StorageError

_NAME = "quarantine.json"


class Quarantine:
    """The samples that were replaced so far, in the order of their ids: equal on all ranks."""

    def __init__(self, checkpoints: CheckpointStore, *, num_samples: int, max_bad_share: float) -> None:
        """Go on with the list beside ``checkpoints``. ``max_bad_share``: of ``num_samples``, over all ranks together.

        A collective. BadSamplesError if the list is too long already.
        """
        self.samples: dict[int, BadSample] = {}
        self._checkpoints = checkpoints
        self._url = _url(checkpoints)
        self._num_samples = num_samples
        self._max_bad_share = max_bad_share
        self._add(read_quarantine(checkpoints) if distributed.rank() == 0 else ())
        self._stop_above_share()

    def gather(self, met: Mapping[int, BadSample]) -> None:
        """Add what each rank has met, and save it.

        A collective. BadSamplesError on all ranks above the share.
        """
        new = self._add(tuple(sample for sample_id, sample in met.items() if sample_id not in self.samples))
        if not new:
            return
        if distributed.rank() == 0:
            self._checkpoints.write_rows(_NAME, map(asdict, self.samples.values()))
            logging.getLogger(__name__).warning(
                "%d training images could not be decoded so far and were replaced; all are listed in %s, new are:\n%s",
                len(self.samples), self._url, list_of(new),
            )  # fmt: skip
        self._stop_above_share()

    def _add(self, mine: tuple[BadSample, ...]) -> list[BadSample]:
        """The ranks' ``mine`` together, without what two of them met."""
        new = {sample.sample_id: sample for sample in distributed.all_gather_items(mine)}
        self.samples = dict(sorted((self.samples | new).items()))
        return list(new.values())

    def _stop_above_share(self) -> None:
        bad = len(self.samples)
        if bad > self._max_bad_share * self._num_samples:
            enough = -(-bad * 1000 // self._num_samples) / 1000
            raise BadSamplesError(
                f"{bad} of {self._num_samples} training images cannot be decoded, more than data.max_bad_share="
                f"{self._max_bad_share:g} allows; mend them or leave them out of the shards, or accept them with "
                f"data.max_bad_share={enough:g}; all are listed in {self._url}:\n{list_of(list(self.samples.values()))}"
            )


def read_quarantine(checkpoints: CheckpointStore) -> tuple[BadSample, ...]:
    """The list that a run has left beside its checkpoints, in the order of ids; empty if there is none."""
    try:
        return tuple(BadSample(**row) for row in checkpoints.read_rows(_NAME))
    except (ValueError, TypeError) as error:
        raise StorageError(
            f"{_url(checkpoints)} is not the list of bad samples that was written: {error}; delete it, and the run "
            "lists those that it meets from its checkpoint on"
        ) from error


def _url(checkpoints: CheckpointStore) -> str:
    return storage.join(checkpoints.url, _NAME)
