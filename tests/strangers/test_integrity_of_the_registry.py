"""An integrity check that trusts what it checks; an identity by name (issue 15, items 11 and 12).

The artifact store is open to more people than the registry's database. Everything that lies in it may be swapped by
files that fit each other, and two registries both have a ``tiny`` version 1.
"""

import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from jobs import embed as embed_job
from jobs import pull as pull_job
from pipeline import storage
from pipeline.config import load_config
from pipeline.data.manifest import Manifest
from pipeline.data.writer import Sample, write_shards
from pipeline.embeddings import HEADER, EmbedError, Origin, claim, file_name, held, write
from pipeline.export import sha256
from pipeline.registry.address import RegistryError, choose_to_read
from pipeline.registry.entry import ENTRY_FILES, FILES_TAG
from pipeline.registry.pull import Pulled, pull, resolve
from pipeline.registry.register import register_encoder, register_run, registered
from pipeline.registry.tracking import Tracker
from pipeline.runs import Run
from tests.encoders import of_another_run
from tests.jobs import refusals
from tests.servers import MLflowServer
from tests.strangers.mutated_archives import write_small

TINY = "tiny-of-two-registries"
CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


class Bundles(NamedTuple):
    good: Path
    evil: Path  # other weights under the same run's name, all of its files in order


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    folder = tmp_path_factory.mktemp("bundles")
    return Bundles(write_small(folder / "good"), write_small(folder / "evil"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two shards of four samples that no test decodes."""
    samples = (Sample(f"{i}", b"image", "png", "train") for i in range(8))
    return write_shards(samples, str(tmp_path_factory.mktemp("shards")), max_shard_samples=4)


def register(uri: str, bundle: Path, name: str, alias: str = "champion") -> int:
    with Tracker(uri, "strangers", "run-1") as tracker:
        run = tracker.mlflow_run_id
        return register_encoder(
            bundle, tracking_uri=uri, mlflow_run_id=run, model_name=name, alias=alias, tags={}
        ).version


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry in a sqlite file, which takes seconds to make: the tests share it, each under a name of its own."""
    return f"sqlite:///{tmp_path_factory.mktemp('local')}/mlflow.db"


@pytest.fixture(scope="module")
def other(mlflow_server: MLflowServer, bundles: Bundles) -> str:
    """Somebody else's, whose TINY version 1 has other weights."""
    assert register(mlflow_server.uri, bundles.evil, TINY) == 1
    return mlflow_server.uri


class Registered(NamedTuple):
    """Version 1 of a model that only one test knows; it is @champion."""

    uri: str
    name: str
    bundle: Path

    @property
    def model(self) -> str:
        return f"models:/{self.name}/1"

    @property
    def model_id(self) -> str:
        return resolve(self.model, self.uri).source.removeprefix("models:/")

    @property
    def store(self) -> Path:
        """The folder that the entry's files lie in; sqlite only."""
        return Path(MlflowClient(self.uri).get_logged_model(self.model_id).artifact_location.removeprefix("file://"))

    def pull(self, out: Path) -> Pulled:
        return pull(self.model, self.uri, out)


def registered_at(uri: str, bundles: Bundles, folder: Path) -> Registered:
    bundle = of_another_run(bundles.good, folder / "bundle", folder.name)
    assert register(uri, bundle, folder.name) == 1
    return Registered(uri, folder.name, bundle)


@pytest.fixture
def own(local: str, bundles: Bundles, tmp_path: Path) -> Registered:
    return registered_at(local, bundles, tmp_path)


@pytest.fixture(scope="module")
def shared(local: str, bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    """Left by each test as it was."""
    return registered_at(local, bundles, tmp_path_factory.mktemp("shared"))


def origin_of(model: str, uri: str, data_digest: str) -> Origin:
    found = resolve(model, uri)
    return Origin(
        model_name=found.name,
        model_version=found.version,
        encoder_digest=found.digest,
        registry_uri=found.registry_uri,
        data_digest=data_digest,
    )


# Item 12: the hashes lie beside the files that they are of.


@pytest.mark.parametrize("backend", ["server", "sqlite"])
def test_a_version_whose_files_were_swapped_is_refused_by_pull_and_embed(
    backend: str,
    other: str,
    bundles: Bundles,
    shards: Manifest,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By another encoder with its own golden embedding, card and list of hashes: every file fits every other."""
    uri = request.getfixturevalue("mlflow_server").uri if backend == "server" else request.getfixturevalue("local")
    victim = registered_at(uri, bundles, tmp_path)
    entry = pull(f"models:/{TINY}/1", other, tmp_path / "swap").folder
    MlflowClient(uri).log_model_artifacts(victim.model_id, str(entry))

    options = ["--out", str(tmp_path / "out"), "--tracking-uri", uri]
    refusals.refused(monkeypatch, pull_job.main, "jobs.pull", victim.model, *options)
    options += ["--data", shards.url]
    refusals.refused(monkeypatch, embed_job.main, "jobs.embed", "--model", victim.model, *options)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    for error in errors:
        assert error.startswith(f"error: {victim.name} version 1 in {uri}: SHA256SUMS is not what was registered")
    assert not list(tmp_path.glob("out/*"))


def removed(file: Path) -> None:
    file.unlink()


def linked(file: Path) -> None:
    """To another file of this machine."""
    file.unlink()
    file.symlink_to(__file__)


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / file.name).write_text("")


@pytest.mark.parametrize("path", ["SHA256SUMS", *ENTRY_FILES])
def test_each_file_of_an_entry_is_compared(shared: Registered, path: str, tmp_path: Path) -> None:
    """MLmodel names the code that MLflow runs, requirements.txt what it installs."""
    file = shared.store / path
    content = file.read_bytes()
    file.write_bytes(content + b"\n")
    with pytest.raises(RegistryError, match=rf"{shared.name} version 1 in {shared.uri}: {path} is not what was"):
        shared.pull(tmp_path / "entry")
    file.write_bytes(content)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [removed, linked, a_folder])
def test_a_file_that_is_none_is_refused(own: Registered, change: Callable[[Path], None], tmp_path: Path) -> None:
    change(own.store / "extra_files" / "config.json")
    with pytest.raises(RegistryError, match=r" version 1 in .*: extra_files/config\.json (cannot|is not)"):
        own.pull(tmp_path / "entry")
    assert not (tmp_path / "entry").exists()


def test_files_that_were_not_registered_are_named_and_stay_where_they_are(
    own: Registered, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("code/loader.py", "extra_files/sitecustomize.py", "conda.yaml"):
        (own.store / path).parent.mkdir(exist_ok=True)
        (own.store / path).write_text("raise SystemExit")
    with caplog.at_level(logging.WARNING):
        own.pull(tmp_path / "entry")
    assert "not fetched: code/, conda.yaml, extra_files/sitecustomize.py" in caplog.text
    found = {path.relative_to(tmp_path / "entry").as_posix() for path in (tmp_path / "entry").rglob("*")}
    assert found == {"data", "extra_files", "SHA256SUMS", *ENTRY_FILES}


def test_a_version_without_the_tag_is_refused(own: Registered, tmp_path: Path) -> None:
    """It was registered by other code, or somebody deleted the tag; registering again makes a version that has it."""
    MlflowClient(own.uri).delete_model_version_tag(own.name, "1", FILES_TAG)
    with pytest.raises(RegistryError, match=rf"{own.name} version 1 in {own.uri} has no tag {FILES_TAG}"):
        own.pull(tmp_path / "entry")
    assert register(own.uri, own.bundle, own.name) == 2
    assert pull(f"models:/{own.name}/2", own.uri, tmp_path / "entry").version == 2


def test_a_version_that_points_at_another_models_files_is_refused(
    own: Registered, shared: Registered, tmp_path: Path
) -> None:
    client = MlflowClient(own.uri)
    good, evil = (client.get_model_version(model.name, "1") for model in (own, shared))
    client.create_model_version(own.name, evil.source, tags=good.tags, model_id=good.model_id)
    with pytest.raises(RegistryError, match=r" version 2 in .*: SHA256SUMS is not what was registered"):
        pull(f"models:/{own.name}/2", own.uri, tmp_path / "entry")


def test_an_artifact_name_that_leads_elsewhere_is_refused(own: Registered, tmp_path: Path) -> None:
    """By somebody who may also write to the registry, and sets a tag that fits."""
    sums = own.store / "SHA256SUMS"
    sums.write_text(sums.read_text() + f"{'0' * 64}  ../../escaped\n")
    MlflowClient(own.uri).set_model_version_tag(own.name, "1", FILES_TAG, sha256(sums))
    with pytest.raises(RegistryError, match=r"SHA256SUMS lists .*\.\./\.\./escaped"):
        own.pull(tmp_path / "entry")
    assert not (tmp_path / "entry").exists()


# Its kind: marks that say "registered", and are believed.


def test_an_encoder_whose_files_were_changed_is_uploaded_again(own: Registered, tmp_path: Path) -> None:
    """As the error of ``pull`` says: delete the version, submit the run again."""
    file = own.store / "MLmodel"
    file.write_bytes(file.read_bytes() + b"\n")
    damaged = own.model_id
    MlflowClient(own.uri).delete_model_version(own.name, "1")
    again = f"models:/{own.name}/{register(own.uri, own.bundle, own.name)}"
    assert resolve(again, own.uri).source != f"models:/{damaged}"
    assert pull(again, own.uri, tmp_path / "entry").folder.exists()


def test_a_run_whose_version_was_deleted_is_not_complete(local: str, bundles: Bundles, tmp_path: Path) -> None:
    name = tmp_path.name
    overrides = [f"storage.url={tmp_path}", f"tracking.uri={local}", f"registry.model_name={name}"]
    run = Run(load_config(str(CONFIG), overrides), "d" * 64)
    run.save_encoder(of_another_run(bundles.good, tmp_path / "bundle", run.id))
    with Tracker(local, "strangers", run.id) as tracker:
        first = register_run(run, tracker.mlflow_run_id, tags={})
        assert registered(run) == first
        MlflowClient(local).delete_registered_model(name)
        assert registered(run) is None
        assert register(local, bundles.evil, name) == int(first.version)  # the number is another encoder's now
        assert registered(run) is None
        assert register_run(run, tracker.mlflow_run_id, tags={}).version == "2"


# Item 11: an output folder of (name, version).


def test_another_registrys_version_of_the_same_name_and_number_is_refused(
    local: str,
    other: str,
    bundles: Bundles,
    shards: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, model = str(tmp_path / "out"), f"models:/{TINY}/1"
    assert register(local, bundles.good, TINY) == 1
    claim(out, origin_of(model, local, shards.digest), shards.url)
    options = ["--data", shards.url, "--out", out, "--tracking-uri", other]
    refusals.refused(monkeypatch, embed_job.main, "jobs.embed", "--model", model, *options)
    error = capsys.readouterr().err
    assert f"registry_uri {local}, these would have encoder_digest" in error
    assert f"registry_uri {other}; go on with those by --model {model} --tracking-uri {local}, or name" in error


def test_an_alias_that_moved_is_refused_with_the_version_that_goes_on(
    own: Registered,
    bundles: Bundles,
    shards: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, model = str(tmp_path / "out"), f"models:/{own.name}@champion"
    claim(out, origin_of(model, own.uri, shards.digest), shards.url)
    assert register(own.uri, of_another_run(bundles.good, tmp_path / "2", f"{own.name}-2"), own.name) == 2
    options = ["--data", shards.url, "--out", out, "--tracking-uri", own.uri]
    refusals.refused(monkeypatch, embed_job.main, "jobs.embed", "--model", model, *options)
    assert f"go on with those by --model {own.model}, or name another folder" in capsys.readouterr().err
    claim(out, origin_of(own.model, own.uri, shards.digest), shards.url)


ORIGIN = Origin(
    model_name="tiny", model_version=1, encoder_digest="e" * 64, registry_uri="http://mlflow:5000", data_digest="d" * 64
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_digest": "f" * 64}, f"{'f' * 64}; name another folder"),  # the number was given anew: no way back
        ({"model_name": "big"}, "go on with those by --model models:/tiny/1, or"),
        ({"data_digest": "a" * 64}, "go on with those by --data s3://bucket/shards, or"),
    ],
)
def test_what_a_folder_is_claimed_for(tmp_path: Path, change: dict[str, str], message: str) -> None:
    claim(str(tmp_path), ORIGIN, "s3://bucket/shards")
    claim(str(tmp_path), ORIGIN, "s3://elsewhere/shards")
    with pytest.raises(EmbedError, match="holds embeddings with") as caught:
        claim(str(tmp_path), ORIGIN.model_copy(update=change), "s3://elsewhere/shards")
    assert message in str(caught.value)


@pytest.mark.parametrize("backend", ["folder", "s3"])
def test_of_claims_at_once_one_is_made(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("s3").url if backend == "s3" else str(tmp_path)
    origins = [ORIGIN.model_copy(update={"model_version": version}) for version in range(1, 9)]
    barrier = threading.Barrier(len(origins))

    def at_once(origin: Origin) -> str:
        barrier.wait()
        try:
            claim(url, origin, "data")
        except EmbedError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(origins)) as pool:
        errors = list(pool.map(at_once, origins))
    (winner,) = (origin for origin, error in zip(origins, errors, strict=True) if not error)
    assert sum(f"holds embeddings with model_version {winner.model_version}," in error for error in errors) == 7


def test_the_registrys_user_and_password_are_not_written_down(
    mlflow_server: MLflowServer, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = registered_at(mlflow_server.uri, bundles, tmp_path).model
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri.replace("//", "//ada:S3cret@"))
    assert resolve(model, choose_to_read(None).uri).registry_uri == mlflow_server.uri


# What lies in the folder: a name is not proof that a shard is done.


@pytest.fixture
def embedded(shards: Manifest, tmp_path: Path) -> tuple[str, Origin]:
    """A claimed folder in which both shards are done; the second lacks an image."""
    out, origin = str(tmp_path / "out"), ORIGIN.model_copy(update={"data_digest": shards.digest})
    claim(out, origin, shards.url)
    for shard, ids in enumerate(([0, 1, 2, 3], [4, 6, 7])):
        write(out, origin, shards, shard, np.array(ids), np.ones((len(ids), 64), np.float32))
    assert held(out, origin, shards).damaged == ()
    return out, origin


def test_images_without_a_row_are_known_to_the_next_attempt(embedded: tuple[str, Origin], shards: Manifest) -> None:
    assert held(*embedded, shards).undecodable == {0: 0, 1: 1}


OLD_HEADER = b'{"model_name": "tiny", "model_version": 1, "data_digest": "d"}'  # as before the registry stood in it


@pytest.mark.parametrize("content", [b"", b'{\n "model_name": "ti', b"[]", b"\xff\xfe", OLD_HEADER])
def test_a_damaged_header_is_a_clear_error_and_is_made_anew(
    embedded: tuple[str, Origin], shards: Manifest, content: bytes
) -> None:
    out, origin = embedded
    header = Path(out) / HEADER
    header.write_bytes(content)
    with pytest.raises(EmbedError, match=r"_embeddings\.json is damaged or.*delete that file and run the same command"):
        claim(out, origin, shards.url)
    header.unlink()
    claim(out, origin, shards.url)
    other = origin.model_copy(update={"model_version": 2})
    header.unlink()
    claim(out, other, shards.url)
    with pytest.raises(EmbedError, match="comes from another folder: it has model_version 1"):
        held(out, other, shards)


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "of 0 bytes": lambda data: b"",
    "of 8 bytes": lambda data: data[:8],
    "without its end": lambda data: data[: len(data) // 2],
    "without its footer's end": lambda data: data[:-1],
    "without its middle": lambda data: data[:100] + data[1000:],
    "of zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("backend", ["folder", "s3"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_file_that_is_not_whole_is_not_done(
    embedded: tuple[str, Origin], shards: Manifest, cut: str, backend: str, request: pytest.FixtureRequest
) -> None:
    out, origin = embedded
    name = file_name(shards.shards.name[0])
    data = CUTS[cut](storage.read_bytes(storage.join(out, name)))
    url = request.getfixturevalue("s3").url if backend == "s3" else out
    storage.write_bytes(storage.join(url, name), data)
    found = held(url, origin, shards)
    assert found.damaged == (name,)
    assert 0 not in found.undecodable


def test_a_file_of_another_origin_or_shard_is_refused(
    embedded: tuple[str, Origin], shards: Manifest, tmp_path: Path
) -> None:
    """Copied from the folder of another encoder, from another shard's name, made by another tool, or left over."""
    out, origin = embedded
    first, second = (Path(out) / file_name(name) for name in shards.shards.name)
    whole = first.read_bytes()

    write(
        out,
        origin.model_copy(update={"encoder_digest": "0" * 64}),
        shards,
        0,
        np.arange(4),
        np.ones((4, 64), np.float32),
    )
    with pytest.raises(EmbedError, match=rf"{first} comes from another folder: it has encoder_digest 0{{64}}"):
        held(out, origin, shards)
    shutil.copy(second, first)
    with pytest.raises(EmbedError, match=rf"{first} comes from another folder: it has shard {shards.shards.name[1]},"):
        held(out, origin, shards)
    pq.write_table(pq.read_table(second).replace_schema_metadata(None), first)
    with pytest.raises(EmbedError, match=rf"{first} does not say what its embeddings were made from"):
        held(out, origin, shards)
    first.write_bytes(whole)
    shutil.copy(second, Path(out) / "copy of a shard.parquet")
    with pytest.raises(EmbedError, match=r"copy of a shard\.parquet belongs to no shard"):
        held(out, origin, shards)
