"""Files and objects by URL: the only user of fsspec and s3fs.

A URL is a local path, ``file:///...`` or anything fsspec knows (``s3://bucket/key``). Every character of a path or key
stands for itself: none is a pattern, a query or an escape, but for %XX in ``file:///...``, which is a URI. Credentials
and endpoints come from the environment only (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, ...; with
FSSPEC_S3_ANON=true requests are not signed, as a public bucket takes them). Every call is bounded: an unreachable
endpoint is a StorageError within about 15 s, not a hang. s3fs is not fork-safe, so a process that forks must not have
touched it; the loader's workers are fresh interpreters for that reason.
"""

import functools
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipeline.errors import UserError

CONNECT_TIMEOUT_S = 3
READ_TIMEOUT_S = 5
_PART = ".part"  # ends the names of files that are being written
S3_ATTEMPTS = 3  # s3fs's own retries, 0.1 and 0.17 s apart; botocore's are off, they would multiply
SIGNATURE_LIFETIME_S = 3600
RANGE_TIMEOUT_S = 300.0  # of one ``read_range``; READ_TIMEOUT_S alone would let a byte now and then renew it
MIN_FREE_BYTES = 2**30  # on a local disk: three checkpoints of a ResNet-50 with its momentum encoder are 0.9 GB
_DELETES = 16  # at a time


class StorageError(UserError):
    """A file, an object or an endpoint is not usable; the message names the URL, the cause and what to do."""


class MissingError(StorageError):
    """Nothing lies at this URL."""


class DeniedError(StorageError):
    """The credentials, or the file's permissions, do not allow it."""


class ShortError(StorageError):
    """The content ends before the bytes that were asked for."""


def is_remote(url: str) -> bool:
    """Whether ``url`` lies outside the local file system."""
    return "://" in url and not url.startswith("file://")


def resolve(url: str) -> str:
    """An absolute local path, or ``scheme://...`` untouched (without trailing slashes)."""
    if not is_remote(url):
        return str(_local(url))
    scheme, _, path = url.partition("://")
    return f"{scheme}://{path.rstrip('/')}"


def join(url: str, *parts: str) -> str:
    """``url`` and ``parts`` with one slash between them."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def folder_name(text: str) -> str:
    """``text`` as the name of one folder, on any disk and in any URL; texts that differ have names that differ."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).lstrip(".-")[:80]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}".lstrip("-")


def exists(url: str) -> bool:
    """Whether a file, an object or a folder lies at ``url``."""
    with _explained("look at", url):
        if not is_remote(url):
            return _local(url).exists()
        fs, path = _remote(url)
        try:
            fs.info(path)  # fs.exists would also be False where the endpoint does not answer
        except FileNotFoundError as error:
            if _lacks_bucket(error):
                raise
            return False
        return True


