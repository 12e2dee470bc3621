"""Tars of other tools: indexed by one walk, streamed like our own; damage is an error, never fewer samples."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
import webdataset

from jobs import index as job
from pipeline import storage
from pipeline.data.foreign import index_shards, split_of
from pipeline.data.loader import Loader
from pipeline.data.manifest import Manifest
from pipeline.data.views import View
from pipeline.storage import StorageError
from tests.conftest import S3
from tests.data.images import jpeg, photo, png, write_photos


def write_tar(path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def image(seed: int) -> bytes:
    return jpeg(photo(30, 30, seed=seed))


def test_webdataset_s_own_writer(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        for i in range(10):
            writer.write({"__key__": f"deep/er/{i:03d}", "png": photo(9, 9, seed=i), "cls": i % 3, "txt": "a cat"})
    manifest = index_shards(str(tmp_path)).manifest
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
    manifest = index_shards(str(tmp_path)).manifest
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
    indexed = index_shards(str(tmp_path))
    manifest = indexed.manifest
    assert manifest.keys() == ["a", "b", "e"]
    assert manifest.samples.label.tolist() == [4, -1, 2]
    assert manifest.samples.length.tolist()[0] == len(image(1))
    assert indexed.without_image == 1


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_format(tmp_path: Path, tar_format: int) -> None:
    folder = "d" * 90
    members = [(f"{folder}/{'n' * 60}{i}.jpg", image(i)) for i in range(4)]
    if tar_format != tarfile.USTAR_FORMAT:
        members += [(f"{'é' * 150}.jpg", image(9))]
    write_tar(tmp_path / "x.tar", members, tar_format)
    manifest = index_shards(str(tmp_path)).manifest
    assert manifest.keys() == [name.removesuffix(".jpg") for name, _ in members]


def test_our_own_shards_index_to_the_same_manifest(tmp_path: Path) -> None:
    written = write_photos(str(tmp_path), 50)
    for name in ("manifest.json", "samples.parquet", "shards.parquet"):
        (tmp_path / name).unlink()
    indexed = index_shards(str(tmp_path)).manifest
    assert indexed.samples.offset.tolist() == written.samples.offset.tolist()
    assert indexed.samples.crc32.tolist() == written.samples.crc32.tolist()
    assert indexed.samples.label.tolist() == written.samples.label.tolist()


def test_splits_from_names_train_first(tmp_path: Path) -> None:
    for name in ("val/0.tar", "train/0.tar", "imagenet-test-3.tar"):
        write_tar(tmp_path / name, [("a.jpg", image(0))])
    manifest = index_shards(str(tmp_path)).manifest
    assert manifest.splits == ("train", "validation", "test")
    assert split_of("constrained-0.tar") == "train"
    assert split_of("laion/00000.tar") == "train"


DAMAGED = 4 * 1024 + 20  # in the fifth member's header


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data.__setitem__(DAMAGED, data[DAMAGED] ^ 1), "tar header .* damaged"),
        (lambda data: data.__delitem__(slice(DAMAGED - 20, None)), "truncated"),
        (lambda data: data.__delitem__(slice(DAMAGED - 3, None)), "truncated"),
    ],
    ids=["flipped header", "cut at a header", "cut in a header"],
)
def test_a_damaged_or_cut_tar_is_an_error(tmp_path: Path, damage: object, words: str) -> None:
    write_tar(tmp_path / "x.tar", [(f"{i}.jpg", b"0" * 512) for i in range(6)])
    data = bytearray((tmp_path / "x.tar").read_bytes())
    damage(data)  # type: ignore[operator]
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(StorageError, match=words):
        index_shards(str(tmp_path))
    assert not (tmp_path / "manifest.json").exists()


def test_a_key_at_two_places_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", image(0)), ("b.jpg", image(1)), ("a.cls", b"1")])
    with pytest.raises(StorageError, match="'a' comes at two places"):
        index_shards(str(tmp_path))


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
