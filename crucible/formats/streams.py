"""Bytes of a source file, decompressed on the way. Damage is named with the place where it was met."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from isal import igzip as untyped_igzip
from isal import isal_zlib as untyped_zlib

from crucible.errors import CorruptFile, UnsupportedFormat
from crucible.formats.limits import Limits

igzip: Any = untyped_igzip  # it has no annotations
_IGZIP_ERROR: Any = untyped_zlib.error
_DAMAGE: tuple[type[Exception], ...] = (
    EOFError,
    zlib.error,
    _IGZIP_ERROR,
    lzma.LZMAError,
    pa.ArrowException,
    OSError,
)

COMPRESSIONS = ("gzip", "bz2", "xz", "zstd", "lz4")

_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bz2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"),
)
_ENDINGS = ((".gz", "gzip"), (".gzip", "gzip"), (".bz2", "bz2"), (".xz", "xz"), (".zst", "zstd"), (".lz4", "lz4"))
_BUFFER = 1 << 20
_PIECE = 1 << 18


def compression_of(path: Path, name: str) -> str | None:
    """How the file is compressed, by its first bytes; None for plain. Archives raise UnsupportedFormat.

    A name that promises a compression which the bytes do not show raises CorruptFile: reading it as plain text would
    give rows of garbage.
    """
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(b"PK\x03\x04"):
        raise UnsupportedFormat(f"{name} (a zip archive)", COMPRESSIONS)
    for magic, compression in _MAGIC:
        if head.startswith(magic):
            return compression
    promised = next((kind for ending, kind in _ENDINGS if name.lower().endswith(ending)), None)
    if promised is not None:
        raise CorruptFile(name, "byte 0", f"does not start like a {promised} file")
    return None


def refuse_packed(path: Path, name: str, what: str) -> None:
    """Raise UnsupportedFormat for a file of `what` that is in a zip archive or compressed as a whole."""
    with path.open("rb") as file:
        head = file.read(8)
    packed = next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)
    if head.startswith(b"PK\x03\x04"):
        packed = "zip"
    if packed is not None:
        raise UnsupportedFormat(
            f"{name} ({what} packed with {packed})", (f"{what} as it is: unpack it, and load that",)
        )


def open_bytes(path: Path, name: str) -> io.BufferedReader:
    """The decompressed bytes. Reading raises CorruptFile where the compressed stream is damaged or ends too early."""
    return io.BufferedReader(_Checked(_open(path, compression_of(path, name)), name), _BUFFER)


def _open(path: Path | io.BytesIO, compression: str | None) -> IO[bytes] | Any:
    if compression == "gzip":
        return igzip.open(path, "rb")  # gzip's own module takes 2.8 times as long for the same bytes and errors
    if compression == "bz2":
        return bz2.open(path, "rb")
    if compression == "xz":
        return lzma.open(path, "rb")
    if compression in ("zstd", "lz4"):
        raw = pa.OSFile(str(path), "rb") if isinstance(path, Path) else pa.PythonFile(path, "r")
        return pa.CompressedInputStream(raw, compression)
    return path.open("rb") if isinstance(path, Path) else path


def rest_of_line(file: Any, name: str, limits: Limits) -> Any:
    """What is left of a line, of bytes or of text. Raises CorruptFile if that is more than a row may have."""
    line = file.readline(limits.row_bytes + 1)
    limits.check_row(name, "a line of it", len(line))
    return line


def decompressed(content: bytes, compression: str, name: str, limits: Limits) -> bytes:
    """`content` unpacked, if that is not more than a row may have. Raises CorruptFile."""
    inner = _open(io.BytesIO(content), compression)
    file = io.BufferedReader(_Checked(inner, name), _BUFFER)
    parts, size = [], 0
    while part := file.read(_BUFFER):
        parts.append(part)
        size += len(part)
        limits.check_row(name, "", size)
    return b"".join(parts)


class _Checked(io.RawIOBase):
    """A raw stream that turns a decompressor's complaints into CorruptFile with the offset of the last good byte."""

    def __init__(self, inner: Any, name: str) -> None:
        super().__init__()
        self._inner, self._path, self._offset = inner, name, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            # no more at once: what is read is copied once, and a piece of this size needs no fresh memory each time
            # into the buffer: pyarrow's `read` loses the memory it took when the stream turns out to be damaged
            size = int(self._inner.readinto(memoryview(buffer)[:_PIECE]))
        except _DAMAGE as error:
            if isinstance(error, OSError) and error.errno:
                raise  # the disk, not the file
            problem = "ends in the middle of its compressed data" if _is_short(error) else f"cannot be read ({error})"
            raise CorruptFile(self._path, f"byte {self._offset:,} of its decompressed data", problem) from error
        self._offset += size
        return size

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


def _is_short(error: BaseException) -> bool:
    return isinstance(error, EOFError) or "runcated" in str(error)
