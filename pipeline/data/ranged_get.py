"""One GET of a byte range over a plain socket or TLS: where it leads, what its answer means, how its bytes come in.

What stands against the bytes is one of three: an OSError or HTTPException where asking again may help, DeniedError
where another signature may, any other StorageError where nothing does. No message holds a signed URL.
"""

import http.client
import io
import os
import re
import select
import socket
import ssl
import struct
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import SplitResult

from pipeline.data import patience
from pipeline.storage import DeniedError, MissingError, StorageError

READ_BYTES = 2**20  # at a wake-up; what a broken connection loses at most
TICK_S = 1.0  # without bytes: then the caller looks how the read gets on
MAX_HOPS = 5
# AWS, GCS, Azure, MinIO: 408, 429, 500, 502, 503, 504; botocore: 509; RFC 8470: 425; Cloudflare before R2: 520 to 524.
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 509, *range(520, 525)})
# S3 says these with a status of 400 too.
_RETRIED_CODES = frozenset({"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "Throttling"})
_DENIED_CODES = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AuthorizationQueryParametersError"})


class ReplacedError(StorageError):
    """A shard is not the object it was when this process first read it."""


class PassingError(ConnectionError):
    """The store cannot answer now; ``retry_after_s`` is what it asks for, 0 where it does not say."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Range:
    """Bytes [start, end) of an object of ``size`` bytes; ``name`` is its URL in messages."""

    name: str
    start: int
    end: int
    size: int
    etag: str = ""  # "" = any


class Connections(threading.local):
    """A thread's idle connections, one to each (scheme, host)."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, str], http.client.HTTPConnection] = {}

    def take(self, url: SplitResult) -> http.client.HTTPConnection:
        """The idle one, or a new one."""
        idle = self._idle.pop((url.scheme, url.netloc), None)
        if idle is not None and _is_readable(idle.sock, 0):  # its end, or more than was asked for
            idle.close()
            idle = None
        return idle or connect(url)

    def keep(self, url: SplitResult, connection: http.client.HTTPConnection) -> None:
        """It can be used again."""
        self._idle[url.scheme, url.netloc] = connection


def connect(url: SplitResult) -> http.client.HTTPConnection:
    """A new connection, on which a wait for bytes ends after TICK_S. OSError if it takes more than TIMEOUT_S."""
    if url.scheme == "https":
        context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))
        secure = http.client.HTTPSConnection(url.netloc, timeout=patience.TIMEOUT_S, context=context)
        secure.connect()
        secure.sock.settimeout(TICK_S)
        return secure
    connection = http.client.HTTPConnection(url.netloc, timeout=patience.TIMEOUT_S)
    connection.connect()
    # The kernel's timeout, for MSG_WAITALL does nothing under Python's. Once for all requests: settimeout gives up the
    # interpreter's lock, and takes up to 5 ms to get it back from a thread that checks samples; with three calls for
    # each request of 4 MB an epoch took 1.3x as long.
    connection.sock.settimeout(None)
    timeval = struct.pack("ll", int(TICK_S), int(TICK_S % 1 * 1e6))
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    return connection


def _is_readable(sock: socket.socket, seconds: float) -> bool:
    """Whether bytes come within so many seconds; of TLS, they may be its own."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class _Wire(io.RawIOBase):
    """What http.client reads an answer from. TimeoutError when none begins within TICK_S, or one that has begun to come
    is not there at ``until``: by itself http.client would give each byte of the headers a patience of its own."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self.until = time.monotonic() + patience.TIMEOUT_S
        self.has_begun = False
        self.is_left = False  # whoever wants more takes it from the socket itself
        self._sock = sock
        # http.client closes a connection before its last bytes are read; this keeps the socket open.
        self._holder = sock.makefile("rb", buffering=0)

    def response(self, sock: socket.socket, **options: Any) -> http.client.HTTPResponse:
        """A ``response_class`` of http.client."""
        return http.client.HTTPResponse(self, **options)  # type: ignore[arg-type]  # it wants no more than makefile

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.is_left:
            return None  # no byte for now; an error would lose those that the reader has ready
        while not self.has_begun or time.monotonic() < self.until:
            try:
                count = self._sock.recv_into(buffer)
            except (BlockingIOError, TimeoutError):  # after TICK_S
                if not self.has_begun:
                    break
            else:
                self.has_begun = True
                return count
        raise TimeoutError(
            f"an answer that began did not end in {patience.TIMEOUT_S:g} s" if self.has_begun else "no answer"
        )

    def close(self) -> None:
        self._holder.close()
        super().close()


