"""The items of a job that wait for their turn. Pure: part of the mind's state, and only `track` changes it.

First what failed and is tried again, then what readers wish for, the wishes at the front of their lists before others,
then the order of the source. A node gets at most `slots` items at a time: what is sent cannot be overtaken any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from crucible.refs import NodeId

Rank = tuple[int, int, int]
"""(0 tried again, 1 wished for, 2 neither; place in a reader's list; index)."""


@dataclass(slots=True)
class Waiting:
    slots: int | None = None
    """Items at a time on a node; None: any number."""
    ranks: dict[int, Rank] = field(default_factory=dict)
    """Of every item that waits. An entry of the heaps that says otherwise is stale."""
    heap: list[Rank] = field(default_factory=list)
    parked: dict[NodeId, list[Rank]] = field(default_factory=dict)
    """Heaps of items whose nodes had no room when their turn came."""
    at_work: dict[NodeId, int] = field(default_factory=dict)
    full: set[NodeId] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.ranks)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ranks)

    def add(self, indexes: Iterable[int]) -> None:
        """Items in their place in the source's order."""
        for index in indexes:
            self._put((2, 0, index))

    def again(self, index: int) -> None:
        """An item that failed, before all others."""
        self._put((0, 0, index))

    def wish(self, index: int, place: int) -> None:
        """Somebody needs the item as the `place`-th. Nothing if it does not wait, or is needed sooner already."""
        if index in self.ranks and (1, place, index) < self.ranks[index]:
            self._put((1, place, index))

    def _put(self, rank: Rank) -> None:
        self.ranks[rank[2]] = rank
        heappush(self.heap, rank)

    def first(self, homes: Mapping[int, NodeId], nodes: Mapping[NodeId, float]) -> int | None:
        """The item whose turn it is and whose node has room, or None."""
        while self.heap:
            rank = self.heap[0]
            index = rank[2]
            if self.ranks.get(index) == rank:
                home = homes[index]
                if home not in self.full:
                    return index
                if len(self.full) >= len(nodes):
                    return None
                heappush(self.parked.setdefault(home, []), rank)
            heappop(self.heap)
        return None

    def start(self, index: int, node: NodeId) -> None:
        """The item waits no more: `node` has it."""
        del self.ranks[index]
        self.at_work[node] = self.at_work.get(node, 0) + 1
        if self.slots is not None and self.at_work[node] >= self.slots:
            self.full.add(node)

    def end(self, node: NodeId) -> None:
        """An item that `node` had is done, or has failed there."""
        self.at_work[node] -= 1
        self.full.discard(node)
        parked = self.parked.get(node, [])
        while parked:
            rank = heappop(parked)
            if self.ranks.get(rank[2]) == rank:
                heappush(self.heap, rank)
                return

    def rebuild(self, nodes: Mapping[NodeId, float]) -> None:
        """Nodes came or went, and items may have other homes now."""
        self.full &= nodes.keys()
        self.parked.clear()
        self.heap = list(self.ranks.values())
        heapify(self.heap)
