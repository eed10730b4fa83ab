"""The agent's socket: who is let in, in time or not at all, and over TLS where the cluster has it.

A connection is counted before a byte of it is read, and has `Bounds.head_s` for its first request, its TLS handshake
included. What speaks the other protocol than this agent is told so in words, and not by a broken connection.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aiohttp import web

from crucible.workers.bounds import Bounds, Doors, address_of

BACKLOG = 512
ACCEPT_AGAIN_S = 0.5
"""After an accept that failed, as it does without a free descriptor."""
SWEEP_S = 1.0
CLEAR_S = 2.0
SERVER = "crucible"
"""What replies say they come from, without the versions of what is under it."""
TLS_HELLO = b"\x16"
"""The first byte of every TLS connection, and of no HTTP request."""
QUIET = logging.Logger("crucible.agent.quiet", logging.CRITICAL + 1)
"""For aiohttp's own words about broken requests: they quote them, and a request carries the secret."""
_log = logging.getLogger("crucible.agent")


class Connection(web.RequestHandler):
    """One connection that was let in. Knows since when it has waited for what."""

    def __init__(self, server: web.Server, bounds: Bounds, left: Callable[[], None]) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=bounds.idle_s,
            logger=QUIET,
            access_log=None,  # type: ignore[arg-type]
            max_line_size=bounds.head_bytes,
            max_field_size=bounds.head_bytes,
            max_headers=bounds.headers,
            lingering_time=1.0,
            auto_decompress=False,
        )
        self._left = left
        self.wire: asyncio.Transport | None = None
        """What it lies on, also after aiohttp has let go of it."""
        self.busy = False
        """A request of it is being answered."""
        self.asking = True
        """The head of a request has begun to come, or the first one is due."""
        self.since = time.monotonic()

    def itself(self) -> Connection:
        """What asyncio asks for when there is a transport for it."""
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.wire = transport
        super().connection_made(transport)

    def began(self) -> None:
        """The head of a request is there."""
        self.busy, self.asking = True, False

    def ended(self) -> None:
        """It is answered; the next may come."""
        self.busy, self.since = False, time.monotonic()

    def hurry(self) -> None:
        """End with the answer that goes out next, whatever body is still to come."""
        self._lingering_time = 0.0

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,  # noqa: ARG002 - aiohttp's words
        message: str | None = None,  # noqa: ARG002
    ) -> web.StreamResponse:
        """What cannot be read gets no more than its status: aiohttp's own answer quotes it."""
        if request.writer.output_size > 0:
            raise ConnectionError("it is answered already, if not to its end")
        reply = web.Response(status=status, headers={"Server": SERVER})
        reply.force_close()
        return reply

    def data_received(self, data: bytes) -> None:
        if not self.busy and not self.asking:
            self.asking, self.since = True, time.monotonic()
        super().data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._left()

    def overdue(self, bounds: Bounds, now: float) -> bool:
        """It has had its time for a request."""
        return not self.busy and now - self.since > (bounds.head_s if self.asking else bounds.idle_s)


class Listener:
    """Accepts connections for an aiohttp server. Everything in one event loop."""

    def __init__(self, server: web.Server, bounds: Bounds, doors: Doors, tls: ssl.SSLContext | None) -> None:
        self._server, self._bounds, self._doors, self._tls = server, bounds, doors, tls
        self._socket: socket.socket | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._inside: set[Connection] = set()

    async def open(self, host: str, port: int) -> int:
        """Listen on this address and no other; gives the port. Raises OSError."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind(address)
            listening.listen(BACKLOG)
            listening.setblocking(False)
        except OSError:
            listening.close()
            raise
        self._socket = listening
        self._start(self._accept(listening))
        self._start(self._sweep())
        return int(listening.getsockname()[1])

    async def clear(self) -> None:
        """End the connections that are still inside, and wait until they are: TLS says goodbye first."""
        until = time.monotonic() + CLEAR_S
        while self._inside and time.monotonic() < until:
            for connection in self._inside:
                if connection.wire is not None:
                    connection.wire.abort()
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Take no more connections."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, peer = await loop.sock_accept(listening)
            except OSError as error:
                _log.warning("the agent cannot accept a connection now: %s", error)
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            who = address_of(str(peer[0]))
            refused = self._doors.enter(who, time.monotonic())
            if refused:
                _say(accepted, 503, refused)
            else:
                self._start(self._admit(accepted, who))

    async def _admit(self, accepted: socket.socket, who: str) -> None:
        """Let one connection in, if what it says first is what is spoken here."""
        connection: Connection | None = None
        made = gone = False

        def left() -> None:
            nonlocal gone
            if not gone:
                gone = True
                self._doors.leave(who)
            if connection is not None:
                self._inside.discard(connection)

        try:
            async with asyncio.timeout(self._bounds.head_s):
                hello = await _first_byte(accepted)
                if not hello:
                    return
                if hello == TLS_HELLO and self._tls is None:
                    _say(accepted, 400, "this agent speaks plain HTTP; set CRUCIBLE_TLS on all nodes or on none")
                    return
                if hello != TLS_HELLO and self._tls is not None:
                    _say(accepted, 400, "this agent speaks TLS only; set CRUCIBLE_TLS on all nodes or on none")
                    return
                connection = Connection(self._server, self._bounds, left)
                self._inside.add(connection)
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await asyncio.get_running_loop().connect_accepted_socket(
                    connection.itself,
                    accepted,
                    ssl=self._tls,
                )
                made = True
        except (TimeoutError, OSError):  # too slow, a broken handshake, or gone
            pass
        finally:
            if not made:
                if connection is not None and connection.transport is not None:
                    connection.transport.abort()
                else:
                    accepted.close()
                left()

    async def _sweep(self) -> None:
        """End the connections that had their time."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            for connection in [one for one in self._inside if one.overdue(self._bounds, now)]:
                if connection.transport is not None:
                    connection.transport.abort()


async def _first_byte(accepted: socket.socket) -> bytes:
    """What comes first, without taking it; b"" when the other side has gone."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return accepted.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            pass
        ready = asyncio.Event()
        loop.add_reader(accepted.fileno(), ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(accepted.fileno())


def _say(accepted: socket.socket, status: int, why: str) -> None:
    """One line to somebody who is not let in, as far as it goes out at once."""
    # in the status line: a client that reads no body of an error shows at least that
    body = b""
    head = f"HTTP/1.1 {status} {why}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with suppress(OSError):
        accepted.setblocking(False)
        accepted.send(head.encode("latin-1", "replace"))
        accepted.shutdown(socket.SHUT_WR)
        accepted.recv(1 << 16)  # unread bytes would turn the close into a reset, which can overtake the reply
    accepted.close()
