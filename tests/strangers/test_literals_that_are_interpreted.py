"""Text that a person typed, on its way to something that reads more into it: YAML, globs, URLs, SQLAlchemy, paths."""

from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs
import pytest

from pipeline import storage
from pipeline.cluster.sweep import arrow_uri
from pipeline.config import Config, ConfigError, load_config, override
from pipeline.data.fetch import HttpFetch, open_fetch, read_range
from pipeline.data.manifest import Manifest
from pipeline.data.writer import Sample, write_shards
from pipeline.registry.address import RegistryError, normalized, sqlite_path, sqlite_uri
from pipeline.registry.tracking import Tracker, connect
from pipeline.storage import StorageError
from pipeline.sweep.config import load_sweep, overrides
from tests.conftest import S3
from tests.data.images import jpeg, photo

QUICKSTART = Path("configs/quickstart.yaml").absolute()
TYPED = [
    "/w/run #3", "a: b", "1e4", "010", "0o17", "1_000", "1:30", "2024-01-01", "on", "no", "null", "~", "*x", "&x", "!x",
    "%x", "@x", "`x`", "[x", "{x", "- x", "? x", "| x", "> x", "it's", '"half', "'a' #'", " x ", "=", "<<", "x\\ty",
]  # fmt: skip
ODD = [
    "?",
    "*",
    "[1]",
    "[!a]",
    "{a,b}",
    "#",
    "%2F",
    "%20",
    "%",
    " ",
    "+",
    "&x=1",
    ";",
    ":@",
    "é",
    "日",
    "'\"",
    "\t",
    "~",
]
EVERY = "a ?*[1]{b,c}#%2F%20&x=1;+é"


def quickstart(*changes: str) -> Config:
    return load_config(QUICKSTART, [*changes])


@pytest.mark.parametrize("text", TYPED)
def test_a_text_arrives_as_it_was_typed(text: str) -> None:
    changes = [f"tracking.experiment={text}", f"cluster.env.X={text}", f"evaluate.selection.split={text}"]
    config = quickstart(*changes)
    assert config.evaluate.selection is not None
    assert (config.tracking.experiment, config.cluster.env["X"], config.evaluate.selection.split) == (text,) * 3
    again = override(quickstart(), overrides({"tracking.experiment": text, "cluster.env": {"X": text}}))
    assert (again.tracking.experiment, again.cluster.env) == (text, {"X": text})


def test_the_storage_folder_keeps_its_number_sign(tmp_path: Path) -> None:
    sweep = load_sweep("configs/sweep/digits-moco.yaml", [f"storage.url={tmp_path}/run #3", "sweep.name=1e1"])
    assert (sweep.base.storage.url, sweep.config.name) == (f"{tmp_path}/run #3", "1e1")
    config = quickstart(f"storage.url={tmp_path}/run #3")
    assert config.storage.url == f"{tmp_path}/run #3"
    storage.probe_writable(config.storage.url)
    assert [p.name for p in tmp_path.iterdir()] == ["run #3"]


def test_quotes_and_nothing_mean_what_they_did() -> None:
    config = quickstart("tracking.experiment='a #b'", "data.source=null", "data.shards=/s", "train.global_bn=on")
    assert (config.tracking.experiment, config.data.source, config.train.global_bn) == ("a #b", None, True)
    assert quickstart("train.epochs=010", "optim.warmup_epochs=1").train.epochs == 10


@pytest.mark.parametrize("value", ["model.args={channels: [4, 8, 8, 16]} # small", "train.epochs=3 #0", "seed=1 #"])
def test_a_comment_is_refused_where_it_would_cut_a_value(value: str) -> None:
    with pytest.raises(ConfigError, match="'#' after a space begins a comment; put it between quotes"):
        quickstart(value)


def test_what_is_too_long_or_too_deep_for_yaml_is_refused() -> None:
    for value in ("9" * 5000, "[" * 1000):
        with pytest.raises(ConfigError, match="too long or too deep"):
            quickstart(f"seed={value}")


