"""Which shards the processes of a node have in use, so that nobody evicts what another one reads or is about to read.

<home>/leases/<host>-<pid>-<random>.lease    one a process: who it is, then a line for each shard taken or given back

The file is locked by its process (flock) for as long as it lives. Where a lock means nothing (some network disks) it is
touched every few seconds instead, which `crucible.cache.lease` does for blobs as well. A process that was killed leaves
its file, which counts for nothing and goes away when the next one looks.

Nothing is wrong without a lease: what is mapped stays mapped when its file goes, and a shard that has gone before it
was opened is fetched again. So a disk that refuses to write one is logged and read from all the same.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import logging
import os
import secrets
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from crucible.cache import lease as leases
from crucible.cache.lease import PULSE, disk_time
from crucible.cache.owner import Owner

VERSION = 1
SUFFIX = ".lease"
LINE = 66
"""Bytes of a line after the first: `+` or `-`, 64 hex, a newline."""
SPARE_LINES = 4096
"""Lines that no longer say anything before the file is written anew."""
HEAD_BYTES = 4096
FOREIGN_S = 86_400.0
"""Silence after which the lease of another host's process counts for nothing, where it does not beat."""
_log = logging.getLogger(__name__)


class Holds:
    """The leases of this process in one store. `holds_of` gives the one there is.

    Concurrency: any thread; `release` also in a destructor. A forked child holds nothing: what it inherited is leased
    by its parent.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.forget()

    def forget(self) -> None:
        """After a fork."""
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._given_back: deque[str] = deque()
        self._path: Path | None = None
        self._descriptor = -1
        self._lines = 0
        self._refused = False

    def hold(self, key: str) -> None:
        """Lease a shard, once more if it is leased already. From here on `Store.evict` leaves it alone."""
        with self._lock:
            lines = self._settle()
            self._counts[key] = self._counts.get(key, 0) + 1
            if self._counts[key] == 1:
                lines += f"+{key}\n"
            self._write(lines)
        self._drain()

    def release(self, key: str) -> None:
        """Give one `hold` back. Never waits: in the middle of another call of this thread, that one does it."""
        self._given_back.append(key)
        self._drain()

    def close(self) -> None:
        """Give everything back."""
        with self._lock:
            self._counts.clear()
            self._given_back.clear()
            self._remove()

    def abandon(self) -> None:
        """In a forked child: close what was inherited, so that the lock ends with the parent."""
        descriptor = self._descriptor
        self.forget()
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)

    def beat(self) -> bool:
        """A sign of life; False once there is nothing to show it for."""
        with self._lock:
            if self._descriptor < 0:
                return False
            with suppress(OSError):
                os.utime(self._descriptor)
            return True

    # --- with the lock held

    def _drain(self) -> None:
        while self._given_back and self._lock.acquire(blocking=False):
            try:
                self._write(self._settle())
            finally:
                self._lock.release()

    def _settle(self) -> str:
        """The lines that say what was given back."""
        lines = ""
        while self._given_back:
            key = self._given_back.popleft()
            count = self._counts.get(key, 0)
            if count > 1:
                self._counts[key] = count - 1
            elif count:
                del self._counts[key]
                lines += f"-{key}\n"
        return lines

    def _write(self, lines: str) -> None:
        if not lines:
            return
        if not self._counts:
            self._remove()
            return
        try:
            if self._descriptor < 0 or self._lines > SPARE_LINES + 4 * len(self._counts):
                self._begin()
            else:
                if os.write(self._descriptor, lines.encode()) < len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # what follows half a line is lost
                self._lines += len(lines) // LINE
        except OSError as error:
            self._remove()
            if not self._refused:
                self._refused = True
                _log.warning("%s: shards in use cannot be leased and may be evicted (%s)", self._folder, error)

    def _begin(self) -> None:
        """Write the file, or write it anew: all that is held now, complete and locked before it can be seen."""
        self._folder.mkdir(parents=True, exist_ok=True)
        owner = Owner.current()
        name = f"{owner.host}-{owner.pid}-{secrets.token_hex(4)}"
        scratch, path = self._folder / f".{name}", self._folder / f"{name}{SUFFIX}"
        descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            locks = is_locked(scratch)
            head = json.dumps({"lease": VERSION, "locks": locks, **asdict(owner)}, separators=(",", ":"))
            lines = "".join(f"+{key}\n" for key in self._counts)
            _write_all(descriptor, f"{head}\n{lines}".encode())
            os.rename(scratch, path)
        except BaseException:
            os.close(descriptor)
            scratch.unlink(missing_ok=True)
            raise
        first = self._path is None
        self._remove()
        self._descriptor, self._path, self._lines = descriptor, path, len(self._counts)
        if first:
            _sweep(self._folder)
            _close_with_process()
        if not locks:
            PULSE.add(self)

    def _remove(self) -> None:
        PULSE.discard(self)
        if self._descriptor >= 0:
            if self._path is not None:
                with suppress(OSError):
                    self._path.unlink()
            os.close(self._descriptor)
        self._descriptor, self._path, self._lines = -1, None, 0


_ALL: dict[Path, Holds] = {}
_ALL_LOCK = threading.Lock()
_ENDING: set[int] = set()
"""Processes that have said that their leases are to go when they end."""


def holds_of(home: Path) -> Holds:
    """This process's leases in the store at `home`."""
    folder = home / "leases"
    with _ALL_LOCK:
        if folder not in _ALL:
            _ALL[folder] = Holds(folder)
        return _ALL[folder]


