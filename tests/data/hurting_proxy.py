"""An HTTP proxy before the S3 server that hurts the GETs of shards: what networks and object stores do on bad days.

Requests pass unchanged (the signature covers the Host header, which names the proxy). A fault is one of the
classes below; ``proxy.faults`` are served to the next GETs in turn, ``proxy.always`` to every GET.
"""

import http.client
import http.server
import socket
import ssl
import struct
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Status:
    """Answer with this status instead."""

    code: int
    headers: tuple[tuple[str, str], ...] = ()
    body: str = ""


@dataclass(frozen=True)
class Redirect:
    """Point to ``to``, in which ``{path}`` is what was asked for, e.g. ``http://127.0.0.1:8080{path}``."""

    to: str
    code: int = 307


@dataclass(frozen=True)
class Cut:
    """Reset the connection after a share of the body."""

    share: float = 0.5


@dataclass(frozen=True)
class Fin:
    """Close the connection in order, after a share of the body."""

    share: float = 0.5


@dataclass(frozen=True)
class Stall:
    """Send nothing more after a share of the body, and keep the connection open."""

    share: float = 0.5


@dataclass(frozen=True)
class Trickle:
    """Send the body in pieces of ``size`` bytes, 1 ms apart."""

    size: int


@dataclass(frozen=True)
class Drip:
    """Send the body at this many bytes per second, after a share of it at full speed."""

    bytes_per_s: int
    share: float = 0.0


@dataclass(frozen=True)
class Late:
    """Answer after this many seconds, or when the proxy is stopped."""

    seconds: float


@dataclass(frozen=True)
class DripHeaders:
    """Send the answer's headers one byte at a time, ten a second, and never end them."""


@dataclass(frozen=True)
class Rangeless:
    """Send the whole object, status 200, as a server that knows no ranges."""


@dataclass(frozen=True)
class Shifted:
    """Answer with the range ``by`` bytes further on, as a confused cache."""

    by: int


@dataclass(frozen=True)
class Flip:
    """Flip the lowest bit of the byte at ``offset`` of the object, if the range covers it."""

    offset: int


@dataclass(frozen=True)
class Close:
    """Announce the connection's end, send everything, close it."""


@dataclass(frozen=True)
class Longer:
    """Send a byte more than was asked for."""


@dataclass(frozen=True)
class Chunked:
    """Send the body in chunks, its length not known before."""


Fault = (
    Status
    | Redirect
    | Cut
    | Fin
    | Stall
    | Trickle
    | Drip
    | Late
    | DripHeaders
    | Rangeless
    | Shifted
    | Flip
    | Close
    | Longer
    | Chunked
)


