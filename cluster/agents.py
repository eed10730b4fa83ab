"""What the nodes' stores hold: asked of their agents, told by them. No decision, and no job.

Soft state: the stores are the truth, and a new coordinator asks them. Raises StaleCoordinator where `roster` does.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray as untyped_ray

from crucible.cache.replaced import put_aside_replaced
from crucible.cache.store import Store
from crucible.cluster.answering import CALL_TIMEOUT_S
from crucible.cluster.catalog import Catalog
from crucible.cluster.executor import reason_of
from crucible.cluster.flights import Flights
from crucible.cluster.given import Given
from crucible.cluster.keys import Keys
from crucible.cluster.prepare import Prepared, remember
from crucible.cluster.roster import AGENT_TIMEOUT_S, Roster
from crucible.cluster.skew import Verdict
from crucible.cluster.turns import Turn
from crucible.errors import ManifestError, StaleCoordinator
from crucible.manifest import Manifest
from crucible.refs import NodeId, WorkItem
from crucible.report import ItemResult
from crucible.workers.caring import manifest_ids

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns
log = logging.getLogger("crucible.agents")


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
        if unasked := self._unasked & self.handles().keys():
            self.rebuild(unasked)

    def _take_in(self, came: Collection[NodeId], known: Mapping[NodeId, str]) -> None:
        super()._take_in(came, known)
        if came:
            threading.Thread(target=self._introduce, args=(set(came),), name="introduce", daemon=True).start()

    def _forget(self, node: NodeId) -> None:
        super()._forget(node)
        self.catalog.drop(node)
        self._items.drop(node)

    def weights(self) -> dict[NodeId, float]:
        """node -> free bytes of its store, to a power of two: so coarse that placement does not flutter."""
        agents = self.handles()
        fit = [node for node in agents if self._verdicts.get(node, Verdict()).works]
        # where all are about to go, a job is better done there than not at all
        working = [node for node in fit if node not in self.drained] or fit
        weights: dict[NodeId, float] = {}
        for node, free, error in self.gather({node: agents[node].weight.remote() for node in working}, CALL_TIMEOUT_S):
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
                there = self.handles()
                asked = {node: agent.report.remote() for node, agent in there.items() if nodes is None or node in nodes}
                self._news = []
            reports = {}
            for node, report, error in self.gather(asked, AGENT_TIMEOUT_S):
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
        """shard key -> urls of agents that hold it; last those that do not answer just now."""
        with self._lock:
            return {
                key: [
                    self._agents[node][1]
                    for node in sorted(self.catalog.holders(key), key=lambda node: (node in self._silent, node))
                    if node in self._agents
                ]
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
        """A node that holds the first of these shards, if each is held by some that answers; else None."""
        with self._lock:
            answering = self.handles().keys()
            there = [self.catalog.holders(key) & answering for key in keys]
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
        """True if `replicas` nodes, or all there are, hold every shard. One that does not answer gives it to nobody."""
        with self._lock:
            wanted, silent = min(replicas, len(self.handles())), self._silent.keys()
            holders = (self.catalog.holders(shard.key) for manifest in manifests for shard in manifest.shards)
            return all(len(there - silent if silent else there) >= wanted for there in holders)

    def share(self, prepared: Prepared, manifests: Sequence[Manifest]) -> None:
        """Give every node the manifests. A node that cannot take them now asks its agent, or the Hub, later."""
        for manifest in manifests:  # while this node's names say what was before; agents do it when they are sent it
            put_aside_replaced(self._store, manifest)
        remember(prepared, tuple(manifests), self._store)
        names = frozenset((prepared.repo.revision, *prepared.revisions))
        made = {manifest.id: (manifest, dict(prepared.survey)) for manifest in manifests}
        self._bring(self.handles(), dict.fromkeys(made, names), made.__getitem__)

    def _introduce(self, nodes: Collection[NodeId]) -> None:
        """Let nodes know what was prefetched before they came, or while they did not answer."""

        def load(manifest_id: str) -> tuple[Manifest, dict[str, Any]] | None:
            manifest = self._store.get_manifest(manifest_id)
            survey = self._store.get_survey(manifest.repo, manifest.variant)
            return None if survey is None else (manifest, survey)

        names = self._store.names()
        # what no name points to first: whoever takes a manifest in lets the name of its commit point to it
        known = sorted(manifest_ids(self._store), key=lambda one: (one in names, one))
        agents = {node: agent for node, agent in self.handles().items() if node in nodes}
        with suppress(StaleCoordinator):  # the next one introduces them
            self._bring(agents, {one: frozenset(names.get(one, ())) for one in known}, load)

    def _bring(
        self,
        agents: Mapping[NodeId, Any],
        wanted: Mapping[str, frozenset[str]],
        load: Callable[[str], tuple[Manifest, dict[str, Any]] | None],
    ) -> None:
        """Bring manifests with the revisions that name them to those nodes that lack them, one after another.

        A manifest may have tens of megabytes: nodes are asked what they have before any is read or sent.
        """
        lacking: dict[str, list[NodeId]] = {}
        asked = {node: agent.names.remote() for node, agent in agents.items()} if wanted else {}
        for node, there, error in self.gather(asked, AGENT_TIMEOUT_S):
            if error is not None:
                self.turn.heard(error)
                continue
            for manifest_id, names in wanted.items():
                if manifest_id not in there or not names <= set(there[manifest_id]):
                    lacking.setdefault(manifest_id, []).append(node)
        for manifest_id in filter(lacking.__contains__, wanted):
            try:
                found = load(manifest_id)
            except ManifestError:
                continue  # damaged here, and nothing to hand on
            if found is None:
                continue
            told, revisions = ray.put([found[0].to_json()]), sorted(wanted[manifest_id])
            calls = {node: agents[node].keep.remote(told, revisions, found[1]) for node in lacking[manifest_id]}
            for node, _, error in self.gather(calls, AGENT_TIMEOUT_S):
                if error is not None:
                    self.turn.heard(error)
                    log.warning("node %s has no manifest %s: %s", node[:12], manifest_id[:12], reason_of(error))
