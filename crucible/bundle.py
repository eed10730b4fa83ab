"""A bundle: a lock file and the shards that it names, in a folder or in one tar. `bundle_write` writes one.

    crucible.lock.json          what all else must be (`lockfile`); the first member of a tar, the last file of a folder
    shards/ab/<key>.arrow       each shard of the job, in the order of the source
    raw/ab/<oid>                the source files, where they were asked for

A folder without a lock file is an export that was interrupted: the same export goes on with it. A tar is written and
read as a stream, front to back, so it can come through a pipe. The same job gives the same bytes, whoever exports it.
Raises BundleError for what a bundle should not be, ChecksumMismatch for a member whose bytes are not those promised.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from crucible import ustar
from crucible.config import lock_bytes
from crucible.errors import BundleError, ChecksumMismatch, CrucibleError
from crucible.hashing import Hasher, hasher_for, shard_hasher
from crucible.lockfile import NAME, Lock, Member, lock_from_json
from crucible.refs import ShardInfo, SourceFile
from crucible.report import Progress

CHUNK = 1 << 20
STREAM = "-"
"""In place of a path: standard input or output."""
Chunks = Iterator[bytes]


@dataclass(frozen=True, slots=True)
class BundleReport:
    """What an export wrote, an import took or a check saw."""

    bundle: str
    lock: str
    """Digest of the lock file."""
    repo: str
    commit: str
    config: str
    splits: tuple[tuple[str, str, int], ...]
    """(split, manifest id, rows)."""
    shards: int
    files: int
    """Source files."""
    bytes: int
    reused: int = 0
    """Of shards and files together: those that were there already."""


def report_of(bundle: str, lock: Lock, reused: int = 0) -> BundleReport:
    shards = files = size = 0
    for member in lock.members():
        shards, files = shards + isinstance(member.what, ShardInfo), files + isinstance(member.what, SourceFile)
        size += member.size
    splits = tuple((one.split, one.id, one.rows) for one in lock.manifests)
    repo = lock.repo
    return BundleReport(
        bundle, lock.digest, repo.repo_id, repo.revision, lock.manifests[0].config, splits, shards, files, size, reused
    )


class BundleReader(Protocol):
    """A bundle that is read. Members come in the order of `lock.members()`, each opened once."""

    where: str
    lock: Lock

    def open(self, member: Member) -> AbstractContextManager[Chunks]:
        """The member's bytes, exactly as many as the lock file says; not hashed. What is not taken is passed over."""
        ...

    def finish(self) -> None:
        """All members were opened: raise BundleError if there is anything else."""
        ...


@contextmanager
def open_bundle(path: str) -> Iterator[BundleReader]:
    """The bundle at `path`, a folder or a tar; `-` is a tar on standard input. Its lock file is checked here."""
    if path == STREAM:
        yield _Tar("standard input", sys.stdin.buffer)
        return
    try:
        folder = stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        raise BundleError(
            path, "", f"cannot be opened ({error.strerror}); give what `crucible export --out` wrote"
        ) from error
    if folder:
        yield _Folder(Path(path))
        return
    with _reading(path, ""), open(path, "rb") as file:
        yield _Tar(path, file)


def read_lock(path: str) -> Lock:
    """The lock file at `path`, or that of the bundle there. Raises BundleError."""
    if path == STREAM or os.path.isdir(path):
        with open_bundle(path) as bundle:
            return bundle.lock
    with _reading(path, ""), open(path, "rb") as file:
        if file.peek(1)[:1] != b"{":  # what comes through a pipe cannot be gone back in
            return _Tar(path, file).lock
        return lock_from_json(_limited(path, file), path)


def verify(path: str, on_progress: Callable[[Progress], None] = lambda _: None) -> BundleReport:
    """Check every byte of a bundle; nothing is written. Raises at the first thing that is wrong."""
    with open_bundle(path) as bundle:
        count = Counter(bundle.lock, "check", on_progress)
        for member in bundle.lock.members():
            with bundle.open(member) as chunks:
                for _ in checked(bundle.where, member, chunks):
                    pass
            count.done(member)
        bundle.finish()
        return report_of(bundle.where, bundle.lock)


def checked(where: str, member: Member, chunks: Chunks) -> Chunks:
    """Hand on `chunks`; raise ChecksumMismatch after the last one if they are not the member."""
    hasher = hasher_of(member)
    for chunk in chunks:
        hasher.update(chunk)
        yield chunk
    if (actual := hasher.hexdigest()) != member.digest:
        raise ChecksumMismatch(member.name, f"bundle {where}", member.digest, actual)


def hasher_of(member: Member) -> Hasher:
    """A fresh hash whose `hexdigest()` is the member's digest if the bytes are right."""
    return shard_hasher() if isinstance(member.what, ShardInfo) else hasher_for(member.what)


class Counter:
    """Tells how far the way through a bundle is, a member at a time."""

    def __init__(self, lock: Lock, what: str, on_progress: Callable[[Progress], None]) -> None:
        self._what, self._tell = what, on_progress
        sizes = [member.size for member in lock.members()]
        self._items, self._bytes = len(sizes), sum(sizes)
        self._done = self._came = 0

    def done(self, member: Member) -> None:
        self._done, self._came = self._done + 1, self._came + member.size
        self._tell(Progress(self._what, "copies", self._done, self._items, self._came, self._bytes))


