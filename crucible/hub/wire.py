"""Bytes off a socket at the speed of the socket: urllib3's connections under httpx's client.

httpx keeps the client, the headers, the timeouts and the exceptions; only the transport below is ours, because its own
reads a body 64 KiB at a time through two parsers and an object each (three times the processor time for a big file).
A body is read with `chunks`, into one buffer that is used again, or with httpx's own `read`, `iter_bytes`, `iter_raw`,
which copy. Nothing is retried or followed here, with one exception: a GET that meets a kept connection the
server has closed meanwhile, of which no byte came back, goes out again on another connection.
"""

from __future__ import annotations

import http.client
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import httpx
import urllib3
from urllib3 import HTTPHeaderDict
from urllib3.util import SKIP_HEADER

from crucible.errors import UsageError
from crucible.hub.connection import POOLS, TARGET, Connection, Stale, misframed, named

BUFFER_BYTES = 1 << 20
"""What one view of `chunks` holds at most."""
COPY_BYTES = 64 << 10
"""What one chunk of httpx's own iterators holds at most. More makes Python allocate and give back for each."""
PEER_CONNECTIONS = 64
_BODY = "crucible.body"


class _Body(httpx.SyncByteStream):
    """The body of one reply, read once: by iterating (copies) or by `views`. One thread reads; any may `cut`."""

    def __init__(self, raw: urllib3.HTTPResponse, *, secure: bool) -> None:
        # urllib3's own readinto() copies; the http.client reply inside it does not. `requests` relies on this name too
        self._raw = raw
        self._reply = cast(http.client.HTTPResponse, raw._original_response)
        self._secure = secure
        self._taken = self._over = False
        self._guard = threading.Lock()  # a connection is not cut any more once it may be another reply's
        self.sized = self._reply.length is not None and not self._reply.chunked

    def __iter__(self) -> Iterator[bytes]:
        with self._reading():
            while chunk := self._reply.read1(COPY_BYTES):
                yield chunk
            if self._reply.length:
                raise _cut(self._reply.length)

    def views(self, buffer: bytearray | memoryview | None) -> Iterator[memoryview]:
        """The body in pieces of `buffer`, each as soon as it is there, and valid until the next is asked for."""
        with self._reading():
            left = self._reply.length or 0
            stream: Any = self._reply.fp
            if not left:
                return
            room = memoryview(buffer if buffer is not None else bytearray(min(BUFFER_BYTES, left))).cast("B")
            held = len(stream.peek(1))  # what came in one packet with the headers
            ready = select.poll()
            ready.register(stream.fileno(), select.POLLIN)
            # Profiled: 93 % of this loop with a pwrite is recv_into and pwrite. One recv brings what the kernel holds,
            # 70 KiB to 1 MiB on loopback. To wait for more (MSG_WAITALL), to read before polling, a buffer of 256 KiB
            # or 4 MiB, a larger SO_RCVBUF: none was faster beyond the noise, alone or in 8 threads. So one call does.
            while left:
                size, failed = min(len(room), left), None
                if held:
                    got = stream.readinto1(room[: min(size, held)])
                    held -= got
                else:
                    got = stream.raw.readinto(room[:size])
                    # a TLS record is 16 KiB: take as many as are here (40 times fewer pieces, with sha256 16 % faster)
                    while self._secure and 0 < got < size and ready.poll(0) and failed is None:
                        try:
                            if not (more := stream.raw.readinto(room[got:size])):
                                break
                            got += more
                        except OSError as error:  # half a record: what was whole before it goes out first
                            failed = error
                if not got:
                    raise _cut(left)
                left -= got
                view = room[:got]
                yield view
                # whoever kept it gets a ValueError from now on, not somebody else's bytes
                view.release()
                if failed is not None:
                    raise failed

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One reading of the body: its errors as httpx's, and the connection kept only when all of it was read."""
        if self._taken:
            raise httpx.StreamConsumed()
        if self._over:
            raise httpx.StreamClosed()
        self._taken = True
        try:
            with named(httpx.ReadTimeout, httpx.ReadError):
                yield
        except BaseException:
            self.close()
            raise
        with self._guard:
            self._over = True
            self._reply.close()
            if isinstance(self._raw.connection, Connection):
                self._raw.connection.rested = time.monotonic()
            self._raw.release_conn()

    def close(self) -> None:
        """Let go of the connection; one with unread bytes on it is of no further use and is closed."""
        with self._guard:
            if not self._over:
                self._over = True
                self._raw.close()
                self._raw.release_conn()

    def cut(self) -> None:
        with self._guard, suppress(OSError, ValueError):  # the other side, or the stream, may have gone already
            if not self._over and self._reply.fp is not None:
                # not by an SSLSocket's own shutdown(): that would let the reader go on with what is still encrypted
                with socket.socket(fileno=os.dup(self._reply.fp.fileno())) as same:
                    same.shutdown(socket.SHUT_RDWR)


