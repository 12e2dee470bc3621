"""Shards together are one bank: what a step reads is what all steps before left, whatever comes twice, late or lost."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.negatives import bank_shard as module
from pipeline.negatives.bank import MemoryBank
from pipeline.negatives.bank_shard import BankShard, BankSpec, Part, Read, Search, Write, decoded, encoded
from pipeline.negatives.shard import NotOpenError, ServiceError

SPEC = BankSpec(num_samples=23, dim=4, dtype="float32", seed=5, ranks=2, num_shards=3)


def opened(spec: BankSpec, generation: int = 1, steps: int = 0, part: int = 5) -> list[BankShard]:
    shards = [BankShard(index) for index in range(spec.num_shards)]
    for shard in shards:
        fill(shard, spec, generation, steps, part)
    return shards


def fill(shard: BankShard, spec: BankSpec, generation: int, steps: int = 0, part: int = 5) -> None:
    rows = len(spec.own_ids(shard.index))
    for first in range(0, rows, part):
        with pytest.raises(NotOpenError):
            shard.open(generation, spec)
        shard.fill(generation, spec, Part(steps, first, min(first + part, rows), None))
    shard.open(generation, spec)


def write(step: int, rank: int, ids: list[int], saved: int = 0) -> Write:
    """Slots that name their step and sample."""
    values = np.repeat(1000.0 * step + np.array(ids)[:, None], SPEC.dim, 1).astype(np.float32)
    return Write(step, rank, np.array(ids), values.view(np.uint8), saved)


def slots(shards: list[BankShard], step: int) -> NDArray[np.float32] | None:
    """(N, D), before ``step``."""
    found = np.empty((SPEC.num_samples, SPEC.dim), np.float32)
    for shard in shards:
        ids = np.array(SPEC.own_ids(shard.index))
        answer = shard.read(1, Read(step, ids))
        if answer is None:
            return None
        found[ids] = decoded(answer.value, SPEC.dtype)
    return found


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_shards_start_with_the_bytes_of_the_local_bank(dtype: str) -> None:
    torch.manual_seed(0)
    bank = MemoryBank(23, 5, getattr(torch, dtype))
    spec = replace(SPEC, dim=5, dtype=dtype, seed=bank.seed)
    local = bank.state_dict()["slots"]
    for shard in opened(spec):
        ids = np.array(spec.own_ids(shard.index))
        answer = shard.read(1, Read(0, ids))
        assert answer is not None
        assert np.array_equal(answer.value, local[ids].view(torch.uint8).numpy())
        wide = decoded(answer.value, dtype)
        assert torch.equal(torch.from_numpy(wide), local[ids].to(torch.promote_types(local.dtype, torch.float32)))


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    values = torch.cat([torch.randn(4096), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 0.0, -0.0])])[:, None]
    assert np.array_equal(encoded(values.numpy(), "bfloat16"), values.bfloat16().view(torch.uint8).numpy())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_writes_of_any_order_and_number_make_the_steps_that_reads_see(seed: int) -> None:
    dice, shards = random.Random(seed), opened(SPEC)
    expected = slots(shards, 0)
    for step in range(4):
        ids = dice.sample(range(SPEC.num_samples), 8)
        writes = [write(step, 0, ids[:4]), write(step, 1, ids[4:])]
        pushes = [(shard, one) for shard in shards for one in writes for _ in range(dice.choice([1, 1, 3]))]
        dice.shuffle(pushes)
        for shard, one in pushes:
            if shard.complete == step and shard is shards[0]:
                assert shard.read(1, Read(step + 1, np.array([0]))) is None, "a step that is not complete"
            shard.push(1, one.share(shard.index, SPEC.num_shards))
        for one in writes:
            expected[one.sample_ids] = one.slots.view(np.float32)
        assert np.array_equal(slots(shards, step + 1), expected)
        assert sum(shard.duplicates for shard in shards) >= 0
    shards[0].push(1, write(1, 0, []))
    assert np.array_equal(slots(shards, 4), expected), "a step that is over changes nothing"


def test_a_write_changes_nothing_before_all_ranks_have_written() -> None:
    (shard,) = opened(spec := replace(SPEC, num_shards=1))
    before = shard.read(1, Read(0, np.arange(23)))
    shard.push(1, write(0, 1, [3, 4]))
    shard.push(1, write(0, 1, [3, 4]))
    assert shard.duplicates == 1
    again = shard.read(1, Read(0, np.arange(23)))
    assert before is not None
    assert again is not None
    assert np.array_equal(before.value, again.value)
    shard.push(1, write(0, 0, [5], saved=0))
    after = shard.read(1, Read(1, np.array([3, 4, 5])))
    assert after is not None
    assert decoded(after.value, spec.dtype)[:, 0].tolist() == [3, 4, 5]
    with pytest.raises(ServiceError, match="asked for the slots before step 0, which is complete"):
        shard.read(1, Read(0, np.array([3])))


def test_of_a_sample_that_comes_twice_the_last_ranks_last_slot_counts() -> None:
    """As in the local bank, whichever rank's write comes first."""
    (shard,) = opened(replace(SPEC, num_shards=1))
    for rank in (1, 0):
        moved = np.repeat([[10 * rank + 1], [10 * rank + 2]], SPEC.dim, 1).astype(np.float32)
        shard.push(1, Write(0, rank, np.array([3, 3]), moved.view(np.uint8), saved=0))
    answer = shard.read(1, Read(1, np.array([3])))
    assert answer is not None
    assert decoded(answer.value, SPEC.dtype)[0, 0] == 12


