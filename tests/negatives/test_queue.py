"""The queue is first in, first out, across the end of the ring too, and resumes from its state."""

from collections import deque

import pytest
import torch

from pipeline.negatives.queue import MomentumQueue


def _keys(first: int, count: int) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(-1, 2)


@pytest.mark.parametrize("size", [4, 7, 8, 12])
def test_holds_the_newest_keys_across_the_wrap_around(size: int) -> None:
    queue, reference = MomentumQueue(size, 2), deque(maxlen=size)
    for start in range(0, 40, 4):
        queue.enqueue(_keys(start, 4))
        reference.extend(range(start, start + 4))
    assert sorted(queue.negatives()[:, 0].tolist()) == sorted(reference)


def test_the_oldest_keys_leave_first() -> None:
    queue = MomentumQueue(6, 2)
    queue.enqueue(_keys(0, 4))
    queue.enqueue(_keys(4, 4))  # 4 and 5 fill the ring, 6 and 7 replace 0 and 1
    assert queue.negatives()[:, 0].tolist() == [6, 7, 2, 3, 4, 5]


def test_starts_with_directions_of_length_1() -> None:
    torch.testing.assert_close(MomentumQueue(64, 16).negatives().norm(dim=1), torch.ones(64))


def test_a_restored_queue_goes_on_where_the_saved_one_was() -> None:
    queue, restored = MomentumQueue(5, 2), MomentumQueue(5, 2)
    queue.enqueue(_keys(0, 3))
    restored.load_state_dict(queue.state_dict())
    for one in (queue, restored):
        one.enqueue(_keys(3, 4))
    assert torch.equal(queue.negatives(), restored.negatives())


def test_is_read_in_place_and_holds_its_dtype() -> None:
    queue = MomentumQueue(4, 2, torch.bfloat16)
    assert queue.negatives().data_ptr() == queue.keys.data_ptr()
    queue.enqueue(_keys(0, 2))
    assert queue.negatives().dtype == torch.bfloat16


def test_a_batch_larger_than_the_queue_is_an_error_that_teaches() -> None:
    with pytest.raises(
        ValueError, match=r"8 keys does not fit a queue of 4; .*global_batch_size <= 4 .*queue_size >= 8"
    ):
        MomentumQueue(4, 2).enqueue(_keys(0, 8))
