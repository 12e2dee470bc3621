"""Rows of a global batch, from shards to finished views. Runs in a loader worker or in the training process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment import Augmenter
from pipeline.data.decode import decode
from pipeline.data.fetch import open_fetch
from pipeline.data.headers import UndecodableError
from pipeline.data.manifest import Manifest
from pipeline.data.mirror import MirrorConfig, MirrorFetch
from pipeline.data.plan import Plan, uniform_rows
from pipeline.data.reader import Block, LaneReader, Singles
from pipeline.data.resize import Pixels
from pipeline.data.views import View
from pipeline.errors import DeterministicError

MAX_BAD_SHARE = 0.01  # of a split's samples, unless configured
_LISTED = 20  # bad samples in a message


@dataclass(frozen=True)
class BadSample:
    """A sample that was put into quarantine: another one of its block took its place."""

    sample_id: int
    shard: str
    reason: str


class BadSamplesError(DeterministicError):
    """Too many samples cannot be used; the message lists them."""


def list_of(bad: Sequence[BadSample]) -> str:
    """A line for each of the first 20."""
    lines = [f"  {sample.sample_id} in {sample.shard}: {sample.reason}" for sample in bad[:_LISTED]]
    more = [f"  ... and {len(bad) - _LISTED} more"] if len(bad) > _LISTED else []
    return "\n".join([*lines, *more])


@dataclass(frozen=True)
class Rows:
    """What an assembler makes: rows [start, end) of every global batch."""

    split: str
    views: tuple[View, ...]
    image_size: int
    global_batch_size: int
    seed: int
    start: int
    end: int
    colour: bool = True  # False: colour, blur and solarisation are left to the device


class Assembler:
    """Makes the rows of one step after the other."""

    def __init__(self, manifest: Manifest, rows: Rows, mirror: MirrorConfig | None = None) -> None:
        self._manifest = manifest
        self._rows = rows
        self._samples = manifest.split(rows.split)
        self._plan = Plan(manifest.shards, rows.split, rows.global_batch_size, rows.seed)
        self._augmenter = Augmenter(rows.views, rows.image_size, rows.colour)
        fetch = open_fetch(manifest)
        if mirror is not None:
            fetch = MirrorFetch(manifest, fetch, mirror)
        self._reader = LaneReader(manifest, self._samples, self._plan, fetch, range(rows.start, rows.end))

    def fill(
        self, step: int, end_step: int, views: list[NDArray[np.uint8]], sample_ids: NDArray[np.int64]
    ) -> list[BadSample]:
        """Write the rows of global ``step`` into ``views`` (n, 3, S, S) and ``sample_ids`` (n,).

        ``end_step`` bounds the reading ahead. Returns the samples met that cannot be decoded; each is replaced by
        one that its block holds for another step, or for this one where the block (one step long at an epoch's edges)
        has no other, or by one of the next lane's block. So the other rows, and every other layout of workers, see the
        same.
        """
        plan, rows = self._plan, self._rows
        epoch, local = divmod(step, plan.steps_per_epoch)
        blocks = self._reader.at(step, end_step)
        count, width = rows.end - rows.start, self._augmenter.num_uniforms
        position = local * plan.global_batch_size + rows.start
        uniforms = uniform_rows(rows.seed, epoch, position, count, width)
        bad: list[BadSample] = []
        for row in range(rows.end - rows.start):
            lane, within = divmod(rows.start + row, plan.batch_per_lane)
            candidates = self._candidates(epoch, local, lane, within, blocks[lane])
            sample_ids[row], image = self._first_decodable(candidates, bad)
            self._augmenter(image, uniforms[row], [view[row] for view in views])
        return bad

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.close()

    def _candidates(
        self, epoch: int, local: int, lane: int, within: int, block: Block | Singles
    ) -> Iterator[tuple[int, memoryview]]:
        """(id, payload) of the sample whose turn it is, then of those that may replace it.

        Of a block they are the next step's, from this row on, and so on to this step's own: an image that is twice in
        a batch would be its own negative. A block holds whole steps.
        """
        per_lane = self._plan.batch_per_lane
        first = local * per_lane - block.start
        yield block.ids[first + within], block.payload(first + within)
        for beside in range(self._plan.lanes):
            if beside:
                other = (lane + beside) % self._plan.lanes
                block = self._reader.read((epoch, other, self._plan.block_of(local, other)))
                first = local * per_lane - block.start
            for later in range(per_lane, len(block.ids) + 1, per_lane):
                for after in range(per_lane):
                    place = (first + later) % len(block.ids) + (within + after) % per_lane
                    if beside or place != first + within:
                        yield block.ids[place], block.payload(place)

    def _first_decodable(
        self, candidates: Iterator[tuple[int, memoryview]], bad: list[BadSample]
    ) -> tuple[int, Pixels]:
        for sample_id, payload in candidates:
            try:
                return sample_id, decode(payload, self._augmenter.min_crop_area, self._augmenter.decode_size)
            except UndecodableError as error:
                shard = self._manifest.shards.name[self._samples.shard[sample_id - self._samples.first_id]]
                bad.append(BadSample(sample_id, shard, str(error)))
        raise BadSamplesError(f"not one of the samples around can be decoded:\n{list_of(bad)}")
