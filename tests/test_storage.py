"""The storage module on a folder, on fsspec's memory and on a real S3 server."""

import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.storage import DeniedError, MissingError, ShortError, StorageError
from tests.conftest import S3


@pytest.fixture(params=["folder", "file://", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3').url}/deep/prefix"
    return {"folder": str(tmp_path), "file://": f"file://{tmp_path}", "memory": f"memory://{tmp_path.name}"}[
        request.param
    ]


def test_bytes_come_back(url: str, tmp_path: Path) -> None:
    target = storage.join(url, "a", "b.bin")
    assert not storage.exists(target)
    storage.write_bytes(target, b"0123456789")
    storage.write_bytes(target, b"9876543210")
    assert storage.read_bytes(target) == b"9876543210"
    assert storage.read_range(target, 2, 5) == b"765"
    assert storage.exists(target)
    assert storage.exists(storage.join(url, "a"))
    storage.download(target, tmp_path / "local")
    assert (tmp_path / "local").read_bytes() == b"9876543210"
    storage.upload(tmp_path / "local", storage.join(url, "a", "c", "d.bin"))
    assert storage.list_sizes(storage.join(url, "a")) == {"b.bin": 10, "c/d.bin": 10}
    storage.delete(storage.join(url, "a"))
    assert storage.list_sizes(storage.join(url, "a")) == {}
    storage.delete(storage.join(url, "a"))


def test_a_listing_tells_when_the_content_has_changed(url: str) -> None:
    storage.write_bytes(storage.join(url, "same"), b"0123")
    storage.write_bytes(storage.join(url, "deep/changed"), b"0123")
    before = storage.list_files(url)
    time.sleep(0.02)  # the clock of a file system may tick in 10 ms
    storage.write_bytes(storage.join(url, "deep/changed"), b"4567")
    listed = storage.list_files(url)
    assert listed["same"] == before["same"]
    assert listed["deep/changed"].version != before["deep/changed"].version
    assert listed["deep/changed"].size == 4
    assert {name: storage.look_at(storage.join(url, name)) for name in listed} == listed


def test_what_is_missing_or_short_says_so(url: str) -> None:
    with pytest.raises(MissingError, match="nothing of that name"):
        storage.read_bytes(storage.join(url, "nowhere"))
    with pytest.raises(MissingError, match="nothing of that name"):
        storage.look_at(storage.join(url, "nowhere"))
    storage.write_bytes(storage.join(url, "x"), b"0123")
    with pytest.raises(ShortError, match="2 of the 4 bytes from 2"):
        storage.read_range(storage.join(url, "x"), 2, 6)


def test_a_writable_folder_is_left_as_it_was(url: str) -> None:
    storage.probe_writable(url)
    assert storage.list_sizes(url) == {}


def test_a_crash_while_writing_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x"
    storage.write_bytes(str(target), b"old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        storage.write_bytes(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_a_missing_bucket_is_named(s3: S3) -> None:
    attempts = (storage.probe_writable, storage.list_sizes, storage.exists, storage.look_at, storage.delete)
    for attempt in attempts:
        for url in ("s3://no-such-bucket/x", "s3://no-such-bucket"):
            with pytest.raises(StorageError, match="there is no bucket 'no-such-bucket' at http"):
                attempt(url)


def test_wrong_credentials_are_an_error_at_once(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DeniedError, match="AWS_ACCESS_KEY_ID is set"):
        storage.probe_writable(f"{s3.url}/x")


def test_an_endpoint_that_refuses_is_named(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:9 \(AWS_ENDPOINT_URL\)"):
        storage.probe_writable(f"{s3.url}/x")


@pytest.fixture
def silent_endpoint() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_an_endpoint_that_never_answers_is_an_error_in_bounded_time(
    s3: S3, silent_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 1)
    monkeypatch.setattr(storage, "_patience_s", lambda size: 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", silent_endpoint)
    for attempt in (lambda: storage.probe_writable(f"{s3.url}/x"), lambda: storage.read_bytes(f"{s3.url}/x")):
        with pytest.raises(StorageError, match=r"FSTimeoutError|ReadTimeoutError"):
            attempt()


def test_urls() -> None:
    assert storage.join("s3://b/", "/x/", "y") == "s3://b/x/y"
    assert storage.resolve("s3://b/x/") == "s3://b/x"
    assert storage.resolve("shards") == str(Path.cwd() / "shards")
    assert storage.resolve("file:///x/y") == "/x/y"
    assert [storage.is_remote(url) for url in ("s3://b", "memory://x", "/x", "file:///x")] == [True, True, False, False]
    with pytest.raises(StorageError, match="s4://"):
        storage.read_bytes("s4://x/y")


def test_a_listing_follows_links_to_folders_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "store/deep").mkdir(parents=True)
    (tmp_path / "store/deep/x").write_bytes(b"0123")
    (tmp_path / "store/back").symlink_to(tmp_path / "listed")
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed/link").symlink_to(tmp_path / "store")
    (tmp_path / "listed/again").symlink_to(tmp_path / "store/deep")
    (tmp_path / "listed/self").symlink_to(tmp_path / "listed")
    (tmp_path / "listed/file").symlink_to(tmp_path / "store/deep/x")
    assert storage.list_sizes(str(tmp_path / "listed")) == {"link/deep/x": 4, "again/x": 4, "file": 4}
    assert storage.list_sizes(str(tmp_path / "nowhere")) == {}


def test_a_listing_that_would_miss_something_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"no folder")
    with pytest.raises(StorageError, match="a folder is needed"):
        storage.list_files(str(tmp_path / "plain"))
    (tmp_path / "folder").mkdir()
    for target in ("gone.png", "link.png"):  # nothing, itself
        (tmp_path / "folder/link.png").symlink_to(target)
        with pytest.raises(StorageError, match=r"folder/link\.png"):
            storage.list_files(str(tmp_path / "folder"))
        (tmp_path / "folder/link.png").unlink()


def test_a_listing_of_a_folder_that_cannot_be_read_is_an_error() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        Path(folder).chmod(0o755)
        secret = Path(folder, "open", "secret")
        secret.mkdir(parents=True)
        secret.chmod(0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # root may read everything
            with pytest.raises(DeniedError, match="open/secret"):
                storage.list_files(folder)
            with pytest.raises(DeniedError, match="look at"):
                storage.exists(f"{folder}/open/secret/x")
        finally:
            os.seteuid(user)
