"""Replies that are a file, whole or a range of it, sent by the kernel (sendfile); and those that are made as they go.

aiohttp's own FileResponse replaces the ETag by one of mtime and size, looks for `.gz` neighbours, and answers HEAD
with 206; the Hub's clients need the ETag of the content, so the range is worked out here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

SEND_PIECE = 8 << 20  # bytes counted as sent at a time; a broken connection is counted exactly anyway
MADE_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """[start, stop) of a body, and whether it was asked for by a range."""

    start: int
    stop: int
    partial: bool


def parse_range(header: str | None, size: int) -> Span | None:
    """The span a Range header asks for; None if it lies outside the body (416).

    One range of `a-b`, `a-`, `-n`. Several ranges, other units and nonsense count as no range, as RFC 9110 allows.
    """
    whole = Span(0, size, False)
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header.replace(" ", "")) if header else None
    if found is None or not (found[1] or found[2]):
        return whole
    if not found[1]:
        last = min(int(found[2]), size)
        return Span(size - last, size, True) if last else None
    start, stop = int(found[1]), min(int(found[2]) + 1, size) if found[2] else size
    if found[2] and int(found[2]) < start:
        return whole
    return Span(start, stop, True) if start < size else None


class BlobResponse(web.StreamResponse):
    """A span of a file. `on_sent` is told of bytes as the kernel takes them."""

    def __init__(self, path: Path, span: Span, *, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(status=status, headers=headers)
        self.content_length = span.stop - span.start
        self.path, self.span = path, span
        self.on_sent: Callable[[int], None] | None = None
        self._begun = False

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        writer = await super().prepare(request)
        if self._begun or writer is None or request.method == "HEAD" or self.status == 304:
            return writer
        self._begun = True
        loop = asyncio.get_running_loop()
        at = self.span.start
        stream = await loop.run_in_executor(None, lambda: self.path.open("rb", buffering=0))
        try:
            while at < self.span.stop:
                if request.transport is None:
                    raise ConnectionResetError("the client went away")
                try:
                    count = await loop.sendfile(request.transport, stream, at, min(SEND_PIECE, self.span.stop - at))
                except BaseException:
                    # the event loop leaves the file's position after the last byte sent
                    self._count(max(0, stream.tell() - at))
                    raise
                if not count:
                    raise ConnectionResetError(f"{self.path.name} is shorter than its size")
                at += count
                self._count(count)
        finally:
            stream.close()
        return writer

    def _count(self, sent: int) -> None:
        if self.on_sent is not None:
            self.on_sent(sent)


class MadeResponse(web.StreamResponse):
    """A body that is made, in a thread, while it is sent. `on_sent` is told of bytes as they are handed over."""

    def __init__(self, pieces: Iterable[bytes], *, headers: Mapping[str, str]) -> None:
        super().__init__(headers=headers)
        self.pieces = iter(pieces)
        self.on_sent: Callable[[int], None] | None = None
        self._begun = False

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        writer = await super().prepare(request)
        if self._begun or writer is None or request.method == "HEAD":
            return writer
        self._begun = True
        while piece := await asyncio.to_thread(self._some):
            await self.write(piece)
            if self.on_sent is not None:
                self.on_sent(len(piece))
        return writer

    def _some(self) -> bytes:
        """Enough for one turn of the event loop; empty at the end."""
        held = bytearray()
        for piece in self.pieces:
            held += piece
            if len(held) >= MADE_PIECE:
                break
        return bytes(held)


def blob_reply(
    request: web.BaseRequest, path: Path, size: int, etag: str, headers: Mapping[str, str]
) -> web.StreamResponse:
    """Answer GET or HEAD with a file: 200, 206, 304 or 416. `etag` is strong and without quotes."""
    quoted = f'"{etag}"'
    head = {"Accept-Ranges": "bytes", "ETag": quoted, **headers}
    if request.headers.get("If-None-Match") in (quoted, f"W/{quoted}", "*"):
        return web.Response(status=304, headers={key: value for key, value in head.items() if key != "Content-Type"})
    wanted = request.headers.get("Range") if request.method == "GET" else None
    if request.headers.get("If-Range", quoted) != quoted:
        wanted = None
    span = parse_range(wanted, size)
    if span is None:
        return web.Response(status=416, headers={**head, "Content-Range": f"bytes */{size}"})
    if not span.partial:
        return BlobResponse(path, span, status=200, headers=head)
    head["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{size}"
    return BlobResponse(path, span, status=206, headers=head)
