"""A slot is a running mean of its sample's embeddings; draws are uniform and repeatable; hardest are the hardest."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.negatives import bank as module
from pipeline.negatives.bank import MemoryBank, drawn


def step(bank: MemoryBank, ids: Tensor, embeddings: Tensor, momentum: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    bank.expect(ids, 6)
    read = bank.read()
    bank.update(embeddings, momentum)
    return read


def test_slots_move_by_the_momentum_and_no_others_do() -> None:
    torch.manual_seed(0)
    bank = MemoryBank(20, 8)
    bank.fill()
    before = bank.slots.clone()
    torch.testing.assert_close(before.norm(dim=1), torch.ones(20))
    ids, new = torch.tensor([3, 17, 4]), F.normalize(torch.randn(3, 8), dim=1)
    own, noise, noise_slots = step(bank, ids, new, momentum=0.25)
    assert torch.equal(own, before[ids])
    assert torch.equal(noise_slots, before[noise])
    for row, sample in enumerate(ids.tolist()):
        mixed = 0.25 * before[sample] + 0.75 * new[row]
        torch.testing.assert_close(bank.slots[sample], mixed / mixed.norm())
    others = [i for i in range(20) if i not in ids.tolist()]
    assert torch.equal(bank.slots[others], before[others])


def test_of_a_sample_that_comes_twice_the_last_row_counts() -> None:
    bank, new = MemoryBank(40, 8), F.normalize(torch.randn(200, 8), dim=1)
    step(bank, torch.arange(200) % 40, new, momentum=0.0)
    torch.testing.assert_close(bank.slots, new[-40:])


def test_slots_start_from_the_seed_alone_in_all_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    bank, other = MemoryBank(4000, 7), MemoryBank(4000, 7)
    twin = copy.deepcopy(bank)
    assert bank.slots.numel() == 0, "a bank that is served takes no memory"
    bank.fill()
    monkeypatch.setattr(module, "_BLOCK", 9)
    twin.fill()
    assert torch.equal(bank.slots, twin.slots)
    assert bank.seed != other.seed
    assert not torch.equal(bank.slots, other.state_dict()["slots"])
    covariance = bank.slots.T @ bank.slots / 4000 - torch.eye(7) / 7
    assert covariance.abs().max() < 0.015  # 5 standard deviations
    assert bank.slots.mean(0).abs().max() < 0.03
    assert len(bank.slots.unique(dim=0)) == 4000


def test_draws_are_uniform_new_each_step_and_the_same_after_a_restart() -> None:
    counts = torch.bincount(drawn(7, 3, 100_000, 10), minlength=10)
    assert ((counts - 10_000).abs() < 400).all()  # 4 standard deviations of 95
    bank, restored = MemoryBank(10, 2), MemoryBank(10, 2)
    _, first, _ = step(bank, torch.arange(3), torch.eye(3, 2))
    restored.load_state_dict(bank.state_dict())
    _, second, slots = step(bank, torch.arange(3), torch.eye(3, 2))
    assert not torch.equal(first, second)
    _, again, slots_again = step(restored, torch.arange(3), torch.eye(3, 2))
    assert torch.equal(again, second)
    assert torch.equal(slots_again, slots)
    assert restored.steps == 2


@pytest.mark.parametrize("block", [4, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hardest_are_those_of_a_full_sort_without_the_querys_own(
    monkeypatch: pytest.MonkeyPatch, block: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    bank, ids = MemoryBank(50, 8, dtype), torch.tensor([3, 17, 49])
    bank.expect(ids, 1)
    bank.read()
    queries = bank.slots[ids].float()  # so that its own slot is the most similar one
    found = bank.hardest(queries, 9)
    similar = queries @ bank.slots.float().T
    similar[torch.arange(3), ids] = -2
    assert torch.equal(found, bank.slots.float()[similar.argsort(1, descending=True)[:, :9]])


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)])
def test_holds_its_dtype_and_reads_float32(dtype: torch.dtype, bytes_each: int) -> None:
    bank = MemoryBank(100, 16, dtype)
    step(bank, torch.arange(5), torch.ones(5, 16) / 4, momentum=0.0)
    assert bank.slots.untyped_storage().nbytes() == 100 * 16 * bytes_each
    own, _, _ = step(bank, torch.arange(5), torch.ones(5, 16))
    assert own.dtype == torch.float32
    torch.testing.assert_close(own, torch.full((5, 16), 0.25))
