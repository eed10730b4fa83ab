"""How many bytes a store takes of its disk. Cheap to ask again: a folder is read anew only when it has changed.

The first look of a process reads every folder of shards (a million files: some seconds); a later one costs a look at
256 folders and reads those in which a shard came or went since.
"""

from __future__ import annotations

import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from crucible.cache.book import RoomBook
from crucible.cache.disk import disk_of
from crucible.cache.quota import Quota, Room

BESIDE = ("raw", "tmp", "quarantine")
"""What counts beside the shards: source files, work in progress, and what turned out wrong. Records are small."""
SETTLED_S = 2.0
"""A folder that changed so shortly before it was read may have changed again within one tick of the disk's clock."""


class Usage:
    """Of one store, for one process. Concurrency: any thread."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._lock = threading.Lock()
        self._known: dict[str, tuple[int, int, int]] = {}
        """Folder of shards -> its mtime in ns, bytes, shards."""

    def bytes(self) -> int:
        """All that counts: shards, source files, work in progress, quarantine."""
        return self.shards()[0] + tree_bytes(*(self._home / name for name in BESIDE))

    def shards(self) -> tuple[int, int]:
        """(bytes, number) of the visible shards."""
        with self._lock:
            known, self._known = self._known, {}
            for path in _folders(self._home / "shards"):
                with suppress(FileNotFoundError, NotADirectoryError):
                    changed = os.stat(path).st_mtime_ns
                    before = known.get(path)
                    if before is None or before[0] != changed:
                        size, count = _folder_bytes(path)
                        before = (changed if time.time_ns() - changed > SETTLED_S * 1e9 else -1, size, count)
                    self._known[path] = before
            return sum(size for _, size, _ in self._known.values()), sum(n for _, _, n in self._known.values())


def tree_bytes(*roots: Path) -> int:
    """Bytes on disk of all files below these folders; of one with several names there (a staged source file), once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for root in roots:
        for status in _files(str(root)):
            if status.st_nlink == 1 or (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += status.st_blocks * 512
    return total


def _files(folder: str) -> Iterator[os.stat_result]:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(entry.path)
                else:
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield status


def _folders(root: Path) -> list[str]:
    with suppress(OSError), os.scandir(root) as entries:
        return [entry.path for entry in entries]
    return []


def _folder_bytes(path: str) -> tuple[int, int]:
    size = count = 0
    with os.scandir(path) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                size += entry.stat().st_size
                count += 1
    return size, count


def room_of(home: Path, quota: Quota) -> Room:
    """What the store at `home` has now. With a quota its files are counted."""
    disk = shutil.disk_usage(disk_of(home))
    limit = quota.limit(disk.total)
    used = 0 if limit is None else usage_of(home).bytes()
    return Room(disk.total, disk.free, used, RoomBook(home).reserved(), limit)


_ALL: dict[Path, Usage] = {}


def usage_of(home: Path) -> Usage:
    """This process's look at the store at `home`."""
    return _ALL.get(home) or _ALL.setdefault(home, Usage(home))


os.register_at_fork(after_in_child=_ALL.clear)  # a thread of the parent may have held a lock
