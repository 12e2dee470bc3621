"""Batches: bit-identical for every layout of ranks and workers, resumable at once, and nothing left behind."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data import reader as reader_module
from pipeline.data.assemble import BadSample, BadSamplesError
from pipeline.data.loader import Loader, WorkerError, centre_crop, normalize, read_blocks, read_images
from pipeline.data.manifest import Manifest
from pipeline.data.plan import Plan
from pipeline.data.views import View
from pipeline.data.writer import Sample, write_shards
from tests.data.images import jpeg, photo, photos, write_photos

VIEWS = (View(count=2), View(count=3, size=16, crop_scale=(0.05, 0.3), solarize=0.5))
BATCH = 24


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_photos(str(tmp_path_factory.mktemp("shards")), 110, samples_per_shard=23)


def loader(manifest: Manifest, rank: int = 0, world_size: int = 1, num_workers: int = 0, batch: int = BATCH) -> Loader:
    return Loader(
        manifest, "train", VIEWS, image_size=24, global_batch_size=batch, seed=7,
        rank=rank, world_size=world_size, num_workers=num_workers,
    )  # fmt: skip


def global_batches(
    manifest: Manifest, world_size: int, num_workers: int, start: int, end: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Every rank's rows side by side: the global batch."""
    ranks = [loader(manifest, r, world_size, num_workers).batches(start, end) for r in range(world_size)]
    for parts in zip(*ranks, strict=True):
        ids = torch.cat([part.sample_ids for part in parts])
        yield ids, [torch.cat(views) for views in zip(*(part.views for part in parts), strict=True)]


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (1, 3), (2, 2), (3, 0), (4, 1), (24, 0)])
def test_every_layout_gives_the_same_pixels(manifest: Manifest, world_size: int, num_workers: int) -> None:
    expected = list(global_batches(manifest, 1, 0, 0, 9))
    assert [view.shape for view in expected[0][1]] == [(24, 3, 24, 24)] * 2 + [(24, 3, 16, 16)] * 3
    seen = list(global_batches(manifest, world_size, num_workers, 0, 9))
    assert len(seen) == 9
    for (ids, views), (expected_ids, expected_views) in zip(seen, expected, strict=True):
        assert torch.equal(ids, expected_ids)
        assert all(torch.equal(a, b) for a, b in zip(views, expected_views, strict=True))


def test_resuming_at_another_world_size_goes_on_with_the_next_batch(manifest: Manifest) -> None:
    expected = list(global_batches(manifest, 1, 0, 0, 12))[7:]
    for (ids, views), (expected_ids, expected_views) in zip(
        global_batches(manifest, 3, 1, 7, 12), expected, strict=True
    ):
        assert torch.equal(ids, expected_ids)
        assert all(torch.equal(a, b) for a, b in zip(views, expected_views, strict=True))


def test_an_epoch_sees_each_sample_once_and_new_augmentations_come_with_each(manifest: Manifest) -> None:
    one = loader(manifest)
    assert (one.steps_per_epoch, one.remainder) == (4, 110 % 24)
    batches = list(one.batches(0, 8))
    for epoch in (batches[:4], batches[4:]):
        assert len(torch.cat([batch.sample_ids for batch in epoch]).unique()) == 96
    first = {int(i): view for b in batches[:4] for i, view in zip(b.sample_ids, b.views[0], strict=True)}
    second = {int(i): view for b in batches[4:] for i, view in zip(b.sample_ids, b.views[0], strict=True)}
    assert not any(torch.equal(first[i], second[i]) for i in first.keys() & second.keys())
    assert not any(torch.equal(a, b) for a, b in zip(batches[0].views[0], batches[0].views[1], strict=True))


def num_calls(work: Callable[[], object]) -> int:
    """How many functions, of Python and of C, this thread calls: a measure of work that other work cannot disturb."""
    events: list[str] = []
    sys.setprofile(lambda frame, event, arg: events.append(event))
    try:
        work()
    finally:
        sys.setprofile(None)
    return events.count("call") + events.count("c_call")


def test_the_first_batch_at_step_10_000_takes_the_work_of_one_at_step_0(manifest: Manifest) -> None:
    """No replay. How long it takes, `python -m tests.benchmarks.stream` measures."""

    def first_batch(step: int) -> None:
        next(loader(manifest).batches(step, step + 1))

    first_batch(0)  # what is done once in a process
    assert num_calls(lambda: first_batch(10_000)) < 1.05 * num_calls(lambda: first_batch(0))


def test_a_killed_worker_is_an_error_that_names_it(manifest: Manifest) -> None:
    batches = loader(manifest, num_workers=2).batches(0, 10_000)
    next(batches)
    victim = worker_pids()[0]
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(WorkerError, match=rf"{victim} died with exit code -9"):
        list(batches)
    assert worker_pids() == []


