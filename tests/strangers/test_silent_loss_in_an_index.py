"""Indexes that lost images, labels or shards without a word: each is a sample now, or counted, or an error."""

import gzip
import json
import random
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from jobs import index as job
from jobs import write_shards
from pipeline import storage
from pipeline.data.manifest import Manifest, build_manifest, save_manifest
from pipeline.storage import StorageError
from tests.conftest import S3
from tests.data.hurting_proxy import Flip, HurtingProxy, Trickle
from tests.data.images import write_photos
from tests.data.tars import write_tar


def jpeg(text: object) -> bytes:
    """Nothing decodes it here: an index reads no more than how a file begins."""
    return b"\xff\xd8\xff\xe0 %b" % str(text).encode()


def binary(text: object) -> bytes:
    """A file of a format that is not known."""
    return b"\0\0\0\x18ftyp %b" % str(text).encode()


def index(folder: Path, *options: str) -> Manifest:
    assert job.main([str(folder), *options]) == 0
    return Manifest.load(str(folder))


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What the job says on stderr, and that it leaves no manifest."""
    with pytest.raises(SystemExit, match="2"):
        job.main([str(folder), *options])
    assert not (folder / "manifest.json").exists()
    return capsys.readouterr().err


def labels(manifest: Manifest) -> dict[str, int]:
    """Key -> label."""
    return dict(zip(manifest.keys(), manifest.samples.label.tolist(), strict=True))


def images(*names: str) -> dict[str, bytes]:
    return {name: jpeg(name) for name in names}


NAMES: dict[str, tuple[dict[str, bytes], dict[str, int]]] = {
    "frames": (images(*(f"scan.{i:04d}.jpg" for i in range(1, 101))), {f"scan.{i:04d}": -1 for i in range(1, 101)}),
    "left and right": (images("x.left.jpg", "x.right.jpg"), {"x.left": -1, "x.right": -1}),
    "a label of both": (images("x.left.jpg", "x.right.jpg") | {"x.cls": b"3"}, {"x.left": 3, "x.right": 3}),
    "a label of its own": (
        {"x.cls": b"3", "x.left.cls": b"4", **images("x.left.jpg", "x.right.jpg")},
        {"x.left": 4, "x.right": 3},
    ),
    "a version": ({"n0.v1.cls": b"1", **images("n0.v1.jpg"), "n1.v1.cls": b"0", **images("n1.v1.jpg")},
                  {"n0.v1": 1, "n1.v1": 0}),
    "a score, shuffled": (
        images("s_0.95_7.jpg") | {"s_0.95_7.cls": b"1"} | images("s_1.2_3.jpg", "s_0.11_4.jpg"),
        {"s_0.95_7": 1, "s_1.2_3": -1, "s_0.11_4": -1},
    ),
    "numbers with a point": (
        images("22.05.png", "./7 Track 2.0 (Clean).jpg") | {"./7 Track 2.0 (Clean).json": b'{"label": 1}'},
        {"22.05": -1, "7 Track 2.0 (Clean)": 1},
    ),
    "a label beside the whole name": (images("a.jpg") | {"a.jpg.json": b'{"label": 2}'}, {"a": 2}),
    "frames beside an image": (images("a.jpg", "a.0001.jpg", "a.2.jpg"), {"a": -1, "a.0001": -1, "a.2": -1}),
    "a mask of a frame": (images("s.1.jpg", "s.1.mask.png", "s.2.jpg"), {"s.1": -1, "s.2": -1}),
    "masks alone": (images("a.mask.png", "b.mask.png"), {"a.mask": -1, "b.mask": -1}),
    "folders with dots": (images("v1.0/a.jpg", "v1.0/b.jpg", "v1.1/a.jpg"), {"v1.0/a": -1, "v1.0/b": -1, "v1.1/a": -1}),
    "no extension": (images("photo1", "d/photo2") | {"photo3.cls": b"5", **images("photo3")},
                     {"photo1": -1, "d/photo2": -1, "photo3": 5}),
    "a number for an extension": (images("scan.0001", "scan.0002"), {"scan.0001": -1, "scan.0002": -1}),
    "an extension of another tool": (images("a.img", "b.dat") | {"b.cls": b"1"}, {"a.img": -1, "b.dat": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("members", "expected"), NAMES.values(), ids=NAMES.keys())
def test_every_image_is_a_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], members: dict[str, bytes], expected: dict[str, int]
) -> None:
    write_tar(tmp_path / "x.tar", members.items())
    manifest = index(tmp_path)
    assert labels(manifest) == expected
    data = (tmp_path / "x.tar").read_bytes()
    for key, offset, length in zip(manifest.keys(), manifest.samples.offset, manifest.samples.length, strict=True):
        assert data[offset : offset + length].startswith((jpeg(key), jpeg(f"./{key}")))
    assert write_shards.main(["--verify", str(tmp_path)]) == 0
    assert "1 of 1 shards are whole" in capsys.readouterr().out


def test_an_ordinary_set_has_the_manifest_that_it_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The digest is of the version that grouped names at their first dot; masks are counted."""
    members = []
    for i in range(6):
        key = f"d/{i:04d}"
        members += [
            (f"{key}.cls", b"%d" % (i % 3)),
            (f"{key}.jpg", b"\xff\xd8\xff image %d" % i),
            (f"{key}.json", json.dumps({"url": "http://x", "label": i % 3}).encode()),
            (f"{key}.mask.png", b"\x89PNG\r\n\x1a\n mask %d" % i),
            (f"{key}.txt", b"a caption"),
        ]
    write_tar(tmp_path / "x.tar", members)
    manifest = index(tmp_path)
    assert manifest.digest == "4fe940f9907ccafb9a5d30f268b046712975df81ac9250bf45c44261bb168334"
    assert manifest.passed_over == {"companion images *.mask.png": 6}
    out = capsys.readouterr().out
    assert "passed over: 6 companion images *.mask.png, e.g. d/0000.mask.png in x.tar" in out
    assert "3 classes (0, 1, 2), 6 labels" in out


