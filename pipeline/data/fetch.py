"""Byte ranges of shards: a plain socket for S3, pread for local files, storage.py for everything else.

On S3, s3fs signs the URL and an ``http.client`` connection per thread moves the bytes: 3x less CPU than s3fs's own
reads. A request that fails or stalls is taken up where it broke off, after a pause of full jitter
(https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/); only PATIENCE_S without a single
new byte is an error. What no retry can heal (401, 403, 404, 412) is an error at once.
"""

import http.client
import os
import random
import socket
import ssl
import struct
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline import storage
from pipeline.data.manifest import Manifest
from pipeline.storage import DeniedError, MissingError, StorageError

CHUNK_BYTES = 4 * 2**20  # what SeaweedFS and the mirror keep together; multipart uploads have parts of 5 MiB and more
PATIENCE_S = 60.0  # an object store may restart meanwhile
TIMEOUT_S = 5.0  # of a connect and of each wait for bytes
_PAUSE_S, _MAX_PAUSE_S = 0.1, 5.0
_READ_BYTES = 2**20  # of TLS, in one call; else at a wake-up; what a broken connection loses at most
_RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})


class ReplacedError(StorageError):
    """A shard is not the object it was when this process first read it."""


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
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                filled = 0
                while count := file.readinto(buffer[filled:]):
                    filled += count
        except FileNotFoundError as error:
            raise MissingError(f"the shard {path} is missing; its manifest lists it") from error
        except OSError as error:
            raise StorageError(f"cannot read the shard {path}: {error}") from error
        if filled < len(buffer):
            raise _too_short(self._manifest, shard, start + filled)

    refill = fill


class StorageFetch:
    """Shards on any fsspec file system, by ranged reads."""

    chunk_bytes = 1

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def fill(self, shard: int, start: int, buffer: memoryview) -> None:
        patience = _Patience(self._manifest.shard_url(shard))
        while True:
            try:
                buffer[:] = storage.read_range(self._manifest.shard_url(shard), start, start + len(buffer))
                break
            except (MissingError, DeniedError, storage.ShortError):
                raise
            except StorageError as error:
                patience.pause(error)

    refill = fill


class HttpFetch:
    """Shards on S3, through signed URLs and keep-alive connections."""

    # A part of a chunk costs the server as much as the whole: SeaweedFS 2.2 instead of 1.8 CPU-s/GB for 8 MiB anywhere.
    chunk_bytes = CHUNK_BYTES

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._etags: dict[int, str] = {}  # as first seen by this process
        self._signed: dict[int, tuple[str, float]] = {}  # shard -> URL, when it was signed
        self._local = threading.local()

    def fill(self, shard: int, start: int, buffer: memoryview) -> None:
        patience = _Patience(self._manifest.shard_url(shard))
        filled = 0
        while filled < len(buffer):
            before = filled
            try:
                response = self._request(shard, start + filled, start + len(buffer))
                for count in _receive(response, self._local.connection.sock, buffer[filled:]):
                    filled += count
                if filled < len(buffer):
                    raise ConnectionError(f"the connection ended after {filled} of {len(buffer)} bytes")
                response.close()  # wholly read: the connection can be used again
            except ssl.SSLCertVerificationError as error:
                raise StorageError(
                    f"{self._manifest.shard_url(shard)}: {error}; AWS_CA_BUNDLE has to name a PEM file with the "
                    f"endpoint's authority, it is {os.environ.get('AWS_CA_BUNDLE', '')!r}"
                ) from error
            except (OSError, http.client.HTTPException) as error:  # OSError: refused, reset, timed out
                self._drop_connection()
                if filled > before:
                    patience.renew()
                patience.pause(error)

    refill = fill

    def _request(self, shard: int, start: int, end: int) -> http.client.HTTPResponse:
        """A response whose body is the range. OSError or HTTPException if trying again may help."""
        url = urllib.parse.urlsplit(self._url(shard))
        headers = {"Range": f"bytes={start}-{end - 1}"}
        if shard in self._etags:
            headers["If-Match"] = self._etags[shard]
        connection = self._connection(url)
        connection.request("GET", f"{url.path}?{url.query}", headers=headers)
        response = connection.getresponse()
        if response.status == 206:
            self._check_object(shard, response)
            if response.length not in (end - start, None):  # None: chunked
                raise ConnectionError(f"{response.length} bytes instead of the {end - start} asked for")
            return response
        reason = f"HTTP {response.status} {response.reason}"
        detail = response.read(2000).decode(errors="replace")
        self._drop_connection()
        where = self._manifest.shard_url(shard)
        if response.status in _RETRIED_STATUS:
            raise ConnectionError(reason)
        if response.status in (401, 403):
            _, signed_at = self._signed.pop(shard, ("", time.monotonic()))  # another thread may have dropped it
            if time.monotonic() - signed_at > storage.SIGNATURE_LIFETIME_S / 2:
                raise ConnectionError(f"{reason}, perhaps because the signature is old")  # the next one is new
            raise DeniedError(
                f"{where}: access denied ({reason}); check the credentials and the bucket's policy: {detail}"
            )
        if response.status == 404:
            raise MissingError(f"{where} is missing; the manifest lists it: was it deleted or moved?")
        if response.status == 412:
            raise ReplacedError(
                f"{where} was replaced while it was being read; shards must not change under a run: restore it, or "
                "make the manifest anew with `python -m jobs.index` and start a new run"
            )
        if response.status == 416:
            raise _too_short(self._manifest, shard, start)
        raise StorageError(f"{where}: unexpected {reason} to a ranged GET: {detail}")

    def _check_object(self, shard: int, response: http.client.HTTPResponse) -> None:
        total = (response.getheader("Content-Range") or "").rpartition("/")[2]
        expected = int(self._manifest.shards.size[shard])
        if total.isdigit() and int(total) != expected:
            self._drop_connection()
            raise _too_short(self._manifest, shard, int(total))
        etag = response.getheader("ETag")
        if etag:
            self._etags.setdefault(shard, etag)

    def _url(self, shard: int) -> str:
        url, signed_at = self._signed.get(shard, ("", 0.0))
        if not url or time.monotonic() - signed_at > storage.SIGNATURE_LIFETIME_S / 2:
            url, signed_at = storage.sign(self._manifest.shard_url(shard)), time.monotonic()
            self._signed[shard] = url, signed_at
        return url

    def _connection(self, url: urllib.parse.SplitResult) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None or (self._local.scheme, self._local.host) != (url.scheme, url.netloc):
            if url.scheme == "https":
                context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))
                connection = http.client.HTTPSConnection(url.netloc, timeout=TIMEOUT_S, context=context)
            else:
                connection = http.client.HTTPConnection(url.netloc, timeout=TIMEOUT_S)
            self._local.connection = connection
            self._local.scheme, self._local.host = url.scheme, url.netloc
        return connection

    def _drop_connection(self) -> None:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None