def test_workers_end_with_the_iterator_and_leave_no_descriptor(manifest: Manifest) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        batches = loader(manifest, num_workers=2).batches(0, 10_000)
        next(batches)
        assert len(worker_pids()) == 2
        batches.close()
        assert worker_pids() == []
    assert len(os.listdir("/proc/self/fd")) <= before


def worker_pids() -> list[int]:
    """Children of this process that run the worker module."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"pipeline.data.worker" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return found


def with_bad_samples(url: str, bad: dict[int, bytes]) -> Manifest:
    samples = photos(60)
    for index, data in bad.items():
        samples[index] = Sample(samples[index].key, data, "jpg", "train")
    return write_shards(samples, url, class_names=("even", "odd"), max_shard_samples=20)


def test_bad_samples_are_replaced_alike_everywhere_and_recorded(tmp_path: Path) -> None:
    bad = {3: b"not an image", 31: jpeg(photo(40, 40))[:600]}
    manifest = with_bad_samples(str(tmp_path), bad)

    def run(num_workers: int) -> tuple[Loader, list[Tensor], list[Tensor]]:
        one = Loader(
            manifest, "train", VIEWS, image_size=24, global_batch_size=12, seed=0,
            num_workers=num_workers,
        )  # fmt: skip
        batches = list(one.batches(0, one.steps_per_epoch))
        return one, [b.sample_ids for b in batches], [b.views[0] for b in batches]

    here, ids, views = run(0)
    there, other_ids, other_views = run(3)
    assert all(map(torch.equal, ids, other_ids))
    assert all(map(torch.equal, views, other_views))
    assert here.quarantine == there.quarantine
    assert set(here.quarantine) == set(bad)
    assert here.quarantine[3].shard == "train-000000.tar"
    assert "truncated" in here.quarantine[31].reason
    assert not set(bad) & set(torch.cat(ids).tolist())


def test_bad_samples_are_replaced_alike_if_the_first_batch_is_read_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = dict.fromkeys(range(0, 60, 4), b"not an image")
    manifest = with_bad_samples(str(tmp_path), bad)

    def run() -> tuple[dict[int, BadSample], Tensor, Tensor]:
        one = Loader(manifest, "train", VIEWS, image_size=24, global_batch_size=12, seed=0)
        batch = next(iter(one.batches(2, 5)))
        return one.quarantine, batch.sample_ids, batch.views[0]

    quarantine, ids, views = run()
    monkeypatch.setattr(reader_module, "REQUEST_BYTES", 0)
    other_quarantine, other_ids, other_views = run()
    assert quarantine == other_quarantine
    assert set(quarantine) & set(bad)
    assert torch.equal(ids, other_ids)
    assert torch.equal(views, other_views)


def test_a_replacement_comes_from_another_step_so_no_batch_has_an_image_twice(tmp_path: Path) -> None:
    """67 is prime: one lane, in whose one block a batch's samples are neighbours."""
    samples = photos(3 * 67, side=16)
    manifest = write_shards(samples, str(tmp_path / "good"), class_names=("even", "odd"))
    planned = [Plan(manifest.shards, "train", 67, 0).batch(0, step) for step in range(3)]
    for i in planned[2][[0, 1, 66]]:
        samples[i] = Sample(samples[i].key, b"not an image", "jpg", "train")
    manifest = write_shards(samples, str(tmp_path / "bad"), class_names=("even", "odd"))
    one = Loader(manifest, "train", (View(),), image_size=16, global_batch_size=67, seed=0)
    ids = [batch.sample_ids.numpy() for batch in one.batches(0, 3)]
    assert len(one.quarantine) == 3
    assert np.array_equal(ids[:2], planned[:2])
    assert np.array_equal(ids[2][2:66], planned[2][2:66])
    assert np.array_equal(ids[2][[0, 1, 66]], planned[0][[0, 1, 66]]), "their rows of the next step, the block's first"


