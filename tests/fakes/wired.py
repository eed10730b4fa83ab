"""A server on loopback that says exactly the bytes a test tells it to, and counts who came.

with Wired(lambda talk: talk.send(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nhi")) as server:
    httpx.get(server.url)
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

from crucible.hub import wire

WAIT_S = 60.0


class Hangup(Exception):
    """End this connection in good order."""


@dataclass
class Talk:
    """One request, and the connection it came on."""

    connection: socket.socket
    head: str
    body: bytes
    number: int
    """How many requests this connection carried before."""
    ended: threading.Event

    @property
    def path(self) -> str:
        return self.head.split(" ", 2)[1]

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.connection.sendall(piece)

    def reply(self, body: bytes, *headers: str, status: str = "200 OK") -> None:
        lines = "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers))
        self.send(f"{lines}\r\n".encode("latin-1") + body)

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Hangup

    def stall(self) -> None:
        """Say nothing more until the test is over or the other side has gone."""
        self.connection.settimeout(0.05)
        while not self.ended.is_set():
            try:
                if not self.connection.recv(1):
                    raise Hangup
            except TimeoutError:
                continue
        raise Hangup


@dataclass(repr=False)
class Wired:
    """Runs `handler` for each request, a thread a connection. `Hangup` closes the connection, a return keeps it."""

    handler: Callable[[Talk], None]
    tls: ssl.SSLContext | None = None
    accepted: int = 0
    heads: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    open: int = 0

    def __enter__(self) -> Self:
        self._ended, self._guard = threading.Event(), threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._socket.settimeout(0.05)
        self.port = self._socket.getsockname()[1]
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:  # the first is the one that adds others
            thread.join(WAIT_S)
            assert not thread.is_alive()
        self._socket.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            with self._guard:
                self.accepted += 1
                self.open += 1
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(WAIT_S)
            if self.tls:
                connection = self.tls.wrap_socket(connection, server_side=True)
            number = 0
            while True:
                head, body = self._request(connection)
                with self._guard:
                    self.heads.append(head)
                    self.bodies.append(body)
                self.handler(Talk(connection, head, body, number, self._ended))
                number += 1
        except (Hangup, OSError):
            pass  # a client that goes away is what many of these tests are about
        finally:
            connection.close()
            with self._guard:
                self.open -= 1

    def _request(self, connection: socket.socket) -> tuple[str, bytes]:
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more(connection)
        raw, _, body = data.partition(b"\r\n\r\n")
        head = raw.decode("latin-1")
        fields = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head.split("\r\n"))
        }
        while len(body) < int(fields.get("content-length", 0)):
            body += self._more(connection)
        while fields.get("transfer-encoding") == "chunked" and not body.endswith(b"0\r\n\r\n"):
            body += self._more(connection)
        return head, body

    def _more(self, connection: socket.socket) -> bytes:
        while not self._ended.is_set():
            connection.settimeout(0.05)
            try:
                data = connection.recv(65536)
            except TimeoutError:
                continue
            finally:
                connection.settimeout(WAIT_S)  # for what the handler sends
            if not data:
                break
            return data
        raise Hangup


BODY = os.urandom(3_000_000)


def content(talk: Talk) -> None:
    """A handler: every reply is `BODY`."""
    talk.reply(BODY)


def soon(true: Callable[[], bool]) -> bool:
    """Does it come true within a minute?"""
    until = time.monotonic() + WAIT_S
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    return true()


def read(client: httpx.Client, url: str, **options: Any) -> bytes:
    """A whole body by `wire.chunks`."""
    with client.stream("GET", url, **options) as reply:
        return b"".join(bytes(chunk) for chunk in wire.chunks(reply))


def stall_in_body(talk: Talk) -> None:
    talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
    talk.stall()


def cut_in_body(talk: Talk) -> None:
    talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
    raise Hangup
