"""A manifest that is not what was written is an error that names the file and what to do."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.manifest import Manifest
from pipeline.data.writer import write_shards
from pipeline.storage import StorageError
from tests.data.images import photos


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_shards(photos(6), str(tmp_path), class_names=("even", "odd"), max_shard_samples=3)


REMEDY = ".*; copy the folder again, or make the manifest anew with `python -m jobs.index`"


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ([], r"manifest\.json is not the header"),
        (None, r"manifest\.json is not the header .* None"),
        ("x", r"manifest\.json is not the header .* 'x'"),
        ({}, r"manifest\.json has format None, this version reads 1"),
        ({"format": 1}, r"manifest\.json: class_names is None"),
        ({"class_names": 5}, r"manifest\.json: class_names is 5"),
        ({"class_names": [5]}, r"manifest\.json: class_names is \[5\]"),
        ({"passed_over": ["hidden files"]}, r"manifest\.json: passed_over is \['hidden files'\]"),
        ({"passed_over": {"hidden files": None}}, r"manifest\.json: passed_over is \{'hidden files': None\}"),
        ({"digest": 3}, "its header says 3"),
        ({"digest": None}, "its header says None"),
    ],
)
def test_a_header_of_another_form(manifest: Manifest, header: Any, words: str) -> None:
    file = Path(manifest.url, "manifest.json")
    if isinstance(header, dict) and header and "format" not in header:
        header = json.loads(file.read_text()) | header
    file.write_text(json.dumps(header))
    with pytest.raises(StorageError, match=words + REMEDY):
        Manifest.load(manifest.url)


def test_a_header_of_before_anything_was_counted(manifest: Manifest) -> None:
    file = Path(manifest.url, "manifest.json")
    header = json.loads(file.read_text())
    assert header.pop("passed_over") == {}
    file.write_text(json.dumps(header))
    assert Manifest.load(manifest.url).digest == manifest.digest


@pytest.mark.parametrize("content", [b"{", b"\xff", b""])
def test_a_header_that_is_no_json(manifest: Manifest, content: bytes) -> None:
    Path(manifest.url, "manifest.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"manifest\.json is not JSON" + REMEDY):
        Manifest.load(manifest.url)


COLUMNS = [
    *(("shards.parquet", name) for name in ("name", "split", "size", "count")),
    *(("samples.parquet", name) for name in ("offset", "length", "crc32", "label", "key")),
]


@pytest.mark.parametrize(("name", "column"), COLUMNS)
@pytest.mark.parametrize("damage", ["missing", "another type", "gaps"])
def test_columns_of_another_form(manifest: Manifest, name: str, column: str, damage: str) -> None:
    file = Path(manifest.url, name)
    table = pq.read_table(file)
    place = table.column_names.index(column)
    other = {
        "missing": None,
        "another type": pa.array([["a"]] * len(table)) if column in ("name", "split", "key") else ["a"] * len(table),
        "gaps": pa.array([None, *table[column].to_pylist()[1:]], table[column].type),
    }[damage]
    table = table.remove_column(place)
    pq.write_table(table if other is None else table.add_column(place, column, pa.array(other)), file)
    with pytest.raises(StorageError, match=name.replace(".", r"\.") + ".*" + REMEDY):
        Manifest.load(manifest.url).keys()


@pytest.mark.parametrize("counts", [[2, 3], [-1, 7], [10**15, 3]])
def test_counts_that_are_not_the_rows(manifest: Manifest, counts: list[int]) -> None:
    file = Path(manifest.url, "shards.parquet")
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.column_names.index("count"), "count", pa.array(counts)), file)
    with pytest.raises(StorageError, match="the shards hold -?[0-9]+ samples, the manifest 6" + REMEDY):
        Manifest.load(manifest.url)


def test_a_parquet_file_that_was_cut(manifest: Manifest) -> None:
    for name in ("samples.parquet", "shards.parquet"):
        file = Path(manifest.url, name)
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(StorageError, match=name.replace(".", r"\.") + ".* is not the Parquet file" + REMEDY):
            Manifest.load(manifest.url)
