"""Shards together are one FIFO, whatever arrives twice, late, in another order or from another worker group."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.negatives.queue_shard import QueueShard, QueueSpec, Rows, own_numbers
from pipeline.negatives.shard import NotOpenError, ServiceError


def rows(spec: QueueSpec, start: int, stop: int, index: int) -> Rows:
    """Shard ``index``'s share of the keys start to stop - 1; key n is n everywhere, its sample id n + 10^6."""
    numbers = np.arange(start, stop)[own_numbers(start, stop, index, spec.num_shards)]
    keys = np.repeat(numbers[:, None], spec.dim, 1).astype(np.float32)
    return Rows(start, stop, keys.view(np.uint8), numbers + 10**6)


def opened(spec: QueueSpec, generation: int = 1, stop: int = 0) -> list[QueueShard]:
    shards = [QueueShard(index) for index in range(spec.num_shards)]
    for index, shard in enumerate(shards):
        shard.fill(generation, spec, rows(spec, stop - spec.size, stop, index))
    return shards


def held(shards: list[QueueShard], generation: int, start: int) -> list[int]:
    """The numbers of the keys that come back, in order; checks that keys and ids belong together."""
    found = []
    for shard in shards:
        part = shard.read(generation, start)
        numbers = part.keys.view(np.float32)[:, 0].astype(int)
        assert (part.sample_ids == numbers + 10**6).all()
        found += numbers.tolist()
    return sorted(found)


SPEC = QueueSpec(size=10, dim=3, dtype="float32", batch=4, num_shards=3, steps_in_flight=3)


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 3]),
    per_rank=st.integers(1, 5),
    more=st.integers(0, 30),
    num_shards=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_queue_batch_ranks_and_shards_are_first_in_first_out(
    ranks: int, per_rank: int, more: int, num_shards: int, seed: int
) -> None:
    batch = ranks * per_rank
    spec = QueueSpec(batch + more, 2, "float32", batch, num_shards, steps_in_flight=3)
    shards = opened(spec)
    for first in range(0, 8 * batch, 2 * batch):  # two steps in flight, in any order, some pushes twice
        pushes = [
            (index, start)
            for start in range(first, first + 2 * batch, per_rank)
            for index in range(num_shards)
            for _ in range(2 if start % 3 == 0 else 1)
        ]
        random.Random(seed).shuffle(pushes)
        for index, start in pushes:
            shards[index].push(1, rows(spec, start, start + per_rank, index))
        stop = first + 2 * batch
        assert [shard.complete for shard in shards] == [stop] * num_shards
        assert held(shards, 1, stop - spec.size) == list(range(stop - spec.size, stop)), "the whole queue"
        assert held(shards, 1, stop - batch) == list(range(stop - batch, stop)), "a delta"
    assert held(shards, 1, 8 * batch) == []


def test_a_step_comes_out_when_its_last_rank_has_pushed() -> None:
    (shard,) = opened(replace(SPEC, num_shards=1))
    spec = shard.spec
    shard.push(1, rows(spec, 2, 4, 0))
    shard.push(1, rows(spec, 4, 6, 0))
    assert held([shard], 1, 0) == []
    shard.push(1, rows(spec, 0, 2, 0))
    assert held([shard], 1, 0) == [0, 1, 2, 3]
    shard.push(1, rows(spec, 0, 2, 0))
    assert shard.duplicates == 1
    shard.push(1, rows(spec, 6, 8, 0))
    assert held([shard], 1, 0) == list(range(8))


def test_memory_is_bounded_and_a_rank_that_runs_ahead_is_refused() -> None:
    shards = opened(SPEC)
    with pytest.raises(ServiceError, match=r"step 3 while step 0 is not complete; at most 3 steps"):
        shards[0].push(1, rows(SPEC, 12, 16, 0))
    assert sum(shard._keys.shape[0] for shard in shards) <= SPEC.size + 3 * SPEC.batch + SPEC.num_shards


@pytest.mark.parametrize("wrong", [replace(SPEC, dim=5), replace(SPEC, num_shards=1)])
def test_rows_of_another_shape_are_refused_and_nothing_is_taken(wrong: QueueSpec) -> None:
    shards = opened(SPEC)
    with pytest.raises(
        ServiceError, match=r"keys 0 to 3 came as \d rows of \d+ bytes; .* 2 rows of 12 .* 3 numbers in"
    ):
        shards[0].push(1, rows(wrong, 0, 4, 0))
    assert shards[0].complete == 0
    shards[0].push(1, rows(SPEC, 0, 4, 0))
    assert held(shards[:1], 1, 0) == [0, 3]


def test_a_rank_with_another_queue_is_refused() -> None:
    (shard, *_) = opened(SPEC)
    shard.open(1, SPEC)
    with pytest.raises(ServiceError, match=r"opened for .*dtype='float32'.*this rank has .*dtype='bfloat16'"):
        shard.open(1, replace(SPEC, dtype="bfloat16"))


def test_a_newer_worker_group_takes_over_and_the_old_one_is_refused() -> None:
    shards = opened(SPEC, generation=5)
    for index, shard in enumerate(shards):
        shard.push(5, rows(SPEC, 0, 4, index))
        shard.push(5, rows(SPEC, 4, 6, index))  # half a step, which dies with its group
        with pytest.raises(NotOpenError):
            shard.push(6, rows(SPEC, 0, 4, index))
        shard.fill(6, SPEC, rows(SPEC, -10, 0, index))
        shard.fill(6, SPEC, rows(SPEC, -6, 4, index))  # a repeated call
        with pytest.raises(ServiceError, match="another worker group"):
            shard.push(5, rows(SPEC, 4, 8, index))
        with pytest.raises(ServiceError, match="another worker group"):
            shard.read(5, 0)
        shard.push(6, rows(SPEC, 0, 4, index))
        shard.push(6, rows(SPEC, 6, 8, index))
    assert held(shards, 6, 0) == [0, 1, 2, 3]


def test_a_queue_saved_for_another_batch_is_refused() -> None:
    with pytest.raises(ServiceError, match=r"after 6 keys, .* steps of 4; resume with the train.global_batch_size"):
        opened(SPEC, stop=6)


def test_a_rank_that_lags_more_than_the_queue_is_told() -> None:
    shards = opened(replace(SPEC, num_shards=1), stop=40)
    with pytest.raises(ServiceError, match=r"below 20 only, and the queue holds those from 30"):
        shards[0].read(1, 20)
