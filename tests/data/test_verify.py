"""What --verify finds: all that is not what was written, in headers, images, labels and sizes."""

import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.foreign import find_shards, index_shards
from pipeline.data.verify import verify
from pipeline.data.writer import Sample, write_shards
from tests.data.images import photos


def flip(shard: bytearray, at: int) -> None:
    shard[at] ^= 1


def set_label(shard: bytearray) -> None:
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        label = next(member for member in tar if member.name.endswith(".cls"))
    flip(shard, label.offset_data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda shard: shard.__delitem__(slice(-1024, None)), "has [0-9]+ bytes, the manifest says [0-9]+"),
        (lambda shard: shard.extend(bytes(512)), "has [0-9]+ bytes, the manifest says [0-9]+"),
        (lambda shard: shard.__setitem__(slice(1024, 1536), b"?" * 512), "tar header at byte 1024 is damaged"),
        (lambda shard: flip(shard, 3), "tar header at byte 0 is damaged"),
        (lambda shard: flip(shard, len(shard) - 1), "is not zero"),
        (set_label, "wrong label of 1 samples: 4"),
        (lambda shard: flip(shard, 2000), "wrong checksum of 1 samples: 4"),
        (lambda shard: shard.clear(), "has 0 bytes"),
    ],
    ids=["end mark cut", "longer", "header destroyed", "name", "behind the end", "label", "image", "empty"],
)
def test_verify_sees_all_of_a_shard(tmp_path: Path, damage: Callable[[bytearray], None], words: str) -> None:
    manifest = write_shards(photos(8), str(tmp_path), class_names=("even", "odd"), max_shard_samples=4)
    path = tmp_path / manifest.shards.name[1]
    shard = bytearray(path.read_bytes())
    damage(shard)
    path.write_bytes(shard)
    (found,) = verify(manifest)
    assert found.shard == path.name
    assert re.search(words, found.problem), found.problem
    path.unlink()
    assert [found.problem for found in verify(manifest)] == ["is missing"]


def test_verify_of_labels_without_class_names(tmp_path: Path) -> None:
    manifest = write_shards([Sample("a", b"data", "jpg", "train", label=3)], str(tmp_path))
    assert verify(manifest) == []
    shard = bytearray((tmp_path / "train-000000.tar").read_bytes())
    set_label(shard)
    (tmp_path / "train-000000.tar").write_bytes(shard)
    assert [found.problem for found in verify(manifest)] == ["wrong label of 1 samples: 0"]


def test_verify_knows_the_labels_of_other_tools_shards(tmp_path: Path) -> None:
    """Keys of a database, which the manifest numbers; none; and a name that no reader of tars would choose."""
    written = write_shards(
        [Sample(key, b"data", "bin", "train") for key in ("a/b", "ü", "a//c")], str(tmp_path / "own")
    )
    assert verify(written) == []
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (
            ("a.png", b"1"),
            ("a.cls", b"3000000000"),
            ("b.png", b"2"),
            ("c.png", b"3"),
            ("c.cls", b"7"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    manifest = index_shards(find_shards(str(tmp_path))).manifest
    assert verify(manifest) == []
    shard = tmp_path / "x.tar"
    shard.write_bytes(shard.read_bytes().replace(b"3000000000", b"3000000001"))
    assert [found.problem for found in verify(manifest)] == ["wrong label of 1 samples: 0"]
