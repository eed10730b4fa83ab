"""A folder of complete, verified files named by their oid, and the one way for many processes to fill it.

<root>/<oid>                               a blob; visible by this name only when whole and verified, and fsynced if it
                                           is to last
<root>/<oid>.<gen>.journal.incomplete      who brings it (`lease`), and which ranges are there (`journal`)
<root>/<oid>.<gen>.incomplete              the bytes so far (`partial`)
<root>/<oid>.<random>.incomplete           a small blob, or one in the moment it gets its name; or another program's

It is the store's `raw/` and the `blobs/` of a repo in the Hub cache, with one code. Any number of threads, processes
and hosts may use one folder. A crash leaves what the next `claim` of that blob goes on with, or what `sweep` removes.
Raises DiskFull, StoreReadOnly, StoreError.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from crucible.cache import journal
from crucible.cache import lease as leases
from crucible.cache.adopt import Occupied, take_over
from crucible.cache.disk import LOCK_WAIT_S, disk_errors
from crucible.cache.journal import SUFFIX, Glance
from crucible.cache.lease import Lease, Names, Silence, Turn, disk_time
from crucible.cache.partial import Partial as Partial
from crucible.cache.partial import is_whole
from crucible.errors import StoreError
from crucible.parts import SMALL_BYTES as SMALL_BYTES
from crucible.refs import SourceFile
from crucible.stopping import check, never

_OID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_JOURNAL = re.compile(r"(?:[0-9a-f]{40}|[0-9a-f]{64})\.(?P<generation>[0-9a-f]{8})\.journal\.incomplete")
_POLL_S = (0.01, 0.5)


@dataclass(frozen=True)
class BlobFolder:
    """Blobs under `root`; `locks` is where `<oid>.lock` lies, or None for no locks. Making one touches no disk."""

    root: Path
    locks: Path | None
    lasting: bool = True
    """Whether a blob that is filled through this folder is fsynced before it gets its name. If not, its bytes are those
    promised as long as the machine runs; who finds it after a crash has to hash it, and who reads it has to look in the
    end whether the disk refused some of it (`disk.check_written`)."""

    def path(self, oid: str) -> Path:
        """Where a blob is when it is here. Refuses what is not 40 or 64 lower-case hex digits."""
        if not _OID.fullmatch(oid):
            raise StoreError(str(self.root), f"{oid!r} is not the oid of a blob")
        return self.root / oid

    def has(self, file: SourceFile) -> bool:
        """True if the blob is here with the right length. (Its bytes were verified before it got its name.)"""
        return is_whole(self.path(file.oid), file)

    def landed(self, file: SourceFile) -> int:
        """Bytes of a blob that this disk has already, complete or on its way: for those who ask how much is to come."""
        if self.has(file):
            return file.size
        names = Names(self.root, file.oid)
        try:
            return min(file.size, os.stat(names.data(names.top())).st_blocks * 512)
        except OSError:
            return 0

    def remove(self, oid: str) -> None:
        """Remove a complete blob, if it is here. One on its way stays."""
        path = self.path(oid)
        with disk_errors(path):
            path.unlink(missing_ok=True)

    def put(self, file: SourceFile, data: bytes | bytearray | memoryview) -> Path:
        """Keep a small blob whose hash the caller has verified. Two that do it at once leave one of two equal files."""
        self.put_all([(file, data)])
        return self.path(file.oid)

    def put_all(self, blobs: Sequence[tuple[SourceFile, bytes | bytearray | memoryview]]) -> None:
        """As `put`, for several: each is on the disk before the first gets its name (if they are to last).

        All are written before the first is waited for, because a file system commits them together: a thousand small
        files cost some thirty commits this way. Holds a descriptor for each. After an error any of them may be here.
        """
        if not blobs:
            return
        for file, data in blobs:
            if (given := memoryview(data).nbytes) != file.size:
                problem = f"{given:,} bytes were given, {file.path} has {file.size:,}"
                raise StoreError(str(self.path(file.oid)), problem)
        first, size = blobs[0][0], sum(file.size for file, _ in blobs)
        what = f"{size:,} bytes for {first.path}" + (f" and {len(blobs) - 1} more" if len(blobs) > 1 else "")
        scratches: list[tuple[Path, Path]] = []
        with disk_errors(self.path(first.oid), what), ExitStack() as stack:
            self.root.mkdir(parents=True, exist_ok=True)
            outs = []
            try:
                for file, data in blobs:
                    target, view = self.path(file.oid), memoryview(data).cast("B")
                    scratch = Names(self.root, file.oid).scratch()
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    out = stack.enter_context(open(os.open(scratch, flags, 0o666), "wb", 0))
                    outs.append(out)
                    scratches.append((scratch, target))
                    while view:
                        view = view[out.write(view) :]
                for out in outs if self.lasting and hasattr(os, "posix_fadvise") else ():
                    # the disk begins with all of them, so that one commit serves the batch: 2 to 9 times less waiting
                    os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                for out in outs:
                    if self.lasting:
                        os.fsync(out.fileno())
                    out.close()
                for scratch, target in scratches:
                    os.replace(scratch, target)
            except BaseException:
                for scratch, _ in scratches:
                    with suppress(OSError):
                        scratch.unlink()
                raise

    @contextmanager
    def claim(
        self, file: SourceFile, *, wait_s: float = LOCK_WAIT_S, stopped: Callable[[], bool] = never
    ) -> Iterator[Partial | None]:
        """Become the one process that brings `file`: yields where to write it, or None if it is complete.

        Waits while another one brings it, and takes over from one that died, let go, or was silent for LEASE_S. One
        that lives but gets nothing new on the disk for `wait_s` seconds is passed by: then the Partial is a private
        file without a journal, which costs a second download and is not there for anybody to go on with. Raises Stopped
        while it waits for others and nobody waits for it.
        """
        self.path(file.oid)
        turn = Turn(None if self.locks is None else self.locks / f"{file.oid}.lock")
        try:
            partial = self._win(file, turn, wait_s, stopped)
            if partial is None:
                yield None
                return
            try:
                yield partial
            finally:
                partial.close()
        finally:
            turn.release()

    def sweep(self, older_than_s: float, *, complete: bool = False) -> int:
        """Remove what nobody works on or wrote to for that long, with `complete` blobs too. Returns bytes freed."""
        groups: dict[str, list[Path]] = {}
        with suppress(FileNotFoundError), os.scandir(self.root) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX) or (complete and _OID.fullmatch(entry.name)):
                    groups.setdefault(entry.name.partition(".")[0], []).append(self.root / entry.name)
        if not groups:
            return 0
        now = disk_time(self.root)
        return sum(
            self._sweep_one(Names(self.root, oid), found, now - older_than_s, now) for oid, found in groups.items()
        )

    # --- inside

    def _win(self, file: SourceFile, turn: Turn, wait_s: float, stopped: Callable[[], bool]) -> Partial | None:
        names = Names(self.root, file.oid)
        wait = _Wait(names, wait_s)
        with disk_errors(self.root, f"{file.size:,} bytes for {file.path}"):
            while not self.has(file):
                mine = turn.take()
                top = names.top()
                holder = journal.glance(names.journal(top)) if top else None
                if wait.over(mine, top, holder):
                    self.root.mkdir(parents=True, exist_ok=True)
                    lease = Lease.create(names, top + 1, file)
                    if lease is not None and (partial := self._begin(names, lease, file)) is not None:
                        return partial
                elif wait.too_long():
                    private = names.scratch()
                    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    partial = Partial(file, names, private, os.open(private, flags, 0o666), None)
                    partial.lasting = self.lasting
                    return partial
                else:
                    check(stopped)
                    wait.sleep()
        return None

    def _begin(self, names: Names, lease: Lease, file: SourceFile) -> Partial | None:
        """Go on with the lease just won; None if it was won too late, or in vain."""
        try:
            if self.has(file):  # it was published after we looked, and the journals were taken away
                lease.withdraw()
                return None
            if lease.check():
                lease.close(released=True)
                return None
            partial = take_over(names, lease, file)
            partial.lasting = self.lasting
            return partial
        except Occupied:
            lease.close(released=True)
            return None
        except BaseException:
            lease.close(released=True)
            raise

    def _sweep_one(self, names: Names, found: list[Path], oldest: float, now: float) -> int:
        """What of one blob's files nobody needs: generations as a whole, anything else file by file."""
        journals = {names.journal(number): number for path in found if (number := _generation_of(path))}
        data = {names.data(number): number for number in journals.values()}
        top = journal.glance(names.journal(max(journals.values()))) if journals else None
        held = top is not None and not _at_rest(top) and now - top.mtime <= leases.LEASE_S
        together = [path for path in found if path in journals or path in data]
        alone = [path for path in found if path not in journals and path not in data]
        freed = 0
        if not held and all(_mtime(path) <= oldest for path in together):
            # data first, then the journals from the highest: they never have a gap
            for path in sorted(together, key=lambda path: (path in journals, -(journals.get(path) or data[path]))):
                freed += _free(path)
        for path in alone:
            if _mtime(path) <= oldest and not (held and path == names.blob):
                freed += _free(path)
        return freed


