"""What a reader of shards asks of the place that they come from. Types only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from crucible.manifest import Manifest
from crucible.refs import ShardInfo
from crucible.stopping import never


class ShardSource(Protocol):
    """Where shards come from: this node's disk, else a peer, else the Hub."""

    def path(self, manifest: Manifest, shard: ShardInfo) -> Path:
        """A local, complete Arrow IPC file of `shard`, fetched first if need be. Raises if it cannot be had."""
        ...

    def note(self) -> Mapping[str, int]:
        """How many shards came from where so far, by origin."""
        ...


class Leases(Protocol):
    """What this process has in use; see `crucible.cache.holds`."""

    def hold(self, key: str) -> None: ...
    def release(self, key: str) -> None: ...


@runtime_checkable
class FeedingSource(Protocol):
    """A `ShardSource` that knows what is here, and can be stopped. From any other nothing is fetched ahead."""

    rank: int | None
    stall_log_s: float
    """Seconds that somebody waits until the log says what for."""
    holds: Leases

    def path(self, manifest: Manifest, shard: ShardInfo, stopped: Callable[[], bool] = never) -> Path:
        """As `ShardSource.path`. Raises Stopped soon after `stopped` says so."""
        ...

    def note(self) -> Mapping[str, int]: ...

    def has(self, shard: ShardInfo) -> bool:
        """True if the shard is on this disk. Cheap, and never waits."""
        ...

    def doing(self, shard: ShardInfo) -> str:
        """What the fetch of this shard waits for at this moment, for the log."""
        ...


@runtime_checkable
class WatchfulSource(Protocol):
    """A source that tells whether a file that it gave is still what it was."""

    def still(self, shard: ShardInfo, stamp: tuple[int, int, int, int]) -> bool:
        """False if the file with this stamp (`cache.seen`) may have other bytes now. Costs a look at it."""
        ...


@runtime_checkable
class WishingSource(Protocol):
    """A source of shards that somebody is only making: what is needed soon can be made first."""

    def wish(self, shards: Sequence[tuple[Manifest, ShardInfo]]) -> None:
        """These will be needed next, in this order. Never waits."""
        ...
