"""Zip archives: which files are inside, in the order in which `datasets` walks them, and their bytes.

Nothing is unpacked to a name that an archive chose: a file inside is a stream, and what needs a path gets one of the
caller's. A name that leads out of the archive raises UnsafePath. The archive's directory, its files and their sum are
bounded by `Limits`; damage, encryption and methods nobody knows raise CorruptFile.
"""

from __future__ import annotations

import errno
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from crucible.errors import CorruptFile, UnsafePath
from crucible.formats.limits import Limits
from crucible.formats.parquet import first_line

DIRECTORY_BYTES = 64 << 20
"""Most that the list of files inside may have: about a million of them."""
_COPY = 1 << 20
_PROBLEMS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    NotImplementedError,
    RuntimeError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    OSError,
)


def is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


class Zip:
    """An open archive. `names` are the files inside that count, in order."""

    def __init__(self, archive: zipfile.ZipFile, name: str, limits: Limits) -> None:
        self._archive, self._name, self._limits = archive, name, limits
        infos = {info.filename: info for info in archive.infolist() if not info.filename.endswith("/")}
        limits.check_unpacked(name, sum(info.file_size for info in infos.values()))
        for inside in infos:
            if inside.startswith("/") or "\0" in inside or any(part in ("", "..") for part in inside.split("/")):
                raise UnsafePath(name, inside)
        self._infos = {inside: infos[inside] for inside in sorted(filter(_visible, infos), key=_walk_order)}
        self.names = tuple(self._infos)

    def size(self, inside: str) -> int:
        """Bytes of a file. Raises CorruptFile if it is not there."""
        if inside not in self._infos:
            raise CorruptFile(self._name, repr(inside), "is named, but not in the archive")
        return self._infos[inside].file_size

    def read(self, inside: str) -> bytes:
        """All bytes of a file that becomes a value."""
        self._limits.check_row(self._name, repr(inside), self.size(inside))
        with self._open(inside) as file:
            return bytes(file.read())

    def copy(self, inside: str, path: Path) -> None:
        """Write a file's bytes to `path`."""
        with self._open(inside) as file, path.open("wb") as out:
            while True:
                with _checked(self._name, inside):
                    part = file.read(_COPY)
                if not part:
                    return
                out.write(part)

    @contextmanager
    def _open(self, inside: str) -> Iterator[IO[bytes]]:
        info = self._infos[inside]
        if info.flag_bits & 1:
            raise CorruptFile(self._name, repr(inside), "is encrypted")
        with _checked(self._name, inside), self._archive.open(info) as file:
            yield file


@contextmanager
def open_zip(path: Path, name: str, limits: Limits) -> Iterator[Zip]:
    """The archive at `path`, called `name` in errors."""
    with path.open("rb") as file, _opened(file, name, limits) as archive:
        yield archive


def names_inside(read: Callable[[int, int], bytes], size: int, name: str) -> tuple[str, ...]:
    """The files inside an archive of `size` bytes, of which `read(start, stop)` brings ranges: only its end is read."""
    with _opened(io.BufferedReader(_Window(read, size), 1 << 16), name, Limits(unpacked_bytes=1 << 62)) as archive:
        return archive.names


@contextmanager
def _opened(file: Any, name: str, limits: Limits) -> Iterator[Zip]:
    with _checked(name, ""):
        archive = zipfile.ZipFile(_Bounded(file, name))
    with archive:
        yield Zip(archive, name, limits)


@contextmanager
def _checked(name: str, inside: str) -> Iterator[None]:
    try:
        yield
    except _PROBLEMS as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk, not the file: this one says no to an offset before the first byte
        where = repr(inside) if inside else ""
        raise CorruptFile(name, where, f"not a whole zip archive ({first_line(error)})") from error


def _visible(inside: str) -> bool:
    return not any(part.startswith((".", "__")) for part in inside.split("/"))


def _walk_order(inside: str) -> list[tuple[int, str]]:
    """Files of a folder by name, then its folders by name."""
    *folders, name = inside.split("/")
    return [*((1, folder) for folder in folders), (0, name)]


class _Bounded:
    """A file of which nobody reads more than `DIRECTORY_BYTES` at once: `zipfile` would, if the archive says so."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size > DIRECTORY_BYTES:
            raise CorruptFile(self._name, "its directory", f"{size:,} bytes, at most {DIRECTORY_BYTES:,} are allowed")
        return bytes(self._file.read(size))


class _Window(io.RawIOBase):
    """A file that is somewhere else, as its reader asks for it."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, (0, self._at, self._size)[whence] + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._size, self._at + len(buffer))
        data = self._read(self._at, stop) if stop > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