class RangedGet:
    """A request that was sent; ``receive`` waits for the answer and takes in its bytes."""

    def __init__(self, url: SplitResult, wanted: Range, connection: http.client.HTTPConnection) -> None:
        self.began = time.monotonic()
        self.answered_after_s = 0.0
        self.received = 0
        self.etag = ""  # of what is being received
        self._url, self._wanted, self._connection = url, wanted, connection
        self._response: http.client.HTTPResponse | None = None
        self._hops = 0
        self._send()

    @property
    def answered(self) -> bool:
        """Whether the bytes of the range come next."""
        return self._response is not None

    def receive(self, body: memoryview) -> Iterator[int]:
        """Fill ``body`` with what is still to come; yields how many bytes came, 0 where none did for TICK_S."""
        while self._response is None:
            if not _is_readable(self.sock, TICK_S) or not self.open():
                yield 0
        for count in _receive(self._response, self._wire, self.sock, body):
            self.received += count
            yield count

    def open(self) -> bool:
        """Take in what has come; whether it is the answer. Follows redirects; raises what stands against the bytes."""
        self._wire = _Wire(self.sock)
        self._connection.response_class = self._wire.response  # type: ignore[assignment]  # it is only ever called
        try:
            response = self._connection.getresponse()
        except TimeoutError:
            if self._wire.has_begun:
                raise
            return False  # TLS tells of its sessions before an answer
        location = response.getheader("Location")
        if response.status in (301, 302, 303, 307, 308) and location:
            self._follow(response, location)
            return False
        if (refusal := refused(response, self._wanted, self._url)) is not None:
            raise refusal
        self._response = response
        self.etag = response.getheader("ETag") or ""
        self.answered_after_s = time.monotonic() - self.began
        return True

    def describe(self) -> str:
        """What came of it so far."""
        what = f"{self.received} bytes" if self.answered else "no answer"
        return f"{what} in {time.monotonic() - self.began:.0f} s"

    def close(self) -> None:
        """What is still to come is not wanted."""
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def keep(self, connections: "Connections") -> None:
        """All bytes of the range are there: others may use the connection, unless more may come."""
        response = self._response
        if response is None or response.will_close or response.length != self._wanted.end - self._wanted.start:
            self.close()
            return
        response.close()
        connections.keep(self._url, self._connection)

    def _send(self) -> None:
        headers = {"Range": f"bytes={self._wanted.start}-{self._wanted.end - 1}"}
        if self._wanted.etag:
            headers["If-Match"] = self._wanted.etag
        target = urllib.parse.urlunsplit(("", "", self._url.path or "/", self._url.query, ""))
        self.sock: socket.socket = self._connection.sock
        try:
            self._connection.request("GET", target, headers=headers)
        except OSError:
            self._connection.close()
            raise

    def _follow(self, response: http.client.HTTPResponse, location: str) -> None:
        """Send the same request to where a redirect points."""
        if self._hops == MAX_HOPS:
            raise StorageError(f"{self._wanted.name}: more than {MAX_HOPS} redirects, one after the other")
        self._hops += 1
        url = _target(self._url, location)
        if url is None or "@" in url.netloc or (url.scheme != "https" and self._url.scheme != url.scheme):
            where = (
                f"from {self._url.scheme}: to {url.scheme}: on {url.hostname}" if url else "to what is no http(s) URL"
            )
            raise StorageError(
                f"{self._wanted.name}: {_reason(response)} leads {where}; that, a redirect from https to http, or one "
                "with a user in it is not followed: set AWS_ENDPOINT_URL to the bucket's own endpoint"
            )
        response.close()
        self._connection.close()
        self._url, self._connection = url, connect(url)
        self._send()