# --- reading


class _Folder:
    def __init__(self, root: Path) -> None:
        self.where, self._root = str(root), root
        if not (root / NAME).exists():
            raise BundleError(self.where, NAME, "is not there: no bundle, or an export that did not end; export again")
        with self._file(NAME) as file:
            self.lock = lock_from_json(_limited(self.where, file), self.where)

    @contextmanager
    def open(self, member: Member) -> Iterator[Chunks]:
        with self._file(member.name) as file:
            found = os.fstat(file.fileno()).st_size
            if found != member.size:
                raise BundleError(
                    self.where, member.name, f"has {found:,} bytes, the lock file says {member.size:,}; copy it again"
                )
            yield self._chunks(member, file)

    def finish(self) -> None:
        expected = {NAME, *(member.name for member in self.lock.members())}
        for folder, folders, names in os.walk(self._root):
            for name in names + [one for one in folders if os.path.islink(os.path.join(folder, one))]:
                path = Path(folder, name).relative_to(self._root).as_posix()
                if path not in expected:
                    raise BundleError(self.where, path[:200], "is no part of this bundle; remove it")

    @contextmanager
    def _file(self, name: str) -> Iterator[BinaryIO]:
        """Open a file below the root, through no link."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        with _reading(self.where, name):
            at = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                *folders, last = name.split("/")
                for folder in folders:
                    below = os.open(folder, flags | os.O_DIRECTORY, dir_fd=at)
                    os.close(at)
                    at = below
                # a FIFO would be waited for
                descriptor = os.open(last, flags | os.O_NONBLOCK, dir_fd=at)
            finally:
                os.close(at)
            with open(descriptor, "rb", buffering=0) as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise BundleError(self.where, name, "is no plain file")
                yield file

    def _chunks(self, member: Member, file: BinaryIO) -> Chunks:
        left = member.size
        while left:
            with _reading(self.where, member.name):
                chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise BundleError(self.where, member.name, f"ends {left:,} bytes early; it is being written to")
            left -= len(chunk)
            yield chunk


class _Tar:
    def __init__(self, where: str, file: BinaryIO) -> None:
        self.where, self._file, self._at = where, file, 0
        block = self._read(ustar.BLOCK, NAME)
        size = ustar.size_in(block, NAME)
        if size is None:
            raise BundleError(
                where, "", "is no bundle: it does not begin with a lock file, as `crucible export` writes it"
            )
        if size > (limit := lock_bytes()):
            raise _too_big(where, f"{size:,} bytes", limit)
        data = b"".join(self._body(NAME, size))
        self._pad(NAME, size)
        self.lock = lock_from_json(data, where)

    @contextmanager
    def open(self, member: Member) -> Iterator[Chunks]:
        block = self._read(ustar.BLOCK, member.name)
        if block != ustar.header(member.name, member.size):
            named = ustar.name_in(block)
            found = (
                "the end" if block == bytes(ustar.BLOCK) else f"{named[:200]!r}, or not as `crucible export` writes it"
            )
            where = f"at byte {self._at - ustar.BLOCK:,}"
            raise BundleError(
                self.where, member.name, f"was to come {where}; there is {found}; copy or export it again"
            )
        body = self._body(member.name, member.size)
        yield body
        for _ in body:
            pass
        self._pad(member.name, member.size)

    def finish(self) -> None:
        if self._read(len(ustar.END), "its end") != ustar.END or self._file.read(1):
            raise BundleError(self.where, "", f"goes on at byte {self._at:,} behind its last member; export it again")

    def _body(self, name: str, size: int) -> Chunks:
        left = size
        while left:
            chunk = self._read(min(CHUNK, left), name)
            left -= len(chunk)
            yield chunk

    def _pad(self, name: str, size: int) -> None:
        if any(self._read(ustar.padding(size), name)):
            raise BundleError(self.where, name, f"has bytes behind its end, before byte {self._at:,}; copy it again")

    def _read(self, size: int, name: str) -> bytes:
        """Exactly so many bytes."""
        parts, left = [], size
        while left:
            with _reading(self.where, name):
                part = self._file.read(left)
            if not part:
                raise BundleError(
                    self.where, name, f"the bundle ends at byte {self._at:,}, in or before this; copy it again"
                )
            self._at += len(part)
            left -= len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def _reading(where: str, name: str) -> Iterator[None]:
    try:
        yield
    except CrucibleError:
        raise
    except OSError as error:
        said = (
            "is a link"
            if error.errno in (errno.ELOOP, errno.ENOTDIR) and name
            else f"cannot be read ({error.strerror})"
        )
        raise BundleError(where, name, said) from error


def _limited(where: str, file: BinaryIO) -> bytes:
    """All of a lock file, of which nobody has said how long it is: it may come through a pipe."""
    limit, parts = lock_bytes(), list[bytes]()
    left = limit + 1
    while left and (part := file.read(min(CHUNK, left))):
        parts.append(part)
        left -= len(part)
    if not left:
        raise _too_big(where, f"more than {limit:,} bytes", limit)
    return b"".join(parts)


def _too_big(where: str, has: str, limit: int) -> BundleError:
    allowed = f"CRUCIBLE_LOCK_BYTES allows {limit:,}; to read one takes 13 times its size of memory"
    return BundleError(where, NAME, f"has {has}, {allowed}: raise it if you know who wrote this one")
