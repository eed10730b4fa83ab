"""The bytes of a store's disk that are promised to work under way, so that two pieces of work are not given the same.

<home>/room/<host>-<pid>-<random>.room    one a promise: who has it, what for, and how many bytes are still to come

A promise lasts as long as its process, which keeps its file locked (flock), or touches it where a lock means nothing:
the same rule as for leases. What a killed process left counts for nothing and is removed by whoever looks next.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from crucible.cache.disk import disk_errors
from crucible.cache.holds import HEAD_BYTES, is_locked, owner_lives
from crucible.cache.lease import PULSE, Turn
from crucible.cache.owner import Owner
from crucible.stopping import LOOK_S, check, never

SUFFIX = ".room"
NUMBER = 21
"""Bytes of the first line: a number of 20 digits and a newline, written in place, so that it needs no room itself."""
ASK_WAIT_S = 60.0
"""For others who are measuring, or evicting, at this moment; then they are passed by."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What one piece of work still has to come, as others see it."""

    path: Path
    what: str
    size: int
    pid: int


class Reservation:
    """One promise of this process. Concurrency: any thread."""

    def __init__(self, path: Path, descriptor: int, size: int, *, locks: bool) -> None:
        self._path, self._descriptor, self.size = path, descriptor, size
        self._lock = threading.Lock()
        self._pid = os.getpid()
        if not locks:
            PULSE.add(self)

    def set(self, size: int) -> None:
        """So many bytes are still to come. Never fails: the line is there already."""
        with self._lock:
            self.size = max(0, size)
            if self._descriptor >= 0:
                with suppress(OSError):
                    os.pwrite(self._descriptor, b"%020d\n" % self.size, 0)

    def beat(self) -> bool:
        """A sign of life; False once it was given back."""
        with self._lock:
            if self._descriptor < 0:
                return False
            with suppress(OSError):
                os.utime(self._descriptor)
            return True

    def close(self) -> None:
        """Give it back."""
        PULSE.discard(self)
        with self._lock:
            if self._descriptor >= 0:
                if self._pid == os.getpid():
                    with suppress(OSError):
                        self._path.unlink()
                os.close(self._descriptor)
            self._descriptor = -1


class RoomBook:
    """All promises of one store. Concurrency: any thread and process; making one touches no disk."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "room"
        self._turn = home / "locks" / "room.lock"

    @contextmanager
    def alone(self, stopped: Callable[[], bool] = never, wait_s: float = ASK_WAIT_S) -> Iterator[bool]:
        """Measure and promise without anybody else doing so. One that takes longer than `wait_s` is passed by: False.

        Raises Stopped.
        """
        turn = Turn(self._turn)
        give_up, pause = time.monotonic() + wait_s, 0.002
        try:
            while not (taken := turn.take()) and time.monotonic() < give_up:
                check(stopped)
                time.sleep(pause)
                pause = min(LOOK_S, pause * 2)
            yield taken
        finally:
            turn.release()

    def reserve(self, size: int, what: str) -> Reservation:
        """Write a promise down. Whether there is room is the caller's to know. Raises what the disk says."""
        owner = Owner.current()
        path = self._folder / f"{owner.host}-{owner.pid}-{secrets.token_hex(4)}{SUFFIX}"
        scratch = path.with_name(f".{path.name}")
        with disk_errors(path, f"{size:,} bytes for {what}"):
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                with suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                locks = is_locked(scratch)
                head = json.dumps({"locks": locks, "what": what[:200], **asdict(owner)}, separators=(",", ":"))
                data = b"%020d\n%s\n" % (size, head.encode())
                while data:
                    data = data[os.write(descriptor, data) :]
                os.rename(scratch, path)
            except BaseException:
                os.close(descriptor)
                scratch.unlink(missing_ok=True)
                raise
        return Reservation(path, descriptor, size, locks=locks)

    def promises(self, *, keep: bool = False) -> list[Promise]:
        """Those of living processes. Removes the files of dead ones, unless they are to be kept for a look."""
        found = []
        with suppress(OSError), os.scandir(self._folder) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(SUFFIX) and not entry.name.startswith(".")]
            for name in names:
                with suppress(OSError):
                    promise, alive = self._read(self._folder / name)
                    if not alive:
                        if not keep:
                            (self._folder / name).unlink()
                    elif promise is not None:
                        found.append(promise)
        return found

    def reserved(self) -> int:
        """Bytes promised to living processes, this one included."""
        return sum(promise.size for promise in self.promises())

    def _read(self, path: Path) -> tuple[Promise | None, bool]:
        """The promise, None if its file is not one; and whether its process lives."""
        with path.open("rb", buffering=0) as file:
            first, _, rest = os.pread(file.fileno(), HEAD_BYTES, 0).partition(b"\n")
            try:
                record = json.loads(rest)
                owner = Owner.of(record)
                promise = Promise(path, str(record["what"]), int(first), owner.pid)
                locks = bool(record["locks"])
            except (ValueError, KeyError, TypeError, RecursionError):
                return None, owner_lives(file.fileno(), None, locks=False, folder=self._folder)
            return promise, owner_lives(file.fileno(), owner, locks=locks, folder=self._folder)
