"""Tars of other tools: indexed by one walk, streamed like our own; damage is an error, never fewer samples."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset

from jobs import index as job
from jobs import write_shards as write_job
from pipeline import storage
from pipeline.data.fetch import Fetch
from pipeline.data.foreign import Indexed, find_shards, index_shards
from pipeline.data.loader import Loader
from pipeline.data.manifest import Manifest
from pipeline.data.members import Member, walk_tar
from pipeline.data.views import View
from pipeline.storage import StorageError
from tests.conftest import S3
from tests.data.images import jpeg, photo, png, write_photos
from tests.data.tars import write_tar


def image(seed: int) -> bytes:
    return jpeg(photo(30, 30, seed=seed))


def index(url: str, **options: Any) -> Indexed:
    return index_shards(find_shards(url), **options)


def test_webdataset_s_own_writer(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        for i in range(10):
            writer.write({"__key__": f"deep/er/{i:03d}", "png": photo(9, 9, seed=i), "cls": i % 3, "txt": "a cat"})
    manifest = index(str(tmp_path)).manifest
    assert manifest.keys() == [f"deep/er/{i:03d}" for i in range(10)]
    assert manifest.samples.label.tolist() == [i % 3 for i in range(10)]
    assert manifest.class_names == ("0", "1", "2")
    loader = Loader(manifest, "train", (View(),), image_size=16, global_batch_size=10, seed=0)
    assert len(next(iter(loader.batches(0, 1))).sample_ids.unique()) == 10


def test_img2dataset_s_layout(tmp_path: Path) -> None:
    for shard in range(3):
        members = []
        for i in range(5):
            key = f"{shard:05d}{i:04d}"
            meta = json.dumps({"url": "http://x", "label": 7, "status": "success"}).encode()
            members += [(f"{key}.jpg", image(i)), (f"{key}.json", meta), (f"{key}.txt", b"a caption")]
        write_tar(tmp_path / f"{shard:05d}.tar", members)
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"not a shard")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    manifest = index(str(tmp_path)).manifest
    assert manifest.shards.count.tolist() == [5, 5, 5]
    assert set(manifest.samples.label.tolist()) == {7}


def test_extensions_masks_samples_without_image_and_without_label(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "x.tar",
        [
            ("a.mask.png", png(photo(5, 5))),
            ("a.JPEG", image(1)),
            ("a.cls", b"4\n"),
            ("b.webp", b"webp"),
            ("c.txt", b"a caption without its image"),
            ("d/.hidden", b""),
            ("e.png", png(photo(6, 6))),
            ("e.json", b'{"cls": 2}'),
        ],
    )
    manifest = index(str(tmp_path)).manifest
    assert manifest.keys() == ["a", "b", "e"]
    assert manifest.samples.label.tolist() == [4, -1, 2]
    assert manifest.samples.length.tolist()[0] == len(image(1))
    assert manifest.passed_over == {
        "companion images *.mask.png": 1,
        "texts without an image": 1,
        "hidden files": 1,
    }


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_format(tmp_path: Path, tar_format: int) -> None:
    folder = "d" * 90
    members = [(f"{folder}/{'n' * 60}{i}.jpg", image(i)) for i in range(4)]
    if tar_format != tarfile.USTAR_FORMAT:
        members += [(f"{'é' * 150}.jpg", image(9))]
    write_tar(tmp_path / "x.tar", members, tar_format)
    manifest = index(str(tmp_path)).manifest
    assert manifest.keys() == [name.removesuffix(".jpg") for name, _ in members]


def test_labels_that_are_keys_of_a_database_name_their_classes(tmp_path: Path) -> None:
    """As numbers of classes they would be 3 billion, most of them empty, and more than an int32."""
    labels = [b"3000000000", b"7", b"-1", b"20000000", b"7"]
    write_tar(tmp_path / "a.tar", [m for i, x in enumerate(labels) for m in ((f"{i}.jpg", image(i)), (f"{i}.cls", x))])
    manifest = index(str(tmp_path)).manifest
    assert manifest.class_names == ("7", "20000000", "3000000000")
    assert manifest.samples.label.tolist() == [2, 0, -1, 1, 0]


def test_our_own_shards_index_to_the_same_manifest(tmp_path: Path) -> None:
    written = write_photos(str(tmp_path), 50)
    for name in ("manifest.json", "samples.parquet", "shards.parquet"):
        (tmp_path / name).unlink()
    indexed = index(str(tmp_path)).manifest
    assert indexed.samples.offset.tolist() == written.samples.offset.tolist()
    assert indexed.samples.crc32.tolist() == written.samples.crc32.tolist()
    assert indexed.samples.label.tolist() == written.samples.label.tolist()


def test_again_a_set_keeps_what_only_its_manifest_tells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The splits that were held out and the names of the classes."""
    for i in range(40):
        file = tmp_path / "images" / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(photo(9, 9, seed=i)))
    url = str(tmp_path / "shards")
    shares = ["--validation-share", "0.2", "--hold-out", "selection=0.2"]
    assert write_job.main([f"folder:{tmp_path / 'images'}", url, *shares]) == 0
    written = Manifest.load(url)
    assert set(written.splits) == {"train", "validation", "selection"}
    again = index(url).manifest
    assert again.digest == written.digest
    assert again.class_names == ("cat", "dog")

    write_tar(tmp_path / "shards/val-new.tar", [("new.png", image(0)), ("new.cls", b"1")])
    grown = index(url).manifest
    assert grown.class_names == ("cat", "dog")
    assert grown.split("validation").num_samples == written.split("validation").num_samples + 1
    assert grown.split("selection").num_samples == written.split("selection").num_samples
    write_tar(tmp_path / "shards/val-new.tar", [("new.png", image(0)), ("new.cls", b"2")])
    assert index(url).manifest.class_names == ("0", "1", "2")
    assert not caplog.messages
    (tmp_path / "shards/manifest.json").write_text("{")
    assert set(index(url).manifest.splits) == {"train", "validation"}, "by the names of the shards"
    assert re.search(r"cannot be read, so the splits follow .*manifest\.json is not JSON", caplog.text)