def test_what_is_passed_over_is_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {
        **images(*(f"{i:02d}.jpg" for i in range(40))),
        "._00.jpg": b"\0\5\x16\7 what macOS knows of 00.jpg",
        ".trash.jpg": jpeg("hidden"),
        "a.png": jpeg("a"),
        "a.jpg": jpeg("the one"),
        "clip.mp4": binary("a film"),
        "clip.json": b"{}",
        "LICENSE": b"do what you want",
        "README.txt": b"",
    }
    write_tar(tmp_path / "x.tar", members.items())
    manifest = index(tmp_path)
    assert manifest.samples.num_samples == 41
    counts = {
        "hidden files": 1,
        "hidden images": 1,
        "companion images *.png": 1,
        "samples without an image": 1,
        "texts without an image": 2,
    }
    assert json.loads((tmp_path / "manifest.json").read_text())["passed_over"] == manifest.passed_over == counts
    out = capsys.readouterr().out
    for reason, example in zip(counts, ("._00.jpg", ".trash.jpg", "a.png", "clip.mp4", "LICENSE"), strict=True):
        assert f"{counts[reason]} {reason}, e.g. {example} in x.tar" in out


@pytest.mark.parametrize(
    ("members", "lost"),
    [
        (
            images("scan.jpg", *(f"scan.{c}.jpg" for c in "abcdefghijkl")),
            r"4 of 5 samples .*, more than 10%: 4 companion images of other kinds, e\.g\. scan\.[a-l]\.jpg in x\.tar",
        ),
        (
            images(*(f"{i}.jpg" for i in range(20)), *(f"{i}.of{i}.jpg" for i in range(20))),
            "20 of 40 samples .*: 20 companion images told apart by a number, e.g. ",
        ),
        (
            images(*(f"{i}.jpg" for i in range(20)), *(f"{i}.view{n}.jpg" for i in range(20) for n in range(4))),
            "80 of 100 samples .*: 80 companion images told apart by a number.* Write a_view0.jpg for a.view0.jpg",
        ),
        (images("a.jpg", ".b.jpg", ".c.jpg"), r"2 of 3 samples .*: 2 hidden images, e\.g\. \.b\.jpg in x\.tar"),
        (
            images("a.jpg") | {"b.heic": binary("b"), "c.dcm": bytes(200), "IM0001": bytes(200)},
            r"3 of 4 samples .*: 3 samples without an image, e\.g\. \S+ in x\.tar.* Formats that are read are jpg, ",
        ),
    ],
    ids=["words of one image", "numbers of their own", "views", "hidden", "formats"],
)
def test_more_than_a_tenth_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], members: dict[str, bytes], lost: str
) -> None:
    write_tar(tmp_path / "x.tar", sorted(members.items()))
    assert re.search(lost, refusal(tmp_path, capsys))
    assert index(tmp_path, "--max-passed-over", "1").passed_over


