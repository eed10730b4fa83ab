"""Write a bundle: see `crucible.bundle` for what it is. Raises BundleError, ChecksumMismatch, or what the disk says."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

from crucible import ustar
from crucible.bundle import CHUNK, STREAM, Chunks, checked, hasher_of
from crucible.cache.disk import disk_errors, fsync_folder, write_atomic
from crucible.errors import BundleError
from crucible.lockfile import NAME, Lock, Member

_WRITING = ".writing-"
"""What a file of a folder is called until it is whole."""


class BundleWriter(Protocol):
    """A bundle that is written. `add` is called for each of `lock.members()` in order, then `finish`."""

    where: str
    reused: int

    def add(self, member: Member, read: Callable[[], AbstractContextManager[Chunks]]) -> None:
        """Write a member from what `read` opens, unless it is there already with the right bytes."""
        ...

    def finish(self) -> None:
        """All members were added: the bundle counts from now on."""
        ...


@contextmanager
def new_bundle(path: str, lock: Lock) -> Iterator[BundleWriter]:
    """Write a bundle to `path`: a tar where the name ends in .tar or is `-` (standard output), else a folder.

    A tar gets its name when it is finished. Into a folder an interrupted export of the same job is continued; one that
    holds something else is refused with a BundleError.
    """
    if path == STREAM:
        writer = _TarWriter("standard output", sys.stdout.buffer, lock)
        yield writer
        return
    target = Path(path).absolute()
    if not path.endswith(".tar"):
        with _FolderWriter(target, lock) as folder:
            yield folder
        return
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("xb") as file:
                yield _TarWriter(path, file, lock)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, target)
            fsync_folder(target.parent)
        finally:
            scratch.unlink(missing_ok=True)


class _TarWriter:
    def __init__(self, where: str, file: BinaryIO, lock: Lock) -> None:
        self.where, self._file, self.reused = where, file, 0
        data = lock.to_json()
        self._write(ustar.header(NAME, len(data)), data, bytes(ustar.padding(len(data))))

    def add(self, member: Member, read: Callable[[], AbstractContextManager[Chunks]]) -> None:
        self._write(ustar.header(member.name, member.size))
        with read() as chunks:
            for chunk in checked(self.where, member, chunks):
                self._write(chunk)
        self._write(bytes(ustar.padding(member.size)))

    def finish(self) -> None:
        self._write(ustar.END)
        self._file.flush()

    def _write(self, *parts: bytes) -> None:
        for part in parts:
            self._file.write(part)


class _FolderWriter:
    def __init__(self, root: Path, lock: Lock) -> None:
        self.where, self._root, self._lock, self.reused = str(root), root, lock, 0
        self._expected = {member.name for member in lock.members()}

    def __enter__(self) -> _FolderWriter:
        with disk_errors(self._root):
            self._root.mkdir(parents=True, exist_ok=True)
            for folder, _, names in os.walk(self._root):
                for name in names:
                    path = Path(folder, name)
                    if name.startswith(_WRITING):
                        path.unlink()  # of an export that was killed
                    elif (inside := path.relative_to(self._root).as_posix()) not in self._expected | {NAME}:
                        raise BundleError(
                            self.where, inside[:200], "is no part of this bundle; export into an empty folder"
                        )
            (self._root / NAME).unlink(missing_ok=True)  # what is not finished does not count
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What was written stays, for the next try."""

    def add(self, member: Member, read: Callable[[], AbstractContextManager[Chunks]]) -> None:
        target = self._root / member.name
        if self._has(member, target):
            self.reused += 1
            return
        with disk_errors(target, f"{member.size:,} bytes for {member.name}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with read() as chunks:
                self._put(target, checked(self.where, member, chunks))

    def finish(self) -> None:
        with disk_errors(self._root / NAME):
            self._put(self._root / NAME, iter([self._lock.to_json()]))
            fsync_folder(self._root)

    def _has(self, member: Member, target: Path) -> bool:
        hasher = hasher_of(member)
        with suppress(OSError), target.open("rb") as file:
            while chunk := file.read(CHUNK):
                hasher.update(chunk)
            return hasher.hexdigest() == member.digest
        return False

    def _put(self, target: Path, chunks: Chunks) -> None:
        scratch = target.with_name(f"{_WRITING}{secrets.token_hex(4)}")
        try:
            with scratch.open("xb", buffering=0) as file:
                for chunk in chunks:
                    rest = memoryview(chunk)
                    while rest:
                        rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)


def put_file(path: str, data: bytes) -> None:
    """Write one file, or to standard output where `path` is `-`. It gets its name when it is whole."""
    if path == STREAM:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    target = Path(path).absolute()
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, data)
