"""Ranges of big files that another node pushes here while it downloads them, so that its death costs only what it had
in flight. They lie in the store's staging folder with a journal, where a work item that comes to this node goes on.

The agent holds the lease of such a blob from the first range on, and lets go when it is asked to (`release`, `drop`) or
when nothing came for LINGER_S. It trusts nobody about the bytes: whoever goes on with them hashes the whole file.
"""

from __future__ import annotations

import threading
import time
import zlib
from contextlib import ExitStack
from dataclasses import dataclass, field

from crucible.cache.blobs import BlobFolder, Partial
from crucible.cache.book import Reservation, RoomBook
from crucible.cache.quota import Quota
from crucible.cache.store import Store
from crucible.cache.usage import room_of
from crucible.refs import SourceFile

LINGER_S = 30.0
"""Longer than a slow link needs for one range; a work item that is not announced here waits at most so long."""
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
        self._crc = zlib.crc32(piece, self._crc)
        self._at += len(piece)

    def finish(self) -> None:
        """All of the range came: journal it."""
        if not self.landing.partial.ranges.covers(self._start, self._at):
            self.landing.partial.record(self._start, self._at, self._crc)
        self.landing.room.set(self.landing.partial.file.size - self.landing.partial.ranges.size)


class Partials:
    """All landings of one store. Thread-safe; what it does with the disk may block, so not for an event loop."""

    def __init__(self, store: Store, quota: Quota | None = None) -> None:
        """`quota` says what the store may take; without it only the disk does."""
        self._store, self._quota = store, quota or Quota()
        self._blobs: BlobFolder = store.raw
        self._lock = threading.Lock()
        self._landings: dict[str, Landing] = {}
        self._closed = False

    def enter(self, file: SourceFile, start: int) -> Incoming:
        """Begin with a range. Pair with `leave`. Raises PartialRefused or StoreError."""
        with self._lock:
            landing = self._landings.get(file.oid)
            if landing is None:
                landing = self._landings[file.oid] = self._begin(file)
            elif landing.partial.file.size != file.size:
                raise PartialRefused(409, f"the file has {landing.partial.file.size} bytes")
            landing.users += 1
            return Incoming(landing, start)

    def leave(self, incoming: Incoming) -> None:
        landing = incoming.landing
        with self._lock:
            landing.users -= 1
            landing.used_at = time.monotonic()
            if landing.leaving and not landing.users:
                self._end(landing)

    def release(self, oid: str) -> None:
        """A process of this node goes on with the blob."""
        self._let_go(oid, unwanted=False)

    def drop(self, oid: str) -> None:
        """Nobody will need the ranges: the file is done elsewhere."""
        if self._let_go(oid, unwanted=True):
            return
        with self._lock, self._blobs.claim(SourceFile(oid, 1 << 62, oid, len(oid) == 64), wait_s=0) as partial:
            if partial is not None:
                partial.reset()

    def expire(self, older_than_s: float = LINGER_S) -> None:
        """Let go of what nothing came for in that time."""
        with self._lock:
            for oid, landing in list(self._landings.items()):
                idle = not landing.users and time.monotonic() - landing.used_at >= older_than_s
                if idle or landing.partial.fenced:
                    self._depart(oid, landing)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for oid, landing in list(self._landings.items()):
                self._depart(oid, landing)

    # --- inside, under the lock

    def _begin(self, file: SourceFile) -> Landing:
        if self._closed or len(self._landings) >= MOST:
            raise PartialRefused(503, "no room for another file")
        lease = ExitStack()
        try:
            book = RoomBook(self._store.home)
            with book.alone():
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
        with self._lock:
            landing = self._landings.get(oid)
            if landing is not None:
                landing.unwanted = unwanted
                self._depart(oid, landing)
            return landing is not None

    def _depart(self, oid: str, landing: Landing) -> None:
        del self._landings[oid]
        landing.leaving = True
        if not landing.users:
            self._end(landing)

    def _end(self, landing: Landing) -> None:
        with landing.lease:
            if landing.unwanted:
                landing.partial.reset()