def read_bytes(url: str) -> bytes:
    """The whole content. MissingError where there is none."""
    with _explained("read", url):
        if not is_remote(url):
            return _local(url).read_bytes()
        fs, path = _remote(url)
        return bytes(fs.cat_file(path))


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of the content; StorageError where it is shorter than ``end``."""
    with _explained("read", url):
        if is_remote(url):
            fs, path = _remote(url)
            bound = {"timeout": RANGE_TIMEOUT_S} if fs.async_impl else {}  # of fsspec's loop; others have none
            data = bytes(fs.cat_file(path, start=start, end=end, **bound))
        else:
            with _local(url).open("rb") as file:
                file.seek(start)
                data = file.read(end - start)
    if len(data) != end - start:
        raise ShortError(f"{url} ends before byte {end}: got {len(data)} of the {end - start} bytes from {start}")
    return data


def write_bytes(url: str, data: bytes) -> None:
    """Write ``data`` so that a reader sees all of it or what was there before."""
    with _explained("write", url):
        if is_remote(url):
            fs, path = _remote(url)
            fs.pipe_file(path, data, timeout=_patience_s(len(data)))
            return
        with _replacing(_local(url)) as part, part.open("wb") as file:
            file.write(data)


def create(url: str, data: bytes) -> None:
    """Write ``data``, atomically, unless something lies there: of several at once one writes.

    S3, GCS and local folders decide it; elsewhere two may both write, so the caller reads back what is there.
    """
    with _explained("write", url):
        if exists(url):
            return
        try:
            if is_remote(url):
                fs, path = _remote(url)
                fs.pipe_file(path, data, mode="create", timeout=_patience_s(len(data)))
            else:
                with _replacing(_local(url), _link) as part:
                    part.write_bytes(data)
        except OSError:  # FileExistsError, or EINVAL with S3 servers that do not say which condition failed
            if not exists(url):
                raise


def upload(local_path: str | Path, url: str) -> None:
    """Copy a local file to ``url``, atomically."""
    with _explained("write", url):
        if is_remote(url):
            fs, path = _remote(url)
            fs.put_file(str(local_path), path, timeout=_patience_s(Path(local_path).stat().st_size))
            return
        with _replacing(_local(url)) as part:
            shutil.copyfile(local_path, part)


def download(url: str, local_path: str | Path) -> None:
    """Copy the content of ``url`` to a local file, atomically."""
    with _explained("read", url), _replacing(Path(local_path)) as part:
        if is_remote(url):
            fs, path = _remote(url)
            fs.get_file(path, str(part))  # READ_TIMEOUT_S bounds each wait
        else:
            shutil.copyfile(_local(url), part)


@dataclass(frozen=True)
class Listed:
    """What a listing tells about a file or object."""

    size: int  # bytes
    version: str  # changes with the content: the ETag, or the time of the last change, as the backend has it


def list_files(folder_url: str) -> dict[str, Listed]:
    """Relative name (with ``/`` for what lies deeper) -> every file below a folder, by one listing.

    A folder that is not there is empty. What is being written, or was when its writer was killed, is not in it. Links
    are followed; StorageError names one that leads nowhere, and a folder that cannot be read: what they hide would be
    missing silently.
    """
    with _explained("list", folder_url):
        if is_remote(folder_url):
            fs, root = _remote(folder_url)
            found = fs.find(root, detail=True)
            return {_below(root, path): _of_object(info) for path, info in found.items() if _is_file(root, path)}
        return dict(_listed(str(_local(folder_url)), "", ()))


def _listed(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[tuple[str, Listed]]:
    """The files of a local folder and those below it; ``above``: the folders it lies in, to which a link may lead."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as scan:
            entries = list(scan)
    except FileNotFoundError:  # never there, or deleted since its parent was read
        return
    for entry in entries:
        if entry.is_dir():
            yield from _listed(entry.path, f"{prefix}{entry.name}/", (*above, real))
        elif not entry.name.endswith(_PART):
            try:
                stat = entry.stat()
            except FileNotFoundError as error:
                if os.path.islink(entry.path):
                    raise StorageError(
                        f"{entry.path} is a link to {os.readlink(entry.path)}, where nothing lies; mend or delete it"
                    ) from error
                continue  # deleted since the folder was read
            yield prefix + entry.name, _of_file(stat)


def list_sizes(folder_url: str) -> dict[str, int]:
    """``list_files``, without the versions."""
    return {name: file.size for name, file in list_files(folder_url).items()}


def look_at(url: str) -> Listed:
    """What a listing would tell about one file or object. MissingError where there is none."""
    with _explained("look at", url):
        if is_remote(url):
            fs, path = _remote(url)
            return _of_object(fs.info(path))
        return _of_file(_local(url).stat())


def delete(url: str) -> None:
    """Remove a file, an object or a folder with all it holds; what is not there is not an error. A remote file system
    that has folders keeps them, empty."""
    with _explained("delete", url):
        if is_remote(url):
            fs, path = _remote(url)
            # Name by name: fs.rm takes the path as a pattern, and passes over what S3 refuses to delete.
            found = {*fs.find(path), *([path] if _is_object(fs, path) else [])}
            with ThreadPoolExecutor(_DELETES) as pool:
                list(pool.map(fs.rm_file, found))
            return
        local = _local(url)
        if local.is_dir():
            shutil.rmtree(local)
        else:
            local.unlink(missing_ok=True)


def probe_writable(url: str) -> None:
    """Write, read back and delete a small object below ``url``; StorageError says what to fix, also where a local disk
    has less than MIN_FREE_BYTES left."""
    probe = join(url, f".probe-{uuid.uuid4().hex[:12]}")
    write_bytes(probe, b"parallax")
    if read_bytes(probe) != b"parallax":
        raise StorageError(f"{url}: what was written is not what is read back; is a cache in between?")
    delete(probe)
    if not is_remote(url) and (free := shutil.disk_usage(_local(url)).free) < MIN_FREE_BYTES:
        raise StorageError(
            f"{url} has {free / 2**20:,.0f} MiB left on its disk, and checkpoints or embeddings need at least "
            f"{MIN_FREE_BYTES / 2**20:,.0f} MiB; delete what is not needed, or name a folder on another disk"
        )


def sign(url: str) -> str:
    """An ``http(s)://`` URL that GETs an S3 object without credentials, for SIGNATURE_LIFETIME_S."""
    with _explained("sign", url):
        fs, path = _remote(url)
        return str(fs.sign(path, expiration=SIGNATURE_LIFETIME_S))