def test_no_image_at_all_says_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "x.tar", [("a.npy", binary("a")), ("b.txt", b"b")])
    assert re.search(
        "no images in 1 tars; .* 1 samples without an image, e.g. a.npy in x.tar; 1 texts without an image, e.g. b.txt",
        refusal(tmp_path, capsys, "--max-passed-over", "1"),
    )


def test_verify_finds_what_an_index_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as an index of before: one sample of a hundred, and a shard that it did not see."""
    write_tar(tmp_path / "x.tar", images(*(f"scan.{i:04d}.jpg" for i in range(100))).items())
    whole = index(tmp_path)
    one = {name: getattr(whole.samples, name)[:1] for name in ("offset", "length", "crc32", "label")}
    table = {"name": ["x.tar"], "split": ["train"], "size": whole.shards.size, "count": [1]}
    save_manifest(build_manifest(whole.url, (), table, one), ["scan"])
    assert write_shards.main(["--verify", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "x.tar: 99 images are not in the manifest, e.g. scan.0001.jpg" in told.err
    assert "0 of 1 shards are whole" in told.out
    index(tmp_path)
    write_tar(tmp_path / "VAL.TAR", images("a.jpg").items())
    assert write_shards.main(["--verify", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "VAL.TAR: is not in the manifest, nor counted as passed over" in told.err
    assert "1 of 1 shards are whole" in told.out


def test_a_tar_in_capitals_is_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", images("a.jpg").items())
    write_tar(tmp_path / "VAL/UP.TAR", images("b.JPG").items())
    manifest = index(tmp_path)
    assert manifest.shards.name == ("a.tar", "VAL/UP.TAR")
    assert manifest.splits == ("train", "validation")


PACKED = {".tar.gz": "gzip", ".tgz": "gzip", ".tar.bz2": "bzip2", ".tar.xz": "xz", ".tar.zst": "zstd -q --rm"}


@pytest.mark.parametrize(("ending", "pack"), PACKED.items())
def test_compressed_shards_name_the_command_that_unpacks_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str, pack: str
) -> None:
    write_tar(tmp_path / "a.tar", images("a.jpg").items())
    write_tar(tmp_path / "val 1.tar", images("b.jpg").items())
    subprocess.run(f"{pack} 'val 1.tar'", shell=True, check=True, cwd=tmp_path)
    (packed,) = (path for path in tmp_path.iterdir() if path.name != "a.tar")
    packed.rename(tmp_path / f"val 1{ending}")
    error = refusal(tmp_path, capsys)
    assert f"1 shards are compressed (val 1{ending})" in error
    (command,) = re.findall("`(.*)`", error)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert index(tmp_path).split("validation").num_samples == 1


def test_a_tar_that_is_not_sorted_names_the_option_that_sorts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = images(*(f"d/{i}.jpg" for i in "012")) | {f"d/{i}.cls": i.encode() for i in "012"}
    write_tar(tmp_path / "x.tar", members.items())
    (command,) = re.findall("the key 'd/0' comes at two places; pack it again with `(.*)`", refusal(tmp_path, capsys))
    subprocess.run("mkdir new; tar -xf x.tar -C new", shell=True, check=True, cwd=tmp_path)
    subprocess.run(f"{command} -cf x.tar -C new . && rm -r new", shell=True, check=True, cwd=tmp_path)
    assert labels(index(tmp_path)) == {f"d/{i}": i for i in range(3)}


def test_a_compressed_tar_that_is_called_tar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", jpeg("") + random.randbytes(1000))])
    (tmp_path / "a.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    assert re.search(r"a\.tar is compressed; .* ends in \.tar\.gz, then `gunzip` it", refusal(tmp_path, capsys))


def test_other_files_beside_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What may be a shard is told; what img2dataset writes is not; a packed copy of what is read is no error."""
    write_tar(tmp_path / "0.tar", images("a.jpg").items())
    (tmp_path / "0.tar").rename(tmp_path / "0.TAR")
    for name in ("0.TAR.GZ", "1.tar.aria2", "2.tar.tmp", "3.zip", "0.parquet", "0_stats.json", "notes.tart"):
        (tmp_path / name).write_bytes(b"?")
    manifest = index(tmp_path)
    assert manifest.passed_over == {"files *.tar.gz": 1, "files *.tar.*": 2, "files *.zip": 1}
    assert re.search(r"2 files \*\.tar\.\*, e\.g\. [12]\.tar\.(aria2|tmp)", capsys.readouterr().out)


