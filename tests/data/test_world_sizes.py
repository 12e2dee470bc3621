"""End to end, shards to pixels: the same at every world size from 1 to 48, from any step on, epoch after epoch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.data import plan as plan_module
from pipeline.data.loader import Loader
from pipeline.data.manifest import Manifest
from pipeline.data.views import View
from pipeline.data.writer import Sample, ShardTask, write_tasks
from tests.data.images import photo, png

IMAGES = [png(photo(5, 4 + i % 3, seed=i)) for i in range(130)]
VIEWS = (View(count=2, solarize=0.5),)


@st.composite
def shard_sizes(draw: st.DrawFn, at_least: int) -> list[int]:
    """From one shard to 16 uneven ones, some of one sample."""
    total = draw(st.integers(at_least, len(IMAGES)))
    cuts = draw(st.sets(st.integers(1, total - 1), max_size=15))
    return [int(size) for size in np.diff([0, *sorted(cuts), total])]


def write(folder: Path, sizes: list[int]) -> Manifest:
    starts = np.cumsum([0, *sizes]).tolist()

    def task(number: int) -> ShardTask:
        ids = range(starts[number], starts[number + 1])
        return ShardTask(
            f"{number:03d}.tar", "train", str(ids), lambda: [Sample(f"{i}", IMAGES[i], "png", "train") for i in ids]
        )

    return write_tasks([task(number) for number in range(len(sizes))], str(folder), class_names=())


def batches(
    manifest: Manifest, batch: int, world_size: int, start: int, end: int
) -> list[tuple[list[int], list[Tensor]]]:
    """The ids and views of global steps [start, end): every rank's rows side by side."""
    ranks = [
        Loader(
            manifest, "train", VIEWS, image_size=8, global_batch_size=batch, seed=11, rank=rank, world_size=world_size
        ).batches(start, end)
        for rank in range(world_size)
    ]
    return [
        (
            torch.cat([part.sample_ids for part in parts]).tolist(),
            [torch.cat(views) for views in zip(*(part.views for part in parts), strict=True)],
        )
        for parts in zip(*ranks, strict=True)
    ]


def check_every_world_size(manifest: Manifest, batch: int, start: int) -> None:
    """Two epochs on one rank are whole; two steps from ``start`` on, at every other world size, are those of one."""
    samples = manifest.split("train").num_samples
    steps = samples // batch
    alone = batches(manifest, batch, 1, 0, 2 * steps)
    for epoch in (alone[:steps], alone[steps:]):
        assert len({i for ids, _ in epoch for i in ids}) == steps * batch, "each at most once"
    start %= 2 * steps
    expected = alone[start : start + 2]
    for world_size in range(2, 49):
        if batch % world_size == 0:
            resumed = batches(manifest, batch, world_size, start, start + len(expected))
            for (ids, views), (expected_ids, expected_views) in zip(resumed, expected, strict=True):
                assert ids == expected_ids, world_size
                assert all(map(torch.equal, views, expected_views)), world_size


@pytest.mark.parametrize("batch", range(25, 49))  # every number to 48 divides one of them
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_any_step_is_the_same_at_every_world_size(
    batch: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Lanes of blocks of a few samples, or of one block; a lane for each row, or ranks that share lanes."""
    manifest = write(tmp_path_factory.mktemp("shards"), data.draw(shard_sizes(batch)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "BLOCK_BYTES", data.draw(st.sampled_from([1, 4 * len(IMAGES[0]), 2**23])))
        patch.setattr(plan_module, "MAX_LANES", data.draw(st.sampled_from([7, 64])))
        check_every_world_size(manifest, batch, data.draw(st.integers(0, 9)))


def test_shards_of_one_sample_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write(tmp_path, [1] * 100)
    for max_lanes, batch, start in ((64, 48, 3), (7, 48, 1), (64, 36, 2)):
        monkeypatch.setattr(plan_module, "MAX_LANES", max_lanes)
        check_every_world_size(manifest, batch, start)


@settings(max_examples=3, deadline=None)
@given(sizes=shard_sizes(30), batch=st.sampled_from([12, 18, 24]))
def test_what_an_epoch_leaves_out_rotates_while_the_world_size_changes(
    sizes: list[int], batch: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No sample is left out twice before every other was, each epoch on another number of ranks."""
    manifest = write(tmp_path_factory.mktemp("shards"), sizes)
    samples = sum(sizes)
    steps, remainder = divmod(samples, batch)
    left_out: list[int] = []
    for epoch in range(min(samples // remainder, 12) if remainder else 2):
        world_size = (1, 2, 3, 6)[epoch % 4]
        seen = [i for ids, _ in batches(manifest, batch, world_size, epoch * steps, (epoch + 1) * steps) for i in ids]
        assert len(set(seen)) == len(seen) == steps * batch
        left_out += set(range(samples)) - set(seen)
    assert len(set(left_out)) == len(left_out)
    assert (len(left_out) > 0) == (remainder > 0)
