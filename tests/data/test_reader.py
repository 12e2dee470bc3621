"""How a lane's blocks are read: which bytes are asked for, and what the samples in memory hold."""

import itertools
import threading
import time
from collections.abc import Sequence
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
from pipeline.data.writer import Sample, write_shards
from pipeline.storage import MissingError
from tests.data.images import photos, write_photos

CHUNK = 8192  # instead of 4 MiB: about three photos
HEADERS = 3 * 512  # of a sample in its shard: never asked for alone
PAYLOADS = [sample.image for sample in photos(200)]


class Recorder(LocalFetch):
    """A store in chunks: reads after a while, notes what is read, (shard, start, end), fails once where told to."""

    chunk_bytes = CHUNK

    def __init__(self, manifest: Manifest, delay_s: float = 0.0) -> None:
        super().__init__(manifest)
        self._delay_s = delay_s
        self.ranges: list[tuple[int, int, int]] = []
        self.reads_until_failure = -1

    def fill(self, shard: int, start: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))  # who still copies from it is found out
        time.sleep(self._delay_s)
        self.ranges.append((shard, start, start + len(buffer)))
        self.reads_until_failure -= 1
        if self.reads_until_failure == 0:
            raise MissingError("not now")
        super().fill(shard, start, buffer)

    def refill(self, shard: int, start: int, buffer: memoryview) -> None:
        raise AssertionError(f"bytes {start} and on of shard {shard} were not what the manifest says")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_photos(str(tmp_path_factory.mktemp("shards")), len(PAYLOADS), samples_per_shard=70)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", 3 * CHUNK)
    monkeypatch.setattr(plan_module, "MAX_LANES", 2)


def check_step(plan: Plan, reader: LaneReader, step: int, end: int) -> None:
    """All lanes' samples of a step are the plan's and hold what was written."""
    epoch, local = divmod(step, plan.steps_per_epoch)
    for lane, block in reader.at(step, end).items():
        first = local * plan.batch_per_lane - block.start
        places = range(first, first + plan.batch_per_lane)
        assert [block.ids[place] for place in places] == plan.lane_batch(epoch, local, lane).tolist()
        for place in places:
            assert block.payload(place) == PAYLOADS[block.ids[place]]


def read_steps(manifest: Manifest, plan: Plan, fetch: LocalFetch, steps: Sequence[int], end: int) -> None:
    reader = LaneReader(manifest, manifest.split("train"), plan, fetch, range(plan.global_batch_size))
    for step in steps:
        check_step(plan, reader, step, end)
    reader.close()


def ranges_of(manifest: Manifest, plan: Plan, step: int) -> list[tuple[int, int, int]]:
    """(shard, start, end) of a batch's samples, ascending."""
    samples, ids = manifest.split("train"), plan.batch(*divmod(step, plan.steps_per_epoch))
    starts = samples.offset[ids]
    return sorted(
        zip(samples.shard[ids].tolist(), starts.tolist(), (starts + samples.length[ids]).tolist(), strict=True)
    )


def test_an_epoch_asks_for_whole_chunks_and_for_no_byte_twice(manifest: Manifest) -> None:
    """Except where a lane or a shard begins or ends, there is one request for some neighbouring chunks."""
    plan = Plan(manifest.shards, "train", 8, seed=1)
    fetch = Recorder(manifest)
    read_steps(manifest, plan, fetch, range(plan.steps_per_epoch), plan.steps_per_epoch)
    ranges = sorted(fetch.ranges)
    joined = [(first, then) for first, then in itertools.pairwise(ranges) if first[0] == then[0]]
    assert all(first[2] <= then[1] for first, then in joined)
    edges = plan.lanes + len(manifest.shards.name)
    assert len(ranges) > 3 * edges
    assert sum(start % CHUNK > HEADERS for _, start, _ in ranges) <= edges
    assert sum(end % CHUNK > 0 for _, _, end in ranges) <= edges