@pytest.mark.parametrize("odd", ODD)
def test_deleting_a_folder_spares_its_neighbours(s3: S3, odd: str) -> None:
    """``?*[`` in a path used to be a pattern: deleting run?1 deleted runA1."""
    folder, neighbours = f"{s3.url}/run{odd}1", ["runA1/x", "runa1/x", "runb1/x", "run1/x", f"run{odd}1x/x"]
    for name in neighbours:
        storage.write_bytes(f"{s3.url}/{name}", b"stays")
    storage.write_bytes(f"{folder}/deep/{odd}.bin", b"0123456789")
    assert storage.list_sizes(folder) == {f"deep/{odd}.bin": 10}
    assert storage.read_range(f"{folder}/deep/{odd}.bin", 2, 5) == b"234"
    assert storage.exists(folder)
    storage.delete(folder)
    assert storage.list_sizes(folder) == {}
    assert set(storage.list_sizes(s3.url)) == set(neighbours)


def test_shards_below_any_prefix_are_read_through_signed_urls(s3: S3, tmp_path: Path) -> None:
    url = f"{s3.url}/{EVERY}"
    write_shards([Sample(f"k{i}", jpeg(photo(16, 16, i)), "jpg", "train", 0) for i in range(3)], url)
    manifest = Manifest.load(url)
    manifest.verify_present()
    fetch = open_fetch(manifest)
    assert isinstance(fetch, HttpFetch)
    assert read_range(fetch, 0, 0, 512) == storage.read_bytes(manifest.shard_url(0))[:512]
    storage.download(manifest.shard_url(0), tmp_path / EVERY.replace("/", ""))
    storage.upload(tmp_path / EVERY, f"{url}/copy{EVERY}")
    assert storage.look_at(f"{url}/copy{EVERY}").size == storage.look_at(manifest.shard_url(0)).size


def test_tune_stores_a_sweep_where_we_look_for_it(s3: S3, tmp_path: Path) -> None:
    for url in (f"{s3.url}/{EVERY}", f"{tmp_path}/{EVERY}"):
        fs, path = pyarrow.fs.FileSystem.from_uri(arrow_uri(url))
        fs.create_dir(path)
        with fs.open_output_stream(f"{path}/x") as stream:
            stream.write(b"012")
        assert storage.list_sizes(url) == {"x": 3}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://b/x//double", "an empty name between two slashes"),
        ("s3://b/x/../y", "the name '..'"),
        ("s3://b/./y", "the name '.'"),
        ("s3://b/x?versionId=3/y", "'?versionId=', where s3fs cuts a key off"),
        ("s3://", "names no bucket; e.g. s3://bucket/folder"),
        ("s3:///x", "names no bucket"),
        ("s3:/b/x", "a bucket's has two slashes, s3://bucket/folder"),
        ("s3:b/x", "a folder of that very name is ./s3:b/x"),
        ("file:/x", "a local file's three, file:///folder/x"),
        ("file://data/x", "file:///folder/x"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name is nobody's home directory"),
    ],
)
def test_a_url_that_nothing_can_keep_is_refused_with_the_reason(url: str, words: str) -> None:
    calls: list[Any] = [storage.exists, storage.list_files, storage.delete, storage.read_bytes, storage.look_at]
    for call in [*calls, lambda url: storage.write_bytes(url, b"")]:
        with pytest.raises(StorageError) as caught:
            call(url)
        assert str(caught.value).startswith(url)
        assert words in str(caught.value)


def test_a_scheme_alone_never_becomes_a_folder() -> None:
    """Without its slashes ``s3://`` was the folder ``s3:`` here."""
    for url, kept in [("s3://", "s3://"), ("s3:///", "s3://"), ("memory://", "memory://"), ("s3://b/x//", "s3://b/x")]:
        assert quickstart(f"storage.url={url}").storage.url == kept


def test_a_working_directory_that_was_deleted_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(StorageError, match="working directory that was deleted"):
        quickstart("storage.url=here")


def test_a_listing_leaves_out_the_marks_of_folders_and_refuses_what_it_cannot_name(s3: S3) -> None:
    client = s3.server.client
    for key in ("folder/", "folder/deep/", "folder/x"):  # the first two as the console makes them
        client.put_object(Bucket=s3.url.removeprefix("s3://"), Key=key, Body=b"")
    assert storage.list_sizes(f"{s3.url}/folder") == {"x": 0}
    fsspec.filesystem("memory", skip_instance_cache=True).pipe_file("/stranger//x", b"012")
    with pytest.raises(StorageError, match=r"/stranger//x has an empty name.* copy that object to another key"):
        storage.list_files("memory://stranger")
    fsspec.filesystem("memory", skip_instance_cache=True).rm_file("/stranger//x")


