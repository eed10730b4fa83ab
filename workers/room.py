"""Room on a node's disk, asked for before anything is brought there. In whatever process brings it.

What an item will take at most (its source files, what of them is unpacked, its shards: `formats.growth`) is promised to
it in a book that all processes of the node share, against the quota and what the disk has free. Where there is too
little, shards that can be had again make room (`evict`); where that is not enough, whoever asks waits for work that is
under way to end, because an estimate is more than most take. What is refused, with NoRoom, is only what could not fit:
the bytes that are certain to come. What turns out to take more than it was promised asks again, and stops there.

So a store keeps to its quota but for the estimate of what is under way, and its disk keeps a reserve free for records.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from crucible.cache.book import Reservation, RoomBook
from crucible.cache.disk import disk_of
from crucible.cache.hubcache import HubCache
from crucible.cache.quota import Room, reserve_of
from crucible.cache.store import Store
from crucible.cache.usage import room_of
from crucible.config import Settings
from crucible.errors import DiskFull, NoRoom, StoreError
from crucible.formats.growth import peak_bytes
from crucible.hub.client import is_folder
from crucible.refs import WorkItem
from crucible.stopping import check, never, rest
from crucible.workers.asking import Line
from crucible.workers.evict import Alone, evict, spare_of

WAIT_S = 600.0
"""For work under way to end and leave some of what it was promised."""
PAUSES_S = (0.02, 1.0)
ASK_EVERY_S = 5.0
"""How often others are asked for room while this one waits."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a piece of work wants to bring, in bytes."""

    what: str
    """For a person."""
    peak: int
    """That it may take at most, as far as can be told."""
    least: Callable[[], int]
    """That are certain to come. Asked only where there are no `peak`."""


def room_of_item(item: WorkItem, settings: Settings, *, keep_raw: bool) -> Need:
    """Of an item: its source files that are not here yet, what is unpacked of them, and its shards.

    With `keep_raw` the files go to the Hub cache: where that is another disk, raises NoRoom if they do not fit there.
    """
    what = item.files[0].path + (f" and {len(item.files) - 1} more files" if len(item.files) > 1 else "")
    if is_folder(item.repo.repo_id):  # they are used where they lie
        return Need(what, peak_bytes(item) - item.size, lambda: 0)
    cache = HubCache(settings.hub_cache)
    blobs = cache.blobs(item.repo) if keep_raw else Store(settings.home).raw

    def missing() -> int:
        if item.options.partial:
            return 0  # some ranges of them
        files = (file for file in item.files if cache.find(item.repo, file) is None)
        return sum(max(0, file.size - blobs.landed(file)) for file in files)

    if keep_raw and os.stat(disk_of(blobs.root)).st_dev != os.stat(disk_of(settings.home)).st_dev:
        _check_free(blobs.root, what, missing())
        return Need(what, peak_bytes(item) - item.size, lambda: 0)
    return Need(what, peak_bytes(item), missing)


def _check_free(folder: Path, what: str, need: int) -> None:
    disk = shutil.disk_usage(disk_of(folder))
    if (left := disk.free - reserve_of(disk.total)) < need:
        why = f"the disk of the Hub cache has {disk.free:,} bytes free"
        raise NoRoom(str(folder), socket.gethostname(), what, need, max(0, left), why)


class Claim:
    """What one piece of work may still take. Used by one thread at a time."""

    def __init__(self, store: Store, settings: Settings, what: str, reservation: Reservation) -> None:
        self._store, self._settings, self._what, self._reservation = store, settings, what, reservation

    @property
    def left(self) -> int:
        """Bytes."""
        return self._reservation.size

    def expect(self, size: int) -> None:
        """So many bytes are still to come, and not more: for when that is known better than before."""
        self._reservation.set(min(size, self.left))

    def landed(self, size: int) -> None:
        """`size` bytes of what was promised are on the disk. Raises NoRoom if they are more, and there is no more."""
        over = size - self.left
        self._reservation.set(-over)
        if over > 0:
            room = room_of(self._store.home, self._settings.quota)
            if room.left < 0:  # what has landed counts as used
                make_room(self._store, self._settings, -room.left, None)
                room = room_of(self._store.home, self._settings.quota)
            if room.left < 0:
                raise refusal(self._store, self._what, size, room.left + size, room, "it is more than was expected")