class HurtingProxy:
    """Listens on loopback, with ``tls`` on https; ``requests`` counts the GETs of shards, ``asked`` has their headers.

    ``host``: what the server is told it was called, where a redirect leads here and the signature is of another name.
    """

    def __init__(self, backend: str, tls: ssl.SSLContext | None = None, host: str = "") -> None:
        self.backend = backend.removeprefix("http://")
        self.host = host
        self.asked: list[dict[str, str]] = []
        self.asked_at: list[float] = []
        self._tls = tls
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None
        self.requests = 0
        self.released = threading.Event()  # ends the stalls
        self.port = 0
        self.up()

    def calm(self) -> None:
        """Hurt nothing, forget what was asked for."""
        self.faults.clear()
        self.always = None
        self.requests = 0
        self.asked.clear()
        self.asked_at.clear()

    @property
    def endpoint(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def up(self) -> None:
        """Listen, on the same port as before."""
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        if self._tls:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections."""
        self._server.shutdown()
        self._server.server_close()

    def stop(self) -> None:
        self.released.set()
        self.down()


class _Handler(http.server.BaseHTTPRequestHandler):
    owner: HurtingProxy
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and the beginning of a body leave together, as from real servers

    def do_GET(self) -> None:
        with suppress(ConnectionError, ssl.SSLError):  # the client has had enough
            self._forward()
            self.wfile.flush()

    def do_HEAD(self) -> None:
        self._forward()

    def _forward(self) -> None:
        proxy = self.owner
        fault: Fault | None = None
        if self.command == "GET" and ".tar" in self.path:
            proxy.requests += 1
            proxy.asked.append(dict(self.headers))
            proxy.asked_at.append(time.monotonic())
            fault = proxy.faults.popleft() if proxy.faults else proxy.always
        if isinstance(fault, Status):
            self.send_response(fault.code)
            for name, content in fault.headers:
                self.send_header(name, content)
            self.send_header("Content-Length", str(len(fault.body)))
            self.end_headers()
            self.wfile.write(fault.body.encode())
            return
        if isinstance(fault, Redirect):
            self.send_response(fault.code)
            self.send_header("Location", fault.to.replace("{path}", self.path))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if isinstance(fault, DripHeaders):
            self.wfile.write(b"HTTP/1.1 206 Partial Content\r\nx-dripping: ")
            while not proxy.released.wait(0.1):
                self.wfile.write(b".")
                self.wfile.flush()
        if isinstance(fault, Late):
            proxy.released.wait(fault.seconds)
        headers = dict(self.headers)
        if proxy.host:
            headers["Host"] = proxy.host
        if isinstance(fault, Rangeless):
            del headers["Range"]
        if isinstance(fault, Shifted):
            first, last = (int(end) + fault.by for end in headers["Range"].removeprefix("bytes=").split("-"))
            headers["Range"] = f"bytes={first}-{last}"
        backend = http.client.HTTPConnection(proxy.backend, timeout=20)
        backend.request(self.command, self.path, headers=headers)
        response = backend.getresponse()
        body = response.read()
        backend.close()
        if isinstance(fault, Flip):
            body = _flipped(body, response.getheader("Content-Range"), fault.offset)
        if isinstance(fault, Longer):
            body += b"?"
        self.send_response(response.status)
        for key, value in response.getheaders():
            if key.lower() not in ("transfer-encoding", "connection", "date", "server", "content-length"):
                self.send_header(key, value)
        if isinstance(fault, Chunked):
            self.send_header("Transfer-Encoding", "chunked")
            body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:1000], body[1000:]) if part)
            body += b"0\r\n\r\n"
        else:
            self.send_header("Content-Length", str(len(body)) if body else response.getheader("Content-Length", "0"))
        if isinstance(fault, Close):
            self.send_header("Connection", "close")  # BaseHTTPRequestHandler then closes it
        self.end_headers()
        if isinstance(fault, Cut | Fin | Stall):
            self.wfile.write(body[: int(len(body) * fault.share)])
            self.wfile.flush()
            if isinstance(fault, Stall):
                proxy.released.wait(60)
            if isinstance(fault, Cut):  # linger 0: RST instead of FIN
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if isinstance(fault, Trickle):
            for start in range(0, len(body), fault.size):
                self.wfile.write(body[start : start + fault.size])
                self.wfile.flush()
                time.sleep(0.001)
        elif isinstance(fault, Drip):
            self._drip(body, fault)
        elif self.command != "HEAD":
            self.wfile.write(body)

    def _drip(self, body: bytes, fault: Drip) -> None:
        """In twenty pieces a second."""
        sent = int(len(body) * fault.share)
        piece = max(fault.bytes_per_s // 20, 1)
        self.wfile.write(body[:sent])
        self.wfile.flush()
        while sent < len(body) and not self.owner.released.wait(0.05):
            self.wfile.write(body[sent : sent + piece])
            self.wfile.flush()
            sent += piece

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _flipped(body: bytes, content_range: str | None, offset: int) -> bytes:
    start = int(content_range.removeprefix("bytes ").partition("-")[0]) if content_range else 0
    if not start <= offset < start + len(body):
        return body
    changed = bytearray(body)
    changed[offset - start] ^= 1
    return bytes(changed)
