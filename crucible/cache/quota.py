"""How much a node's store may hold, and what goes first when something else needs the room. Pure.

`workers.room` measures, decides with these and acts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

RESERVE_SHARE = 100
RESERVE_MOST = 256 << 20
PEER_COST = 1.0
"""To get a shard again that another node holds..."""
SOURCE_COST = 4.0
"""...and one that has to be downloaded and converted anew, which the Hub counts too."""
NEVER = math.inf
"""What cannot be had again."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What a store may take of its disk. None of both: all but a reserve."""

    size: int | None = None
    """Bytes."""
    share: float | None = None
    """Part of the disk, more than 0 and at most 1."""

    def limit(self, disk: int) -> int | None:
        """Bytes, on a disk of `disk` bytes; None: there is no limit but the disk's."""
        if self.share is not None:
            return int(disk * self.share)
        return self.size


def reserve_of(disk: int) -> int:
    """Bytes of a disk that are left to others, and to what a full store still has to write: 1 %, at most 256 MiB."""
    return min(RESERVE_MOST, disk // RESERVE_SHARE)


@dataclass(frozen=True, slots=True)
class Room:
    """What a store has, in bytes."""

    disk: int
    """Of the whole disk."""
    free: int
    """That this user may still write there, whoever takes them first."""
    used: int
    """By the store: shards, source files, work in progress and quarantine."""
    reserved: int
    """Promised to work that is under way. What of it is written already counts as used, and not as free, too."""
    limit: int | None = None
    """What `used` may come to."""

    @property
    def left(self) -> int:
        """That something new may take. Below 0 where more was promised, or written by others, than there is."""
        left = self.free - reserve_of(self.disk)
        if self.limit is not None:
            left = min(left, self.limit - self.used)
        return left - self.reserved

    @property
    def bound(self) -> str:
        """What bounds it, for a person."""
        if self.limit is not None and self.limit - self.used < self.free - reserve_of(self.disk):
            return f"CRUCIBLE_QUOTA allows {self.limit:,} bytes, {self.used:,} are used, {self.reserved:,} promised"
        kept = reserve_of(self.disk)
        return f"the disk has {self.free:,} bytes free, of which {kept:,} stay so, and {self.reserved:,} are promised"


@dataclass(frozen=True, slots=True)
class Held:
    """A shard that could go."""

    key: str
    size: int
    """Bytes."""
    age_s: float
    """Since its last use."""
    cost: float
    """To get it again, per byte: PEER_COST, SOURCE_COST or NEVER."""

    @property
    def weight(self) -> float:
        """The more, the sooner it goes."""
        return self.size * max(1.0, self.age_s) / self.cost


def choose(held: Iterable[Held], need: int) -> list[str]:
    """Keys to remove, the best first, that free at least `need` bytes; all that can go if those are not enough.

    None that cannot be had again. None that is not needed for it, beside the others that were chosen.
    """
    ranked = sorted((one for one in held if one.cost < NEVER and one.size > 0), key=lambda one: (-one.weight, one.key))
    taken: list[Held] = []
    freed = 0
    for one in ranked:
        if freed >= need:
            break
        taken.append(one)
        freed += one.size
    kept: list[Held] = []
    for one in reversed(taken):  # a big one at the end may have made small ones before it needless
        if freed - one.size >= need:
            freed -= one.size
        else:
            kept.append(one)
    return [one.key for one in reversed(kept)]
