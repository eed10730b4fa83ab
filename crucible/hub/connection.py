"""urllib3's connections as an httpx transport needs them: what they send, what is a reply, whose errors they raise.

A request's target goes out as httpx wrote it. A reply whose end nobody can tell is an error and not a body of whatever
length. Every error is one of httpx's (httpx.TransportError, httpx.InvalidURL), as callers catch them.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import httpx
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

IDLE_S = 30.0
"""A connection that rested longer is not used again: a gateway on the way may have forgotten it without a word."""
HEAD_S = 30.0
"""For the head of a reply to come whole, once it has begun."""
HEAD_BYTES = 1 << 20
ENCODINGS = ("", "identity", "gzip", "deflate")
"""What a body may be packed with: 64 KiB unpack to 64 MiB at most. Other ways, and one in another, have no bound."""
TARGET = "crucible-target"
"""The request header that carries the target as httpx wrote it. It is never sent."""


class Stale(ConnectionError):
    """A kept connection turned out to be closed: the request was sent, and not one byte of a reply came."""


class _Lines:
    """Stands in for a reply's stream while its head is read, and keeps the last line.

    The head must end: a socket's timeout begins anew with each byte, and so a byte now and then, or one interim reply
    after the other, would hold a reader for ever.
    """

    last = b""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.close = stream.close
        self._began, self._size = 0.0, 0

    def readline(self, limit: int) -> bytes:
        line = bytearray()
        while len(line) < limit and not line.endswith(b"\n"):
            here = self.stream.peek(1)[: limit - len(line)]  # what has come; waits only where nothing has
            if not here:
                break
            line += self.stream.read((here.find(b"\n") + 1) or len(here))
            self._began = self._began or time.monotonic()
            if time.monotonic() - self._began > HEAD_S:
                raise TimeoutError(f"the head of the reply takes longer than {HEAD_S:g} s")
        self._size += len(line)
        if self._size > HEAD_BYTES:
            raise http.client.HTTPException(f"the head of the reply is longer than {HEAD_BYTES:,} bytes")
        self.last = bytes(line)
        return self.last


class _Reply(http.client.HTTPResponse):
    """A reply whose head must have an end. To http.client the end of the connection serves as well: a head that was cut
    before its Content-Length would be a whole reply without a body."""

    def begin(self) -> None:
        stream, lines = self.fp, _Lines(self.fp)
        self.fp = cast(Any, lines)
        try:
            super().begin()
            while 101 < self.status < 200:  # hints of a reply that is still to come
                self.headers = self.msg = cast(Any, None)
                super().begin()
        finally:
            if cast(Any, self.fp) is lines:
                self.fp = stream
        if lines.last not in (b"\r\n", b"\n"):
            raise http.client.IncompleteRead(lines.last)


class Connection(HTTPConnection):
    """A connection that knows whether it has served before, and sends the target exactly as httpx wrote it."""

    response_class = _Reply
    served = False
    rested = 0.0

    def connect(self) -> None:
        self.served = False
        super().connect()

    @property
    def is_connected(self) -> bool:
        return time.monotonic() - self.rested < IDLE_S and super().is_connected

    def request(self, method: str, url: str, body: Any = None, headers: Any = None, **options: Any) -> None:
        # urllib3 writes escapes anew (%2f becomes %2F), and a signed link may be signed over the other spelling
        target = headers.pop(TARGET, url)
        super().request(method, target, body=body, headers=headers, **options)

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]
        served, self.served = self.served, True
        try:
            return super().getresponse()
        except (http.client.RemoteDisconnected, ConnectionError) as error:
            if served:
                raise Stale(str(error)) from error
            raise


class _SecureConnection(Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls: Any = Connection  # urllib3 declares a protocol here that its own classes do not fit


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls: Any = _SecureConnection


POOLS: dict[str, type[HTTPConnectionPool]] = {"http": _Pool, "https": _SecurePool}


def misframed(raw: urllib3.HTTPResponse) -> str:
    """Why nobody can tell where this reply's body ends, or how much it unpacks to, or "".

    http.client would read on until the connection ends.
    """
    reply = cast(http.client.HTTPResponse, raw._original_response)
    if 100 <= raw.status < 200:
        return f"unexpected status {raw.status}"
    if raw.headers.get("transfer-encoding") and not reply.chunked:
        return f"unknown Transfer-Encoding {raw.headers['transfer-encoding']!r}"
    if raw.headers.get("content-length") and reply.length is None and not reply.chunked:
        return f"wrong Content-Length {raw.headers['content-length']!r}"
    if (packed := raw.headers.get("content-encoding", "").strip().lower()) not in ENCODINGS:
        return f"Content-Encoding {packed[:40]!r}, which nobody asked for"
    return ""


@contextmanager
def named(timed_out: type[httpx.TimeoutException], broken: type[httpx.NetworkError]) -> Iterator[None]:
    """urllib3's, http.client's and the socket's errors as httpx's, by what was going on."""
    try:
        yield
    except (
        OSError,
        ValueError,
        http.client.HTTPException,
        urllib3.exceptions.HTTPError,
    ) as error:
        raise _translated(error, timed_out, broken) from error


def _translated(
    error: Exception, timed_out: type[httpx.TimeoutException], broken: type[httpx.NetworkError]
) -> httpx.TransportError | httpx.InvalidURL:
    said = f"{type(error).__name__}: {error}"
    match error:
        case urllib3.exceptions.EmptyPoolError():
            return httpx.PoolTimeout(said)
        case urllib3.exceptions.ProxyError():
            return httpx.ProxyError(said)
        case urllib3.exceptions.NewConnectionError() | urllib3.exceptions.SSLError():
            return httpx.ConnectError(said)
        case urllib3.exceptions.ConnectTimeoutError():
            return httpx.ConnectTimeout(said)
        case urllib3.exceptions.ReadTimeoutError():
            return httpx.ReadTimeout(said)
        case urllib3.exceptions.LocationValueError():
            return httpx.InvalidURL(said)
        case urllib3.exceptions.ProtocolError(args=(_, Exception() as cause)):
            return _translated(cause, timed_out, broken)
        case http.client.RemoteDisconnected() | Stale():
            return httpx.RemoteProtocolError("the server closed the connection without a reply")
        case TimeoutError():
            return timed_out(said)
        case OSError():
            return broken(said)
        case ValueError():
            return httpx.LocalProtocolError(said)
    return httpx.RemoteProtocolError(said)