def _target(base: SplitResult, location: str) -> SplitResult | None:
    """Where a redirect leads; None where that is no URL of a web server."""
    try:
        url = urllib.parse.urlsplit(urllib.parse.urljoin(base.geturl(), location))
        is_one = url.scheme in ("http", "https") and url.hostname and url.port != 0  # raises where it is no number
    except ValueError:
        return None
    return url if is_one and re.fullmatch(r"[!-~]+", location) else None


def refused(response: http.client.HTTPResponse, wanted: Range, url: SplitResult) -> Exception | None:
    """What stands against the bytes of an answer, if anything does."""
    if response.status == 206:
        return _wrong_range(response, wanted)
    reason = f"{_reason(response)} from {url.scheme}://{url.hostname}"
    if response.status == 200:  # the server has no ranges
        if wanted.start:
            return StorageError(
                f"{wanted.name}: {reason}, the whole object instead of bytes {wanted.start} to {wanted.end}; what "
                "answers, or a proxy before it, must support the header Range"
            )
        whole = wanted.size if response.length is None else response.length
        return None if whole == wanted.size else too_short(wanted.name, whole, wanted.size)
    detail = _beginning(response)
    code, text = _tag("Code", detail), _tag("Message", detail)
    said = f"{reason}: {code}: {text}" if code else f"{reason} {detail[:300]}".strip()
    said += _region(response, detail)
    if response.status in RETRIED_STATUS or code in _RETRIED_CODES:
        return PassingError(said, _retry_after_s(response))
    if response.status in (401, 403) or code in _DENIED_CODES:
        return DeniedError(
            f"{wanted.name}: access denied ({said}){_clock(code, response)}, with a new signature too; check the "
            "credentials and the bucket's policy"
        )
    if response.status == 404:
        return MissingError(f"{wanted.name} is missing ({said}); the manifest lists it: was it deleted or moved?")
    if response.status == 412:
        return ReplacedError(
            f"{wanted.name} was replaced while it was being read; shards must not change under a run: restore it, or "
            "make the manifest anew with `python -m jobs.index` and start a new run"
        )
    if response.status == 416:
        total = re.search(r"/(\d{1,18})$", response.getheader("Content-Range") or "")
        if total and int(total[1]) == wanted.size:
            return PassingError(f"{said}, though the object has its {total[1]} bytes")
        return too_short(wanted.name, int(total[1]) if total else wanted.start, wanted.size)
    return StorageError(f"{wanted.name}: unexpected {said}")


def too_short(name: str, found: int, expected: int) -> StorageError:
    """The object ends at byte ``found``."""
    return StorageError(
        f"{name} ends at byte {found}, the manifest says {expected}: it is truncated or another file; copy it again, "
        "or make the manifest anew with `python -m jobs.index`"
    )


def _wrong_range(response: http.client.HTTPResponse, wanted: Range) -> Exception | None:
    """Proxies and caches answer other ranges than they were asked for, and count wrongly."""
    content_range = response.getheader("Content-Range") or "none"
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", content_range.strip())
    if match and match[3] not in ("*", str(wanted.size)):
        return too_short(wanted.name, int(match[3]), wanted.size)
    if match is None or (int(match[1]), int(match[2]) + 1) != (wanted.start, wanted.end):
        return ConnectionError(f"Content-Range: {content_range} instead of bytes {wanted.start}-{wanted.end - 1}")
    if response.length not in (wanted.end - wanted.start, None):  # None: in chunks
        return ConnectionError(f"{response.length} bytes instead of the {wanted.end - wanted.start} asked for")
    return None


