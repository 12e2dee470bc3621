"""Byte ranges of shards: a plain socket for S3, pread for local files, storage.py for everything else.

On S3, s3fs signs the URL and an ``http.client`` connection per thread moves the bytes: 3x less CPU than s3fs's own
reads. A request that fails is taken up where it broke off, after a pause of full jitter
(https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/). One that is far slower than others
is raced by a second one on a new connection (a hedged request: Dean & Barroso, The Tail at Scale, 2013,
https://doi.org/10.1145/2408776.2408794); whichever is first goes on, the other is closed. PATIENCE_S below a rate that
is worth waiting for is an error. 401 and 403 are signed anew once, by credentials that are read anew. What no retry can
heal (404, 412, a second 403) is an error at once.
"""

import http.client
import os
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline import storage
from pipeline.data import patience
from pipeline.data.hedging import Hedge, Usual
from pipeline.data.manifest import Manifest
from pipeline.data.patience import Patience
from pipeline.data.ranged_get import RETRIED_STATUS, Connections, PassingError, Range, RangedGet, connect, too_short
from pipeline.storage import DeniedError, MissingError, StorageError
from pipeline.waiting import Waiting

CHUNK_BYTES = 4 * 2**20  # what SeaweedFS and the mirror keep together; multipart uploads have parts of 5 MiB and more


