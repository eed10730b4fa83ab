"""A blob on its way: a data file, the journal of what is in it, and how it gets its name when it is complete.

After a kill the journal says which ranges were finished; the next holder checks them against the disk and goes on. A
blob gets its name by a rename of exactly the bytes behind our own descriptor, whatever became of the names meanwhile.
Raises DiskFull, StoreReadOnly and StoreError; after each of them what was recorded before is still true.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from crucible.cache import journal
from crucible.cache.disk import disk_errors, fsync_folder
from crucible.cache.journal import Entry
from crucible.cache.lease import Lease, Names
from crucible.cache.ranges import Ranges
from crucible.errors import StoreError
from crucible.refs import SourceFile

QUARANTINE_BYTES = 1 << 30
"""What a quarantine folder holds at most, in bytes on disk."""
QUIET_WAIT_S = 120.0
"""How long `reset`, `quarantine` and `publish` wait for writes that are under way, in seconds."""


class Partial:
    """The one place where this process writes a blob. Thread-safe. Made by `BlobFolder.claim`, valid inside its `with`.

    Without a lease (`BlobFolder.claim` waited too long) the file is private and is gone after the `with`.
    """

    def __init__(
        self,
        file: SourceFile,
        names: Names,
        data: Path,
        descriptor: int,
        lease: Lease | None,
        entries: tuple[Entry, ...] = (),
        etags: dict[str, str] | None = None,
    ) -> None:
        self.file, self.descriptor = file, descriptor
        self.lasting = True
        """Whether the blob is to be there after a power cut; see `BlobFolder`."""
        self.ranges = Ranges.of((entry.start, entry.stop) for entry in entries)
        self.adopted = self.ranges.size
        self._names, self._data, self._lease = names, data, lease
        self._etags = dict(etags or {})
        self._journal = threading.Lock()
        self._gate = threading.Condition()
        self._users = 0
        self._open = True
        self._published = False
        self._pid = os.getpid()

    @property
    def fenced(self) -> bool:
        """True once somebody else goes on with this blob: stop writing. Known after a few seconds at the latest."""
        return self._lease is not None and self._lease.lost

    @property
    def shared(self) -> bool:
        """True if what is recorded here is there for the next holder; False for a private file (see `claim`)."""
        return self._lease is not None

    def write(self, offset: int, view: bytes | bytearray | memoryview) -> None:
        """Write all of `view` at `offset`. Any thread, any order; two threads must not write the same bytes at once."""
        rest = memoryview(view).cast("B")
        self._check(offset, offset + rest.nbytes)
        self._enter()
        try:
            with disk_errors(self._data, f"{self.file.size:,} bytes for {self.file.path}"):
                while rest:
                    written = os.pwrite(self.descriptor, rest, offset)
                    rest, offset = rest[written:], offset + written
        finally:
            self._leave()

    def record(self, start: int, stop: int, crc32: int) -> None:
        """Journal that [start, stop) was written and has this zlib.crc32. Looks whether the lease still stands."""
        self._check(start, stop)
        if start == stop:
            return
        self._enter()
        try:
            with self._journal, disk_errors(self._data, f"{self.file.size:,} bytes for {self.file.path}"):
                if self._lease is not None:
                    self._lease.append(Entry(start, stop, crc32).line())
                    self._lease.check()
                self.ranges = self.ranges.add(start, stop)
        finally:
            self._leave()

    def note_etag(self, source: str, etag: str) -> bool:
        """Remember what a source called its version. False if it called it otherwise before: the caller resets."""
        self._enter()
        try:
            with self._journal, disk_errors(self._data):
                known = self._etags.get(source)
                if known is None:
                    if self._lease is not None:
                        self._lease.append(journal.etag_line(source, etag))
                    self._etags[source] = etag
                return known in (None, etag)
        finally:
            self._leave()

    def reset(self) -> None:
        """Forget everything that was written, etags too."""
        with self._alone(), disk_errors(self._data):
            self._forget()
            os.ftruncate(self.descriptor, 0)

    def quarantine(self, folder: Path) -> Path:
        """Put the wrong bytes into `folder` for a look, at most QUARANTINE_BYTES of them, and begin anew.

        The oldest there make room. `descriptor` keeps its number. Bytes that somebody took away from us are just gone.
        """
        target = folder / f"{self.file.oid}.{secrets.token_hex(4)}.wrong"
        with self._alone(), disk_errors(self._data):
            self._forget()  # first: from here on a kill finds a journal that promises nothing
            if self._mine():
                with disk_errors(target):
                    folder.mkdir(parents=True, exist_ok=True)
                    self._move_aside(target)
                fresh = os.open(self._data, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                try:
                    os.dup2(fresh, self.descriptor, inheritable=False)
                finally:
                    os.close(fresh)
            else:
                os.ftruncate(self.descriptor, 0)
        _bound(folder, keep=target)
        return target

    def publish(self) -> Path:
        """Give the blob its name. The caller has verified its hash. The size is checked; what is to last is fsynced.

        Idempotent between processes: whoever is second replaces the blob by an equal one. Raises StoreError if
        somebody else took over and has taken our file away without being done yet.
        """
        target = self._names.blob
        with self._alone(), disk_errors(target, f"{self.file.size:,} bytes for {self.file.path}"):
            status = os.fstat(self.descriptor)
            if status.st_size != self.file.size:
                raise StoreError(
                    str(self._data),
                    f"has {status.st_size:,} bytes, {self.file.path} has {self.file.size:,}; fetch it again",
                )
            if self._lease is not None:
                os.fchmod(self.descriptor, self._lease.mode)  # an adopted file may be made under another umask
            os.utime(self.descriptor)  # of age from now on: what sweeps by age must not count a long download
            if self.lasting:
                os.fsync(self.descriptor)
            if not self._surface(target):
                if not is_whole(target, self.file):
                    raise StoreError(str(self._data), f"another process goes on with {self.file.path}; ask again")
                return target
            if self.lasting:
                fsync_folder(target.parent)
            self._open, self._published = False, True
        with suppress(OSError):
            if self._lease is not None:
                self._lease.retire()
            self._drop_data()
        return target

    def close(self) -> None:
        """Let go: the next one goes on with what was recorded. Called by `BlobFolder.claim`; never raises."""
        if self._pid != os.getpid():
            return  # a forked child: all of this is its parent's
        quiet = True
        try:
            with self._alone():
                self._open = False
        except StoreError:
            quiet = not self._open  # closed before, or a write still hangs
        with suppress(OSError):
            if self._lease is None:
                self._drop_data()
            elif self._published:
                pass
            elif not self.ranges and quiet:
                self._drop_data()
                self._lease.withdraw()
            else:
                self._lease.close(released=quiet)
                if not self._lease.present():
                    self._drop_data()  # the journal was taken away: nobody can go on with this
        if quiet and self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    # --- inside

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.file.size:
            raise ValueError(f"[{start}, {stop}) is not a part of {self.file.path} ({self.file.size} bytes)")

    def _enter(self) -> None:
        with self._gate:
            self._check_open()
            self._users += 1

    def _leave(self) -> None:
        with self._gate:
            self._users -= 1
            if not self._users:
                self._gate.notify_all()

    def _check_open(self) -> None:
        if not self._open:
            raise StoreError(str(self._data), "is closed")
        if self._pid != os.getpid():
            raise StoreError(str(self._data), "belongs to the process this one was forked from; claim it anew")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold back other threads' writes, once those under way have ended."""
        with self._gate:
            self._check_open()
            if not self._gate.wait_for(lambda: not self._users, QUIET_WAIT_S):
                raise StoreError(str(self._data), f"a write did not end in {QUIET_WAIT_S:.0f} s; check the disk")
            self._check_open()
            yield

    def _forget(self) -> None:
        if self._lease is not None:
            self._lease.clear()
        self.ranges = Ranges()
        self._etags.clear()

    def _mine(self) -> bool:
        """True if our bytes still have the name we gave them."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.stat(self._data), os.fstat(self.descriptor))
        return False

    def _drop_data(self) -> None:
        if self._mine():
            self._data.unlink(missing_ok=True)

    def _surface(self, target: Path) -> bool:
        """Rename our inode to `target`; False if it has no name left."""
        scratch = self._names.scratch()
        try:
            # by descriptor: between any check of a name and its rename this process may be stopped for a day.
            # A src_dir_fd (not used, the path is absolute) is what makes Python call linkat, which follows the link.
            os.link(f"/proc/self/fd/{self.descriptor}", scratch, src_dir_fd=self.descriptor, follow_symlinks=True)
        except OSError:  # no name left, no /proc, or a disk without links
            if not self._mine():
                return False
            os.replace(self._data, target)
            return True
        try:
            os.replace(scratch, target)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        return True

    def _move_aside(self, target: Path) -> None:
        if self.file.size > QUARANTINE_BYTES:
            os.ftruncate(self.descriptor, min(os.fstat(self.descriptor).st_size, QUARANTINE_BYTES))
        try:
            os.replace(self._data, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copyfile(self._data, target)
            self._data.unlink()


def is_whole(path: Path, file: SourceFile) -> bool:
    """True if a blob of the right length is there."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == file.size


def _bound(folder: Path, keep: Path) -> None:
    """Remove the oldest wrong blobs until the rest fits; `keep` goes last."""
    found = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".wrong"):
                with suppress(OSError):
                    status = entry.stat()
                    size = min(status.st_size, status.st_blocks * 512)
                    found.append((entry.name != keep.name, -status.st_mtime_ns, size, entry.path))
    total = 0
    for _, _, size, path in sorted(found):
        total += size
        if total > QUARANTINE_BYTES and path != str(keep):
            with suppress(OSError):
                os.unlink(path)