def _beginning(response: http.client.HTTPResponse) -> str:
    """Of an error's text; "" where it does not come, for the status says enough."""
    try:
        return response.read1(4000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _reason(response: http.client.HTTPResponse) -> str:
    return f"HTTP {response.status} {response.reason}".strip()


def _tag(name: str, xml: str) -> str:
    match = re.search(f"<{name}>([^<]*)</{name}>", xml)
    return match[1] if match else ""


def _region(response: http.client.HTTPResponse, detail: str) -> str:
    """S3 says where a bucket lies to those who look elsewhere."""
    region = response.getheader("x-amz-bucket-region") or _tag("Region", detail)
    if region:
        return f"; the bucket lies in the region {region}: set AWS_DEFAULT_REGION={region}"
    if response.status in (301, 307, 308):  # one with a Location is followed
        return (
            "; a redirect without a Location means another region or endpoint: set AWS_DEFAULT_REGION to the bucket's "
            f"region or AWS_ENDPOINT_URL to its endpoint{f', {found}' if (found := _tag('Endpoint', detail)) else ''}"
        )
    return ""


def _clock(code: str, response: http.client.HTTPResponse) -> str:
    """How far this machine's clock is off, where that is what the server says."""
    theirs = _date(response.getheader("Date"))
    if code != "RequestTimeTooSkewed" or theirs is None:
        return ""
    ahead_s = (datetime.now(UTC) - theirs).total_seconds()
    return f"; this machine's clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the server's"


def _retry_after_s(response: http.client.HTTPResponse) -> float:
    """Seconds, or the date from which on to ask again."""
    value = response.getheader("Retry-After") or ""
    if value.isdecimal():
        return float(value)
    date = _date(value)
    return max((date - datetime.now(UTC)).total_seconds(), 0.0) if date else 0.0


def _date(value: str | None) -> datetime | None:
    try:
        date = parsedate_to_datetime(value or "")
    except ValueError:
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _receive(response: http.client.HTTPResponse, wire: _Wire, sock: socket.socket, body: memoryview) -> Iterator[int]:
    """Fill ``body`` with the response's; yields how many bytes came, 0 where none did for TICK_S."""
    if response.length is None:  # in chunks; ``response`` takes them apart, and gives up after TIMEOUT_S without a byte
        while body:
            wire.until = time.monotonic() + patience.TIMEOUT_S
            data = response.read1(min(len(body), READ_BYTES))
            if not data:
                break
            body[: len(data)] = data
            yield len(data)
            body = body[len(data) :]
        return
    wire.is_left = True
    count = response.fp.readinto1(body) or 0
    if count:  # came with the headers
        yield count
    yield from (_receive_tls if isinstance(sock, ssl.SSLSocket) else _receive_plain)(sock, body[count:])


def _receive_tls(sock: socket.socket, body: memoryview) -> Iterator[int]:
    """A record of at most 16 KiB at a time: there is no way to have OpenSSL wait for more."""
    while body:
        piece, count, until = body[:READ_BYTES], 0, time.monotonic() + TICK_S
        ended = False
        try:
            while count < len(piece) and not ended and time.monotonic() < until:
                came = sock.recv_into(piece[count:])
                count, ended = count + came, came == 0
        except TimeoutError:
            pass
        yield count
        if ended:
            return
        body = body[count:]


def _receive_plain(sock: socket.socket, body: memoryview) -> Iterator[int]:
    """The kernel fills ``body`` in two calls, and wakes this thread once a MiB.

    A call for each piece that arrives is 0.1 CPU-s/GB of Python, and a wake-up for each is another 0.18, half of what
    the sockets cost.
    """
    while body:
        # As much has to be still to come: the kernel waits for it even where the call lacks but one byte.
        beyond = max(len(body) - READ_BYTES, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, READ_BYTES if beyond else 1)
        try:
            count = sock.recv_into(body[:beyond] if beyond else body, 0, socket.MSG_WAITALL)
        except BlockingIOError:
            yield 0
            continue
        if not count:
            return
        yield count
        body = body[count:]
