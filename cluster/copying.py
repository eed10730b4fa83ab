"""The replicas that a job still has to make. Pure: part of the mind's state, for `track` alone.

Items are looked at one after the other, in the order of the source, and again when a copy failed or a holder went. A
node gets at most `slots` copies at a time; an item whose copies have to wait for a node is looked at when it has room.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush

from crucible.refs import NodeId

COPY_TRIES = 4
"""Failures of an item's copies, on nodes that live, before the job is content with fewer."""


@dataclass(frozen=True, slots=True)
class Copy:
    """The shard in place `place` of those of the item `index`."""

    index: int
    place: int
    size: int
    """Bytes."""


@dataclass(slots=True)
class Copying:
    slots: int | None = None
    under_way: dict[str, dict[NodeId, list[Copy]]] = field(default_factory=dict)
    """shard key -> node -> what is on its way there: several where the same content is in a repo twice."""
    at_work: dict[NodeId, int] = field(default_factory=dict)
    parked: dict[NodeId, list[int]] = field(default_factory=dict)
    """Items that wait for room on a node."""
    failed_on: dict[int, list[NodeId]] = field(default_factory=dict)
    """Of items whose copies failed, the node of each try."""
    begun: bool = False
    upto: int = 0
    """Items before this one have been looked at; those of `again_at` are to be looked at once more."""
    count: int = 0
    again_at: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether anything is under way."""
        return bool(self.under_way)

    def begin(self, count: int, slots: int | None) -> None:
        """Look at `count` items. Only the first call counts: what changes later is looked at by itself."""
        if not self.begun:
            self.begun, self.count, self.slots = True, count, slots

    def look_at(self, indexes: list[int]) -> None:
        """Items that may lack copies now. Those that were not looked at yet will be."""
        for index in indexes:
            if index < self.upto:
                heappush(self.again_at, index)

    def unpark(self, gone: Iterable[NodeId]) -> None:
        """What waits for room on nodes that went has to look for others."""
        for node in gone:
            for index in self.parked.pop(node, ()):
                heappush(self.again_at, index)

    def first(self, index: int) -> None:
        """The item that `next` gave has to be looked at again before others."""
        heappush(self.again_at, index)

    def next(self) -> int | None:
        """The item to look at now, or None."""
        if self.again_at:
            return heappop(self.again_at)
        if self.upto < self.count:
            self.upto += 1
            return self.upto - 1
        return None

    def coming(self, key: str) -> set[NodeId]:
        """The nodes that are getting the shard."""
        return set(self.under_way.get(key, ()))

    def start(self, copy: Copy, key: str, node: NodeId) -> bool:
        """Whether the copy may begin. If not, its item is looked at again when the node has room."""
        if len(self.failed_on.get(copy.index, ())) >= COPY_TRIES:
            return False
        if self.slots is not None and self.at_work.get(node, 0) >= self.slots:
            self.parked.setdefault(node, []).append(copy.index)
            return False
        self.at_work[node] = self.at_work.get(node, 0) + 1
        self.under_way.setdefault(key, {}).setdefault(node, []).append(copy)
        return True

    def ended(self, key: str, node: NodeId) -> Copy | None:
        """The copy that has come to its end; None where there was none."""
        there = self.under_way.get(key, {})
        if node not in there:
            return None
        copy = there[node].pop()
        if not there[node]:
            del there[node]
        if not there:
            del self.under_way[key]
        self.at_work[node] -= 1
        if waiting := self.parked.get(node):
            # who is woken may need the room no more: when nothing is at work here, nobody else would wake the others
            for _ in range(1 if self.at_work[node] else len(waiting)):
                heappush(self.again_at, waiting.pop(0))
            if not waiting:
                del self.parked[node]
        return copy

    def again(self, copy: Copy, node: NodeId, *, lost: bool) -> bool:
        """A copy has failed: whether another will be tried. That its node is gone is no fault of the copy."""
        if not lost:
            self.failed_on.setdefault(copy.index, []).append(node)
        heappush(self.again_at, copy.index)
        return len(self.failed_on.get(copy.index, ())) < COPY_TRIES
