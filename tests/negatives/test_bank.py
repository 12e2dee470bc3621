"""A slot is a running mean of its sample's embeddings; draws are uniform and repeatable."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.negatives.bank import MemoryBank


def test_slots_move_by_the_momentum_and_no_others_do() -> None:
    torch.manual_seed(0)
    bank = MemoryBank(20, 8)
    before = bank.slots.clone()
    torch.testing.assert_close(before.norm(dim=1), torch.ones(20))
    ids, new = torch.tensor([3, 17, 4]), F.normalize(torch.randn(3, 8), dim=1)
    bank.update(ids, new, momentum=0.25)
    for row, sample in enumerate(ids.tolist()):
        mixed = 0.25 * before[sample] + 0.75 * new[row]
        torch.testing.assert_close(bank.read(ids)[row], mixed / mixed.norm())
    others = [i for i in range(20) if i not in ids.tolist()]
    assert torch.equal(bank.slots[others], before[others])


def test_draws_are_uniform_new_each_step_and_the_same_after_a_restart() -> None:
    bank, restored = MemoryBank(10, 2), MemoryBank(10, 2)
    counts = torch.bincount(bank.draw(100_000), minlength=10)
    assert ((counts - 10_000).abs() < 400).all()  # 4 standard deviations of 95
    first = bank.draw(50)
    assert torch.equal(first, bank.draw(50))
    bank.update(torch.arange(3), torch.eye(3, 2), momentum=0.5)
    assert not torch.equal(first, bank.draw(50))
    restored.load_state_dict(bank.state_dict())
    assert torch.equal(restored.draw(50), bank.draw(50))
    assert torch.equal(restored.slots, bank.slots)


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)])
def test_holds_its_dtype_and_reads_float32(dtype: torch.dtype, bytes_each: int) -> None:
    bank = MemoryBank(100, 16, dtype)
    assert bank.slots.untyped_storage().nbytes() == 100 * 16 * bytes_each
    bank.update(torch.arange(5), torch.ones(5, 16) / 4, momentum=0.0)
    assert bank.read(torch.arange(5)).dtype == torch.float32
    torch.testing.assert_close(bank.read(torch.arange(5)), torch.full((5, 16), 0.25))