class _Wait:
    """One process's patience with the others, and what it saw of them."""

    def __init__(self, names: Names, wait_s: float) -> None:
        self._names, self._wait_s = names, wait_s
        self._silence = Silence(names.root)
        self._sign: object = None
        self._since = time.monotonic()
        self._pause = _POLL_S[0]

    def over(self, mine: bool, top: int, holder: Glance | None) -> bool:
        """True if the next generation may be created. `holder` is the journal of generation `top`."""
        if top and holder is None:
            return False  # taken away this instant
        if holder is not None and not _at_rest(holder):
            self._note((top, holder.inode, holder.size, _mtime(self._names.data(top))))
            return self._silence.of(holder)  # if so it may also be what keeps the lock
        if mine:
            return True
        # somebody has the lock and no lease: another program at work, or a process about to create a lease. If
        # nothing moves it may be a forgotten child of a dead one
        self._note(tuple(_sizes(self._names)))
        return time.monotonic() - self._since > leases.LEASE_S

    def too_long(self) -> bool:
        """True if nothing moved for `wait_s`."""
        return time.monotonic() - self._since >= self._wait_s

    def sleep(self) -> None:
        time.sleep(self._pause)
        self._pause = min(_POLL_S[1], self._pause * 1.5)

    def _note(self, sign: object) -> None:
        if sign != self._sign:
            self._sign, self._since = sign, time.monotonic()


def _at_rest(holder: Glance) -> bool:
    """True if nothing will ever be written to that generation again."""
    return holder.released or (holder.owner is not None and holder.owner.fate() == "dead")


def _sizes(names: Names) -> Iterator[tuple[str, int, int]]:
    """Everything there is of a blob, however named, with what shows that it grows."""
    with suppress(OSError), os.scandir(names.root) as entries:
        for entry in entries:
            if entry.name.startswith(names.oid):
                with suppress(OSError):
                    status = entry.stat()
                    yield entry.name, status.st_size, status.st_mtime_ns


def _generation_of(path: Path) -> int:
    """The generation in the name of a journal, 0 if it is none."""
    match = _JOURNAL.fullmatch(path.name)
    return int(match["generation"], 16) if match else 0


def _mtime(path: Path) -> float:
    """Seconds; 0 for what is not there."""
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0


def _free(path: Path) -> int:
    """Remove a file; the bytes that gives back."""
    try:
        status = os.lstat(path)
        path.unlink()
    except OSError:
        return 0
    return status.st_blocks * 512 if status.st_nlink == 1 else 0
