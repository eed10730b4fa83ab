"""The right to bring one blob into one folder: taken by creating the next journal, kept by touching it.

The journals of a blob are numbered 1, 2, 3... without a gap; each is created with O_EXCL, so one process wins each
number, and the number is the fencing token: the highest is the holder, whoever finds a higher one than its own has
been given up on. Journals go away together, highest first, when the blob is complete. A gap (somebody else tidied up)
costs at most a second download, because a process writes only to files it made or whose maker is dead.

One thread of this process touches the journals it holds every `LEASE_S / BEATS` seconds and looks for higher ones. It
is started by the first lease and ends after the last. A forked child holds nothing.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from crucible.cache import journal
from crucible.cache.journal import SUFFIX, Glance
from crucible.cache.owner import Owner
from crucible.refs import SourceFile

LEASE_S = 60.0
"""Silence after which a holder is given up on, in seconds: many times what a busy machine keeps a thread waiting."""
BEATS = 12
"""Signs of life a lease lasts."""


@dataclass(frozen=True, slots=True)
class Names:
    """What belongs to one blob in one folder."""

    root: Path
    oid: str

    @property
    def blob(self) -> Path:
        return self.root / self.oid

    def data(self, generation: int) -> Path:
        return self.root / f"{self.oid}.{generation:08x}{SUFFIX}"

    def journal(self, generation: int) -> Path:
        return self.root / f"{self.oid}.{generation:08x}.journal{SUFFIX}"

    def scratch(self) -> Path:
        """A name nobody else has."""
        return self.root / f"{self.oid}.{secrets.token_hex(4)}{SUFFIX}"

    def top(self) -> int:
        """The highest generation, 0 if there is none. Asked by name: a folder may hold a million blobs."""
        generation = 0
        while os.path.lexists(self.journal(generation + 1)):
            generation += 1
        return generation


class Lease:
    """A journal of this process. Thread-safe. `lost` is true once a higher generation was seen; it stays true."""

    def __init__(self, names: Names, generation: int, descriptor: int, head: bytes) -> None:
        self.names, self.generation = names, generation
        self.path = names.journal(generation)
        self.lost = False
        self._descriptor, self._head, self._end = descriptor, len(head), len(head)
        status = os.fstat(descriptor)
        self._inode, self.mode = status.st_ino, status.st_mode & 0o777
        self._pid = os.getpid()
        self._lock = threading.Lock()
        PULSE.add(self)

    @staticmethod
    def create(names: Names, generation: int, file: SourceFile) -> Lease | None:
        """Win `generation`, or None: somebody else did. Raises OSError."""
        path = names.journal(generation)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return None
        try:
            head = journal.header(file, Owner.current())
            _write(descriptor, head, 0)
            return Lease(names, generation, descriptor, head)
        except BaseException:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise

    def append(self, lines: bytes) -> None:
        """Add whole lines. When the disk refuses, what was there before stays as it was."""
        with self._lock:
            try:
                _write(self._descriptor, lines, self._end)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(self._descriptor, self._end)
                raise
            self._end += len(lines)

    def clear(self) -> None:
        """Back to the first line. Needs no space."""
        with self._lock:
            os.ftruncate(self._descriptor, self._head)
            self._end = self._head

    def beat(self) -> bool:
        """Say that we live, see if we are still wanted; False once the lease is lost or closed."""
        with self._lock:
            if self._descriptor < 0:
                return False
            with suppress(OSError):  # a disk that fails: the others will judge us silent, and be right
                os.utime(self._descriptor)
        return not self.check()

    def check(self) -> bool:
        """Look for a higher generation now. True if there is one, or if our journal was taken away."""
        if not self.lost:
            with suppress(OSError):
                self.lost = os.path.lexists(self.names.journal(self.generation + 1)) or not self.present()
        return self.lost

    def close(self, *, released: bool) -> None:
        """Let go. `released` says that nothing of this process touches the data file any more."""
        PULSE.discard(self)
        if self._descriptor < 0:
            return
        if released and self._pid == os.getpid():
            with suppress(OSError):  # a full disk: then the others wait until we are dead or silent
                self.append(journal.RELEASED)
        with self._lock:
            os.close(self._descriptor)
            self._descriptor = -1

    def retire(self) -> None:
        """Let go, and take away this journal and, unless somebody followed, all before it."""
        PULSE.discard(self)
        generations = range(self.generation, 0, -1) if not self.check() else ()
        self.close(released=False)
        for generation in generations:
            self.names.data(generation).unlink(missing_ok=True)
            self.names.journal(generation).unlink(missing_ok=True)

    def withdraw(self) -> None:
        """Let go of a lease under which nothing was written: as if it had never been."""
        PULSE.discard(self)
        ours = not self.check()
        self.close(released=not ours)
        if ours:
            self.path.unlink(missing_ok=True)

    def present(self) -> bool:
        """True if our journal is still where we put it."""
        try:
            return os.stat(self.path).st_ino == self._inode
        except FileNotFoundError:
            return False


def _write(descriptor: int, data: bytes, at: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, at)
        data, at = data[written:], at + written


class Beating(Protocol):
    """Something of this process that others judge by its signs of life."""

    def beat(self) -> bool:
        """Give one; False when no more are needed. May be slow, must not raise."""
        ...


class _Pulse:
    """The thread that touches what this process holds: journals, and leases where a lock means nothing."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """After a fork: the leases are the parent's."""
        self._changed = threading.Condition()
        self._leases: set[Beating] = set()
        self._thread: threading.Thread | None = None

    def add(self, lease: Beating) -> None:
        with self._changed:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="crucible-leases", daemon=True)
                thread.start()
                self._thread = thread
            self._leases.add(lease)
            self._changed.notify_all()

    def discard(self, lease: Beating) -> None:
        with self._changed:
            self._leases.discard(lease)

    def _run(self) -> None:
        while True:
            with self._changed:
                woken = self._changed.wait(LEASE_S / BEATS)
                if not self._leases and not woken:
                    self._thread = None
                    return
                held = tuple(self._leases)
            for lease in held:
                if not lease.beat():
                    self.discard(lease)


