"""An entry comes whole or not at all, and errors name what exists."""

from pathlib import Path

import pytest

from pipeline.archive import load_archive
from pipeline.export import check_golden
from pipeline.registry.address import RegistryError
from pipeline.registry.pull import pull, resolve
from pipeline.registry.register import register_encoder
from pipeline.registry.tracking import Tracker
from tests.encoders import export_tiny, of_another_run


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry with two versions of ``tiny``: @old and @champion."""
    folder = tmp_path_factory.mktemp("pull")
    uri = f"sqlite:///{folder}/mlflow.db"
    bundle = export_tiny(folder / "encoder")
    with Tracker(uri, "pull", "run-1") as tracker:
        for alias, files in (("old", bundle), ("champion", of_another_run(bundle, folder / "2", "run-2"))):
            register_encoder(
                files,
                tracking_uri=uri,
                mlflow_run_id=tracker.mlflow_run_id,
                model_name="tiny",
                alias=alias,
                tags={},
            )
    return uri


def test_the_whole_entry_comes_and_gives_the_golden_embedding(uri: str, tmp_path: Path) -> None:
    pulled = pull("models:/tiny@champion", uri, tmp_path / "entry")
    assert (pulled.name, pulled.version, pulled.folder) == ("tiny", 2, tmp_path / "entry")
    check_golden(load_archive(pulled.folder / "data" / "model.pt2"), pulled.folder / "extra_files")
    files = {path.relative_to(pulled.folder).as_posix() for path in pulled.folder.rglob("*") if path.is_file()}
    extra = {f"extra_files/{n}" for n in ("card.json", "config.json", "golden.npz", "model.safetensors", "README.md")}
    assert files >= {"MLmodel", "data/model.pt2", "requirements.txt", *extra}


def test_aliases_and_versions_resolve(uri: str) -> None:
    assert resolve("models:/tiny@old", uri) == resolve("models:/tiny/1", uri)
    assert resolve("models:/tiny@champion", uri).version == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models:/tiny@best", r"aliases of tiny: .*@champion \(version 2\).*; versions: 1, 2"),
        ("models:/tiny/7", r"versions: 1, 2"),
        ("models:/other@champion", r"registered models: tiny"),
        ("tiny", r"models:/parallax-encoder@champion"),
        ("models:/tiny@", r"models:/parallax-encoder@champion"),
        ("models:/tiny/latest", r"models:/parallax-encoder/3"),
    ],
)
def test_what_does_not_exist_is_answered_by_what_does(uri: str, tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        pull(model, uri, tmp_path / "entry")
    assert list(tmp_path.iterdir()) == []


def test_a_registry_file_that_is_not_there_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"there is no file .*typo\.db"):
        resolve("models:/tiny@champion", f"sqlite:///{tmp_path}/typo.db")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(uri: str, tmp_path: Path) -> None:
    (tmp_path / "entry").mkdir()
    with pytest.raises(RegistryError, match=r"exists already.*entry-2"):
        pull("models:/tiny@champion", uri, tmp_path / "entry")


@pytest.mark.parametrize("out", ["/dev/null/x", "/proc/x"])
def test_a_folder_that_cannot_be_made_is_named(uri: str, out: str) -> None:
    with pytest.raises(RegistryError, match=rf"{out} cannot be made: .*; name a folder"):
        pull("models:/tiny@champion", uri, Path(out))