def test_what_is_no_tar_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "b.tar.br").write_bytes(b"?")
    assert "holds no *.tar, but 1 .zip, 1 .br; give the folder" in refusal(tmp_path, capsys)
    assert "a folder is needed, and this is a file" in refusal(tmp_path / "a.zip", capsys)
    (tmp_path / "c.tar").write_bytes(b"<html>404 Not Found</html>" * 40)
    assert "or this is no tar: it begins with b'<html>404 Not" in refusal(tmp_path, capsys)


def shards(folder: Path, *names: str) -> None:
    for name in names:
        write_tar(folder / name, images("a.jpg").items())


SPLITS = {
    "Train/0.tar": "train",
    "VAL/0.tar": "validation",
    "dev-0.tar": "validation",
    "eval/0.tar": "validation",
    "testing/0.tar": "test",
    "imagenet_Val2012-3.tar": "validation",
    "constrained-0.tar": "train",
    "evaluate/00000.tar": "train",
}


@pytest.mark.parametrize(("name", "split"), SPLITS.items())
def test_words_of_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, split: str) -> None:
    shards(tmp_path, name)
    assert index(tmp_path).splits == (split,)
    assert f"shards by split: {split} 1\n1 shards, {split} 1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train/val-0.tar", "test-dev-0.tar", "imagenet-train/Validation 1/0.tar"])
def test_two_splits_in_one_name_want_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    shards(tmp_path, name, "b.tar")
    error = refusal(tmp_path, capsys)
    assert f"1 shards have two splits in their names, e.g. {name!r}: " in error
    (option,) = re.findall(r"with --split (.*), which", error)
    (option,) = shlex.split(option)
    assert set(index(tmp_path, "--split", option).splits) == {"train", option.rpartition("=")[2]}


def test_the_split_option(tmp_path: Path) -> None:
    names = ("a/0.tar", "a/1.tar", "b/[x]=1.tar", "train/2.tar")
    shards(tmp_path, *names)
    assert index(tmp_path, "--split", "VAL").splits == ("validation",)
    assert index(tmp_path).splits == ("validation",), "a shard keeps its split"
    options = ("train", "a/*=selection", "a/1.tar=dev", "b/[x]=1.tar=test")
    manifest = index(tmp_path, *(word for option in options for word in ("--split", option)))
    assert dict(zip(manifest.shards.name, manifest.shards.split, strict=True)) == dict(
        zip(names, ("selection", "validation", "test", "train"), strict=True)
    )


def test_a_split_option_that_says_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards(tmp_path, "a.tar")
    assert "no shard's name matches 'val*'; a name is, e.g., 'a.tar'" in refusal(
        tmp_path, capsys, "--split", "val*=validation"
    )
    for name in ("", "a=", "my split", "*=2017", "Größe"):
        assert "is no name of a split" in refusal(tmp_path, capsys, "--split", name)


@pytest.mark.parametrize(
    ("name", "data", "label"),
    [
        ("a.json", b"7", 7),
        ("a.json", b"7.0", 7),
        ("a.json", b'"7"', 7),
        ("a.json", b"null", -1),
        ("a.json", b"NaN", -1),
        ("a.json", b"-1", -1),
        ("a.json", b"", -1),
        ("a.json", b'{"label": NaN}', -1),
        ("a.json", b'{"label": "n/a", "caption": "a cat"}', -1),
        ("a.json", b"[[1, 2], [3, 4]]", -1),
        ("a.cls", b"-1\n", -1),
        ("a.cls", b"", -1),
        *(("a.cls", text, -1) for text in (b"NaN", b"nan\n", b"NA", b"None", b"null", b"NULL", b"N/A")),
    ],
)  # fmt: skip
def test_labels_and_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes, label: int
) -> None:
    write_tar(tmp_path / "x.tar", {**images("a.jpg"), name: data}.items())
    assert labels(index(tmp_path)) == {"a": label}
    assert "passed over" not in capsys.readouterr().out
    assert write_shards.main(["--verify", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.cls", b"-7", "a.cls: '-7'"),
        ("a.cls", b"-100", "a.cls: '-100'"),
        ("a.json", b'{"label": -2}', "a.json, label: -2"),
        ("a.json", b"-3", "a.json: -3"),
        ("a.json", b"7.5", "a.json: 7.5"),
        ("a.json", b"true", "a.json: True"),
        ("a.json", b"Infinity", "a.json: inf"),
        ("a.json", b'"a cat"', "a.json: 'a cat'"),
    ],
)
def test_labels_that_are_none_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes, words: str
) -> None:
    write_tar(tmp_path / "x.tar", {**images("a.jpg"), name: data}.items())
    manifest = index(tmp_path)
    assert labels(manifest) == {"a": -1}
    assert manifest.passed_over == {"labels that are not the number of a class": 1}
    assert f"1 labels that are not the number of a class, e.g. {words} in x.tar" in capsys.readouterr().out