def _close_all() -> None:
    for holds in list(_ALL.values()):
        holds.close()


def _close_with_process() -> None:
    """A worker process of `multiprocessing` ends without `atexit`."""
    if os.getpid() not in _ENDING:
        _ENDING.clear()
        _ENDING.add(os.getpid())
        if "multiprocessing.util" in sys.modules:
            sys.modules["multiprocessing.util"].Finalize(None, _close_all, exitpriority=1)


def _forked() -> None:
    global _ALL_LOCK
    _ALL_LOCK = threading.Lock()
    for holds in _ALL.values():
        holds.abandon()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forked)


# --- what others see


@dataclass(slots=True)
class _Read:
    """One process's file, as far as it was read."""

    inode: int
    owner: Owner | None = None
    locks: bool = False
    end: int = 0
    keys: set[str] = field(default_factory=set)


class LeaseBook:
    """Reads the leases of all processes of a store. Remembers what it has read, so that asking again is cheap.

    Concurrency: any thread.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._files: dict[str, _Read] = {}

    def keys(self) -> set[str]:
        """The shards that living processes hold now."""
        with self._lock:
            self._look()
            return set[str]().union(*(file.keys for file in self._files.values()))

    def has(self, key: str) -> bool:
        """True if a living process holds the shard now."""
        with self._lock:
            self._look()
            return any(key in file.keys for file in self._files.values())

    def _look(self) -> None:
        found: dict[str, _Read] = {}
        for path in _lease_files(self._folder):
            with suppress(FileNotFoundError), path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                read = self._files.get(path.name)
                if read is None or read.inode != status.st_ino or read.end > status.st_size:
                    read = _Read(status.st_ino)
                if read.end < status.st_size:
                    _read_on(file.fileno(), read)
                if owner_lives(file.fileno(), read.owner, locks=read.locks, folder=self._folder):
                    found[path.name] = read
                elif path.stat().st_ino == read.inode:
                    path.unlink()
        self._files = found


_BOOKS: dict[Path, LeaseBook] = {}


def lease_book_of(home: Path) -> LeaseBook:
    """This process's look at the leases of the store at `home`."""
    return _BOOKS.get(home) or _BOOKS.setdefault(home, LeaseBook(home / "leases"))


os.register_at_fork(after_in_child=_BOOKS.clear)  # a thread of the parent may have held a lock


def _lease_files(folder: Path) -> list[Path]:
    with suppress(OSError), os.scandir(folder) as entries:
        return [folder / entry.name for entry in entries if entry.name.endswith(SUFFIX)]
    return []


def _read_on(descriptor: int, read: _Read) -> None:
    """Take in what was written since the last time; half a line waits for its other half."""
    if read.end == 0:
        head, newline, _ = os.pread(descriptor, HEAD_BYTES, 0).partition(b"\n")
        if not newline:
            return
        read.owner, read.locks = _parse_head(head)
        read.end = len(head) + 1
    while block := os.pread(descriptor, 1 << 20, read.end):
        lines = block[: len(block) // LINE * LINE]
        for at in range(0, len(lines), LINE):
            key = lines[at + 1 : at + LINE - 1].decode("ascii", "replace")
            if lines[at] == ord("+"):
                read.keys.add(key)
            else:
                read.keys.discard(key)
        read.end += len(lines)
        if len(lines) < len(block):
            return


def _parse_head(line: bytes) -> tuple[Owner | None, bool]:
    try:
        record = json.loads(line)
        return Owner.of(record), bool(record["locks"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, False


def owner_lives(descriptor: int, owner: Owner | None, *, locks: bool, folder: Path) -> bool:
    """Whether the process that keeps this file, locked if `locks`, still runs: as sure as one can be."""
    fate = "unknown" if owner is None else owner.fate()
    if fate != "unknown":
        return fate == "alive"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    here = Owner.current()
    if locks and owner is not None and (owner.host, owner.boot) == (here.host, here.boot):
        return False  # in a container beside this one: the lock would have held
    silent = disk_time(folder) - os.fstat(descriptor).st_mtime
    return silent <= (FOREIGN_S if locks else leases.LEASE_S)


def _sweep(folder: Path) -> None:
    """Remove the files of processes that are certainly dead."""
    for path in _lease_files(folder):
        with suppress(OSError):
            with path.open("rb") as file:
                owner = _parse_head(file.readline(HEAD_BYTES))[0]
            if owner is not None and owner.fate() == "dead":
                path.unlink()


def is_locked(path: Path) -> bool:
    """Whether the lock that this process has on the file keeps others out."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
