"""What the nodes' stores hold: asked of their agents, told by them. No decision, and no job.

Soft state: the stores are the truth, and a new coordinator asks them. Raises StaleCoordinator where `roster` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ray as untyped_ray

from crucible.cache.store import Store
from crucible.cluster.catalog import Catalog
from crucible.cluster.executor import replies
from crucible.cluster.flights import Flights
from crucible.cluster.given import Given
from crucible.cluster.keys import Keys
from crucible.cluster.prepare import Prepared, remember
from crucible.cluster.roster import AGENT_TIMEOUT_S, CALL_TIMEOUT_S, Roster
from crucible.cluster.skew import Verdict
from crucible.cluster.turns import Turn
from crucible.manifest import Manifest
from crucible.refs import NodeId, WorkItem
from crucible.report import ItemResult

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns


class Agents(Roster):
    """The agents of a cluster, and the catalog of their stores.

    Concurrency: any method from any thread.
    """

    def __init__(self, store: Store, turn: Turn, learn: Callable[[bytes], None], keys: Keys, *, embedded: bool) -> None:
        super().__init__(store, turn, learn, keys, embedded=embedded)
        self.catalog = Catalog()
        """To be read by whoever likes; changed here only."""
        self._items = Catalog()
        self._news: list[tuple[NodeId, Mapping[str, int], str | None]] | None = None
        """What landed while the stores were being asked; None when nobody asks."""
        self.flights: Flights[ItemResult] = Flights()
        self.given = Given()

    def refresh(self) -> None:
        """Notice which nodes came and went, and agents that were started again; ask stores that are new to us.

        Costs a call to Ray's head while nothing changes. Raises what `ensure` does.
        """
        super().refresh()
        with self._lock:
            unasked = self._unasked & self._agents.keys()
        if unasked:
            self.rebuild(unasked)

    def _forget(self, node: NodeId) -> None:
        super()._forget(node)
        self.catalog.drop(node)
        self._items.drop(node)

    def weights(self) -> dict[NodeId, float]:
        """node -> free bytes of its store, to a power of two: so coarse that placement does not flutter."""
        with self._lock:
            fit = [node for node in self._agents if self._verdicts.get(node, Verdict()).works]
            # where all are about to go, a job is better done there than not at all
            working = [node for node in fit if node not in self.drained] or fit
            asked = [(node, self._agents[node][0].weight.remote()) for node in working]
        weights: dict[NodeId, float] = {}
        for node, free, error in replies(asked, CALL_TIMEOUT_S):
            if error is None:  # else no agent, no store: nothing can be born there
                weights[node] = 2.0 ** math.floor(math.log2(max(float(free), 1.0)))
        return weights

    # --- what they hold

    def rebuild(self, nodes: Collection[NodeId] | None = None) -> None:
        """Ask the stores, of `nodes` or of all, what they hold. One that does not answer in time keeps what was known.

        Raises StaleCoordinator.
        """
        with self._asking:
            with self._lock:
                asked = [
                    (node, agent.report.remote())
                    for node, (agent, _) in self._agents.items()
                    if nodes is None or node in nodes
                ]
                self._news = []
            reports = {}
            for node, report, error in replies(asked, AGENT_TIMEOUT_S):
                if error is None:
                    reports[node] = report
                else:
                    self.turn.heard(error)
            with self._lock:
                for node, (shards, items) in reports.items():
                    if node not in self._agents:
                        continue  # it went away meanwhile
                    self.catalog.replace(node, shards, shards.values())
                    self._items.replace(node, items)
                    self._unasked.discard(node)
                news, self._news = self._news, None
                for node, keys, item in news:  # a store that was asked before it landed did not know of it
                    self.landed(node, keys, item)

    def locate(self, keys: Sequence[str]) -> dict[str, list[str]]:
        """shard key -> urls of agents that hold it."""
        with self._lock:
            return {
                key: [self._agents[node][1] for node in sorted(self.catalog.holders(key)) if node in self._agents]
                for key in keys
            }

    def where_done(self, item: WorkItem) -> NodeId | None:
        """A node whose store has this item in full: doing it there moves nothing. One that stays, if there is one."""
        there = self.recorded(item.key)
        return min(there - set(self.drained) or there, default=None)

    def recorded(self, item: str) -> set[NodeId]:
        """The nodes that have done the item of this key, or were given what came of it."""
        with self._lock:
            return self._items.holders(item) & self.handles().keys()

    def where_held(self, keys: Sequence[str]) -> NodeId | None:
        """A node that holds the first of these shards, if each is held by some; else None."""
        with self._lock:
            there = [self.catalog.holders(key) & self._agents.keys() for key in keys]
        return min(there[0]) if there and all(there) else None

    def landed(self, node: NodeId, shards: Mapping[str, int], item: str | None = None) -> None:
        """Shards that have just become visible on a node, by key, with their bytes; and the item that they complete."""
        with self._lock:
            if node not in self._agents:
                return  # gone, and with it what it made; or so new that it will be asked
            if self._news is not None:
                self._news.append((node, shards, item))
            self.catalog.add(node, shards, shards.values())
            if item is not None:
                self._items.add(node, [item])

    def held_by(self, node: NodeId) -> list[str]:
        """Keys of the shards that a node holds, sorted."""
        with self._lock:
            return sorted(self.catalog.keys_of(node))

    def dropped(self, node: NodeId, keys: Collection[str]) -> None:
        """Shards that the node holds no more."""
        with self._lock:
            self.catalog.remove(node, keys)

    def all_held(self, manifests: Sequence[Manifest], replicas: int) -> bool:
        """True if `replicas` nodes, or all there are, hold every shard."""
        with self._lock:
            wanted = min(replicas, len(self._agents))
            return all(len(self.catalog.holders(s.key)) >= wanted for m in manifests for s in m.shards)

    def share(self, prepared: Prepared, manifests: Sequence[Manifest]) -> None:
        """Give every node the manifests. A node that cannot take them now asks its agent, or the Hub, later."""
        remember(prepared, tuple(manifests), self._store)
        data = [manifest.to_json() for manifest in manifests]
        with self._lock:
            agents = [agent for agent, _ in self._agents.values()]
        calls = [agent.keep.remote(data, prepared.revisions, dict(prepared.survey)) for agent in agents]
        ray.wait(calls, num_returns=len(calls), timeout=AGENT_TIMEOUT_S)
