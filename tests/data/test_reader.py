"""How a lane's blocks are read: which bytes are asked for, and what the samples in memory hold."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import plan as plan_module
from pipeline.data import reader as reader_module
from pipeline.data.fetch import LocalFetch
from pipeline.data.manifest import Manifest
from pipeline.data.plan import Plan
from pipeline.data.reader import LaneReader
from pipeline.storage import MissingError
from tests.data.images import photos, write_photos

CHUNK = 8192  # instead of 4 MiB: about three photos
HEADERS = 3 * 512  # of a sample in its shard: never asked for alone
PAYLOADS = [sample.image for sample in photos(200)]


class Recorder(LocalFetch):
    """Reads, and notes what is read: (shard, start, end)."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self.ranges: list[tuple[int, int, int]] = []

    def fill(self, shard: int, start: int, buffer: memoryview) -> None:
        self.ranges.append((shard, start, start + len(buffer)))
        super().fill(shard, start, buffer)

    def refill(self, shard: int, start: int, buffer: memoryview) -> None:
        raise AssertionError(f"bytes {start} and on of shard {shard} were not what the manifest says")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_photos(str(tmp_path_factory.mktemp("shards")), len(PAYLOADS), samples_per_shard=70)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", 3 * CHUNK)
    monkeypatch.setattr(plan_module, "MAX_LANES", 2)


def read_steps(manifest: Manifest, plan: Plan, fetch: LocalFetch, steps: range) -> None:
    """All lanes' samples of these steps hold what was written."""
    reader = LaneReader(manifest, manifest.split("train"), plan, fetch, range(plan.lanes))
    for step in steps:
        epoch, local = divmod(step, plan.steps_per_epoch)
        for lane, block in reader.at(step, steps.stop).items():
            first = local * plan.batch_per_lane - block.start
            places = range(first, first + plan.batch_per_lane)
            assert [block.ids[place] for place in places] == plan.lane_batch(epoch, local, lane).tolist()
            for place in places:
                assert block.payload(place) == PAYLOADS[block.ids[place]]
    reader.close()


def test_an_epoch_asks_for_whole_chunks_and_for_no_byte_twice(manifest: Manifest) -> None:
    """Except where a lane or a shard begins or ends, there is one request for some neighbouring chunks."""
    plan = Plan(manifest.shards, "train", 8, seed=1)
    fetch = Recorder(manifest)
    read_steps(manifest, plan, fetch, range(plan.steps_per_epoch))
    ranges = sorted(fetch.ranges)
    joined = [(first, then) for first, then in itertools.pairwise(ranges) if first[0] == then[0]]
    assert all(first[2] <= then[1] for first, then in joined)
    edges = plan.lanes + len(manifest.shards.name)
    assert len(ranges) > 3 * edges
    assert sum(start % CHUNK > HEADERS for _, start, _ in ranges) <= edges
    assert sum(end % CHUNK > 0 for _, _, end in ranges) <= edges


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 40), chunk=st.integers(1, 20_000), block=st.integers(1, 60_000), data=st.data())
def test_samples_are_right_from_any_step_on(
    batch: int, chunk: int, block: int, data: st.DataObject, manifest: Manifest
) -> None:
    """Chunks smaller than a sample and larger than a block, over the edge of an epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "CHUNK_BYTES", chunk)
        patch.setattr(plan_module, "BLOCK_BYTES", block)
        plan = Plan(manifest.shards, "train", batch, seed=2)
        start = data.draw(st.integers(0, 2 * plan.steps_per_epoch - 1))
        read_steps(manifest, plan, Recorder(manifest), range(start, min(start + 60, 2 * plan.steps_per_epoch)))


def test_what_cannot_be_read_is_an_error_each_time(manifest: Manifest, tmp_path: Path) -> None:
    """Never the blocks of an earlier step; once the shard is back, reading goes on."""
    plan = Plan(manifest.shards, "train", 8, seed=1)
    reader = LaneReader(manifest, manifest.split("train"), plan, LocalFetch(manifest), range(plan.lanes))
    first = reader.at(0, 1)
    step = plan.steps_per_epoch - 1  # other blocks of every lane
    path = Path(manifest.shard_url(int(manifest.split("train").shard[plan.batch(0, step)[0]])))
    path.rename(tmp_path / path.name)
    try:
        for _ in range(2):
            with pytest.raises(MissingError, match=path.name):
                reader.at(step, step + 1)
    finally:
        (tmp_path / path.name).rename(path)
    for lane, block in reader.at(step, step + 1).items():
        assert block is not first[lane]
        assert block.payload(step * plan.batch_per_lane - block.start) == PAYLOADS[plan.lane_batch(0, step, lane)[0]]
    reader.close()