class PoolTransport(httpx.BaseTransport):
    """HTTP/1.1 over kept connections, `max_connections` a host; the next request waits for `timeout.pool` seconds.

    `proxy` is an http(s) address, credentials included. `tls` is called once, for the first https address: making a
    context takes 20 ms. Concurrency: any number of threads. A forked child must make its own.
    """

    def __init__(
        self,
        *,
        max_connections: int = 32,
        proxy: str | None = None,
        tls: Callable[[], ssl.SSLContext] = httpx.create_ssl_context,
    ) -> None:
        self._make_tls, self._tls, self._guard = tls, cast("ssl.SSLContext | None", None), threading.Lock()
        options: dict[str, Any] = {"num_pools": 64, "maxsize": max_connections, "block": True, "retries": False}
        self._forwards, self._to_proxy = proxy is not None, "http"
        self._pools = urllib3.PoolManager(**options) if proxy is None else self._proxied(proxy, options)
        self._pools.pool_classes_by_scheme = POOLS

    def _proxied(self, proxy: str, options: dict[str, Any]) -> urllib3.ProxyManager:
        try:
            address = httpx.URL(proxy if "://" in proxy else f"http://{proxy}")
        except httpx.InvalidURL as error:
            raise UsageError(f"HTTP_PROXY or HTTPS_PROXY is no address: {error}") from error
        if address.scheme not in ("http", "https") or not address.host:
            raise UsageError(
                f"HTTP_PROXY or HTTPS_PROXY begins with {address.scheme}://; give the address of an http(s) proxy"
            )
        self._to_proxy = address.scheme
        said = f"{address.username}:{address.password}" if address.username else None
        return urllib3.ProxyManager(
            str(address.copy_with(userinfo=b"")),
            proxy_headers=urllib3.make_headers(proxy_basic_auth=said) if said else None,
            proxy_ssl_context=self._context() if address.scheme == "https" else None,
            **options,
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send it and read the head of the reply. Raises what httpx's own transport raises (httpx.TransportError)."""
        url = request.url
        if url.scheme not in ("http", "https") or not url.host:
            raise httpx.UnsupportedProtocol(f"no http:// or https:// address: {str(url)!r}")
        with named(httpx.WriteTimeout, httpx.ReadError):
            while True:
                try:
                    raw = self._send(request)
                    break
                except urllib3.exceptions.ProtocolError as error:
                    # the pool now hands out the place of the failed one first: the next goes out on a new connection
                    if (
                        _framed(request)
                        or request.method not in ("GET", "HEAD")
                        or not isinstance(error.args[-1], Stale)
                    ):
                        raise
        body = _Body(raw, secure="https" in (url.scheme, self._to_proxy))
        if wrong := misframed(raw):
            body.close()
            raise httpx.RemoteProtocolError(wrong)
        return httpx.Response(
            raw.status,
            headers=[(name.encode("latin-1"), value.encode("latin-1")) for name, value in raw.headers.iteritems()],
            stream=body,
            extensions={
                "http_version": b"HTTP/1.0" if raw.version == 10 else b"HTTP/1.1",
                "reason_phrase": (raw.reason or "").encode("latin-1", "replace"),
                _BODY: body,
            },
        )

    def _send(self, request: httpx.Request) -> urllib3.HTTPResponse:
        url, wait = request.url, request.extensions.get("timeout", {})
        pool = self._pools.connection_from_host(
            url.raw_host.decode("ascii"),
            url.port,
            url.scheme,
            pool_kwargs={"ssl_context": self._context()} if "https" in (url.scheme, self._to_proxy) else None,
        )
        headers = HTTPHeaderDict()
        for name, value in request.headers.raw:
            headers.add(name.decode("latin-1"), value.decode("latin-1"))
        for unsaid in ("user-agent", "accept-encoding"):
            headers.setdefault(unsaid, SKIP_HEADER)  # else urllib3 sends its own
        target = url.raw_path.decode("ascii")
        if self._forwards and url.scheme == "http":
            target = f"http://{url.netloc.decode('ascii')}{target}"
        headers[TARGET] = target
        reply = pool.urlopen(
            request.method,
            target,
            body=cast(Any, iter(cast(Iterable[bytes], request.stream))) if _framed(request) else None,
            headers=headers,
            retries=False,
            redirect=False,
            assert_same_host=False,
            timeout=urllib3.Timeout(connect=wait.get("connect"), read=wait.get("read")),
            pool_timeout=wait.get("pool"),
            preload_content=False,
            decode_content=False,
        )
        return cast(urllib3.HTTPResponse, reply)

    def _context(self) -> ssl.SSLContext:
        with self._guard:
            if self._tls is None:
                self._tls = self._make_tls()
            return self._tls

    def close(self) -> None:
        pools = self._pools.pools
        for pool in [pools[key] for key in pools.keys()]:  # noqa: SIM118 - it is no dict and cannot be iterated
            pool.close()  # clear() alone leaves that to the garbage collector
        pools.clear()


def chunks(response: httpx.Response, buffer: bytearray | memoryview | None = None) -> Iterator[memoryview | bytes]:
    """The body of a streamed reply, decoded if it is encoded. Raises httpx.TransportError, httpx.DecodingError.

    Of a `PoolTransport`'s reply with a known length come views of one buffer (`buffer`, or one of `BUFFER_BYTES` made
    for this call), each valid until the next is asked for and unusable after. Else come bytes.
    """
    body = response.extensions.get(_BODY)
    if "content-encoding" in response.headers:
        return response.iter_bytes()
    # iter_raw without a chunk size: with one, httpx copies and halves its speed
    return body.views(buffer) if isinstance(body, _Body) and body.sized else response.iter_raw()


def cut(response: httpx.Response) -> None:
    """End a reading that waits in another thread: it gets an error at once, not when its timeout is over.

    For a source that has been given up for another one. Does nothing to a reply that was read to its end.
    """
    body = response.extensions.get(_BODY)
    if isinstance(body, _Body):
        body.cut()


def client(
    timeout_s: float,
    *,
    max_connections: int = 32,
    proxies: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> httpx.Client:
    """A client on `PoolTransport`: no redirects, no ~/.netrc. `proxies` says by scheme which proxy serves it.

    `tls` is who is believed, other than the system's authorities.
    """
    return httpx.Client(
        transport=PoolTransport(
            max_connections=max_connections, tls=httpx.create_ssl_context if tls is None else lambda: tls
        ),
        mounts={
            f"{scheme}://": PoolTransport(max_connections=max_connections, proxy=proxy)
            for scheme, proxy in (proxies or {}).items()
        },
        timeout=timeout_s,
        follow_redirects=False,
        trust_env=False,
    )


_peers: dict[tuple[int, Path | None, int], httpx.Client] = {}
# a child must neither read from its parent's connections nor hold them open
os.register_at_fork(after_in_child=_peers.clear)


def peer_client(authority: Path | None = None) -> httpx.Client:
    """This process's client for the agents of other nodes: one, so that their connections are kept. Never close it.

    `authority` is the certificate that https peers must have theirs from. A file that was written anew is read anew.
    Raises httpx.UnsupportedProtocol if it cannot be read.
    """
    try:
        key = os.getpid(), authority, authority.stat().st_mtime_ns if authority else 0
        made = _peers.get(key)
        if made is None:
            tls = believing(authority) if authority else None
            made = _peers.setdefault(key, client(10.0, max_connections=PEER_CONNECTIONS, tls=tls))
        return made
    except OSError as error:
        raise httpx.UnsupportedProtocol(f"{authority}: no authority of this cluster's to believe ({error})") from error


def believing(authority: Path) -> ssl.SSLContext:
    """Believes this authority and no other, for the address that was asked for. Raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(authority)
    return context


def _framed(request: httpx.Request) -> bool:
    """Does it have a body?"""
    return "content-length" in request.headers or "transfer-encoding" in request.headers


def _cut(left: int) -> httpx.RemoteProtocolError:
    return httpx.RemoteProtocolError(
        f"peer closed connection without sending complete message body ({left} bytes left)"
    )
