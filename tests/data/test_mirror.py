"""The local mirror: the second epoch needs no source, its size is bounded, and damage to it is healed."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import storage
from pipeline.data import mirror as mirror_module
from pipeline.data.fetch import LocalFetch, read_range
from pipeline.data.loader import Loader
from pipeline.data.manifest import Manifest
from pipeline.data.mirror import MirrorConfig, MirrorFetch
from pipeline.data.views import View
from pipeline.storage import StorageError
from tests.data.images import write_photos


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_photos(str(tmp_path / "shards"), 60)


def epoch(manifest: Manifest, folder: Path | None, num_workers: int = 0) -> list[Tensor]:
    loader = Loader(
        manifest, "train", (View(),), image_size=16, global_batch_size=12, seed=0, num_workers=num_workers,
        mirror=MirrorConfig(folder=str(folder)) if folder else None,
    )  # fmt: skip
    return [batch.views[0] for batch in loader.batches(0, loader.steps_per_epoch)]


def files(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.glob("*/*") if entry.is_file())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_second_epoch_needs_no_source(manifest: Manifest, tmp_path: Path, num_workers: int) -> None:
    expected = epoch(manifest, None)
    assert all(map(torch.equal, epoch(manifest, tmp_path / "mirror", num_workers), expected))
    for name in manifest.shards.name:
        storage.delete(storage.join(manifest.url, name))
    assert all(map(torch.equal, epoch(manifest, tmp_path / "mirror", num_workers), expected))


def test_damaged_and_cut_chunks_are_read_again(manifest: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    expected = epoch(manifest, folder)
    for file in files(folder):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 255
        file.write_bytes(bytes(data))
    assert all(map(torch.equal, epoch(manifest, folder), expected))
    for file in files(folder):
        file.write_bytes(file.read_bytes()[:1000])
    assert all(map(torch.equal, epoch(manifest, folder), expected))


def test_ranges_across_chunks_are_the_source_s_bytes(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "CHUNK_BYTES", 1000)
    source = LocalFetch(manifest)
    mirror = MirrorFetch(manifest, source, MirrorConfig(folder=str(tmp_path / "mirror")))
    size = int(manifest.shards.size[0])
    random = np.random.default_rng(0)
    for _ in range(300):
        start, end = sorted(random.integers(0, size + 1, 2).tolist())
        if start < end:
            assert read_range(mirror, 0, start, end) == read_range(source, 0, start, end)


def test_the_folder_stays_within_its_bound_and_the_oldest_leave(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(mirror_module, "_TRIM_EVERY", 4)
    bound = 20 * 1024
    mirror = MirrorFetch(
        manifest, LocalFetch(manifest), MirrorConfig(folder=str(tmp_path / "m"), max_gib=bound / 2**30)
    )
    for chunk in range(int(manifest.shards.size[0]) // 1024 - 1):
        read_range(mirror, 0, chunk * 1024, chunk * 1024 + 1024)
        assert sum(file.stat().st_size for file in files(tmp_path / "m")) <= bound + 4 * 1024
        time.sleep(0.001)  # mtimes that differ
    assert max(int(file.name) for file in files(tmp_path / "m")) == chunk


def test_readers_killed_at_any_moment_leave_a_mirror_that_works(manifest: Manifest, tmp_path: Path) -> None:
    """Four processes fill one mirror; two are killed -9 in the middle."""
    expected = epoch(manifest, None)
    script = (
        "from pipeline.data.manifest import Manifest; from pipeline.data.fetch import LocalFetch, read_range\n"
        "import pipeline.data.mirror as m; m.CHUNK_BYTES = 512\n"
        f"manifest = Manifest.load({manifest.url!r})\n"
        f"mirror = m.MirrorFetch(manifest, LocalFetch(manifest), m.MirrorConfig(folder={str(tmp_path / 'm')!r}))\n"
        "print('ready', flush=True)\n"
        "for turn in range(10):\n"
        "    for shard, size in enumerate(manifest.shards.size.tolist()):\n"
        "        for start in range(0, size - 700, 700):\n"
        "            got, want = (read_range(f, shard, start, start + 700) for f in (mirror, LocalFetch(manifest)))\n"
        "            assert got == want\n"
    )
    readers = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(4)
    ]  # fmt: skip
    for reader in readers:
        assert reader.stdout is not None
        reader.stdout.readline()
    for reader in readers[:2]:
        os.kill(reader.pid, signal.SIGKILL)
    assert [reader.wait(60) for reader in readers] == [-9, -9, 0, 0]
    assert all(map(torch.equal, epoch(manifest, tmp_path / "m"), expected))


def test_a_folder_that_cannot_be_written_is_named(manifest: Manifest) -> None:
    with pytest.raises(StorageError, match="/proc/nowhere"):
        epoch(manifest, Path("/proc/nowhere"))


def test_a_part_that_another_process_trims_away_is_not_kept(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    expected = epoch(manifest, None)
    other = MirrorFetch(manifest, LocalFetch(manifest), MirrorConfig(folder=str(folder), max_gib=1e-9))
    replace, trims = Path.replace, []

    def late(part: Path, target: Path) -> Path:
        other._trim()
        trims.append(part)
        return replace(part, target)

    monkeypatch.setattr(Path, "replace", late)
    assert all(map(torch.equal, epoch(manifest, folder), expected))
    assert trims
    assert files(folder) == []


def test_a_folder_that_is_deleted_under_a_run_is_made_again(manifest: Manifest, tmp_path: Path) -> None:
    mirror = MirrorFetch(manifest, LocalFetch(manifest), MirrorConfig(folder=str(tmp_path / "m")))
    first = read_range(mirror, 0, 0, 100)
    shutil.rmtree(tmp_path / "m")
    assert read_range(mirror, 0, 0, 100) == first
    assert len(files(tmp_path / "m")) == 1


def test_a_disk_that_takes_or_gives_no_more_is_named(manifest: Manifest, tmp_path: Path) -> None:
    """A file's size is limited instead of the disk's; a folder lies where a chunk should."""
    folder = tmp_path / "m"
    mirror = MirrorFetch(manifest, LocalFetch(manifest), MirrorConfig(folder=str(folder)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match=f"cannot write to the mirror {folder}: .*too large"):
            read_range(mirror, 0, 0, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(folder) == [], "nothing is left of it"
    read_range(mirror, 0, 0, 100)
    (chunk,) = files(folder)
    chunk.unlink()
    chunk.mkdir()
    with pytest.raises(StorageError, match=f"cannot read the mirror {folder}: .*Is a directory"):
        read_range(mirror, 0, 0, 100)