def test_a_shard_that_was_lost_takes_the_steps_since_its_checkpoint_again() -> None:
    ids = [[0, 3, 6, 9], [1, 4, 7, 10]]
    steps = [[write(step, rank, ids[rank]) for rank in range(2)] for step in range(6)]
    shards = opened(SPEC)
    for one in (one for step in steps for one in step):
        for shard in shards:
            shard.push(1, one.share(shard.index, 3))
    shards[1] = BankShard(1)
    with pytest.raises(NotOpenError):
        shards[1].push(1, steps[5][0].share(1, 3))
    kept = np.array(SPEC.own_ids(1))
    saved = np.zeros((len(kept), SPEC.row_bytes), np.uint8)
    shards[1].fill(1, SPEC, Part(4, 0, len(kept), saved))
    for rank in (1, 0):  # rank 0 still has what the checkpoint holds, rank 1 has forgotten it
        for step in range(0 if rank == 0 else 4, 6):
            shards[1].push(1, steps[step][rank].share(1, 3))
    answer = shards[1].read(1, Read(6, kept))
    assert answer is not None
    assert decoded(answer.value, SPEC.dtype)[:, 0].tolist() == [5000 + i if i in ids[1] else 0 for i in kept]


def test_what_is_saved_is_told_to_all() -> None:
    (shard,) = opened(replace(SPEC, num_shards=1))
    shard.push(1, write(0, 0, [1], saved=7))
    shard.push(1, write(0, 1, [2], saved=0))
    answer = shard.read(1, Read(1, np.array([1])))
    assert answer is not None
    assert answer.saved == 7


def test_parts_that_do_not_follow_one_another_and_older_groups_are_refused() -> None:
    shard = BankShard(0)
    with pytest.raises(NotOpenError):
        shard.fill(2, SPEC, Part(0, 4, 8, None))
    shard.fill(2, SPEC, Part(0, 0, 4, None))
    with pytest.raises(ServiceError, match="another worker group"):
        shard.fill(1, SPEC, Part(0, 0, 4, None))
    with pytest.raises(NotOpenError):
        shard.push(2, write(0, 0, [0]))
    fill(shard, SPEC, generation=3, steps=9)
    assert shard.complete == 9
    with pytest.raises(ServiceError, match=r"opened for .*ranks=2.*this rank has .*ranks=4"):
        shard.open(3, replace(SPEC, ranks=4))
    with pytest.raises(ServiceError, match=r"slots of step 9 came as \(1, 12\), not \(1, 16\) bytes: 4 numbers in"):
        shard.push(3, Write(9, 0, np.array([0]), np.zeros((1, 12), np.uint8), 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_most_similar_of_all_shards_are_those_of_a_full_sort(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(module, "_BLOCK", 3)
    spec = replace(SPEC, num_samples=200, dim=8, dtype=dtype)
    shards = opened(spec, part=30)
    whole = np.empty((200, 8), np.float32)
    for shard in shards:
        answer = shard.read(1, Read(0, np.array(spec.own_ids(shard.index))))
        assert answer is not None
        whole[shard.index :: 3] = decoded(answer.value, dtype)
    ids = np.array([3, 44, 128, 199])
    found = [shard.read(1, Search(0, whole[ids], ids, 80)) for shard in shards]
    similarities = np.concatenate([answer.value.similarities for answer in found], 1)
    sample_ids = np.concatenate([answer.value.sample_ids for answer in found], 1)
    expected = whole[ids] @ whole.T
    expected[np.arange(4), ids] = -np.inf
    for row in range(4):
        best = np.argsort(-similarities[row])[:80]
        assert sample_ids[row][best].tolist() == np.argsort(-expected[row])[:80].tolist()
        np.testing.assert_allclose(similarities[row][best], np.sort(expected[row])[::-1][:80], rtol=1e-6)
    assert (sample_ids == -1).sum(1).tolist() == [41] * 4, "3 shards have 67, 67 and 66 slots, one of them the query's"