PULSE = _Pulse()
os.register_at_fork(after_in_child=PULSE.forget)


class Silence:
    """Judges whether a holder that cannot be proven dead has gone silent. One for one wait.

    A change of its journal is a sign of life. Without one for two beats the file system's own clock is asked how old
    the last one is; the two beats let a holder speak whose whole machine had been asleep.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: tuple[int, float] | None = None
        self._since = self._next = 0.0

    def of(self, holder: Glance) -> bool:
        """True if `holder` may be given up on."""
        now = time.monotonic()
        beat = LEASE_S / BEATS
        if self._seen != (holder.inode, holder.mtime):
            self._seen, self._since, self._next = (holder.inode, holder.mtime), now, now + 2 * beat
        if now < self._next:
            return False
        self._next = now + beat
        if holder.owner is None:
            return True  # killed, or worse, before it wrote its name; so it has no bytes either
        return now - self._since > LEASE_S or disk_time(self._root) - holder.mtime > LEASE_S


def disk_time(folder: Path) -> float:
    """Now, as the disk counts it, in seconds."""
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime
    return time.time()


LOCK_MODE = 0o664
"""Whatever the umask: users of one group who share a cache wait for each other, and the official client, which sets the
same, fails on a lock that it may not open."""


class Turn:
    """A lock between processes that saves waiting and double work; nothing is wrong without it. Not reentrant.

    The path is one that other programs may lock too. A disk without locks, or one that cannot be written, grants
    every turn.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._descriptor, self._granted = path, -1, path is None
        self._pid = os.getpid()

    def take(self) -> bool:
        """True if it is ours now, also when it was before. Does not wait."""
        if self._granted or self._path is None:
            return True
        try:
            if self._descriptor < 0:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, LOCK_MODE)
                with suppress(OSError):  # another user's, which has its mode already
                    os.fchmod(self._descriptor, LOCK_MODE)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
        self._granted = True
        return True

    def release(self) -> None:
        """Give it back; a forked child only closes its copy, the turn stays its parent's."""
        if self._descriptor >= 0:
            if self._pid == os.getpid():
                with suppress(OSError):
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = -1
        self._granted = False
