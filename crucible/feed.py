"""Bring the shards that a reader will need into the store before it needs them. In a training process; no files here.

A `Feeder` is told the order in which shards will be read, and its threads fetch those that are not on this disk, at
most so many bytes ahead. It is a `ShardSource` itself: a reader that asks it for a shard that is on its way waits for
that fetch and starts no second one. A wait that becomes long is logged with what is waited for.

Threads exist only while something is being fetched; where everything is on this disk there are none. They end soon
after `close`, when the feeder is garbage and when the process ends. A forked child has none and starts its own. An
error of a fetch ahead is not kept: whoever then asks for the shard fetches it once more and gets that error.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from crucible.feeding import QUEUED, Feeding
from crucible.manifest import Manifest
from crucible.patience import Patience
from crucible.refs import ShardInfo
from crucible.sources import FeedingSource, Leases, ShardSource, WatchfulSource, WishingSource


class Feeder:
    """Fetches ahead for one reader, or for several that read in one order.

    `most_bytes` bounds what is being fetched ahead, or was and has not been opened; 0 fetches nothing ahead. A bigger
    shard is left to the reader. `fetchers` threads fetch ahead, and one more each shard that a reader waits for.

    Concurrency: any thread. Not picklable.
    """

    def __init__(self, source: ShardSource, *, most_bytes: int = 0, fetchers: int = 2, rank: int | None = None) -> None:
        self.source = source
        self._feeding = source if isinstance(source, FeedingSource) else None
        self._watchful = source if isinstance(source, WatchfulSource) else None
        self._rank = rank if rank is not None or self._feeding is None else self._feeding.rank
        self._state = Feeding(self._feeding, max(0, most_bytes), fetchers) if self._feeding is not None else None
        if self._state is not None:
            weakref.finalize(self, self._state.stop).atexit = False

    def want(self, shards: Iterable[tuple[Manifest, ShardInfo]]) -> None:
        """The shards that will be read next, in the order in which they will be needed. Replaces what was said before.

        Consumed lazily, a little at a time and by any thread, so it may be endless. It must not hold this feeder.
        """
        if self._state is not None and self._state.most_bytes:
            self._state.want(iter(shards))
        elif isinstance(self.source, WishingSource):
            self.source.wish(list(islice(shards, QUEUED)))

    def path(self, manifest: Manifest, shard: ShardInfo) -> Path:
        """As `ShardSource.path`: at once if the shard is on this disk, else when it has been fetched."""
        state = self._state
        if state is None or self._feeding is None or state.stopped or self._feeding.has(shard):
            return self.source.path(manifest, shard)
        return state.wait(manifest, shard, Patience(self._feeding, manifest, shard, self._rank))

    def note(self) -> Mapping[str, int]:
        return self.source.note()

    def opened(self, manifest: Manifest, shard: ShardInfo) -> None:  # noqa: ARG002 - part of what a reader says
        """A reader has mapped the shard: it counts no more as fetched ahead."""
        if self._state is not None and self._state.most_bytes:
            self._state.opened(shard.key)

    def still(self, shard: ShardInfo, stamp: tuple[int, int, int, int]) -> bool:
        """False if the file that was mapped with this stamp has to be asked for anew."""
        return self._watchful is None or self._watchful.still(shard, stamp)

    @property
    def holds(self) -> Leases | None:
        """Where a reader leases a shard before it opens it; None where there are no leases."""
        return None if self._feeding is None else self._feeding.holds

    @property
    def bytes_ahead(self) -> int:
        """Bytes of shards that are being fetched ahead, or were and have not been opened."""
        return 0 if self._state is None else self._state.bytes_ahead

    def shed(self) -> None:
        """There is no room on the disk for a shard that is needed now: make do without fetching ahead."""
        if self._state is not None:
            self._state.shed()

    def close(self) -> None:
        """Fetch nothing more, and wait for the threads to end. Shards can still be asked for."""
        if self._state is not None:
            self._state.close()
