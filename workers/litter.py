"""What nobody needs any more in a store, and its removal. `litter` only looks; `sweep` removes what it is given.

All of it goes by itself sooner or later, or does no harm; an admin wants to see it, and have the room now.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from crucible.cache import journal
from crucible.cache.book import SUFFIX as ROOM_SUFFIX
from crucible.cache.book import RoomBook
from crucible.cache.disk import dead_workspaces, key_files
from crucible.cache.lease import disk_time
from crucible.cache.pins import Pins
from crucible.cache.store import RAW_KEEP_S, Store
from crucible.cache.usage import tree_bytes
from crucible.refs import ShardInfo
from crucible.workers.evict import jobs_seen, jobs_since

Kind = Literal[
    "dead workspace",
    "stale early manifest",
    "old quarantine",
    "old source file",
    "old lock",
    "pin without manifest",
    "record without shards",
    "unreferenced shard",
    "dead promise",
    "ended job",
    "half-written record",
]
QUARANTINE_KEEP_S = 7 * 86_400.0
UNREFERENCED_KEEP_S = 3_600.0
"""A shard is there before its manifest: a running job names it at its end, or a reader of an early manifest does."""
EARLY_KEEP_S = 7 * 86_400.0
LOCK_KEEP_S = 86_400.0
HALF_KEEP_S = 3_600.0


@dataclass(frozen=True, slots=True)
class Litter:
    """One thing that may go."""

    path: str
    kind: Kind
    bytes: int
    """That removing it gives back."""
    why: str
    changed_ns: int = 0
    """Its ctime when it was looked at."""

    def to_dict(self) -> dict[str, Any]:
        """As an admin sees it."""
        return {name: value for name, value in asdict(self).items() if name != "changed_ns"}


def litter(store: Store) -> list[Litter]:
    """All there is, by kind. Reads every manifest and every item's record; changes nothing."""
    home = store.home
    if not home.is_dir():
        return []
    now = disk_time(home) if os.access(home, os.W_OK) else time.time()
    dead = set(dead_workspaces(home / "tmp"))
    found = [
        _one(path, status, "dead workspace", "its process is dead")
        for path, status in _entries(home / "tmp")
        if path in dead
    ]
    found += _old(home / "early", "stale early manifest", EARLY_KEEP_S, now, lambda name: name.endswith(".json"))
    found += _old(home / "quarantine", "old quarantine", QUARANTINE_KEEP_S, now)
    found += _raw(store, now)
    found += (one for one in _old(home / "locks", "old lock", LOCK_KEEP_S, now, _is_a_lock) if _is_free(Path(one.path)))
    found += _pins(home)
    found += _records(store)
    found += _unreferenced(store, now)
    found += _jobs(store)
    found += _dead_promises(home)
    found += _half_written(home, now)
    return found


def sweep(found: Iterable[Litter]) -> list[Litter]:
    """Remove them; those that are gone now, by us. What somebody leases, or has used or written to since, stays."""
    gone = []
    for one in found:
        path = Path(one.path)
        try:
            if os.lstat(path).st_ctime_ns != one.changed_ns:
                continue
            if one.kind == "unreferenced shard":
                store = Store(path.parent.parent.parent)
                if store.evict(path.stem):
                    gone.append(one)
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError:
            continue
        gone.append(one)
    return gone


def _old(
    folder: Path, kind: Kind, keep_s: float, now: float, counts: Callable[[str], bool] = lambda _: True
) -> Iterator[Litter]:
    for path, status in _entries(folder):
        age = now - status.st_mtime if kind != "old quarantine" else now - max(status.st_mtime, status.st_ctime)
        if counts(path.name) and age > keep_s:
            yield _one(path, status, kind, f"{_days(age)} old")


def _is_a_lock(name: str) -> bool:
    """One of an item, a blob or a shard. That of the book of room is taken all the time, and there is only one."""
    return name.endswith(".lock") and name != "room.lock"


