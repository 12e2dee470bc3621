"""The queue is first in, first out, across the end of the ring too, and resumes from its state."""

from collections import deque

import pytest
import torch

from pipeline.negatives.queue import MomentumQueue


def _keys(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that name themselves, and sample ids 1000 higher."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(-1, 2), torch.arange(count) + (
        first + 1000
    )


@pytest.mark.parametrize("size", [1, 3, 4, 7, 8, 12])
@pytest.mark.parametrize("batch", [1, 4, 5, 9])
def test_holds_the_newest_keys_and_their_ids_for_any_size_and_batch(size: int, batch: int) -> None:
    queue, reference = MomentumQueue(size, 2), deque(maxlen=size)
    for start in range(0, 10 * batch, batch):
        queue.enqueue(*_keys(start, batch))
        reference.extend(range(start, start + batch))
        real = queue.sample_ids >= 0
        assert sorted(queue.negatives()[real, 0].tolist()) == list(reference)
        assert (queue.sample_ids[real] - 1000).tolist() == queue.negatives()[real, 0].tolist()
        assert queue.gauges() == {"queue/fill": len(reference) / size}


def test_the_oldest_keys_leave_first() -> None:
    queue = MomentumQueue(6, 2)
    queue.enqueue(*_keys(0, 4))
    assert queue.sample_ids.tolist() == [1000, 1001, 1002, 1003, -1, -1]
    queue.enqueue(*_keys(4, 4))  # 4 and 5 fill the ring, 6 and 7 replace 0 and 1
    assert queue.negatives()[:, 0].tolist() == [6, 7, 2, 3, 4, 5]


def test_starts_with_directions_of_length_1() -> None:
    torch.testing.assert_close(MomentumQueue(64, 16).negatives().norm(dim=1), torch.ones(64))


def test_a_restored_queue_goes_on_where_the_saved_one_was() -> None:
    queue, restored = MomentumQueue(5, 2), MomentumQueue(5, 2)
    queue.enqueue(*_keys(0, 3))
    restored.load_state_dict(queue.state_dict())
    for one in (queue, restored):
        one.enqueue(*_keys(3, 4))
    assert torch.equal(queue.negatives(), restored.negatives())
    assert torch.equal(queue.sample_ids, restored.sample_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_read_in_place_and_holds_its_dtype(dtype: torch.dtype) -> None:
    queue = MomentumQueue(4, 2, dtype)
    assert queue.negatives().data_ptr() == queue.keys.data_ptr()
    keys = torch.rand(2, 2)
    queue.enqueue(keys, torch.arange(2))
    assert torch.equal(queue.negatives()[:2], keys.to(dtype))
