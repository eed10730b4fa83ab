"""Who holds a lease, and whether that process still lives: as sure as a process can be about another one.

A process is named by its host, the boot of that host, its pid namespace, its pid and its start time. Only a process
of the same host, boot and namespace can be proven dead; of any other one only its silence can be judged (`lease`).
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

Fate = Literal["alive", "dead", "unknown"]


@dataclass(frozen=True, slots=True)
class Owner:
    """One process of one boot of one host."""

    host: str
    boot: str
    """The kernel's id of this boot; empty where there is no /proc, and then nobody is ever proven dead."""
    namespace: str
    """Inodes of the pid and the time namespace: a pid means nothing outside the one, a start time outside the other."""
    pid: int
    started: int
    """Clock ticks from the boot to the start of the process; 0 where unknown."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Owner:
        """From what `asdict` gave, out of a file. Raises KeyError, ValueError or TypeError for anything else."""
        host, boot, namespace = (str(record[name]) for name in ("host", "boot", "namespace"))
        return cls(host, boot, namespace, int(record["pid"]), int(record["started"]))

    @staticmethod
    def current() -> Owner:
        """This process, also right after a fork."""
        return _owner(os.getpid())

    def fate(self) -> Fate:
        """Whether the process runs. A defunct one is dead once its last thread is gone."""
        here = Owner.current()
        if self == here:
            return "alive"
        if (
            not self.boot
            or not self.namespace
            or (self.host, self.boot, self.namespace) != (here.host, here.boot, here.namespace)
        ):
            return "unknown"
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return "dead"
        except OSError:
            pass  # another user's
        state, started = _stat(self.pid)
        if not started:
            return "unknown"  # hidden from us, or gone this instant: the next look will tell
        if self.started and started != self.started:
            return "dead"
        return "dead" if state in "ZX" and _threads(self.pid) <= 1 else "alive"


@functools.lru_cache(maxsize=2)
def _owner(pid: int) -> Owner:
    return Owner(socket.gethostname(), _boot(), _namespace(), pid, _stat(pid)[1])


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _namespace() -> str:
    inodes = []
    for kind in ("pid", "time"):  # an old kernel has no time namespaces: nothing to tell apart
        with suppress(OSError):
            inodes.append(f"{kind}:{os.stat(f'/proc/self/ns/{kind}').st_ino}")
    return " ".join(inodes)


def _stat(pid: int) -> tuple[str, int]:
    """State letter and start time of a process; ("", 0) when it cannot be read."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, ValueError, IndexError):
        return "", 0


def _threads(pid: int) -> int:
    """Threads left: those of a killed process may still be inside a write after its first thread is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def lock_holder(path: str | os.PathLike[str]) -> int | None:
    """The process that has a flock on the file, as the kernel tells; None where it does not. For people to read."""
    with suppress(OSError, ValueError, IndexError):
        inode = str(os.stat(path).st_ino)
        with open("/proc/locks") as file:
            lines = [line.split() for line in file]
        pids = {int(line[4]) for line in lines if line[1] == "FLOCK" and line[5].rpartition(":")[2] == inode}
        return pids.pop() if len(pids) == 1 and min(pids) > 0 else None
    return None