def test_file_urls_are_decoded_once(tmp_path: Path) -> None:
    folder = tmp_path / "a %20b#?"
    storage.write_bytes(f"{folder.as_uri()}/x", b"0")
    assert storage.read_bytes(f"{folder}/x") == b"0"
    assert storage.resolve(folder.as_uri()) == str(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["a %20b#?"]


@pytest.mark.parametrize("name", ["plain", "a b", "%2F", "%20", "?", "#", "é", "[1]", "%", "%25", "a;b&c=d", "a:b@c"])
def test_the_uri_of_a_file_leads_back_to_it(name: str) -> None:
    uri = sqlite_uri(Path(f"/w/{name}/mlflow.db"))
    assert sqlite_path(uri) == Path(f"/w/{name}/mlflow.db")
    assert normalized(uri) == uri


def test_runs_are_tracked_in_a_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And experiments of any name keep their artifacts in it."""
    (tmp_path / "cwd" / EVERY).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd" / EVERY)
    uri = quickstart("storage.url=here").tracking_uri
    (tmp_path / "report.txt").write_text("well")
    for experiment in ("../../x", "/Shared/x", "..", "x" * 400 + EVERY):
        with Tracker(uri, experiment, "run") as tracker:
            tracker.log_artifact(tmp_path / "report.txt", "evaluation")
        assert [file.path for file in connect(uri).list_artifacts(tracker.mlflow_run_id, "evaluation")] == [
            "evaluation/report.txt"
        ]
    home = tmp_path / "cwd" / EVERY / "here"
    assert len(list((home / "mlartifacts").glob("*/*/artifacts/evaluation/report.txt"))) == 4
    assert {path.name for path in home.iterdir()} == {"mlflow.db", ".mlflow.db.lock", "mlartifacts"}
    assert {path.name for path in (*tmp_path.iterdir(), *home.parent.parent.iterdir(), *home.parent.iterdir())} == {
        "cwd", "report.txt", EVERY, "here",
    }  # fmt: skip


def test_a_tilde_is_the_home_directory_and_a_query_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert quickstart("tracking.uri=sqlite:///~/x.db").tracking_uri == f"sqlite:///{tmp_path}/x.db"
    assert quickstart("tracking.uri=sqlite:///x.db").tracking_uri == f"sqlite:///{tmp_path}/x.db"
    for uri, words in [
        ("sqlite:///x.db?mode=ro", "options after a"),
        ("sqlite:///:memory:", "neither a server nor a sqlite file"),
        ("sqlite:///~nobody-of-this-name/x.db", "nobody's home directory"),
    ]:
        with pytest.raises(ConfigError, match=words):
            quickstart(f"tracking.uri={uri}")
        with pytest.raises(RegistryError, match=words):
            connect(uri)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "a:b", ".hidden", "-x", "a b", "a\n", "x" * 300])
def test_a_model_name_that_is_a_path_or_a_uri_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"registry\.model_name"):
        quickstart(f"registry.model_name={name}")


@pytest.mark.parametrize("alias", ["latest", "Latest", "v1", "V12", "", "..", "a/b", "a b", "a\n"])
def test_an_alias_that_mlflow_would_refuse_is_refused_before_training(alias: str) -> None:
    with pytest.raises(ConfigError, match=r"registry\.alias"):
        quickstart(f"registry.alias={alias}")


@pytest.mark.parametrize("source", ["folder:../../../x", "folder:/data/images", "table:a?b.csv", "folder:.."])
def test_shards_of_any_source_lie_in_one_folder_of_the_storage(source: str) -> None:
    config = quickstart(f"data.source={source}", "storage.url=/w")
    assert Path(config.shards_url).resolve().parent == Path("/w/shards")
    other = quickstart(f"data.source={source}x", "storage.url=/w")
    assert config.shards_url != other.shards_url