@contextmanager
def admitted(
    store: Store,
    settings: Settings,
    need: Need,
    *,
    since: float | None = None,
    stopped: Callable[[], bool] = never,
) -> Iterator[Claim]:
    """Have `need.peak` bytes promised for the time of a `with`, or less but no less than `need.least`.

    `since`: shards used then or later do not make room. Waits for other work if need be. Raises NoRoom, StoreError, or
    Stopped.
    """
    reservation = _reserve(store, settings, need, since, stopped)
    try:
        yield Claim(store, settings, need.what, reservation)
    finally:
        reservation.close()


def _reserve(
    store: Store, settings: Settings, need: Need, since: float | None, stopped: Callable[[], bool]
) -> Reservation:
    what, peak = need.what, need.peak
    book = RoomBook(store.home)
    give_up, pause = time.monotonic() + WAIT_S, PAUSES_S[0]
    asked_at = float("-inf")
    while True:
        with book.alone(stopped):
            room = room_of(store.home, settings.quota)
            least = peak if room.left >= peak else min(peak, need.least())
            late = time.monotonic() > give_up
            # what was refused while others were under way may be had now: nobody is refused on an answer from then
            last = late or not room.reserved
            if room.left < peak and (last or time.monotonic() - asked_at > ASK_EVERY_S):
                enough = make_room(store, settings, peak - room.left, since)
                if not enough and room.left < least:
                    make_room(store, settings, least - room.left, since)
                room = room_of(store.home, settings.quota)
                asked_at = time.monotonic()
            # with less than it may take it starts only alone: two that are short of room would both end without
            if room.left >= peak or (room.left >= least and last):
                try:
                    return book.reserve(min(peak, max(room.left, 0)), what)
                except DiskFull as error:  # not even for that: something else fills the disk
                    raise refusal(store, what, least or peak, room.left, room, "its records need room too") from error
        # work that is under way gives back more than it was promised: its source files and drafts count as used by now
        if last or (room.limit is not None and least > room.limit):
            raise refusal(store, what, least or peak, room.left, room, "nothing more can be evicted")
        check(stopped)
        rest(pause, stopped)
        pause = min(PAUSES_S[1], pause * 1.5)


def refusal(store: Store, what: str, need: int, left: int, room: Room, why: str) -> NoRoom:
    """What is raised for want of room."""
    return NoRoom(str(store.home), socket.gethostname(), what, need, max(0, left), f"{room.bound}; {why}")


def make_room(store: Store, settings: Settings, need: int, since: float | None) -> bool:
    """Free at least `need` bytes, or nothing of worth. What is in the quarantine goes first; then shards.

    By this node's agent where there is one, which asks the others; else by this process.
    """
    need -= _empty_quarantine(store, need)
    if need <= 0:
        return True
    told = Line(settings).room(need, since)
    if told is not None:
        return told >= need
    with suppress(StoreError):
        room = room_of(store.home, settings.quota)
        spare = spare_of(need, room.limit or room.disk)
        return sum(evict(store, need, Alone(store, settings), since=since, spare=spare).values()) >= need
    return False


def _empty_quarantine(store: Store, need: int) -> int:
    """Remove the oldest of it until `need` bytes are free. Returns the bytes freed."""
    freed = 0
    found: list[tuple[float, int, Path]] = []
    with suppress(FileNotFoundError):
        for path in (store.home / "quarantine").iterdir():
            with suppress(OSError):
                status = path.stat()
                found.append((max(status.st_mtime, status.st_ctime), status.st_blocks * 512, path))
    for _, size, path in sorted(found):
        if freed >= need:
            break
        with suppress(OSError):
            path.unlink()
            freed += size
    return freed