def _receive(response: http.client.HTTPResponse, connection: socket.socket | None, body: memoryview) -> Iterator[int]:
    """Fill ``body`` with the response's; yields how many bytes came, again and again. TimeoutError where none come.

    From a plain socket the kernel fills it in two calls, and wakes this thread once a MiB: a call for each piece that
    arrives is 0.1 CPU-s/GB of Python, and a wake-up for each is another 0.18, half of what the sockets cost.
    """
    if connection is None or isinstance(connection, ssl.SSLSocket) or response.length is None:
        while count := response.readinto(body[:_READ_BYTES]):
            yield count
            body = body[count:]
        response.read()  # how chunks end
        return
    count = response.fp.readinto1(body)  # came with the headers
    yield count
    body = body[count:]
    connection.settimeout(None)  # to Python it blocks: MSG_WAITALL does nothing otherwise. The kernel's timeout holds
    connection.setsockopt(
        socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(TIMEOUT_S), int(TIMEOUT_S % 1 * 1e6))
    )
    try:
        while body:
            # As much has to be still to come: the kernel waits for it even where the call lacks but one byte.
            beyond = max(len(body) - _READ_BYTES, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _READ_BYTES if beyond else 1)
            if not (count := connection.recv_into(body[:beyond] if beyond else body, 0, socket.MSG_WAITALL)):
                break
            yield count
            body = body[count:]
    except BlockingIOError as error:
        raise TimeoutError(f"no byte for {TIMEOUT_S:g} s") from error
    connection.settimeout(TIMEOUT_S)


class _Patience:
    """Pauses between attempts; gives up after PATIENCE_S without progress."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.renew()

    def renew(self) -> None:
        """Progress was made."""
        self._attempts = 0
        self._deadline = time.monotonic() + PATIENCE_S

    def pause(self, error: Exception) -> None:
        """Sleep for a random share of a limit that doubles; StorageError when there is no time left."""
        self._attempts += 1
        if time.monotonic() >= self._deadline:
            raise StorageError(
                f"{self._url}: no byte for {PATIENCE_S:g} s in {self._attempts} attempts, last: "
                f"{type(error).__name__}: {error}; is the endpoint up and reachable from here?"
            ) from error
        time.sleep(random.uniform(0, min(_PAUSE_S * 2**self._attempts, _MAX_PAUSE_S)))


def _too_short(manifest: Manifest, shard: int, size: int) -> StorageError:
    return StorageError(
        f"{manifest.shard_url(shard)} ends at byte {size}, the manifest says {manifest.shards.size[shard]}: it is "
        "truncated or another file; copy it again, or make the manifest anew with `python -m jobs.index`"
    )