def test_a_sample_that_is_a_block_by_itself_is_replaced_from_the_next_lane(tmp_path: Path) -> None:
    """60 samples in 60 lanes: no other sample of its block can take its place."""
    manifest = with_bad_samples(str(tmp_path), {3: b"not an image", 31: b"nor this"})

    def run(world_size: int, num_workers: int) -> list[Tensor]:
        ranks = [
            Loader(
                manifest, "train", VIEWS, image_size=24, global_batch_size=60, seed=0,
                rank=rank, world_size=world_size, num_workers=num_workers,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        batches = [next(iter(one.batches(0, 1))) for one in ranks]
        assert {3, 31} == {i for one in ranks for i in one.quarantine}
        return [torch.cat([b.sample_ids for b in batches]), torch.cat([b.views[0] for b in batches])]

    ids, views = run(1, 0)
    planned = Plan(manifest.shards, "train", 60, 0).batch(0, 0)
    bad = np.isin(planned, [3, 31])
    assert np.array_equal(ids.numpy()[~bad], planned[~bad])
    assert np.array_equal(ids.numpy()[bad], np.roll(planned, -1)[bad])
    for layout in ((1, 3), (4, 0)):
        other_ids, other_views = run(*layout)
        assert torch.equal(ids, other_ids)
        assert torch.equal(views, other_views)


def test_nothing_that_can_be_decoded_is_an_error(tmp_path: Path) -> None:
    manifest = with_bad_samples(str(tmp_path), dict.fromkeys(range(60), b"not an image"))
    one = Loader(manifest, "train", VIEWS, image_size=24, global_batch_size=60, seed=0)
    with pytest.raises(BadSamplesError, match=r"not one of the samples around.*\n.*no image format"):
        next(iter(one.batches(0, 1)))


def test_images_that_cannot_be_read_for_evaluation_are_left_out_up_to_a_share(tmp_path: Path) -> None:
    manifest = with_bad_samples(str(tmp_path), {3: b"not an image", 31: b"nor this"})
    ids = torch.cat([ids for ids, _, _ in read_images(manifest, "train", 24, max_bad_share=0.05)])
    assert ids.tolist() == [i for i in range(60) if i not in (3, 31)]
    with pytest.raises(BadSamplesError, match=r"2 of the 60 samples in train") as error:
        list(read_images(manifest, "train", 24, max_bad_share=0.02))
    assert "3 in train-000000.tar" in str(error.value)
    assert "31 in train-000001.tar" in str(error.value)


def test_read_images_is_in_id_order_with_labels(manifest: Manifest) -> None:
    parts = list(read_images(manifest, "train", 24, batch_size=32))
    assert [len(ids) for ids, _, _ in parts] == [32, 32, 32, 14]
    assert torch.equal(torch.cat([ids for ids, _, _ in parts]), torch.arange(110))
    assert torch.cat([labels for _, _, labels in parts]).tolist() == [i % 2 for i in range(110)]
    image = centre_crop(photo(41, 40, seed=1), 24)
    assert np.abs(parts[0][1][1].permute(1, 2, 0).numpy().astype(int) - image).mean() < 4, "JPEG's loss apart"


def test_read_blocks_gives_what_read_images_does_for_the_samples_chosen(tmp_path: Path) -> None:
    """Neighbours, single samples, across shards of 20; a bad one alone in its block."""
    manifest = with_bad_samples(str(tmp_path), {3: b"not an image", 31: b"nor this"})
    whole = {
        int(i): image
        for ids, images, _ in read_images(manifest, "train", 24, max_bad_share=1)
        for i, image in zip(ids, images, strict=True)
    }
    blocks = [np.array(ids) for ids in ([0, 1, 2, 3, 4, 19, 20, 21], [31], [*range(32, 60)], [5, 7, 59])]
    read = list(read_blocks(manifest, "train", blocks, 24, num_threads=3))
    assert [ids.tolist() for ids, _, _ in read] == [[i for i in b if i in whole] for b in blocks]
    for ids, images, _ in read:
        assert all(torch.equal(image, whole[int(i)]) for i, image in zip(ids, images, strict=True))
    assert [[(b.sample_id, b.shard) for b in bad] for _, _, bad in read] == [
        [(3, "train-000000.tar")], [(31, "train-000001.tar")], [], []
    ]  # fmt: skip
    assert list(read_blocks(manifest, "train", [], 24)) == []


def test_normalize_is_the_formula() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(normalize(images, mean, std), expected.float(), rtol=0, atol=1e-6)


def test_a_world_size_that_does_not_divide_is_named(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match=r"24 does not divide by world_size=5"):
        loader(manifest, world_size=5)


def test_1000_shards_and_3_epochs_show_no_growth(tmp_path: Path) -> None:
    """Resident memory of the worker and of this process after each epoch; a leak of one payload a sample is 6 MB."""
    image = jpeg(photo(24, 24))
    samples = (Sample(f"{i}", image, "jpg", "train") for i in range(8000))
    manifest = write_shards(samples, str(tmp_path), max_shard_samples=8)
    assert len(manifest.shards.name) == 1000
    one = Loader(manifest, "train", (View(),), image_size=16, global_batch_size=250, seed=0, num_workers=1)
    resident = []
    for step, _ in enumerate(one.batches(0, 4 * one.steps_per_epoch), 1):
        if step % one.steps_per_epoch == 0 and step < 4 * one.steps_per_epoch:
            resident.append([resident_bytes(pid) for pid in (os.getpid(), worker_pids()[0])])
    assert len(resident) == 3
    for first, third in zip(resident[0], resident[2], strict=True):
        assert third - first < 4 * 2**20


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
