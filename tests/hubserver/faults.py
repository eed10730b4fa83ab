"""The product's Hub with things going wrong on purpose.

    hub = FaultyHub(root, faults=[Fault("cut", path="*.parquet", origin="cdn", after=1000, times=1)])
    hub.add("429", origin="hub", wait=2)          # RateLimit: r=0;t=2 for two seconds, then success
    hub.import_files("org/data", {"data/train.parquet": content})

| kind          | what happens                                                        | parameters              |
|---------------|---------------------------------------------------------------------|-------------------------|
| expired       | 403 as an expired link gets                                          | status                  |
| ignore-range  | 200 and the whole body, whatever Range says                         |                         |
| cut           | right headers, the connection ends after `after` body bytes         | after                   |
| flip          | one byte of the body is wrong, at file offset `after`               | after                   |
| flip-byte     | that byte only: bodies that lack it come as they are                | after                   |
| wrong-length  | Content-Length says `by` bytes more (or less) than what comes       | by                      |
| wrong-range   | Content-Range begins `by` bytes off                                 | by                      |
| 429           | RateLimit r=0;t=left until `wait` seconds after the first hit       | wait, times             |
| retry-after   | `status` (429 or 503) with Retry-After: wait only                   | status, wait, times     |
| status        | `status` and nothing else                                           | status                  |
| slow          | the body comes in `piece` bytes every `wait` seconds                | piece, wait             |
| stall         | after `after` body bytes nothing more comes, the connection stays   | after                   |
| reset         | the connection is reset before any byte of the reply                |                         |
| gzip          | the body is gzipped, chunked, without Content-Length                |                         |

A fault hits requests whose path matches the glob, and whose origin and method are as said, `times` times
(None: always). The first fault of the list that matches and has hits left is the one that happens.
"""

from __future__ import annotations

import asyncio
import fnmatch
import gzip
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.typedefs import Handler

from crucible.hub.server import ORIGIN, HubOptions, HubServer, RequestRecord, import_files, import_folder
from crucible.hub.server.access import Refusal
from crucible.hub.server.app import LOG_ENTRY, raw_path, refusal_reply
from crucible.hub.server.blob import BlobResponse, MadeResponse, Span
from crucible.hub.server.ratelimit import bucket_of, limit_headers

Kind = Literal[
    "expired", "ignore-range", "cut", "flip", "wrong-length", "wrong-range", "429", "retry-after", "status",
    "slow", "stall", "reset", "gzip", "flip-byte",
]  # fmt: skip
STALL_MOST_S = 120.0  # a stalled reply ends by itself at last


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong; see the module's table."""

    kind: Kind
    path: str = "*"
    """Glob over the whole path, without the query; `*` matches `/` too."""
    origin: Literal["hub", "cdn"] | None = None
    method: str | None = None
    times: int | None = None
    skip: int = 0
    """Matching requests that pass unharmed first."""
    after: int = 0
    by: int = 1
    status: int = 403
    wait: float = 1.0
    piece: int = 1024


class FaultyHub(HubServer):
    """`HubServer` with a list of faults, which any thread may change while it serves."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        faults: Sequence[Fault] = (),
        *,
        host: str = "127.0.0.1",
        options: HubOptions | None = None,
    ) -> None:
        self.root = Path(root)
        self.faults = FaultList(faults)
        super().__init__(root, host=host, options=options, middlewares=[self.faults.middleware])

    def add(self, fault: Fault | Kind, **fields: Any) -> Fault:
        """Add a fault: `add("cut", path="*.parquet", after=1000, times=1)`."""
        made = fault if isinstance(fault, Fault) else Fault(fault, **fields)
        self.faults.add(made)
        return made

    def clear_faults(self) -> None:
        self.faults.clear()

    def hits(self, fault: Fault) -> int:
        """How often this fault has happened."""
        return self.faults.hits(fault)

    def import_files(self, repo_id: str, files: dict[str, bytes | Path], **options: Any) -> str:
        """`crucible.hub.server.import_files` into this Hub, without waiting for the disk."""
        return import_files(self.root, repo_id, files, durable=False, **options)

    def import_folder(self, repo_id: str, folder: str | os.PathLike[str], **options: Any) -> str:
        return import_folder(self.root, repo_id, folder, durable=False, **options)

    def requests(self, path: str = "*", *, origin: str | None = None, method: str | None = None) -> list[RequestRecord]:
        """The log's records that match."""
        return [
            record
            for record in self.log
            if fnmatch.fnmatchcase(record.path, path)
            and origin in (None, record.origin)
            and method in (None, record.method)
        ]

    def bytes_sent(self, path: str = "*", *, origin: str | None = "cdn") -> int:
        """Body bytes of all matching replies; by default what the CDN served."""
        return sum(record.sent for record in self.requests(path, origin=origin))


@dataclass(slots=True)
class _Armed:
    fault: Fault
    seen: int = 0
    hits: int = 0
    first_hit: float = 0.0