class Fetch(Protocol):
    """Reads ranges of a manifest's shards; safe to call from several threads.

    ``chunk_bytes``: a range best begins and ends with a multiple of it, 1 where that makes no difference.
    """

    chunk_bytes: int

    def fill(self, shard: int, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the shard's bytes from ``start`` on. StorageError where they cannot be had."""

    def refill(self, shard: int, start: int, buffer: memoryview) -> None:
        """The same from the source, past any copy: the checksum of what came first was wrong."""


def read_range(fetch: Fetch, shard: int, start: int, end: int) -> memoryview:
    """Bytes [start, end) of a shard, in memory of their own."""
    buffer = np.empty(end - start, np.uint8).data  # bytearray would clear it first
    fetch.fill(shard, start, buffer)
    return buffer


def open_fetch(manifest: Manifest) -> Fetch:
    """The fastest way to the manifest's shards."""
    if not storage.is_remote(manifest.url):
        return LocalFetch(manifest)
    if manifest.url.startswith(("s3://", "s3a://")) and not urllib.request.getproxies():
        return HttpFetch(manifest)
    return StorageFetch(manifest)


class LocalFetch:
    """Shards in a local folder."""

    chunk_bytes = 1

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def fill(self, shard: int, start: int, buffer: memoryview) -> None:
        path = Path(self._manifest.shard_url(shard))
        try:
            with Waiting(lambda: f"{path}, a local file"), path.open("rb", buffering=0) as file:
                file.seek(start)
                filled = 0
                while count := file.readinto(buffer[filled:]):
                    filled += count
        except FileNotFoundError as error:
            raise MissingError(f"the shard {path} is missing; its manifest lists it") from error
        except OSError as error:
            raise StorageError(f"cannot read the shard {path}: {error}") from error
        if filled < len(buffer):
            raise too_short(str(path), start + filled, int(self._manifest.shards.size[shard]))

    refill = fill


class StorageFetch:
    """Shards on any fsspec file system, by ranged reads."""

    chunk_bytes = 1

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def fill(self, shard: int, start: int, buffer: memoryview) -> None:
        """In pieces: what came is kept when a read fails, and a slow store has storage.RANGE_TIMEOUT_S for each."""
        url = self._manifest.shard_url(shard)
        with Patience(url, len(buffer)) as progress:
            for low in range(0, len(buffer), CHUNK_BYTES):
                piece = buffer[low : low + CHUNK_BYTES]
                piece[:] = self._read(url, start + low, len(piece), progress)
                progress.got(len(piece))

    refill = fill

    def _read(self, url: str, start: int, count: int, progress: Patience) -> bytes:
        was_denied = False
        while True:
            try:
                return storage.read_range(url, start, start + count)
            except (MissingError, storage.ShortError):
                raise
            except StorageError as error:
                status = _status(error)
                if isinstance(error, DeniedError) or status in (401, 403):
                    if was_denied:
                        raise
                    was_denied = True
                    storage.forget_credentials()
                elif status is not None and 400 <= status < 500 and status not in RETRIED_STATUS:
                    raise
                else:
                    progress.pause(error)


def _status(error: StorageError) -> int | None:
    """The HTTP status that a backend's exception carries: aiohttp's, gcsfs's and adlfs's have it, each by its name."""
    found = (getattr(error.__cause__, name, None) for name in ("status", "code", "status_code"))
    return next((value for value in found if isinstance(value, int)), None)


class HttpFetch:
    """Shards on S3, through signed URLs and keep-alive connections."""

    # A part of a chunk costs the server as much as the whole: SeaweedFS 2.2 instead of 1.8 CPU-s/GB for 8 MiB anywhere.
    chunk_bytes = CHUNK_BYTES

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._etags: dict[int, str] = {}  # as first seen by this process
        self._signed: dict[int, tuple[str, float]] = {}  # shard -> URL, when it was signed
        self._signed_anew_at = 0.0
        self._connections = Connections()
        self._usual = Usual()

    def fill(self, shard: int, start: int, buffer: memoryview) -> None:
        filled, was_denied = 0, False
        with Patience(self._manifest.shard_url(shard), len(buffer)) as progress:
            while filled < len(buffer):
                asked_at = time.monotonic()
                try:
                    for count in self._stream(shard, start + filled, buffer[filled:], progress):
                        filled += count
                        was_denied = was_denied and not count  # signatures expire again and again
                        progress.got(count)
                except DeniedError:
                    if was_denied:
                        raise
                    was_denied = True
                    self._sign_anew(asked_at)
                except ssl.SSLCertVerificationError as error:
                    raise StorageError(
                        f"{self._manifest.shard_url(shard)}: {error}; AWS_CA_BUNDLE has to name a PEM file with the "
                        f"endpoint's authority, it is {os.environ.get('AWS_CA_BUNDLE', '')!r}"
                    ) from error
                except (OSError, http.client.HTTPException) as error:  # OSError: refused, reset, timed out
                    progress.pause(error, error.retry_after_s if isinstance(error, PassingError) else 0.0)

    refill = fill

    def _stream(self, shard: int, start: int, body: memoryview, progress: Patience) -> Iterator[int]:
        """Fill ``body``; yields how many bytes came, 0 where none did for a while. Raises as ``RangedGet.open``."""
        end = start + len(body)
        get, hedge = self._ask(shard, start, end), Hedge(self._usual)
        try:
            ended = False
            while body and not ended:
                for count in get.receive(body):
                    if get.etag:
                        self._etags.setdefault(shard, get.etag)
                    body = body[count:]
                    yield count
                    if body and hedge.is_due(get, progress):
                        get = self._race(get, shard, end - len(body), end, progress)
                        break
                else:
                    ended = True
            if body:
                raise ConnectionError(f"the connection ended {len(body)} bytes early")
        except BaseException:
            get.close()
            raise
        self._usual.note(get)
        get.keep(self._connections)

    def _race(self, get: RangedGet, shard: int, start: int, end: int, progress: Patience) -> RangedGet:
        """``get`` or a second request for the rest, on a new connection: the first to answer; the other is closed."""
        progress.failed(TimeoutError(get.describe()))
        try:
            second = self._ask(shard, start, end, is_second=True)
        except (OSError, http.client.HTTPException) as error:
            progress.failed(error)
            return get
        first = get
        try:
            until = time.monotonic() + patience.TIMEOUT_S
            while first is get and (left := until - time.monotonic()) > 0:
                if wait([second.sock] if get.answered else [get.sock, second.sock], left) != [second.sock]:
                    break
                if second.open():
                    first = second
        except DeniedError:  # another signature is better than waiting on
            raise
        except (OSError, http.client.HTTPException, StorageError) as error:  # what answers may not have ranges
            progress.failed(error)
        finally:
            (second if first is get else get).close()
        return first

    def _ask(self, shard: int, start: int, end: int, is_second: bool = False) -> RangedGet:
        url = urllib.parse.urlsplit(self._url(shard))
        name, size = self._manifest.shard_url(shard), int(self._manifest.shards.size[shard])
        connection = connect(url) if is_second else self._connections.take(url)
        return RangedGet(url, Range(name, start, end, size, self._etags.get(shard, "")), connection)

    def _url(self, shard: int) -> str:
        url, signed_at = self._signed.get(shard, ("", 0.0))
        if not url or time.monotonic() - signed_at > storage.SIGNATURE_LIFETIME_S / 2:
            try:
                url, signed_at = storage.sign(self._manifest.shard_url(shard)), time.monotonic()
            except StorageError as error:
                if not self._etags:  # credentials never worked
                    raise
                raise ConnectionError(str(error)) from error
            self._signed[shard] = url, signed_at
        return url

    def _sign_anew(self, refused_at: float) -> None:
        """Credentials may have been replaced, or their role's session renewed; another thread may know already."""
        if self._signed_anew_at < refused_at:
            self._signed_anew_at = time.monotonic()
            storage.forget_credentials()
            self._signed.clear()
