"""The replicas that a job still has to make. Pure: part of the mind's state, for `track` alone.

Items are looked at one after the other, in the order of the source, and again when a copy failed or a holder went. A
node gets at most `slots` copies at a time; an item whose copies have to wait for a node is looked at when it has room.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import islice

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
    """shard key -> node -> what is on its way there: several where the same content is in a repo twice. The first is
    what was started, and of its size; the others wait for it."""
    at_work: dict[NodeId, int] = field(default_factory=dict)
    parked: dict[NodeId, dict[int, None]] = field(default_factory=dict)
    """Items that wait for room on a node, each once, however often it was looked at."""
    failed_on: dict[int, list[NodeId]] = field(default_factory=dict)
    """Of items whose copies failed, the node of each try."""
    begun: bool = False
    upto: int = 0
    """Items before this one have been looked at; those of `again_at` are to be looked at once more."""
    count: int = 0
    again_at: list[int] = field(default_factory=list)
    """A heap of the items in `_due`."""
    _due: set[int] = field(default_factory=set)

    def __bool__(self) -> bool:
        """Whether anything is under way."""
        return bool(self.under_way)

    def begin(self, count: int, slots: int | None) -> None:
        """Look at `count` items. Only the first call counts: what changes later is looked at by itself."""
        if not self.begun:
            self.begun, self.count, self.slots = True, count, slots

    def look_at(self, indexes: list[int]) -> None:
        """Items that may lack copies now, for a reason that is new. Those that were not looked at yet will be."""
        for index in indexes:
            self.failed_on.pop(index, None)  # maybe it was the node that is gone which could not be read
            if index < self.upto:
                self.first(index)

    def look_at_all(self) -> None:
        """There were too few nodes for as many copies as are wanted, and now there are more."""
        self.upto = 0

    def unpark(self, gone: Iterable[NodeId]) -> None:
        """What waits for room on nodes that went has to look for others."""
        for node in gone:
            for index in self.parked.pop(node, ()):
                self.first(index)

    def first(self, index: int) -> None:
        """The item is to be looked at again, before those that were not looked at yet."""
        if index not in self._due:
            self._due.add(index)
            heappush(self.again_at, index)

    def next(self) -> int | None:
        """The item to look at now, or None."""
        if self.again_at:
            index = heappop(self.again_at)
            self._due.remove(index)
            return index
        if self.upto < self.count:
            self.upto += 1
            return self.upto - 1
        return None

    def coming(self, key: str) -> set[NodeId]:
        """The nodes that are getting the shard."""
        return set(self.under_way.get(key, ()))

    def join(self, index: int, place: int, key: str) -> None:
        """What is on its way for another item with the same content is on its way for this one too."""
        for there in self.under_way.get(key, {}).values():
            if all(copy.index != index for copy in there):
                there.append(Copy(index, place, 0))

    def start(self, copy: Copy, key: str, node: NodeId) -> bool:
        """Whether the copy may begin. If not, its item is looked at again when the node has room."""
        if len(self.failed_on.get(copy.index, ())) >= COPY_TRIES:
            return False
        if self.slots is not None and self.at_work.get(node, 0) >= self.slots:
            self.parked.setdefault(node, {})[copy.index] = None
            return False
        self.at_work[node] = self.at_work.get(node, 0) + 1
        self.under_way.setdefault(key, {})[node] = [copy]
        return True

    def ended(self, key: str, node: NodeId) -> list[Copy]:
        """What has come to its end with a copy; [] where there was none."""
        there = self.under_way.get(key, {})
        if node not in there:
            return []
        copies = there.pop(node)
        if not there:
            del self.under_way[key]
        self.at_work[node] -= 1
        if waiting := self.parked.get(node):
            # who is woken may need the room no more: when nothing is at work here, nobody else would wake the others
            for index in list(islice(waiting, 1 if self.at_work[node] else None)):
                del waiting[index]
                self.first(index)
            if not waiting:
                del self.parked[node]
        return copies

    def again(self, copy: Copy, node: NodeId, *, lost: bool) -> bool:
        """A copy has failed: whether another will be tried. That its node is gone is no fault of the copy."""
        if not lost:
            self.failed_on.setdefault(copy.index, []).append(node)
        self.first(copy.index)
        return len(self.failed_on.get(copy.index, ())) < COPY_TRIES