class FaultList:
    """The faults and how often each has happened. Concurrency: any thread."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._guard = threading.Lock()
        self._armed = [_Armed(fault) for fault in faults]

    def add(self, fault: Fault, *, first: bool = False) -> None:
        """`first` puts it before those that are there."""
        with self._guard:
            self._armed.insert(0 if first else len(self._armed), _Armed(fault))

    def remove(self, fault: Fault) -> None:
        """Let it happen no more; nothing if it is not there."""
        with self._guard:
            self._armed = [armed for armed in self._armed if armed.fault is not fault]

    def clear(self) -> None:
        with self._guard:
            self._armed.clear()

    def hits(self, fault: Fault) -> int:
        with self._guard:
            return sum(armed.hits for armed in self._armed if armed.fault is fault)

    def take(self, origin: str, method: str, path: str, now: float) -> tuple[Fault, float] | None:
        """The fault that happens to this request, and when it happened first; counted."""
        with self._guard:
            for armed in self._armed:
                fault = armed.fault
                if (
                    fault.origin not in (None, origin)
                    or fault.method not in (None, method)
                    or not fnmatch.fnmatchcase(path, fault.path)
                ):
                    continue
                armed.seen += 1
                if armed.seen <= fault.skip or (fault.times is not None and armed.hits >= fault.times):
                    continue
                if fault.kind == "429" and armed.hits and now >= armed.first_hit + fault.wait:
                    continue
                armed.first_hit = armed.first_hit or now
                armed.hits += 1
                return fault, armed.first_hit
        return None

    def first_hit(self, fault: Fault) -> float:
        """Unix seconds when it happened first; 0.0 if it has not."""
        with self._guard:
            return next((armed.first_hit for armed in self._armed if armed.fault is fault), 0.0)

    @property
    def middleware(self) -> Any:
        @web.middleware
        async def faulty(request: web.Request, handler: Handler) -> web.StreamResponse:
            now = time.time()
            taken = self.take(request.app[ORIGIN], request.method, raw_path(request), now)
            if taken is None:
                return await handler(request)
            return await _happen(taken[0], request, handler, left=max(0.0, taken[1] + taken[0].wait - now))

        return faulty


async def _happen(fault: Fault, request: web.Request, handler: Handler, *, left: float) -> web.StreamResponse:
    bucket = bucket_of(raw_path(request))
    match fault.kind:
        case "expired":
            return refusal_reply(Refusal(fault.status, "", "Request has expired"))
        case "status":
            return web.Response(status=fault.status)
        case "retry-after":
            status = fault.status if fault.status in (429, 503) else 429
            return web.Response(status=status, headers={"Retry-After": f"{fault.wait:.0f}"})
        case "429":
            quiet = refusal_reply(Refusal(429, "", "Too many requests"))
            quiet.headers.update(limit_headers(bucket, quota=500, left=0, reset_s=max(1, round(left)), window_s=300))
            return quiet
        case "reset":
            return RawReply(b"", [], reset=True)
    if fault.kind == "ignore-range":
        request = request.clone(headers={key: value for key, value in request.headers.items() if key != "Range"})
    reply = await handler(request)
    if fault.kind == "ignore-range":
        return reply
    body, offset = await asyncio.to_thread(_body_of, reply)
    headers = {key: value for key, value in reply.headers.items() if key not in ("Content-Length", "Transfer-Encoding")}
    length = len(body)
    pieces = [body]
    raw = RawReply(b"", pieces)
    match fault.kind:
        case "cut":
            raw.pieces = [body[: fault.after]]
        case "flip":
            at = max(0, fault.after - offset)
            raw.pieces = [body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]] if at < len(body) else pieces
        case "flip-byte" if offset <= fault.after < offset + len(body):
            at = fault.after - offset
            raw.pieces = [body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]]
        case "wrong-length":
            length += fault.by
        case "wrong-range":
            headers["Content-Range"] = f"bytes {offset + fault.by}-{offset + fault.by + length - 1}/{offset + length}"
        case "slow":
            raw.pieces, raw.pause = [body[i : i + fault.piece] for i in range(0, length, fault.piece)], fault.wait
        case "stall":
            raw.pieces, raw.stall = [body[: fault.after]], True
        case "gzip":
            packed = gzip.compress(body)
            raw.pieces = [b"%x\r\n%b\r\n0\r\n\r\n" % (len(packed), packed)]
            headers |= {"Content-Encoding": "gzip", "Transfer-Encoding": "chunked"}
    if fault.kind != "gzip":
        headers["Content-Length"] = str(length)
    headers["Connection"] = "close"
    lines = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
    raw.head = f"HTTP/1.1 {reply.status} {reply.reason}\r\n{lines}\r\n".encode()
    if request.method == "HEAD":
        raw.pieces = []
    raw.set_status(reply.status)
    return raw


def _body_of(reply: web.StreamResponse) -> tuple[bytes, int]:
    """The whole body of an unsent reply, and where in the file it begins."""
    if isinstance(reply, BlobResponse):
        span: Span = reply.span
        with reply.path.open("rb") as stream:
            stream.seek(span.start)
            return stream.read(span.stop - span.start), span.start
    if isinstance(reply, MadeResponse):
        return b"".join(reply.pieces), 0
    body = reply.body if isinstance(reply, web.Response) else None
    return bytes(body) if isinstance(body, (bytes, bytearray)) else b"", 0


class RawReply(web.StreamResponse):
    """A reply written straight to the connection, which ends with it: headers may lie, the body may stop."""

    def __init__(self, head: bytes, pieces: list[bytes], *, reset: bool = False) -> None:
        super().__init__()
        self.head, self.pieces, self.reset = head, pieces, reset
        self.pause, self.stall = 0.0, False
        self._over = False

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        transport = request.transport
        if self._over or transport is None:
            return None
        self._over = True
        self.force_close()
        assert isinstance(transport, asyncio.Transport)
        if self.reset:
            connection: socket.socket = transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
            return None
        transport.write(self.head)
        for piece in self.pieces:
            if transport.is_closing():
                break
            transport.write(piece)
            LOG_ENTRY.get().sent(len(piece))
            while transport.get_write_buffer_size() > 1 << 20 and not transport.is_closing():
                await asyncio.sleep(0.005)
            await asyncio.sleep(self.pause)
        until = time.monotonic() + STALL_MOST_S
        while self.stall and not transport.is_closing() and time.monotonic() < until:
            await asyncio.sleep(0.05)
        transport.close()
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing: the connection is closed already."""
