"""Push the finished ranges of a big file to the agent of another node, which goes on with them if this one dies.

It never harms the download it accompanies: nothing is tried twice, nothing is raised, and after a few failures the
spare counts as gone. The bytes are read from the disk, or its cache, in pieces; nothing is kept in memory.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress

import httpx

from crucible.hub import wire
from crucible.refs import SourceFile
from crucible.report import Tally
from crucible.workers.tls import Trust

PUSH_BYTES = 64 << 20
"""The most that one request carries, and the most that an agent takes."""
PIECE_BYTES = 1 << 20
FAILURES = 3
"""After so many the spare is not tried any more."""
READ_S = 15.0
TIMEOUT = httpx.Timeout(READ_S, connect=2.0)
"""Seconds without a byte moving. A spare that is slower than this holds up the download for nothing."""


def announce(url: str, secret: str, oids: Iterable[str], trust: Trust | None = None) -> None:
    """Ask this node's agent to let go of what it holds for these files: a process of the node goes on with them.

    Unasked, or not heard, it lets go by itself after a while.
    """
    # every item with a big file comes here: httpx's own transport would load the certificates for each (20 ms)
    with suppress(httpx.HTTPError), wire.client(READ_S, max_connections=1, tls=_context(url, trust)) as client:
        for oid in oids:
            with suppress(httpx.HTTPError):
                headers = {"authorization": f"Bearer {secret}"}
                client.post(f"{url}/v1/partials/{oid}/release", headers=headers, timeout=TIMEOUT)


class SparePusher:
    """The `Spare` of a work item, for the agent at `url`. Usable from any thread; counts what it sent in `tally`."""

    def __init__(self, url: str, secret: str, tally: Tally, trust: Trust | None = None) -> None:
        self._url, self._tally = url.rstrip("/"), tally
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
        self._failures = 0
        try:
            context = _context(url, trust)
        except httpx.TransportError:  # this node cannot believe anybody
            context, self._failures = None, FAILURES
        self._client = httpx.Client(
            timeout=TIMEOUT,
            limits=limits,
            trust_env=False,
            headers={"authorization": f"Bearer {secret}"},
            verify=context or False,  # False, for http only: its own would load the system's certificates
        )
        self._lock = threading.Lock()
        self._pushed: set[str] = set()

    def __call__(self, file: SourceFile, descriptor: int, start: int, stop: int) -> None:
        for begin in range(start, stop, PUSH_BYTES):
            if self._failures >= FAILURES:
                return
            self._push(file, descriptor, begin, min(stop, begin + PUSH_BYTES))

    def done(self) -> None:
        """The item is done: what the spare got is of no use any more."""
        for oid in self._pushed:
            with suppress(httpx.HTTPError):
                self._client.delete(f"{self._url}/v1/partials/{oid}")

    def close(self) -> None:
        self._client.close()

    def _push(self, file: SourceFile, descriptor: int, start: int, stop: int) -> None:
        with self._lock:
            self._pushed.add(file.oid)
        try:
            reply = self._client.put(
                f"{self._url}/v1/partials/{file.oid}",
                params={"size": file.size, "lfs": int(file.lfs), "start": start},
                content=_pieces(descriptor, start, stop),
                headers={"content-length": str(stop - start)},
            )
            reply.raise_for_status()
        except (httpx.HTTPError, httpx.StreamError, OSError):
            with self._lock:
                self._failures += 1
            self._tally.add(spare_failures=1)
        else:
            self._tally.add(spare_bytes=stop - start)


def _context(url: str, trust: Trust | None) -> ssl.SSLContext | None:
    """Whom a client of the agent at `url` believes; None for plain HTTP. Raises httpx.UnsupportedProtocol."""
    return None if trust is None else trust.context(url)


def _pieces(descriptor: int, start: int, stop: int) -> Iterator[bytes]:
    while start < stop:
        piece = os.pread(descriptor, min(PIECE_BYTES, stop - start), start)
        if not piece:
            raise OSError(f"the file on its way ends at {start:,}, before {stop:,}")
        start += len(piece)
        yield piece