def forget_credentials() -> None:
    """The next call reads them anew, from wherever they come: a file may have been replaced meanwhile."""
    _filesystem.cache_clear()


def _is_object(fs: Any, path: str) -> bool:
    """Whether an object has this very name; on S3 there may be a folder of the same name besides."""
    try:
        return bool(fs.info(path)["type"] == "file")
    except FileNotFoundError as error:
        if _lacks_bucket(error):
            raise
        return False


def _is_file(root: str, path: str) -> bool:
    """Neither the folder that was listed nor an empty object in the place of a folder, as the S3 console makes them."""
    return path != root and not path.endswith("/")


def _below(root: str, path: str) -> str:
    """The name of a listed object, relative to the folder ``root``."""
    name = path[len(root) + 1 :]
    if problem := _unusable(name):
        raise StorageError(f"{path} {problem}; copy that object to another key and delete it")
    return name


def _of_file(stat: os.stat_result) -> Listed:
    return Listed(stat.st_size, str(stat.st_mtime_ns))


def _of_object(info: dict[str, Any]) -> Listed:
    """Every fsspec backend has names of its own: S3 and Azure, GCS, HDFS and SFTP, memory."""
    keys = ("ETag", "etag", "LastModified", "updated", "mtime", "created")
    version = next((info[key] for key in keys if info.get(key)), "")
    if isinstance(version, datetime):
        version = version.timestamp()  # memory's, in one of info and find
    return Listed(int(info["size"]), str(version))


def _patience_s(size: int) -> float:
    """Seconds a write may take: a PUT waits for ``100 Continue`` under no timeout of aiohttp's."""
    return 15 + size / 2**20


def _local(url: str) -> Path:
    if url.startswith("file://"):
        path = unquote(url.removeprefix("file://").removeprefix("localhost"))
        if not path.startswith("/"):
            raise StorageError(f"{url} names a file of another host; a local file has three slashes, file:///folder/x")
        return Path(path)
    if re.match(r"[a-z][a-z0-9+]*:/|(file|s3a?|gs|gcs|az|abfss?|hdfs):", url):
        raise StorageError(
            f"{url} is neither a path nor a URL; a bucket's has two slashes, s3://bucket/folder, a local file's three, "
            f"file:///folder/x, and a folder of that very name is ./{url}"
        )
    try:
        return Path(url).expanduser().absolute()
    except RuntimeError as error:
        raise StorageError(f"{url}: {url.partition('/')[0]} is nobody's home directory; write the path out") from error
    except FileNotFoundError as error:
        raise StorageError(f"{url} is a path from a working directory that was deleted; change to another") from error


