"""The sqlite database of runs: made beside its place and renamed into it, so it is there whole or not at all.

MLflow takes a new database through 60 migrations in place. Two first runs at once would crash on each other's tables,
and a killed one would leave tables at which every later run fails.
"""

import fcntl
import glob
import logging
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from mlflow.store.db.base_sql_model import Base
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy import make_url

from pipeline.registry.address import RegistryError, sqlite_uri

_BUSY_S = 20  # as MLflow waits for a lock
_PATIENCE_S = 120  # for another process to make the database, which takes 2 to 10 s

# What to do about what sqlite says.
_ADVICE = {
    "database is locked": "another process has been writing to it for 20 s, or its disk cannot lock files (NFS): end "
    "that process, or use a file on a local disk or a server",
    "disk is full": "free some space",
    "No space left": "free some space",
    "disk I/O error": "its disk fails or is full",
    "readonly database": "the file or its folder cannot be written; mend their permissions",
}

_logger = logging.getLogger(__name__)


def prepare(path: Path) -> None:
    """Make the database if there is none; RegistryError unless MLflow can work with the one that is there."""
    try:
        if path.exists() and not path.is_file():  # a pipe or a device has no bytes either, and would be replaced
            raise RegistryError(f"{path} cannot be read as a sqlite database: it is no file; name a file")
        if not _is_there(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                _make(path)
    except OSError as error:
        raise RegistryError(
            f"cannot write {path}: {error}; name a file in a folder of yours, on a local disk"
        ) from error
    _check(path)


def rehearse(path: Path) -> None:
    """What ``prepare`` would do where there is no database, in a folder that is gone afterwards."""
    folder = next(parent for parent in path.parents if os.path.exists(parent))
    try:
        with tempfile.TemporaryDirectory(prefix=".parallax-probe-", dir=folder) as scratch:
            _migrate(Path(scratch) / path.name)
    except OSError as error:
        raise RegistryError(f"cannot write {path}: {error}; name a file in a folder of yours") from error


def check_writable(path: Path) -> None:
    """RegistryError where the database is there and cannot be written."""
    if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        raise RegistryError(f"cannot write {path}, or its folder, which sqlite needs; name a file in a folder of yours")


def advice(error: BaseException) -> str:
    """What to do about an error of sqlite's, however it is wrapped; "" if that is not known."""
    return next((remedy for words, remedy in _ADVICE.items() if words in str(error)), "")


def _is_there(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0  # sqlite leaves an empty file where nothing was written yet


def _make(path: Path) -> None:
    part = path.with_name(f".{path.name}.new")
    for left_over in path.parent.glob(f"{glob.escape(part.name)}*"):  # of a process that was killed; also its journal
        left_over.unlink()
    if not _is_there(path):
        _migrate(part)
        if not _is_there(path):  # an MLflow of somebody else's takes no lock
            part.replace(path)
    part.unlink(missing_ok=True)


def _migrate(path: Path) -> None:
    uri = sqlite_uri(path)
    if make_url(uri).database != str(path):
        raise RegistryError(f"SQLAlchemy cannot open {path}: use a path without % and ?, or SQLAlchemy 2.1 or newer")
    path.touch()  # where it cannot be made MLflow would try ten times, over 100 s
    store = SqlAlchemyStore(uri, (path.parent / "mlartifacts").as_uri())
    store.engine.dispose()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. The lock is gone with the process that holds it."""
    with path.with_name(f".{path.name}.lock").open("w") as file:
        deadline = time.monotonic() + _PATIENCE_S
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise RegistryError(
                        f"another process has been making {path} for {_PATIENCE_S} s; is it stopped? End it, or name "
                        "another file"
                    ) from error
            if not waiting:
                _logger.warning("waiting for another process to make %s", path)
                waiting = True
            time.sleep(0.1)
        yield


def _check(path: Path) -> None:
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=_BUSY_S)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            kept = tables & {"runs", "registered_models"}
            is_used = any(connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in kept)
    except sqlite3.Error as error:
        raise RegistryError(
            f"{path} cannot be read as a sqlite database: {error}; {advice(error) or 'name another file'}"
        ) from error
    half_made = any(table.startswith("_alembic_tmp_") for table in tables)
    if not half_made and tables >= set(Base.metadata.tables):
        return
    if not is_used:
        raise RegistryError(
            f"{path} is half made, by a process that was killed, and holds no run; delete it and try again"
        )
    raise RegistryError(
        f"{path} holds runs of another version of MLflow, or its upgrade was broken off; copy the file, then run "
        f"`mlflow db upgrade '{sqlite_uri(path)}'`, or name another file"
    )
