"""The order: every sample once an epoch, the same at any world size, computed and not replayed."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import plan as plan_module
from pipeline.data.manifest import Shards
from pipeline.data.plan import Plan


def table(counts: list[int], sample_bytes: int = 1000, first_id: int = 5) -> Shards:
    """Shards of the split "train" behind one of another split, so that ids do not start at 0."""
    all_counts = np.array([first_id, *counts])
    splits = ("validation", *["train"] * len(counts))
    return Shards(tuple(f"{i}.tar" for i in range(len(splits))), splits, all_counts * sample_bytes, all_counts)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Uneven shards, one-sample shards, more lanes than shards, blocks from one sample to all."""
    counts = draw(st.lists(st.integers(1, 60), min_size=1, max_size=30))
    batch = draw(st.integers(1, sum(counts)))
    return Plan(table(counts, draw(st.integers(1000, 3_000_000))), "train", batch, draw(st.integers(0, 2**64 - 1)))


def epoch_ids(plan: Plan, epoch: int) -> np.ndarray:
    return np.concatenate([plan.batch(epoch, step) for step in range(plan.steps_per_epoch)])


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(0, 50))
def test_every_sample_once_an_epoch_but_for_the_remainder(plan: Plan, epoch: int) -> None:
    seen = np.sort(np.concatenate([epoch_ids(plan, epoch), plan.left_out(epoch)]))
    assert np.array_equal(seen, np.arange(5, 5 + plan.num_samples))
    assert len(plan.left_out(epoch)) == plan.remainder < plan.global_batch_size


@settings(max_examples=50, deadline=None)
@given(plans())
def test_the_remainder_rotates_before_it_repeats(plan: Plan) -> None:
    if plan.remainder:
        rounds = plan.num_samples // plan.remainder
        left_out = np.concatenate([plan.left_out(epoch) for epoch in range(rounds)])
        assert len(np.unique(left_out)) == len(left_out)


@settings(max_examples=100, deadline=None)
@given(plans(), st.data())
def test_a_batch_is_computed_from_its_step_alone(plan: Plan, data: st.DataObject) -> None:
    """A fresh plan, asked for one step only, gives what a plan gives that walked there: resume replays nothing."""
    epoch, step = data.draw(st.integers(0, 5)), data.draw(st.integers(0, plan.steps_per_epoch - 1))
    walked = [plan.batch(epoch, at) for at in range(plan.steps_per_epoch)][step]
    shards = table([1])  # another plan's caches must not matter either
    Plan(shards, "train", 1, plan.seed).batch(epoch, 0)
    plan.block_order.cache_clear()
    plan._sequence.cache_clear()
    assert np.array_equal(plan.batch(epoch, step), walked)


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(0, 3))
def test_what_a_lane_reads_is_what_its_batches_take(plan: Plan, epoch: int) -> None:
    """Blocks tile the lane, their byte ranges are read once each, and none spans two shards."""
    lane = plan.lanes - 1
    blocks = sorted({plan.block_of(step, lane) for step in range(plan.steps_per_epoch)})
    runs = [run for block in blocks for run in plan.block_runs(epoch, lane, block)]
    read = np.concatenate([np.arange(run.first, run.first + run.count) for run in runs])
    taken = np.concatenate([plan.lane_batch(epoch, step, lane) for step in range(plan.steps_per_epoch)])
    assert np.array_equal(np.sort(read), np.sort(taken))
    starts = set(plan._shard_starts[1:] + 5)
    assert not any(start in starts for run in runs for start in range(run.first + 1, run.first + run.count))


def test_seeds_and_epochs_give_other_orders_and_batches_mix_shards() -> None:
    plan = Plan(table([50] * 40, sample_bytes=40_000), "train", 64, seed=1)
    first, other_epoch = plan.batch(0, 0), plan.batch(1, 0)
    other_seed = Plan(table([50] * 40, sample_bytes=40_000), "train", 64, seed=2).batch(0, 0)
    assert len(np.intersect1d(first, other_epoch)) < 20
    assert len(np.intersect1d(first, other_seed)) < 20
    assert len(np.unique((first - 5) // 50)) > 20, "64 lanes lie in many of the 40 shards"


def test_the_order_is_pinned_across_releases() -> None:
    """A run that resumes under another numpy or Parallax must go on in the same order."""
    assert Plan(table([7, 1, 9, 30]), "train", 8, seed=3).batch(2, 1).tolist() == [8, 10, 16, 27, 34, 37, 44, 49]


def test_100_million_samples_in_100_000_shards_plan_in_little_memory() -> None:
    """How long that takes, `python -m tests.benchmarks.stream` measures."""
    shards = table([1000] * 100_000, sample_bytes=35_000)
    tracemalloc.start()
    plan = Plan(shards, "train", 4096, seed=0)
    first = plan.batch(0, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(first)) == 4096
    assert plan.steps_per_epoch == 100_000_000 // 4096
    assert peak < 64 * 2**20


@pytest.mark.parametrize(("batch", "seed"), [(0, 0), (21, 0), (4, -1)])
def test_a_batch_or_seed_that_cannot_be_is_named(batch: int, seed: int) -> None:
    with pytest.raises(ValueError, match=f"{batch}|{seed}") as error:
        Plan(table([20]), "train", batch, seed)
    assert "20" in str(error.value) or "2**64" in str(error.value)


def test_lanes_divide_the_batch_and_follow_its_size() -> None:
    for batch in (1, 96, 97, 128, 256, 1000, 4096):
        lanes = Plan(table([5000]), "train", batch, 0).lanes
        assert batch % lanes == 0
        assert lanes <= plan_module.MAX_LANES
    assert Plan(table([5000]), "train", 256, 0).lanes == 64