@pytest.mark.parametrize(
    ("name", "data", "label"),
    [
        ("a.CLS", b"7", 7),
        ("a.cls", b"+3\n", 3),
        ("a.cls", b"3.0", 3),
        ("a.JSON", b'{"label": 7}', 7),
        ("a.json", b'{"label": "7"}', 7),
        ("a.json", b'{"label": 7.0}', 7),
        ("a.json", b'{"label": "a cat", "class_id": 4}', 4),
        ("a.json", b'{"caption": "a cat", "label": null}', -1),
    ],
)
def test_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes, label: int) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", image(0)), (name, data)])
    assert job.main([str(tmp_path)]) == 0
    assert Manifest.load(str(tmp_path)).samples.label.tolist() == [label]
    assert "passed over" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.cls", b"cat", "a.cls: 'cat'"),
        ("a.cls", "²".encode(), "a.cls: '²'"),
        ("a.cls", b"--5", "a.cls: '--5'"),
        ("a.cls", b"3.5", "a.cls: '3.5'"),
        ("a.cls", b"9" * 5000, "a.cls: '999999999999...9999999999999'"),
        ("a.json", b"[" * 100_000, "a.json: '[[[["),
        ("a.json", b'{"label": ' + b"9" * 5000 + b"}", "a.json: '{"),
        ("a.json", b'{"label": 7.5}', "a.json, label: 7.5"),
        ("a.json", b'{"cls": true}', "a.json, cls: True"),
        ("a.json", b'{"label": ["cat"]}', "a.json, label: ['cat']"),
        ("a.json", b"{" + b" " * 2**20 + b"}", "a.json: '1048578 bytes'"),
    ],
)
def test_what_is_no_label_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes, words: str
) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", image(0)), (name, data), ("b.png", image(1)), ("b.cls", b"2")])
    assert job.main([str(tmp_path)]) == 0
    assert Manifest.load(str(tmp_path)).samples.label.tolist() == [-1, 2]
    told = "passed over: 1 labels that are not the number of a class, e.g. "
    assert told + words in capsys.readouterr().out


@pytest.mark.parametrize("threads", ["0", "-1", "x"])
def test_the_job_refuses_no_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        job.main([str(tmp_path), f"--threads={threads}"])
    assert f"{threads!r} is not a whole number from 1 on" in capsys.readouterr().err


def test_splits_from_names_train_first(tmp_path: Path) -> None:
    for name in ("val/0.tar", "train/0.tar", "imagenet-test-3.tar"):
        write_tar(tmp_path / name, [("a.jpg", image(0))])
    write_tar(tmp_path / "constrained-0.tar", [("a.jpg", image(0))])
    manifest = index(str(tmp_path)).manifest
    assert manifest.splits == ("train", "validation", "test")
    assert manifest.shards.name[:2] == ("constrained-0.tar", "train/0.tar")