@contextmanager
def _replacing(target: Path, move: Callable[[Path, Path], object] = Path.replace) -> Iterator[Path]:
    """A temporary neighbour of ``target`` that becomes ``target`` by ``move`` once it is on the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=_PART, dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)  # mkstemp's 0600 would hide a shared folder's files from the other users
        move(part, target)
    finally:
        part.unlink(missing_ok=True)


def _link(part: Path, target: Path) -> None:
    """FileExistsError if ``target`` is there."""
    try:
        os.link(part, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links here (gcsfuse, exFAT): a reader may see half of it
        with target.open("xb") as file:
            file.write(part.read_bytes())


def _remote(url: str) -> tuple[Any, str]:
    scheme, _, path = url.partition("://")
    if scheme in ("s3", "s3a") and path[:1] in ("", "/"):
        raise StorageError(f"{url} names no bucket; e.g. s3://bucket/folder")
    if problem := _unusable(path.strip("/")):
        raise StorageError(f"{url} {problem}; use another name")
    environment = tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))
    fs = _filesystem(scheme, os.getpid(), environment)
    return fs, str(fs._strip_protocol(url)).rstrip("/")


def _unusable(path: str) -> str:
    """Why a remote path cannot be used; "" if it can."""
    if "?versionId=" in path:
        return "contains '?versionId=', where s3fs cuts a key off"
    if empty := set(path.split("/")) & {"", ".", ".."}:
        kinds = {"": "an empty name between two slashes", ".": "the name '.'", "..": "the name '..'"}
        return f"has {kinds[min(empty)]}, which S3 keeps as it is and other servers and clients resolve"
    return ""


@functools.lru_cache
def _filesystem(scheme: str, pid: int, environment: tuple[tuple[str, str], ...]) -> Any:
    import fsspec  # 1 s with s3fs behind it; a run on local folders never pays it

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme in ("s3", "s3a"):
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"max_attempts": 0},
            "signature_version": "s3v4",  # sign() would fall back to version 2, which newer regions refuse
            "max_pool_connections": 32,
        }
    try:
        fs = fsspec.filesystem(scheme, **options)
    except (ValueError, ImportError) as error:
        raise StorageError(f"{scheme}:// is not a storage this installation can reach: {error}") from error
    if scheme in ("s3", "s3a"):
        import s3fs.core

        fs.retries = S3_ATTEMPTS
        s3fs.core.set_custom_error_handler(_may_pass)
    return fs


def _may_pass(error: Exception) -> bool:
    """Whether s3fs should try again on an S3 error; by itself it gives up at the first 500 or flipped bit."""
    if type(error).__name__ == "FlexibleChecksumError":  # the body's is not the one in the header
        return True
    response = getattr(error, "response", None) or {}
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (500, 502, 503, 504)


# What to do about what s3fs and what lies below it raise, by the exception's name or S3's error code.
_ADVICE = {
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; a public bucket is read "
    "without any under FSSPEC_S3_ANON=true",
    "PartialCredentialsError": "set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "ProfileNotFound": "AWS_PROFILE has to name a profile of ~/.aws/config or ~/.aws/credentials, or be unset",
    "ConfigParseError": "mend ~/.aws/config, or what AWS_CONFIG_FILE names",
    "EndpointConnectionError": "nothing answers there: is the address in AWS_ENDPOINT_URL right, and the server up?",
    "ConnectTimeoutError": "nothing answers there: is the address in AWS_ENDPOINT_URL right, and the server up?",
    "InvalidRegionError": "AWS_DEFAULT_REGION has to be a region's name such as us-east-1",
    "NoRegionError": "set AWS_DEFAULT_REGION, e.g. us-east-1",
    "FileNotFoundError": "AWS_CA_BUNDLE, if set, has to name a PEM file",
    "SSLError": "AWS_CA_BUNDLE has to name a PEM file with the endpoint's authority; an endpoint without TLS is http://",
    "FlexibleChecksumError": "what came is not what was stored: a proxy or the server damaged it; try again, and set "
    "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required if the server's checksums are wrong",
    "ParamValidationError": "a bucket's name has 3 to 63 lower-case letters, digits, dots and hyphens: s3://bucket/key",
    "InvalidAccessKeyId": "the server does not know AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID",
    "ExpiredToken": "AWS_SESSION_TOKEN has expired; fetch new credentials",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "PermanentRedirect": "the bucket lies in another region; set AWS_DEFAULT_REGION to it",
}
_CHECK = "check the URL, AWS_ENDPOINT_URL, the credentials and the bucket's policy"


@contextmanager
def _explained(verb: str, url: str) -> Iterator[None]:
    """Turn what any backend raises into a StorageError that teaches."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        if _lacks_bucket(error):
            bucket = url.partition("://")[2].partition("/")[0]
            raise StorageError(
                f"cannot {verb} {url}: there is no bucket {bucket!r} at {_endpoint()}; create it, or correct its name"
            ) from error
        raise MissingError(f"cannot {verb} {url}: there is nothing of that name") from error
    except NotADirectoryError as error:
        raise StorageError(f"cannot {verb} {url}: a folder is needed, and this is a file or lies below one") from error
    except PermissionError as error:
        raise DeniedError(f"cannot {verb} {url}: access denied ({error}); {_hint(url, error)}") from error
    except Exception as error:  # every backend has exceptions of its own: name them all, keep the cause
        reason = (str(error).splitlines() or [""])[-1]
        raise StorageError(f"cannot {verb} {url}: {type(error).__name__}: {reason}; {_hint(url, error)}") from error


def _names(error: BaseException | None) -> Iterator[str]:
    """An exception's types, S3's error code and operation, and those of what caused it."""
    while error is not None:
        yield from (kind.__name__ for kind in type(error).__mro__)
        if isinstance(response := getattr(error, "response", None), dict):
            yield response.get("Error", {}).get("Code", "")
            yield getattr(error, "operation_name", "")
        error = error.__cause__ or error.__context__


def _lacks_bucket(error: FileNotFoundError) -> bool:
    """Whether it is the bucket that is not there; only S3 tells."""
    return not {"NoSuchBucket", "HeadBucket"}.isdisjoint(_names(error))


def _hint(url: str, error: BaseException) -> str:
    if not url.startswith(("s3://", "s3a://")):
        return "check the path and its permissions"
    advice = next((_ADVICE[name] for name in _names(error) if name in _ADVICE), _CHECK)
    key = "set" if os.environ.get("AWS_ACCESS_KEY_ID") else "not set"
    return f"{advice} (endpoint: {_endpoint()}; AWS_ACCESS_KEY_ID is {key})"


def _endpoint() -> str:
    given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return f"{given} (AWS_ENDPOINT_URL)" if given else "Amazon"
