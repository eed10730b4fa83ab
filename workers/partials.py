"""Ranges of big files that another node pushes here while it downloads them, so that its death costs only what it had
in flight. They lie in the store's staging folder with a journal, where a work item that comes to this node goes on.

The agent holds the lease of such a blob from the first range on, and lets go when it is asked to (`release`, `drop`) or
when nothing came for LINGER_S. It trusts nobody about the bytes: whoever goes on with them hashes the whole file.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from crucible.cache.blobs import BlobFolder, Partial
from crucible.cache.book import Reservation, RoomBook
from crucible.cache.quota import Quota
from crucible.cache.store import Store
from crucible.cache.usage import room_of
from crucible.hashing import crc32
from crucible.refs import SourceFile

LINGER_S = 30.0
"""Longer than a slow link needs for one range; a work item that is not announced here waits at most so long."""
PATIENCE_S = 5.0
"""For somebody else who measures the room here, or begins with the same file: well below what who pushes waits for."""
MOST = 64
"""Files under way here at once; each holds two descriptors."""


class PartialRefused(Exception):
    """A range is not wanted here. `status` is what HTTP calls the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass
class Landing:
    """A blob that ranges are arriving for. `Partials` owns it."""

    partial: Partial
    lease: ExitStack
    room: Reservation
    users: int = 0
    used_at: float = field(default_factory=time.monotonic)
    leaving: bool = False
    """Somebody else goes on with it: its users stop at the next piece, and the last of them lets go."""
    unwanted: bool = False
    """And what came is to be forgotten."""


class Incoming:
    """One range on its way in. Used by one thread at a time."""

    def __init__(self, landing: Landing, start: int) -> None:
        self.landing, self._start, self._at, self._crc = landing, start, start, 0

    def write(self, piece: bytes) -> None:
        """The next bytes. Raises PartialRefused when they are not wanted any more, StoreError for the disk."""
        if self.landing.leaving or self.landing.partial.fenced:
            raise PartialRefused(409, "another process goes on with this file")
        if not self.landing.partial.ranges.covers(self._at, self._at + len(piece)):
            self.landing.partial.write(self._at, piece)
        self._crc = crc32(piece, self._crc)
        self._at += len(piece)

    def finish(self) -> None:
        """All of the range came: journal it."""
        if not self.landing.partial.ranges.covers(self._start, self._at):
            self.landing.partial.record(self._start, self._at, self._crc)
        self.landing.room.set(self.landing.partial.file.size - self.landing.partial.ranges.size)