def with_header(data: bytearray, at: int, field: slice, value: bytes) -> None:
    """Another value in the header at a byte, and the checksum that goes with it."""
    header = bytearray(data[at : at + 512])
    header[field] = value.ljust(field.stop - field.start, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[at : at + 512] = header


def test_headers_are_read_as_python_s_tarfile_reads_them(tmp_path: Path) -> None:
    """What other tools leave behind a number, a number that is missing, a name in Latin-1."""
    write_tar(tmp_path / "x.tar", [("a.jpg", image(0)), ("b.jpg", b""), ("c.jpg", image(2)), ("d.jpg", image(3))])
    data = bytearray((tmp_path / "x.tar").read_bytes())
    with tarfile.open(tmp_path / "x.tar") as tar:
        a, b, c, d = (member.offset for member in tar)
    with_header(data, a, SIZE, b"%07o\0abc" % len(image(0)))
    with_header(data, b, SIZE, b"")
    with_header(data, c, SIZE, b"    %o " % len(image(2)))
    with_header(data, d, slice(0, 100), b"caf\xe9.jpg")
    (tmp_path / "x.tar").write_bytes(data)
    manifest = index(str(tmp_path)).manifest
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert manifest.samples.length.tolist() == [member.size for member in tar]
        assert manifest.samples.offset.tolist() == [member.offset_data for member in tar]
    assert Manifest.load(manifest.url).keys() == ["a", "b", "c", "caf\\xe9"]


def test_an_image_of_2_gib_is_named(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.tiff")
    info.size = 2**31
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(info.tobuf())
        file.truncate(512 + 2**31 + 1024)  # zeros that take no place on the disk
    with pytest.raises(StorageError, match=r"x\.tar: a\.tiff has 2147483648 bytes"):
        index(str(tmp_path))


SIZE = slice(124, 136)
DAMAGED = 4 * 1024 + 20  # in the fifth member's header


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data.__setitem__(DAMAGED, data[DAMAGED] ^ 1), "tar header .* damaged"),
        (lambda data: with_header(data, DAMAGED - 20, SIZE, b"1x"), "tar header at byte 4096 is damaged .*size.*1x"),
        (lambda data: with_header(data, DAMAGED - 20, SIZE, b"-1"), "tar header at byte 4096 is damaged .*size.*-1"),
        (lambda data: with_header(data, DAMAGED - 20, SIZE, b""), "tar header at byte 4608 is damaged"),
        (lambda data: with_header(data, 0, slice(124, 157), b"7777777".ljust(32) + b"L"), "name of 2097151 bytes"),
        (lambda data: data.__delitem__(slice(DAMAGED - 20, None)), "truncated"),
        (lambda data: data.__delitem__(slice(DAMAGED - 3, None)), "truncated"),
        (lambda data: data.__setitem__(slice(2048, 4096), bytes(2048)), "at byte 2048 ends .* byte 4096 is not zero"),
        (lambda data: data.extend(data), "at byte 6144 ends .* byte 10240 is not zero; .* a file of its own"),
    ],
    ids=[
        "flipped header",
        "no number",
        "negative",
        "no size",
        "an endless name",
        "cut at a header",
        "cut in a header",
        "a hole of zeros",
        "two tars in one",
    ],
)
def test_a_damaged_or_cut_tar_is_an_error(tmp_path: Path, damage: object, words: str) -> None:
    write_tar(tmp_path / "x.tar", [(f"{i}.jpg", b"0" * 512) for i in range(6)])
    data = bytearray((tmp_path / "x.tar").read_bytes())
    damage(data)  # type: ignore[operator]
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(StorageError, match=words):
        index(str(tmp_path))
    assert not (tmp_path / "manifest.json").exists()


def gnu_tar(folder: Path, *arguments: str) -> None:
    subprocess.run(["tar", "-cf", "x.tar", *arguments], cwd=folder, check=True)


@pytest.mark.parametrize("pack", [[], ["--format=pax"]], ids=["gnu", "pax"])
@pytest.mark.parametrize("linked", ["b.png", "a.cls", "a.JSON"])
def test_what_belongs_to_a_sample_is_no_link(tmp_path: Path, linked: str, pack: list[str]) -> None:
    """Its header alone is in the tar: the image would be passed over, the label -1."""
    (tmp_path / "a.png").write_bytes(png(photo(9, 9)))
    target = {".png": "a.png"}.get(Path(linked).suffix, "a.txt")
    (tmp_path / "a.txt").write_bytes(b"3")
    os.link(tmp_path / target, tmp_path / linked)
    gnu_tar(tmp_path, *pack, target, linked)
    with pytest.raises(StorageError, match=f"x.tar: {linked} is a hard link.*--hard-dereference"):
        index(str(tmp_path))
    (tmp_path / linked).unlink()
    (tmp_path / linked).symlink_to(target)
    gnu_tar(tmp_path, *pack, target, linked)
    with pytest.raises(StorageError, match=f"x.tar: {linked} is a symbolic link.*--dereference"):
        index(str(tmp_path))
    gnu_tar(tmp_path, *pack, "--dereference", "--hard-dereference", "a.png", linked)
    assert index(str(tmp_path)).manifest.keys() == (["a", "b"] if linked == "b.png" else ["a"])


