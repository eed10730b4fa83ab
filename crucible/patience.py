"""Says in the log that somebody waits for a shard, and for what. No decision hangs on it."""

from __future__ import annotations

import logging
import time

from crucible.manifest import Manifest
from crucible.refs import ShardInfo
from crucible.sources import FeedingSource

_log = logging.getLogger("crucible.feed")


class Patience:
    """Logs that somebody waits, when it has been long, and again each time it has been twice as long."""

    def __init__(self, source: FeedingSource, manifest: Manifest, shard: ShardInfo, rank: int | None) -> None:
        self._source, self._shard = source, shard
        self._who = "waited" if rank is None else f"rank {rank} has waited"
        self._what = f"shard {shard.key[:12]} ({place_of(manifest, shard)})"
        self._began = time.monotonic()
        self._next = source.stall_log_s

    def look(self) -> None:
        waited = time.monotonic() - self._began
        if waited >= self._next:
            self._next = 2 * max(waited, self._next)
            _log.warning("%s %.0f s for %s: %s", self._who, waited, self._what, self._source.doing(self._shard))

    def over(self) -> None:
        if self._next > self._source.stall_log_s:
            _log.warning("%s came after %.0f s", self._what, time.monotonic() - self._began)


def place_of(manifest: Manifest, shard: ShardInfo) -> str:
    """Repo and source file of a shard, for people."""
    if shard.item >= len(manifest.items):
        return str(manifest.repo)
    first, *rest = (file.path for file in manifest.item_of(shard).files)
    return f"{manifest.repo}, {first}" + (f" and {len(rest)} more" if rest else "")