def test_the_blocks_of_one_lane_are_read_side_by_side(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though each begins with what the one before it has read."""
    monkeypatch.setattr(plan_module, "MAX_LANES", 1)
    begun, three = itertools.count(1), threading.Event()

    class Gate(Recorder):
        def fill(self, shard: int, start: int, buffer: memoryview) -> None:
            if next(begun) == 3:
                three.set()
            assert three.wait(timeout=10), "a read waits for the end of another"
            super().fill(shard, start, buffer)

    plan = Plan(manifest.shards, "train", 8, seed=1)
    assert plan.steps_per_epoch > 4 > plan.block_length // plan.batch_per_lane
    reader = LaneReader(manifest, manifest.split("train"), plan, Gate(manifest), range(plan.batch_per_lane))
    check_step(plan, reader, 0, plan.steps_per_epoch)
    reader.close()


@pytest.mark.parametrize("start", [0, 3, 4, 10_000])
def test_a_first_batch_reads_its_samples_and_nothing_else(
    manifest: Manifest, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a run starts, with a request for each sample, if its blocks are long. They come with the next batch."""
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", 12 * CHUNK)
    monkeypatch.setattr(reader_module, "REQUEST_BYTES", 0)
    plan = Plan(manifest.shards, "train", 8, seed=1)
    first_batch = ranges_of(manifest, plan, start)
    fetch = Recorder(manifest)
    reader = LaneReader(manifest, manifest.split("train"), plan, fetch, range(plan.global_batch_size))
    check_step(plan, reader, start, start + 20)
    time.sleep(0.2)  # threads that have been asked for more note it meanwhile
    assert sorted(fetch.ranges) == first_batch
    for step in range(start + 1, start + 20):
        check_step(plan, reader, step, start + 20)
    reader.close()
    assert len(fetch.ranges) - len(first_batch) < 19 * plan.global_batch_size / 2, "the rest is read in blocks"


def test_a_first_batch_reads_no_sample_of_another_process(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows of one lane belong to several, as with more loader workers than lanes."""
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", 12 * CHUNK)
    monkeypatch.setattr(reader_module, "REQUEST_BYTES", 0)
    plan = Plan(manifest.shards, "train", 8, seed=1)
    assert plan.batch_per_lane == 4
    read = []
    for rows in (range(3), range(3, 6), range(6, 8)):
        fetch = Recorder(manifest)
        reader = LaneReader(manifest, manifest.split("train"), plan, fetch, rows)
        blocks = reader.at(5, 6)
        assert list(blocks) == sorted({row // 4 for row in rows})
        for row in rows:
            block = blocks[row // 4]
            place = 5 * 4 - block.start + row % 4
            assert block.ids[place] == plan.batch(0, 5)[row]
            assert block.payload(place) == PAYLOADS[block.ids[place]]
        reader.close()
        assert len(fetch.ranges) == len(rows)
        read += fetch.ranges
    assert sorted(read) == ranges_of(manifest, plan, 5)


def test_where_blocks_are_short_a_first_batch_is_read_in_blocks(manifest: Manifest) -> None:
    """A request for each of its samples would take longer."""
    plan = Plan(manifest.shards, "train", 8, seed=1)
    fetch = Recorder(manifest)
    read_steps(manifest, plan, fetch, [5], 6)
    assert len(fetch.ranges) < plan.global_batch_size


def test_buffers_are_used_again(manifest: Manifest) -> None:
    """A lane never needs more than those of the block at hand, the four that come next and one that is given back."""
    plan = Plan(manifest.shards, "train", 8, seed=1)
    reader = LaneReader(manifest, manifest.split("train"), plan, Recorder(manifest), range(plan.global_batch_size))
    seen = {}
    for step in range(6 * plan.steps_per_epoch):
        for block in reader.at(step, 6 * plan.steps_per_epoch).values():
            seen[id(block.buffer)] = block.buffer  # kept, so that no other has its address
    reader.close()
    blocks = 6 * sum(plan.blocks_at(plan.steps_per_epoch - 1) + 1)
    assert blocks > 100
    assert len(seen) <= 6 * plan.lanes


def test_a_long_block_s_buffer_is_not_kept_for_short_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thumbnails in most shards, photos in the last: what a block of thumbnails holds is about as long as it is."""
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", 20_000)
    samples = [Sample(f"{i:03d}", bytes(200 if i < 380 else 20_000), "jpg", "train") for i in range(400)]
    manifest = write_shards(samples, str(tmp_path / "shards"), max_shard_bytes=60_000)
    plan = Plan(manifest.shards, "train", 8, seed=1)
    reader = LaneReader(manifest, manifest.split("train"), plan, LocalFetch(manifest), range(8))
    longest = set()
    for step in range(4 * plan.steps_per_epoch):
        for block in reader.at(step, 4 * plan.steps_per_epoch).values():
            used = max(block._ends) - min(block._starts)
            longest.add(used)
            assert len(block.buffer) <= max(plan.block_bytes * 5 // 4 + 1, used)
    reader.close()
    assert max(longest) > 3 * plan.block_bytes > 3 * min(longest)


def test_a_hole_in_a_shard_is_not_read_beyond_a_block(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an epoch leaves out parts a shard; its halves may follow each other, the first or the second first."""
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", 1)
    for seed in range(30):
        plan = Plan(manifest.shards, "train", 3, seed=seed)
        start = seed * plan.steps_per_epoch
        read_steps(manifest, plan, Recorder(manifest), range(start, start + plan.steps_per_epoch), start + 1000)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 40),
    chunk=st.integers(1, 20_000),
    block=st.integers(1, 60_000),
    moves=st.lists(st.sampled_from([1, 1, 1, 1, 2, 7, -1, -3]), min_size=10, max_size=40),
    data=st.data(),
)
def test_samples_are_right_at_any_step(
    batch: int, chunk: int, block: int, moves: list[int], data: st.DataObject, manifest: Manifest
) -> None:
    """Chunks smaller than a sample and larger than a block; to and fro, over the edges of epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "chunk_bytes", chunk)
        patch.setattr(reader_module, "FETCH_THREADS", data.draw(st.integers(1, 4)))
        patch.setattr(reader_module, "REQUEST_BYTES", data.draw(st.sampled_from([0, CHUNK])))
        patch.setattr(plan_module, "BLOCK_BYTES", block)
        patch.setattr(plan_module, "MAX_LANES", data.draw(st.integers(1, 6)))
        plan = Plan(manifest.shards, "train", batch, seed=2)
        end = 3 * plan.steps_per_epoch
        steps = itertools.accumulate(moves, initial=data.draw(st.integers(0, end - 1)))
        read_steps(manifest, plan, Recorder(manifest), [step % end for step in steps], end)


def test_back_over_the_edge_of_an_epoch(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block may still wait for its turn to copy from one that nobody else needs any more."""
    monkeypatch.setattr(reader_module, "FETCH_THREADS", 1)
    monkeypatch.setattr(Recorder, "chunk_bytes", 5 * CHUNK)
    plan = Plan(manifest.shards, "train", 8, seed=1)
    edge, end = plan.steps_per_epoch, 2 * plan.steps_per_epoch
    read_steps(manifest, plan, Recorder(manifest, delay_s=0.01), [edge, edge - 1, *range(edge, edge + 4)] * 4, end)


@pytest.mark.parametrize("request_bytes", [0, CHUNK])  # the first batch one by one, or not
def test_one_read_that_fails_is_one_error(
    manifest: Manifest, request_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither are the blocks that begin with what it would have read lost."""
    monkeypatch.setattr(reader_module, "REQUEST_BYTES", request_bytes)
    plan = Plan(manifest.shards, "train", 8, seed=1)
    end = 2 * plan.steps_per_epoch
    fetch = Recorder(manifest)
    reader = LaneReader(manifest, manifest.split("train"), plan, fetch, range(plan.global_batch_size))
    failed = injected = 0
    for step in range(end):
        if step % 5 == 0:
            fetch.reads_until_failure = 1
            injected += 1
        while True:
            try:
                check_step(plan, reader, step, end)
                break
            except MissingError:
                failed += 1
                assert failed <= injected
    assert failed >= 3
    reader.close()


@pytest.mark.parametrize("failing", [2, 3, 4])
def test_after_an_error_the_last_good_step_is_read_anew(
    manifest: Manifest, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first lanes had moved on, and other lanes had their buffers, when a lane failed."""
    monkeypatch.setattr(plan_module, "MAX_LANES", 4)
    monkeypatch.setattr(reader_module, "FETCH_THREADS", 1)
    plan = Plan(manifest.shards, "train", 8, seed=1)
    fetch = Recorder(manifest, delay_s=0.05)
    reader = LaneReader(manifest, manifest.split("train"), plan, fetch, range(plan.global_batch_size))
    check_step(plan, reader, 0, 1)
    last = plan.steps_per_epoch - 1
    fetch.reads_until_failure = failing
    with pytest.raises(MissingError):
        reader.at(last, last + 1)
    check_step(plan, reader, 0, 1)
    reader.close()