@pytest.mark.parametrize("pack", ["--format=gnu", "--format=pax", "--sparse-version=0.1", "--sparse-version=0.0"])
def test_an_image_is_not_sparse(tmp_path: Path, pack: str) -> None:
    """The tar holds its parts, more of them than GNU's header can list."""
    pack = pack if "format" in pack else f"--format=pax {pack}"
    with (tmp_path / "a.png").open("wb") as file:
        for part in range(60):
            file.seek(part * 65536)
            file.write(b"part")
        file.truncate(60 * 65536)
    gnu_tar(tmp_path, "--sparse", *pack.split(), "a.png")
    with pytest.raises(StorageError, match=r"x\.tar: a\.png is sparse.*without `--sparse`"):
        index(str(tmp_path))
    (tmp_path / "a.png").rename(tmp_path / "a.bin")
    (tmp_path / "b.png").write_bytes(png(photo(9, 9)))
    (tmp_path / "c.txt").symlink_to("b.png")
    os.link(tmp_path / "a.bin", tmp_path / ("d" * 120))  # long names of a link and of its target
    gnu_tar(tmp_path, "--sparse", *pack.split(), "d" * 120, "a.bin", "c.txt", "b.png")
    assert index(str(tmp_path)).manifest.keys() == ["b"], "others are passed over"


def test_pax_records_are_as_long_as_they_say(tmp_path: Path) -> None:
    names = ["é\n12 size=3.png", "é\nb.png", "日本\n9 path=z.png", "ü.png"]
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for seed, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(image(seed))
            info.pax_headers = {"comment": "x\n9 path=zz.png", "size": str(info.size)}
            tar.addfile(info, io.BytesIO(image(seed)))
    manifest = index(str(tmp_path)).manifest
    assert manifest.keys() == [name.removesuffix(".png") for name in names]
    assert manifest.samples.crc32.tolist() == [zlib.crc32(image(seed)) for seed in range(4)]


def test_the_size_of_a_pax_record_counts(tmp_path: Path) -> None:
    """More than a header's 8 GiB; GNU tar and tarfile write it only then."""
    record = b"12 size=600\n"
    write_tar(tmp_path / "x.tar", [("x", record), ("a.png", b"1" * 600), ("b.png", b"2" * 600)])
    data = bytearray((tmp_path / "x.tar").read_bytes())
    with_header(data, 0, slice(156, 157), b"x")
    with_header(data, 1024, SIZE, b"0")
    (tmp_path / "x.tar").write_bytes(data)
    assert index(str(tmp_path)).manifest.samples.length.tolist() == [600, 600]
    for damaged in (b"99 size=600\n", b"12 size=6x0\n", b"12 size 600\n", b"xx size=600\n"):
        data[512 : 512 + len(record)] = damaged
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(StorageError, match="the pax records behind the tar header at byte 0 are damaged"):
            index(str(tmp_path))


def test_a_long_name_outlives_pax_records_without_one(tmp_path: Path) -> None:
    long = f"{'n' * 150}.png"
    write_tar(tmp_path / "x.tar", [("l", f"{long}\0".encode()), ("x", b"15 comment=yes\n"), ("a.png", b"1")])
    data = bytearray((tmp_path / "x.tar").read_bytes())
    with_header(data, 0, slice(156, 157), b"L")
    with_header(data, 1024, slice(156, 157), b"x")
    (tmp_path / "x.tar").write_bytes(data)
    assert index(str(tmp_path)).manifest.keys() == ["n" * 150]


@pytest.mark.parametrize(
    "names", [["a.png", "a.png"], ["a.png", "a.cls", "a.png", "a.cls"], ["a.png", "a.PNG"], ["./a.png", "a.png"]]
)
def test_two_neighbours_of_one_name_are_an_error(tmp_path: Path, names: list[str]) -> None:
    write_tar(tmp_path / "x.tar", [(name, b"1") for name in names])
    with pytest.raises(StorageError, match=r"x\.tar: '(\./)?a.png' and 'a\.(png|PNG)' have the same key"):
        index(str(tmp_path))