def test_all_damaged_shards_are_listed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(6):
        write_tar(tmp_path / f"{i}.tar", images(*(f"{i}-{j}.jpg" for j in range(4))).items())
    good = {name: (tmp_path / name).read_bytes() for name in ("1.tar", "3.tar", "4.tar")}
    (tmp_path / "1.tar").write_bytes(b"?" * 512 + good["1.tar"][512:])
    (tmp_path / "3.tar").write_bytes(good["3.tar"][:2048])
    write_tar(tmp_path / "4.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")])
    error = refusal(tmp_path, capsys)
    assert "3 of 6 shards cannot be indexed" in error
    assert re.search(
        r"1\.tar: the tar header at byte 0 is damaged.*\n.*3\.tar ends .*truncated\n.*4\.tar: the key", error
    )

    manifest = index(tmp_path, "--skip-damaged")
    assert manifest.shards.name == ("0.tar", "2.tar", "5.tar")
    assert manifest.passed_over == {"damaged shards": 3}
    out = capsys.readouterr().out
    assert len(re.findall(r"skipped: .*/[134]\.tar", out)) == 3
    assert write_shards.main(["--verify", str(tmp_path)]) == 0
    assert "3 of 3 shards are whole" in capsys.readouterr().out

    for name, data in good.items():
        (tmp_path / name).write_bytes(data)
    receipts = {path: path.read_text() for path in (tmp_path / ".progress").iterdir()}
    assert len(receipts) == 3
    for path, text in receipts.items():
        path.write_text(text.replace('"0-0"', '"from the receipt"'))
    mended = index(tmp_path)
    assert mended.samples.num_samples == 24
    assert mended.keys()[0] == "from the receipt", "only what changed is walked"
    assert not mended.passed_over
    assert not (tmp_path / ".progress").exists()


def test_nothing_but_damaged_shards_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.tar").write_bytes(b"?" * 1024)
    assert "1 damaged shards, e.g. " in refusal(tmp_path, capsys, "--skip-damaged")


@pytest.mark.integration
@pytest.mark.parametrize("validation", ["when_supported", "when_required"])
def test_a_manifest_with_a_flipped_bit_is_read_again(s3: S3, monkeypatch: pytest.MonkeyPatch, validation: str) -> None:
    """Whether it is the client that finds it, by the server's checksum, or Parquet and the digest."""
    url = f"{s3.url}/hurt.tar"  # the proxy hurts what has .tar in its path
    written = write_photos(url, 4)
    keys = written.keys()
    names = ("manifest.json", "shards.parquet", "samples.parquet")  # in the order in which they are read
    sizes = [len(storage.read_bytes(f"{url}/{name}")) for name in names]
    proxy = HurtingProxy(s3.server.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", validation)
    for files_before, size in enumerate(sizes):
        proxy.faults.extend([Trickle(2**20)] * files_before + [Flip(size // 4)])
        proxy.requests = 0
        assert Manifest.load(url).digest == written.digest
        assert proxy.requests > len(names), "one of them was read again"
        assert not proxy.faults
    proxy.faults.append(Flip(40))
    proxy.requests = 0
    assert written.keys() == keys
    assert proxy.requests > 1
    proxy.always = Flip(3)
    with pytest.raises(StorageError, match=r"manifest\.json"):
        Manifest.load(url)
    proxy.stop()
