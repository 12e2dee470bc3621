"""Where runs are tracked: by the option, else MLFLOW_TRACKING_URI, else the default, in every job, which says it."""

import os
from pathlib import Path

import pytest

from jobs import embed, pretrain, pull
from pipeline.config import Config, dump, load_config, override
from pipeline.data.writer import Sample, write_shards
from pipeline.registry.address import RegistryError, choose, choose_to_read, sqlite_uri
from pipeline.registry.tracking import connect, probe
from pipeline.sweep.config import load_sweep
from tests.data.images import jpeg, photo
from tests.jobs.refusals import refused

QUICKSTART = str(Path("configs/quickstart.yaml").absolute())
VARIABLE = "MLFLOW_TRACKING_URI"


def tracked(config: Config) -> tuple[str, str]:
    return config.tracking_uri, config.tracking_source


def test_a_run_and_a_sweep_take_the_key_then_the_variable_then_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def addresses(*changes: str) -> set[tuple[str, str]]:
        arguments = [f"storage.url={tmp_path}", *changes]
        sweep = load_sweep("configs/sweep/digits-moco.yaml", arguments)
        return {tracked(load_config(QUICKSTART, arguments)), tracked(sweep.base)}

    assert addresses() == {(f"sqlite:///{tmp_path}/mlflow.db", "the default")}
    monkeypatch.setenv(VARIABLE, "http://mlflow:5000/")
    assert addresses() == {("http://mlflow:5000", VARIABLE)}
    assert addresses("tracking.uri=http://other:5000") == {("http://other:5000", "tracking.uri")}
    monkeypatch.setenv(VARIABLE, "mlruns")
    assert addresses("tracking.uri=http://other:5000") == {("http://other:5000", "tracking.uri")}
    with pytest.raises(RegistryError, match="MLFLOW_TRACKING_URI='mlruns' is neither a server nor a sqlite file"):
        addresses()


def test_what_was_decided_on_the_driver_holds_everywhere_and_is_no_part_of_the_run_id(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without = load_config(QUICKSTART)
    monkeypatch.setenv(VARIABLE, "sqlite:///here.db")
    config = load_config(QUICKSTART)
    assert config.tracking_uri == f"sqlite:///{Path.cwd()}/here.db"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "http://elsewhere:5000")
    (tmp_path / "dump.yaml").write_text(dump(config))
    assert load_config("dump.yaml").tracking_uri == override(config, []).tracking_uri == config.tracking_uri
    assert config.run_id("") == without.run_id("")


def test_a_connection_leaves_the_variables_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow writes the URI that it is told into them, and another run of this process would take it for the user's."""
    connect("http://127.0.0.1:9")
    assert VARIABLE not in os.environ
    monkeypatch.setenv(VARIABLE, "http://mine:5000")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://registry:5000")
    connect("http://127.0.0.1:9")
    assert (os.environ[VARIABLE], os.environ["MLFLOW_REGISTRY_URI"]) == ("http://mine:5000", "http://registry:5000")


def test_readers_find_what_a_run_of_the_same_folder_or_variable_wrote(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for storage_url in (".parallax", "s3://bucket/x"):
        config = load_config(QUICKSTART, [f"storage.url={storage_url}"])
        assert choose("", "--tracking-uri", "sqlite:///.parallax/mlflow.db").uri == config.tracking_uri
    monkeypatch.setenv(VARIABLE, "http://mlflow:5000")
    assert choose_to_read(None) == tracked(load_config(QUICKSTART)) == ("http://mlflow:5000", VARIABLE)
    assert choose_to_read("http://other:5000") == ("http://other:5000", "--tracking-uri")


def test_readers_name_the_places_that_they_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards([Sample("k", jpeg(photo(16, 16)), "jpg", "train")], str(tmp_path / "shards"))
    commands = {
        pull.main: ["jobs.pull", "models:/x@champion", "--out", "out"],
        embed.main: ["jobs.embed", "--model", "models:/x@champion", "--data", "shards", "--out", "out"],
    }
    for main, command in commands.items():
        refused(monkeypatch, main, *command)
        error = capsys.readouterr().err
        for words in (
            "--tracking-uri is not given",
            f"{VARIABLE} is not set",
            f"no file {tmp_path}/.parallax/mlflow.db",
        ):
            assert words in error
        with monkeypatch.context() as patch:
            patch.setenv(VARIABLE, "sqlite:///gone.db")
            refused(patch, main, *command)
        assert f"{VARIABLE}=sqlite:///{tmp_path}/gone.db: there is no file" in capsys.readouterr().err
    assert not (tmp_path / ".parallax").exists()


def test_a_dry_run_in_any_folder_says_where_it_would_track_and_makes_nothing_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run #3 %2F?"
    samples = [Sample(f"k{i}", jpeg(photo(16, 16)), "jpg", "train", i % 2) for i in range(8)]
    write_shards(samples, str(folder / "shards"))
    monkeypatch.setenv(VARIABLE, sqlite_uri(folder / "mine.db"))
    monkeypatch.setattr(
        "sys.argv",
        [
            *("jobs.pretrain", QUICKSTART, "--dry-run", f"storage.url={folder}", f"data.shards={folder}/shards"),
            *("data.source=null", "train.global_batch_size=4", "model.args={channels: [4, 8, 8, 16]}"),
        ],
    )
    pretrain.main()
    out = capsys.readouterr().out
    assert "everything is in place" in out
    assert f"tracking  {sqlite_uri(folder / 'mine.db')} (from {VARIABLE})" in out
    assert {path.name for path in (*tmp_path.iterdir(), *folder.iterdir())} == {folder.name, "shards"}


def test_credentials_in_the_variable_stay_out_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config is saved and shown; MLflow finds them in its own variables."""
    monkeypatch.setenv(VARIABLE, "http://me:p%40ss@mlflow:5000/")
    assert load_config(QUICKSTART, ["tracking.uri=http://other:5000"]).tracking_source == "tracking.uri"
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ, "another server would be sent this password"
    config = load_config("configs/quickstart.yaml")
    assert (config.tracking_uri, config.tracking_source) == ("http://mlflow:5000", VARIABLE)
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", "p@ss")


@pytest.mark.parametrize(
    "uri",
    [
        *("https://hunter22@mlflow", "http://me:@mlflow", "http://mlflow:5000?token=hunter22", "http://me:hunter#22@h"),
        *("http://", "http:///x", "http://[::1", "http://h:99999", "http://h:x", "http://h:5000/#/experiments/1"),
    ],
)
def test_what_is_no_root_of_a_server_is_refused_by_runs_and_readers(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv(VARIABLE, uri)
    for attempt in (lambda: load_config(QUICKSTART), lambda: choose_to_read(None), lambda: connect(uri)):
        with pytest.raises(RegistryError, match=r"is not the root of a server.* or MLFLOW_TRACKING_TOKEN") as caught:
            attempt()
        assert "hunter" not in str(caught.value)


def test_a_name_that_is_too_long_is_one_message(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/{'x' * 300}.db"
    with pytest.raises(RegistryError, match="there is no file"):
        choose_to_read(uri)
    for rehearse in (True, False):
        with pytest.raises(RegistryError, match=r"File name too long|unable to open database file"):
            probe(uri, "parallax", rehearse=rehearse)