def _is_free(lock: Path) -> bool:
    """True if nobody has it now."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _raw(store: Store, now: float) -> Iterator[Litter]:
    """Source files that nobody wrote to for a day, and of those on their way only such whose process has ended."""
    for path, status in _entries(store.home / "raw"):
        age = now - status.st_mtime
        if age > RAW_KEEP_S and not _brought(path):
            yield _one(path, status, "old source file", f"not written to for {_days(age)}")


def _brought(path: Path) -> bool:
    """True while a living process brings the blob that this file belongs to."""
    oid = path.name.partition(".")[0]
    for other in path.parent.glob(f"{oid}.*.journal{journal.SUFFIX}"):
        with suppress(OSError):
            glance = journal.glance(other)
            if (
                glance is not None
                and not glance.released
                and glance.owner is not None
                and glance.owner.fate() != "dead"
            ):
                return True
    return False


def _pins(home: Path) -> Iterator[Litter]:
    for pin in Pins(home).listing():
        if not (home / "manifests" / f"{pin.manifest}.json").exists():
            path = home / "pins" / f"{pin.manifest}.json"
            with suppress(OSError):
                yield _one(path, path.lstat(), "pin without manifest", "its manifest is not here any more")


def _records(store: Store) -> Iterator[Litter]:
    """Items none of whose shards is here: what is evicted for good. One with some left is made again as a whole."""
    for entry in key_files(store.home / "items", "json"):
        with suppress(FileNotFoundError):
            status = entry.stat()
            try:
                shards = [ShardInfo(**shard) for shard in json.loads(Path(entry.path).read_bytes())["shards"]]
            except (ValueError, KeyError, TypeError):
                yield _one(Path(entry.path), status, "record without shards", "it cannot be read")
                continue
            if shards and not any(store.has_shard(shard) for shard in shards):
                why = f"none of its {len(shards)} shards is here"
                yield _one(Path(entry.path), status, "record without shards", why)


def _unreferenced(store: Store, now: float) -> Iterator[Litter]:
    """Shards that no manifest here names, complete or early, and no job that may still run has made or found here."""
    named = {shard.key for manifest in store.manifests() for shard in manifest.shards} | _early_keys(store)
    leased = store.leased()
    began = jobs_since(store)
    for entry in key_files(store.home / "shards", "arrow"):
        key = entry.name.partition(".")[0]
        if key in named or key in leased:
            continue
        with suppress(FileNotFoundError):
            status = entry.stat()
            used = max(status.st_mtime, status.st_atime, status.st_ctime)
            if now - used > UNREFERENCED_KEEP_S and (began is None or used < began):
                yield _one(Path(entry.path), status, "unreferenced shard", "no manifest here names it")


def _early_keys(store: Store) -> set[str]:
    keys: set[str] = set()
    for path, _ in _entries(store.home / "early"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            keys |= {str(shard["key"]) for manifest in json.loads(path.read_bytes()) for shard in manifest["shards"]}
    return keys


def _jobs(store: Store) -> Iterator[Litter]:
    before = dict(_entries(store.home / "jobs"))
    for path, _, over in jobs_seen(store):
        if over and path in before and not path.name.startswith("."):
            yield _one(path, before[path], "ended job", "nothing was done for it for a day")


def _dead_promises(home: Path) -> Iterator[Litter]:
    before = [(path, status) for path, status in _entries(home / "room") if path.name.endswith(ROOM_SUFFIX)]
    alive = {promise.path for promise in RoomBook(home).promises(keep=True)}
    for path, status in before:
        if path not in alive:
            yield _one(path, status, "dead promise", "its process is dead")


def _half_written(home: Path, now: float) -> Iterator[Litter]:
    """Scratch files of records whose writer was killed between its write and its rename."""
    folders = ["", "items/*", "manifests", "refs/*/*", "refs/*/*/*", "pins", "leases", "room", "seen", "early"]
    folders += ["jobs", "coordinator", "tls"]
    for pattern in folders:
        for folder in [home] if not pattern else sorted(home.glob(pattern)):
            for path, status in _entries(folder):
                age = now - status.st_mtime
                if path.name.startswith(".") and stat.S_ISREG(status.st_mode) and age > HALF_KEEP_S:
                    yield _one(path, status, "half-written record", f"{_days(age)} old")


def _one(path: Path, status: os.stat_result, kind: Kind, why: str) -> Litter:
    """What has just been looked at; `status` is from before it was judged."""
    return Litter(str(path), kind, _size(path, status), why, status.st_ctime_ns)


def _entries(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                found.append((Path(entry.path), entry.stat(follow_symlinks=False)))
    return sorted(found, key=lambda one: one[0])


def _size(path: Path, status: os.stat_result) -> int:
    if stat.S_ISDIR(status.st_mode):
        return tree_bytes(path)
    return status.st_blocks * 512 if status.st_nlink == 1 else 0


def _days(age_s: float) -> str:
    return f"{age_s / 86_400:.1f} days" if age_s >= 86_400 else f"{age_s / 3_600:.1f} hours"
