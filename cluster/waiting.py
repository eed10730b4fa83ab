"""The items of a job that wait for their turn, and for which node. Pure: part of the mind's state, for `track` alone.

First what failed and is tried again, then what readers wish for, the wishes at the front of their lists before others,
then the order of the source. A node gets at most `slots` items at a time: what is sent cannot be overtaken any more.

A node that has ended far fewer items than others, since it came, gets fewer at a time, down to one: what it was sent is
all that a slow node can hold up. A node with room for which nothing waits takes from the one for which most waits: so a
slow node's line goes to others, and one that joins has work at once. What waits for a node that has room is never taken
from it, nor what failed elsewhere, because the ranges that had arrived were sent to the heir.

A million items are an entry each in the lines of their nodes; only what leaves the order of the source is in a heap.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from crucible.refs import NodeId

Rank = tuple[int, int, int]
"""(0 tried again, 1 wished for, 2 neither; of wishes the place in a reader's list, then who came first; index)."""
WISHES = 1 << 40
"""More than there ever are in a job."""
NEVER: Rank = (3, 0, 0)
"""After all ranks."""
UNBOUNDED = 1 << 62
LEEWAY = 2
"""A node gets fewer items at a time when it has ended less than this part of what nodes did on average."""


@dataclass(slots=True)
class _Queue:
    """What waits for one node. Entries that have been started, or have another home now, are stale."""

    line: array[int] = field(default_factory=lambda: array("I"))
    """In the order of the source, from `at` on."""
    at: int = 0
    heap: list[Rank] = field(default_factory=list)
    count: int = 0
    """Items that wait here, without the stale."""
    at_work: int = 0
    most: int = UNBOUNDED
    """Items it is given at a time."""
    ended: int = 0
    since: int = 0
    """Items that had ended anywhere when the node came."""
    entered: Rank | None = None
    """The rank with which the node is in `_ready`; an entry that says otherwise is stale."""


class Waiting:
    """Items by index; `homes` says for each where it goes, or went."""

    def __init__(self, slots: int | None = None) -> None:
        self.slots = slots
        """Items at a time on a node; None: any number."""
        self.homes: list[NodeId] = []
        self._waits = bytearray()
        self._left = self._ended = 0
        self._wished: dict[int, Rank] = {}
        self._wishes = 0
        """Heard so far."""
        self._queues: dict[NodeId, _Queue] = {}
        """Of the nodes there are, and of those that went while they had work."""
        self._here: dict[NodeId, None] = {}
        self._ready: list[tuple[Rank, NodeId]] = []
        """A heap with an entry, maybe with too early a rank, of every node that has room and for which items wait."""
        self._idle: list[tuple[int, NodeId]] = []
        """A heap with an entry (items at work, node), maybe stale, of every node with room for which nothing waits."""
        self._longest: list[tuple[int, NodeId]] = []
        """A heap with an entry (-items that wait, node), maybe with too many, of every node for which items wait."""

    def begin(self, names: Sequence[NodeId], homes: Sequence[int]) -> None:
        """All items wait, item i for the node `names[homes[i]]`. These are the nodes there are."""
        self.homes = [names[home] for home in homes]
        self._waits = bytearray(b"\1" * len(homes))
        self._left = len(homes)
        numbers = np.asarray(homes, np.int64)
        order = np.argsort(numbers, kind="stable").astype(array("I").typecode)
        ends = np.searchsorted(numbers[order], np.arange(len(names)), side="right").tolist()
        start = 0
        for name, end in zip(names, ends, strict=True):
            self._queues[name] = queue = self._queue()
            queue.line, queue.count = array("I", order[start:end].tobytes()), end - start
            start = end
        self._here = dict.fromkeys(names)
        self._look_again()

    def __len__(self) -> int:
        return self._left

    def __iter__(self) -> Iterator[int]:
        return (index for index, waits in enumerate(self._waits) if waits)

    def again(self, index: int, node: NodeId) -> None:
        """An item that failed, before all others."""
        self._put((0, 0, index), node)

    def add(self, index: int, node: NodeId) -> None:
        """An item that has to be done once more, in its place in the order of the source."""
        self._put((2, 0, index), node)

    def wish(self, index: int, place: int) -> None:
        """Somebody needs the item as the `place`-th. Nothing if it does not wait, or is needed sooner already.

        Of two at the same place the one that came first is first: a reader that goes on from item to item would else
        always be before one that waits for a later item.
        """
        rank = (1, place * WISHES + self._wishes, index)
        self._wishes += 1
        if 0 <= index < len(self._waits) and self._waits[index] and rank < self._wished.get(index, NEVER):
            self._wished[index] = rank
            self._enter(rank, self.homes[index])

    def next(self) -> tuple[int, NodeId] | None:
        """The item whose turn it is and the node that has room for it, or None. It waits until it is started."""
        ready = self._ready
        while ready:
            rank, node = ready[0]
            queue = self._queues.get(node)
            if queue is None or queue.entered != rank:
                heappop(ready)
                continue
            head = NEVER
            if queue.at_work < queue.most and node in self._here:
                index = rank[2]
                if self._waits[index] and self.homes[index] == node:  # what came sooner since would be entered
                    return index, node
                head = self._head(node, queue)
            queue.entered = None if head is NEVER else head
            if head is NEVER:
                heappop(ready)
            else:
                heapreplace(ready, (head, node))
        return self._taken() if self._left else None

    def start(self, index: int, node: NodeId) -> None:
        """The item waits no more: `node` has it."""
        queue = self._queues[node]
        if self.homes[index] == node and queue.count > 1 and not self._wished:  # as nearly always
            self._waits[index] = 0
            self._left -= 1
            queue.count -= 1
        else:
            self._unwait(index)
            self.homes[index] = node
        queue.at_work += 1
        if queue.at_work >= queue.most:
            if self._ready and self._ready[0][1] == node:  # as nearly always: the entry of this item
                heappop(self._ready)
                queue.entered = None
        elif queue.entered is None:
            self._note_room(node, queue)

    def end(self, node: NodeId) -> None:
        """An item that `node` had is done, or has failed there."""
        queue = self._queues[node]
        queue.at_work -= 1
        if self.slots is not None:
            self._ended += 1
            queue.ended += 1
            if queue.ended < 16 or not queue.ended & 15:  # later one more or less says little
                self._measure(queue, self.slots)
        if node in self._here:
            if queue.entered is None:
                self._note_room(node, queue)
        elif not queue.at_work and not queue.count:
            del self._queues[node]

    def _measure(self, queue: _Queue, slots: int) -> None:
        fair = (self._ended - queue.since) / max(1, len(self._here))
        if fair >= slots:  # before, chance says more than speed
            queue.most = min(slots, 1 + int(LEEWAY * slots * queue.ended / fair))

    def changed(self, nodes: Iterable[NodeId]) -> list[int]:
        """These are the nodes there are now. Returns the items that wait for others, which stay there until moved."""
        self._here = dict.fromkeys(nodes)
        for node in self._here:
            if node not in self._queues:
                self._queues[node] = self._queue()
        gone = [(node, queue) for node, queue in self._queues.items() if node not in self._here]
        homeless: list[int] = []
        for node, queue in gone:
            found = {*queue.line[queue.at :], *(rank[2] for rank in queue.heap)} if queue.count else ()
            homeless += (index for index in found if self._waits[index] and self.homes[index] == node)
            if not queue.at_work and not queue.count:
                del self._queues[node]
        self._look_again()
        return sorted(homeless)

    def move(self, index: int, node: NodeId) -> None:
        """An item that waits goes to another node, and keeps its rank but for that of a second try."""
        rank = self._wished.get(index, (2, 0, index))
        self._unwait(index)
        self._put(rank, node)

    def _queue(self) -> _Queue:
        return _Queue(most=UNBOUNDED if self.slots is None else self.slots, since=self._ended)

    def _put(self, rank: Rank, node: NodeId) -> None:
        index = rank[2]
        queue = self._queues.get(node)
        if queue is None:
            queue = self._queues[node] = self._queue()
        if not self._waits[index]:
            self._waits[index] = 1
            self._left += 1
            queue.count += 1
            heappush(self._longest, (-queue.count, node))
        self.homes[index] = node
        self._enter(rank, node)

    def _enter(self, rank: Rank, node: NodeId) -> None:
        queue = self._queues[node]
        heappush(queue.heap, rank)
        if self._has_room(node, queue):
            self._make_ready(rank, node, queue)

    def _make_ready(self, rank: Rank, node: NodeId, queue: _Queue) -> None:
        if rank is not NEVER and (queue.entered is None or rank < queue.entered):
            queue.entered = rank
            heappush(self._ready, (rank, node))

    def _unwait(self, index: int) -> None:
        node = self.homes[index]
        queue = self._queues[node]
        self._waits[index] = 0
        self._left -= 1
        if self._wished:
            self._wished.pop(index, None)
        queue.count -= 1
        if not queue.count:
            queue.heap.clear()
            queue.at = len(queue.line)
            if not queue.at_work and node not in self._here:
                del self._queues[node]

    def _has_room(self, node: NodeId, queue: _Queue) -> bool:
        return queue.at_work < queue.most and node in self._here

    def _note_room(self, node: NodeId, queue: _Queue) -> None:
        """Enter a node that may have room where it will be looked for."""
        if queue.at_work >= queue.most:
            return
        if queue.count:
            if queue.entered is None:
                head = queue.entered = self._head(node, queue)
                heappush(self._ready, (head, node))
        else:
            heappush(self._idle, (queue.at_work, node))

    def _look_again(self) -> None:
        self._ready.clear()
        self._idle.clear()
        for queue in self._queues.values():
            queue.entered = None
        for node in self._here:
            self._note_room(node, self._queues[node])
        self._longest = [(-queue.count, node) for node, queue in self._queues.items() if queue.count]
        heapify(self._longest)

    def _head(self, node: NodeId, queue: _Queue) -> Rank:
        """The first that waits for the node; `NEVER` when nothing does. Drops what is stale before it."""
        line, at, heap = queue.line, queue.at, queue.heap
        if not heap and at < len(line) and self._waits[index := line[at]] and self.homes[index] is node:
            return (2, 0, index)
        first = self._line_head(node, queue)
        while heap and not (self._waits[heap[0][2]] and self.homes[heap[0][2]] == node):
            heappop(heap)
        return min(first, heap[0]) if heap else first

    def _line_head(self, node: NodeId, queue: _Queue) -> Rank:
        line, at = queue.line, queue.at
        while at < len(line) and not (self._waits[line[at]] and self.homes[line[at]] == node):
            at += 1
        queue.at = at
        return (2, 0, line[at]) if at < len(line) else NEVER

    def _taken(self) -> tuple[int, NodeId] | None:
        """An item of the node for which most waits, for one with room for which nothing does."""
        while self._idle:
            at_work, idle = self._idle[0]
            queue = self._queues.get(idle)
            if queue is not None and queue.at_work == at_work and not queue.count and self._has_room(idle, queue):
                break
            heappop(self._idle)
        else:
            return None
        while self._longest:
            count, node = self._longest[0]
            queue = self._queues.get(node)
            if queue is not None and queue.count and queue.count == -count:
                head = self._head(node, queue)
                if head[0] == 0:
                    head = self._line_head(node, queue)
                if head is not NEVER:
                    return head[2], idle
                heappop(self._longest)  # all that waits there was tried already
                continue
            heappop(self._longest)
            if queue is not None and queue.count:
                heappush(self._longest, (-queue.count, node))
        return None