class Partials:
    """All landings of one store. Thread-safe; what it does with the disk may block, so not for an event loop.

    Nothing slow is done under the lock. A file that is begun with, or let go of, is in `_busy` meanwhile: others that
    come with ranges of it wait a little, and ranges of other files come in.
    """

    def __init__(self, store: Store, quota: Quota | None = None) -> None:
        """`quota` says what the store may take; without it only the disk does."""
        self._store, self._quota = store, quota or Quota()
        self._blobs: BlobFolder = store.raw
        self._lock = threading.Condition()
        self._landings: dict[str, Landing] = {}
        self._busy: dict[str, Literal["", "released", "unwanted"]] = {}
        """By oid, what was asked of the file since somebody began with it or began to let go of it."""
        self._closed = False

    def join(self, file: SourceFile, start: int) -> Incoming | None:
        """Begin with a range of a file that is begun with already, else None. Waits for nobody.

        Pair with `leave`. Raises PartialRefused.
        """
        with self._lock:
            landing = self._landings.get(file.oid)
            if landing is None:
                return None
            if landing.partial.file.size != file.size:
                raise PartialRefused(409, f"the file has {landing.partial.file.size} bytes")
            landing.users += 1
            return Incoming(landing, start)

    def enter(self, file: SourceFile, start: int) -> Incoming:
        """Begin with a range. Pair with `leave`. Raises PartialRefused or StoreError."""
        with self._lock:
            if not self._lock.wait_for(lambda: file.oid not in self._busy, PATIENCE_S):
                raise PartialRefused(503, "the file is still being begun with here")
            if (incoming := self.join(file, start)) is not None:
                return incoming
            if self._closed or len(self._landings) + len(self._busy) >= MOST:
                raise PartialRefused(503, "no room for another file")
            self._busy[file.oid] = ""
        try:
            landing = self._begin(file)
        except BaseException:
            self._over(file.oid)
            raise
        with self._lock:
            if not self._busy[file.oid] and not self._closed:
                del self._busy[file.oid]
                self._landings[file.oid] = landing
                landing.users += 1
                self._lock.notify_all()
                return Incoming(landing, start)
        self._end(landing)
        raise PartialRefused(409, "another process goes on with this file")

    def leave(self, incoming: Incoming) -> None:
        landing = incoming.landing
        with self._lock:
            landing.users -= 1
            landing.used_at = time.monotonic()
            last = landing.leaving and not landing.users
        if last:
            self._end(landing)

    def release(self, oid: str) -> None:
        """A process of this node goes on with the blob."""
        self._let_go(oid, unwanted=False)

    def drop(self, oid: str) -> None:
        """Nobody will need the ranges: the file is done elsewhere."""
        if self._let_go(oid, unwanted=True):
            return
        with self._blobs.claim(SourceFile(oid, 1 << 62, oid, len(oid) == 64), wait_s=0) as partial:
            if partial is not None:
                partial.reset()

    def expire(self, older_than_s: float = LINGER_S) -> None:
        """Let go of what nothing came for in that time."""
        with self._lock:
            gone = [
                landing
                for landing in self._landings.values()
                if landing.partial.fenced or (not landing.users and time.monotonic() - landing.used_at >= older_than_s)
            ]
            ended = [landing for landing in gone if self._depart(landing)]
        for landing in ended:
            self._end(landing)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            ended = [landing for landing in list(self._landings.values()) if self._depart(landing)]
        for landing in ended:
            self._end(landing)

    # --- inside

    def _begin(self, file: SourceFile) -> Landing:
        """May take long: others measure their room, and what lies here from before is read."""
        lease = ExitStack()
        try:
            book = RoomBook(self._store.home)
            with book.alone(wait_s=PATIENCE_S) as alone:
                if not alone:
                    raise PartialRefused(503, "others are making room here")
                # nothing is evicted for what is only here in case that another node dies
                if (left := room_of(self._store.home, self._quota).left) < file.size - self._blobs.landed(file):
                    raise PartialRefused(507, f"no room for {file.size} bytes, {max(0, left)} are left")
                room = book.reserve(file.size, f"ranges of {file.oid[:12]}")
            lease.callback(room.close)
            partial = lease.enter_context(self._blobs.claim(file, wait_s=0))
            if partial is None:
                raise PartialRefused(409, "the file is here already")
            if not partial.shared:
                raise PartialRefused(409, "another process brings this file here")
        except BaseException:
            lease.close()
            raise
        return Landing(partial, lease, room)

    def _let_go(self, oid: str, *, unwanted: bool) -> bool:
        """Whether it is held here; whoever is busy with it then lets go of it as soon as that is done."""
        with self._lock:
            if oid in self._busy:
                self._busy[oid] = "unwanted" if unwanted else self._busy[oid] or "released"
                return True
            landing = self._landings.get(oid)
            if landing is None:
                return False
            landing.unwanted = unwanted
            last = self._depart(landing)
        if last:
            self._end(landing)
        return True

    def _depart(self, landing: Landing) -> bool:
        """Under the lock: take nothing more for it. True if nobody is at it, so that the caller has to `_end` it."""
        oid = landing.partial.file.oid
        del self._landings[oid]
        landing.leaving = True
        self._busy[oid] = ""
        return not landing.users

    def _end(self, landing: Landing) -> None:
        """Of a file that is in `_busy`: give back its room and its lease."""
        oid = landing.partial.file.oid
        try:
            with landing.lease:
                if landing.unwanted or self._busy.get(oid) == "unwanted":
                    landing.partial.reset()
        finally:
            self._over(oid)

    def _over(self, oid: str) -> None:
        with self._lock:
            self._busy.pop(oid, None)
            self._lock.notify_all()