def test_a_key_at_two_places_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", image(0)), ("b.jpg", image(1)), ("a.cls", b"1")])
    with pytest.raises(StorageError, match="'a' comes at two places"):
        index(str(tmp_path))


def test_a_killed_walk_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Shard 0 is changed behind its receipt's back, so it tells whether it is walked again; shard 1 openly."""
    folder = tmp_path / "shards"
    for shard in range(8):
        write_tar(folder / f"deep/{shard}.tar", [(f"{shard}-{i}.jpg", image(10 * shard + i)) for i in range(3)])
    endless = folder / "last.tar"
    zeros = tarfile.TarInfo("x.bin")
    zeros.size = 2**33 - 1024  # they take no place on the disk, but time to walk: it is killed there
    with endless.open("wb") as file:
        file.write(zeros.tobuf())
        file.truncate(2**33)
    walk = subprocess.Popen([sys.executable, "-m", "jobs.index", str(folder), "--threads", "1"])
    deadline = time.monotonic() + 120
    while len(receipts := list((folder / ".progress/deep").glob("*.json"))) < 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(walk.pid, signal.SIGKILL)
    assert walk.wait() == -signal.SIGKILL
    assert len(receipts) == 8
    assert not (folder / "manifest.json").exists()

    hidden = folder / "deep/0.tar"
    before = hidden.stat()
    hidden.write_bytes(b"?" * before.st_size)
    os.utime(hidden, ns=(before.st_atime_ns, before.st_mtime_ns))
    write_tar(folder / "deep/1.tar", [("new.jpg", image(99))])
    write_tar(endless, [("end.jpg", image(98))])
    progress: list[tuple[int, int]] = []
    manifest = index(str(folder), on_progress=lambda done, total: progress.append((done, total))).manifest
    assert manifest.keys()[:4] == ["0-0", "0-1", "0-2", "new"]
    assert manifest.keys()[-2:] == ["7-2", "end"]
    assert manifest.shards.count.tolist() == [3, 1, *[3] * 6, 1]
    assert progress[-1] == (sum(manifest.shards.size), sum(manifest.shards.size))
    assert not (folder / ".progress").exists()

    write_tar(hidden, [(f"0-{i}.jpg", image(i)) for i in range(3)])
    assert index(str(folder)).manifest.digest == manifest.digest, "as a walk that nobody killed"


@pytest.mark.integration
def test_an_object_that_was_replaced_is_walked_again(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same size: its ETag tells."""

    def put(shard: int, data: bytes) -> None:
        write_tar(tmp_path / "x.tar", [(f"{shard}.jpg", data)])
        storage.upload(tmp_path / "x.tar", f"{s3.url}/resumed/{shard}.tar")

    for shard in range(3):
        put(shard, bytes([shard]) * 600)
    storage.write_bytes(f"{s3.url}/resumed/3.tar", b"?" * 512)
    with pytest.raises(StorageError, match=r"3\.tar.*damaged"):
        index(f"{s3.url}/resumed", num_threads=1)
    put(1, b"x" * 600)
    put(3, b"3" * 600)
    walked: list[int] = []

    def walk(manifest: Manifest, fetch: Fetch, shard: int) -> Iterator[Member]:
        walked.append(shard)
        return walk_tar(manifest, fetch, shard)

    monkeypatch.setattr("pipeline.data.foreign.walk_tar", walk)
    manifest = index(f"{s3.url}/resumed").manifest
    assert sorted(walked) == [1, 3]
    assert manifest.samples.crc32.tolist() == [zlib.crc32(d * 600) for d in (b"\0", b"x", b"\2", b"3")]
    assert not [name for name in storage.list_sizes(f"{s3.url}/resumed") if name.startswith(".")]


@pytest.mark.integration
def test_on_s3_through_the_job(s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in range(4):
        write_tar(tmp_path / "x.tar", [(f"{shard}-{i}.jpg", image(shard * 10 + i)) for i in range(10)])
        storage.upload(tmp_path / "x.tar", f"{s3.url}/foreign/part{shard}.tar")
    assert job.main([f"{s3.url}/foreign"]) == 0
    assert "4 shards, train 40" in capsys.readouterr().out
    manifest = Manifest.load(f"{s3.url}/foreign")
    loader = Loader(manifest, "train", (View(),), image_size=16, global_batch_size=20, seed=0)
    ids = torch.cat([batch.sample_ids for batch in loader.batches(0, 2)])
    assert len(ids.unique()) == 40
    with pytest.raises(SystemExit, match="2"):
        job.main([f"{s3.url}/nothing"])
    assert "holds no *.tar" in capsys.readouterr().err
