"""Nodes that are to go: they get nothing new, what runs there is let end, and what only they hold is brought elsewhere.

Said by a person, by the agent of a node that is told to end, or by Ray. The order outlives coordinators.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any

from crucible.cache.store import Store
from crucible.cluster.agents import Agents
from crucible.cluster.hands import RayHands
from crucible.cluster.known import Notes
from crucible.cluster.operation import BATCH_BYTES, BATCH_SHARDS, GONE_S, TICK_S, Job, Operation, flow
from crucible.cluster.operations import Operations
from crucible.cluster.place import ring_of
from crucible.config import Settings
from crucible.errors import ClusterError
from crucible.refs import NodeId
from crucible.report import ItemResult

log = logging.getLogger("crucible.care")

ASK_S = 60.0
"""For a node to read its records: it may have a hundred thousand."""
LAST_S = 3.0
"""For the same when the grace is over."""
ROUND_S = 2.0
"""Between two looks at what came to be on a node meanwhile; at least ten times as long as such a look takes."""


class Draining(Operations):
    """The drains of one cluster. Concurrency: any method from any thread."""

    def __init__(
        self,
        store: Store,
        agents: Agents,
        notes: Notes,
        cluster: str,
        settings: Settings,
        hands: RayHands | None = None,
    ) -> None:
        super().__init__(store, agents, notes, cluster, settings, hands)
        self._leaving: set[NodeId] = set()
        """Nodes that Ray was about to take away when we looked last."""

    def start_drain(self, nodes: Sequence[str], grace_s: float | None = None) -> dict[str, Any]:
        """Give nodes no new work, let end what runs there, and copy what only they hold, last copies first.

        They go on serving. What still runs when the grace is over is ended there, and done by others.
        """
        self.ready()
        leaving = [self.node_of(name) for name in nodes]
        for node in leaving:
            self._notes.note("drain", node, {"cluster": self._cluster, "since": time.time()})
        self.agents.drained = self.drained
        deadline = None if grace_s is None else time.monotonic() + grace_s
        return self._start_drain(leaving, deadline)

    def undrain(self, nodes: Sequence[str]) -> list[str]:
        """Let nodes have work again. Those that were drained."""
        orders = self._notes.notes("drain")
        found = [node for name in nodes if (node := self.node_of(name)) in orders]
        for node in found:
            self._notes.note("drain", node, None)
        self.agents.drained = self.drained
        return list(found)

    def _save_what_ray_takes(self, nodes: set[NodeId]) -> None:
        """Empty nodes that Ray is about to take away, as far as there is time."""
        leaving = self._hands.draining()
        for node in (leaving.keys() & nodes) - self._leaving:
            left_s = leaving[node]
            log.warning("node %s is being taken away by Ray; copying what only it holds", node[:12])
            deadline = None if left_s is None else time.monotonic() + left_s
            self._start_drain([node], deadline)
        self._leaving = set(leaving)

    def _start_drain(self, leaving: Collection[NodeId], deadline: float | None) -> dict[str, Any]:
        return self._start(Operation("drain", deadline=deadline), partial(self._drain, nodes=frozenset(leaving)))

    def _drain(self, operation: Operation, nodes: AbstractSet[NodeId]) -> None:
        given = self.agents.given
        while True:
            self._still_there(operation, nodes)
            under_way, began = given.at(nodes), time.monotonic()  # before the plan: it knows what came of the rest
            self._carry_out(operation, partial(self.plan_drain, nodes))
            self._bring_records(operation, nodes)
            if operation.stopped or (not under_way and nodes <= set(self._hands.reached())):
                break
            self._await(operation, nodes, max(ROUND_S, 10 * (time.monotonic() - began)))
        if operation.cancelled.is_set() or not operation.stopped:
            return
        if taken := given.take_back(nodes, "is drained, and its grace is over"):
            operation.moved = sum(taken.values())
            log.warning("%s: its grace is over; %s are done elsewhere", operation.name, _told(taken))
        self._still_there(operation, nodes)
        # what ended in the last moments is not counted yet
        operation.left = self.plan_drain(nodes).left + _shards(self._records(operation, nodes, LAST_S))

    def _still_there(self, operation: Operation, nodes: AbstractSet[NodeId]) -> None:
        """Wait a while for nodes whose agents cannot be asked just now: what they hold is not known then.

        Raises ClusterError when one is gone.
        """
        since = time.monotonic()
        while not operation.cancelled.is_set() and (gone := nodes - set(self._hands.reached())):
            operation.waiting_for, operation.phase = f"the agent of node {min(gone)[:12]}", "waits"
            if operation.stopped or time.monotonic() - since > GONE_S:
                raise ClusterError(f"node {min(gone)[:12]} went, or stopped answering, before it was empty")
            operation.cancelled.wait(TICK_S)

    def _await(self, operation: Operation, nodes: AbstractSet[NodeId], wait_s: float) -> None:
        """Until nothing is under way on the nodes; for so long, unless the operation is stopped before."""
        give_up = time.monotonic() + wait_s
        while time.monotonic() < give_up and not operation.stopped and not self.agents.given.wait(nodes, TICK_S):
            where = ", ".join(node[:12] for node in sorted(nodes))
            operation.waiting_for = f"{_told(self.agents.given.at(nodes))} on node {where}"
            operation.phase = "waits"
            if not nodes <= set(self.agents.drained):  # the order was taken back
                operation.cancelled.set()

    # --- what jobs that have not ended made there: no manifest names it yet

    def _bring_records(self, operation: Operation, nodes: AbstractSet[NodeId]) -> None:
        """Have other nodes bring the items that only these have done, each with its record: it counts as done there."""
        if operation.stopped:
            return
        items, weights = self._records(operation, nodes, ASK_S), self.agents.weights()
        staying = {node: weights.get(node, 1.0) for node in self.agents.handles() if node not in self._going(nodes)}
        if not items or not staying:
            operation.left += _shards(items)
            return
        ring = ring_of(staying)
        batches: list[tuple[NodeId, list[ItemResult]]] = []
        open_: dict[NodeId, list[ItemResult]] = {}
        for item in items:
            node = next(ring.walk(item.key))
            batch = open_.get(node)
            if batch is None or _shards(batch) >= BATCH_SHARDS or _size(batch) >= BATCH_BYTES:
                batch = open_[node] = []
                batches.append((node, batch))
            batch.append(item)

        def copied(count: int, size: int) -> None:
            operation.copied += count
            operation.bytes_done += size

        operation.copies += _shards(items)
        operation.bytes += _size(items)
        jobs = [
            Job(
                node,
                _size(batch),
                tuple(shard.key for item in batch for shard in item.shards),
                partial(self._hands.bring, node, batch),
                copied,
            )
            for node, batch in batches
        ]
        with self._turn(operation) as mine:
            if mine:
                operation.phase = "works"
                flow(jobs, operation, self._hands, self._settings.inflight_bytes)
        operation.left += _shards(self._records(operation, nodes, ASK_S))

    def _records(self, operation: Operation, nodes: AbstractSet[NodeId], wait_s: float) -> list[ItemResult]:
        """Items that only these nodes have done, with shards that no manifest names."""
        held = {node: set(self.agents.held_by(node)) for node in nodes}
        with self._lock:
            named = self.ledger.with_keys(set().union(*held.values())).keys()
        asked = {node: sorted(keys - named) for node, keys in held.items() if not keys <= named}
        going, found = self._going(nodes), dict[str, ItemResult]()
        for node, keys in asked.items():
            answers, problems = self.ask("records", keys, nodes=[node], wait_s=wait_s)
            for item in answers.get(node, ()):
                stays = [self.agents.recorded(item.key), *(self.agents.catalog.holders(s.key) for s in item.shards)]
                if not all(there - going for there in stays):
                    found.setdefault(item.key, item)
            for problem in problems.values():
                operation.went_wrong(f"node {node[:12]}: {problem}", 0)
        return list(found.values())

    def _going(self, nodes: AbstractSet[NodeId]) -> set[NodeId]:
        return {*nodes, *self.agents.drained}


def _shards(items: Collection[ItemResult]) -> int:
    return sum(len(item.shards) for item in items)


def _size(items: Collection[ItemResult]) -> int:
    return sum(shard.size for item in items for shard in item.shards)


def _told(under_way: Counter[str]) -> str:
    """Such as `2 items of org/data, 1 upkeep`."""
    return ", ".join(f"{count:,} {what}" for what, count in sorted(under_way.items()))
