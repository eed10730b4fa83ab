"""Send a range of a shard to who asked for it, in pieces that must each be taken in time. The kernel does the copying.

The file is opened by its name in its folder, and no link is followed on the way: a link inside of a store leads out.
Under TLS the bytes pass through this process, where they are encrypted.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from aiohttp import web

PIECE_BYTES = 1 << 20
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR})
"""What the system says of a name that is no file: nothing, a link, a pipe or socket, a folder."""
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")


def open_inside(path: Path) -> io.FileIO | None:
    """The regular file `path`, whose folder and itself are no links; None for anything else.

    Raises OSError where that cannot be known, as without a free descriptor.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        folder = os.open(path.parent, flags | os.O_DIRECTORY)
        try:
            descriptor = os.open(path.name, flags | os.O_NONBLOCK, dir_fd=folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return io.FileIO(descriptor, "rb")


def span_of(header: str | None, size: int) -> tuple[int, int] | None:
    """(start, stop) of what a Range header asks of `size` bytes; the whole without one. None: nothing of it is here.

    One range only. Several at once are None as well: no client of ours asks for them, and they multiply the work.
    """
    if header is None:
        return 0, size
    match = _RANGE.fullmatch(header.strip())
    if match is None or match[0] == "bytes=-":
        return None
    if not match[1]:
        start, stop = max(0, size - int(match[2])), size
    else:
        start, stop = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
    return (start, stop) if start < stop else None


class ShardResponse(web.StreamResponse):
    """One range of an open file. The file is closed when all was sent, or nothing more can be.

    A reader that takes no piece within `piece_s` is cut off: it may ask for the rest, and its slot is another's.
    """

    def __init__(self, file: io.FileIO, span: tuple[int, int], size: int, piece_s: float, *, partial: bool) -> None:
        start, stop = span
        super().__init__(status=206 if partial else 200)
        self._file, self._at, self._stop, self._piece_s = file, start, stop, piece_s
        self.content_type = "application/octet-stream"
        self.content_length = stop - start
        self.headers["Accept-Ranges"] = "bytes"
        if partial:
            self.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"

    async def send(self, request: web.Request) -> None:
        """Head and bytes. Ends the connection of a reader that is too slow, or of a file that ended too early."""
        with self._file:
            await self.prepare(request)
            transport = request.transport
            if transport is None or request.method == "HEAD":
                return
            secure = transport.get_extra_info("sslcontext") is not None
            loop = asyncio.get_running_loop()
            try:
                while self._at < self._stop:
                    size = min(PIECE_BYTES, self._stop - self._at)
                    async with asyncio.timeout(self._piece_s):
                        if secure:
                            data = await loop.run_in_executor(None, os.pread, self._file.fileno(), size, self._at)
                            if len(data) < size:
                                raise ConnectionResetError("the file is shorter than it was")
                            await self.write(data)
                        elif await loop.sendfile(transport, self._file, self._at, size) < size:
                            raise ConnectionResetError("the file is shorter than it was")
                    self._at += size
            except (TimeoutError, OSError, RuntimeError):
                # the reader sees a body that ends before its length, which is no body
                with suppress(OSError, RuntimeError):
                    transport.abort()
                return
            if secure:
                await self.write_eof()
