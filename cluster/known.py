"""What upkeep knows: the nodes, what they hold, what they are to hold; and the plans that follow from it.

What must outlive this coordinator (how often each manifest is to be held, which nodes are drained) are standing orders
in its journal, of which every node is told.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, Protocol

from crucible.cache.store import Store
from crucible.cluster.agents import Agents
from crucible.cluster.hands import RayHands
from crucible.cluster.ledger import Choice, Ledger, Order
from crucible.cluster.logbook import Logbook
from crucible.cluster.remembered import options_of
from crucible.cluster.upkeep import Place, Plan, Wanted, rebalance, repair
from crucible.config import Settings
from crucible.errors import CrucibleError, ManifestError, StoreError, UsageError
from crucible.manifest import Manifest, manifest_from_json
from crucible.refs import NodeId, RepoRef
from crucible.workers.caring import manifest_ids
from crucible.workers.evict import SOURCE_BAD_S, source_answers
from crucible.workers.tasks import JobOptions

log = logging.getLogger("crucible.care")

RACK_S = 10.0
"""For nodes to say where they stand."""
SOURCE_GOOD_S = 60.0
"""How long an answer of a source is believed."""


class Notes(Protocol):
    """Standing orders that outlive a coordinator."""

    def note(self, kind: str, key: str, record: Mapping[str, Any] | None) -> None: ...

    def notes(self, kind: str) -> Mapping[str, Mapping[str, Any]]: ...


class Orders:
    """The journal's standing orders, of which all nodes are told at once."""

    def __init__(self, logbook: Logbook, tell: Callable[[], None]) -> None:
        self._logbook, self._tell = logbook, tell

    def note(self, kind: str, key: str, record: Mapping[str, Any] | None) -> None:
        self._logbook.note(kind, key, record)
        self._tell()

    def notes(self, kind: str) -> Mapping[str, Mapping[str, Any]]:
        return self._logbook.notes(kind)


class Known:
    """One cluster's nodes and manifests. `cluster` is Ray's name for it, `store` this node's.

    Concurrency: any method from any thread.
    """

    def __init__(
        self,
        store: Store,
        agents: Agents,
        notes: Notes,
        cluster: str,
        settings: Settings,
        hands: RayHands | None = None,
    ) -> None:
        self._store, self.agents, self._notes, self._cluster = store, agents, notes, cluster
        self._settings = settings
        self.ledger = Ledger()
        self._hands = RayHands(agents, settings) if hands is None else hands
        self._lock = threading.RLock()
        self._let_go: set[str] = set()
        """Keys of last copies that were dropped on purpose: no repair that nobody asked for makes them again."""
        self._racks: dict[NodeId, str] = {}
        self._learned = False
        self._answers: dict[tuple[RepoRef, str], tuple[float, bool]] = {}
        self._questions: dict[tuple[RepoRef, str], threading.Lock] = {}
        """Held by whoever asks a source."""

    # --- what there is

    def meet(self) -> None:
        """Know who there is, and wait for nobody who does not answer; costs a call to Ray's head."""
        self.agents.notice()
        if not self._learned:
            self.learn()

    def ready(self) -> None:
        """Know the nodes and what they hold, as it is now."""
        self.agents.ensure()
        self.agents.rebuild()
        self.learn()

    def ask(self, method: str, *arguments: Any, **how: Any) -> tuple[dict[NodeId, Any], dict[NodeId, str]]:
        """Ask agents; see `RayHands.ask`."""
        return self._hands.ask(method, *arguments, **how)

    def ask_each(
        self, method: str, arguments: Mapping[NodeId, Sequence[Any]], **how: Any
    ) -> tuple[dict[NodeId, Any], dict[NodeId, str]]:
        """Ask each of some agents its own question, all at once; see `RayHands.ask_each`."""
        return self._hands.ask_each(method, arguments, **how)

    def order(self, kind: str, key: str, record: Mapping[str, Any] | None) -> None:
        """Give a standing order, or take it back (None)."""
        self._notes.note(kind, key, record)

    def pins(self) -> dict[str, str]:
        """Manifest -> why it is pinned, on every node."""
        return {key: str(told.get("note", "")) for key, told in self._notes.notes("pin").items()}

    def pin_on(self, waiting: dict[NodeId, set[str]]) -> None:
        """Pin on nodes that came what is pinned on all; takes out of `waiting` what is done, or void.

        A manifest that is only on its way to a node stays in it. Many nodes are asked at once.
        """
        there, nodes = self.pins(), self.agents.handles()
        alike: dict[tuple[str, frozenset[str]], list[NodeId]] = {}
        for node, ids in list(waiting.items()):
            ids.intersection_update(there)
            if not ids or node not in nodes:
                del waiting[node]
            for note in {there[one] for one in ids}:
                alike.setdefault((note, frozenset(one for one in ids if there[one] == note)), []).append(node)
        for (note, some), askable in alike.items():
            for node, pinned in self.ask("pin", sorted(some), note, nodes=askable)[0].items():
                waiting.get(node, set()).difference_update(pinned)

    @property
    def drained(self) -> set[NodeId]:
        """Nodes that get nothing new: by an order of a person, or by Ray's."""
        return {NodeId(node) for node in self._notes.notes("drain")} | self._hands.draining().keys()

    def racks(self, wait_s: float = RACK_S) -> dict[NodeId, str]:
        """node -> rack, of all nodes that have said one: Ray's label, else CRUCIBLE_RACK of the node."""
        nodes = self.agents.handles()
        if unknown := nodes.keys() - self._racks.keys():
            said = self._hands.labels("rack")
            asked = self._hands.ask("rack", nodes=[node for node in unknown if node not in said], wait_s=wait_s)[0]
            self._racks.update({node: str(rack) for node, rack in {**asked, **said}.items() if node in unknown})
        return {node: rack for node in nodes if (rack := self._racks.get(node, ""))}

    def places(self, *, capacity: bool = False) -> dict[NodeId, Place]:
        """The nodes as `upkeep` sees them, weighed as jobs do.

        `capacity` weighs them by free bytes and what they hold, and leaves out those that do not say how much that is:
        they would seem to have too much.
        """
        nodes, drained, racks = self.agents.handles(), self.drained, self.racks()
        weights = self.agents.weights()
        by = weights
        if capacity:
            free = self._hands.ask("weight")[0]
            by = {node: float(free[node]) + self.agents.catalog.bytes(node) for node in nodes if node in free}
        return {
            node: Place(by.get(node, 1.0), racks.get(node, ""), node in drained, makes=node in weights)
            for node in (by if capacity else nodes)
        }

    def learn(self) -> None:
        """Take in the manifests and orders that this node, the journal and the other nodes know.

        What no store has any more is forgotten, if all of them answered.
        """
        # before the question: what comes while it is asked is not gone
        orders, entries = self._notes.notes("wanted"), self.ledger.entries()
        own = manifest_ids(self._store)
        for manifest_id in own:
            if manifest_id not in self.ledger:
                with suppress(CrucibleError):
                    self._add(self._store.get_manifest(manifest_id))
        told, problems = self.ask("manifest_ids")
        for node, known in told.items():
            for manifest_id in known:
                if manifest_id not in self.ledger:
                    with suppress(CrucibleError):
                        self._fetch(node, manifest_id)
        if not problems:
            there = {*own, *(manifest_id for known in told.values() for manifest_id in known)}
            for manifest_id in {entry.manifest for entry in entries} - there:
                with self._lock:
                    let_go = self._let_go.intersection(self.ledger.keys_of([manifest_id]))
                    self.ledger.forget(manifest_id)
                    self._let_go -= let_go - self.ledger.with_keys(let_go).keys()
            with suppress(StoreError):  # a full disk: the next time
                for manifest_id in orders.keys() - there:
                    self.order("wanted", manifest_id, None)
        with self._lock:
            self.ledger.orders = {key: Order.heard(order) for key, order in self._notes.notes("wanted").items()}
            self._learned = True

    def manifest(self, manifest_id: str) -> Manifest:
        """A manifest from this node's store; from another's, where it is gone here or damaged. Raises ManifestError."""
        try:
            return self._store.get_manifest(manifest_id)
        except ManifestError as error:
            there = self.ask("manifest_ids")[0]
            for node in sorted(node for node, known in there.items() if manifest_id in known):
                with suppress(ManifestError):
                    if (found := self._fetch(node, manifest_id)) is not None:
                        log.warning("%s; node %s had it", error, node[:12])
                        return found
            raise

    def _fetch(self, node: NodeId, manifest_id: str) -> Manifest | None:
        """A manifest as a node has it, which is then known here too. Raises ManifestError for one that is damaged."""
        found = self._hands.ask("manifest", manifest_id, nodes=[node])[0].get(node)
        if found is None:
            return None
        data, revisions, survey = found
        manifest = manifest_from_json(data, manifest_id)
        try:
            self._store.put_manifest(manifest, tuple(revisions))
            if survey is not None:
                for revision in {manifest.repo.revision, *revisions}:
                    self._store.put_survey(RepoRef(manifest.repo.repo_id, revision, manifest.repo.repo_type), survey)
        except StoreError as error:  # it is asked for again when it is needed
            log.warning("manifest %s cannot be kept on this node: %s", manifest_id[:12], error)
        self._add(manifest)
        return manifest

    def _add(self, manifest: Manifest) -> None:
        with self._lock:
            self.ledger.add(manifest)

    # --- what jobs promise

    def kept(self, manifests: Iterable[Manifest], replicas: int, options: JobOptions, job: str) -> None:
        """A job has ended: its manifests are to be held by so many nodes from now on."""
        told = {field.name: getattr(options, field.name) for field in fields(options) if field.name != "epoch"}
        for manifest in manifests:
            self._add(manifest)
            self.promise(manifest.id, Order(replicas, self._cluster, job, told))
            with self._lock:
                self._let_go.difference_update(shard.key for shard in manifest.shards)

    def promise(self, manifest_id: str, order: Order) -> None:
        """What is to be of a manifest from now on, whichever coordinator there is."""
        with self._lock:
            if self.ledger.orders.get(manifest_id) == order:
                return
            self.ledger.orders[manifest_id] = order
        try:
            self._notes.note("wanted", manifest_id, order.told())
        except StoreError as error:  # the shards are there; a later coordinator takes them for wanted once
            log.warning("manifest %s: how often it is wanted is not in the journal: %s", manifest_id[:12], error)

    def want(self, ids: Collection[str], replicas: int) -> None:
        """Say of manifests how many nodes are to hold them; 0 gives them up."""
        for manifest_id in ids:
            self.promise(manifest_id, replace(self.ledger.order(manifest_id), replicas=replicas))

    def meant(self, choice: Choice) -> list[str]:
        """Ids of the manifests that are meant. Raises UsageError when there are none."""
        found = [entry.manifest for entry in self.ledger.entries(choice)]
        if choice and not found:
            self.learn()
            found = [entry.manifest for entry in self.ledger.entries(choice)]
        if choice and not found:
            raise UsageError(f"{choice}: no manifest here; `crucible status` lists what there is")
        return found

    # --- plans

    def plan_repair(
        self, ids: Collection[str] | None, *, trim: bool, on_purpose: bool = True, replicas: int | None = None
    ) -> Plan:
        """What `repair` would do for these manifests, or for all. Not `on_purpose`: what was let go stays away."""
        with self._lock:
            let_go = set() if on_purpose else set(self._let_go)
        return repair(
            self.ledger.shards(ids, replicas),
            self.agents.catalog.holders,
            self.places(),
            trim=trim,
            pinned=self._pinned(),
            remake=lambda key: key not in let_go,
        )

    def plan_rebalance(self) -> Plan:
        return rebalance(
            self.ledger.shards(), self.agents.catalog.holders, self.places(capacity=True), pinned=self._pinned()
        )

    def plan_drain(self, nodes: Collection[NodeId]) -> Plan:
        """What must be copied before these nodes may go. Nothing is made again that is lost anyway."""
        leaving, holders = set(nodes), self.agents.catalog.holders
        places = {
            node: replace(place, drained=place.drained or node in leaving) for node, place in self.places().items()
        }
        return repair(_Held(self.ledger.shards(), holders, leaving), holders, places, remake=lambda _: False)

    def _pinned(self) -> Callable[[str], AbstractSet[NodeId]]:
        pinned: set[str] = set()
        if ids := self.pins().keys():
            pinned.update(self.ledger.keys_of(ids))
        return lambda key: self.agents.catalog.holders(key) if key in pinned else set()

    def node_of(self, name: str) -> NodeId:
        """The node with this id, or the only one whose id, host or url begins like that. Raises UsageError."""
        urls = self.agents.urls()
        found = [node for node, url in urls.items() if node.startswith(name) or url.split("//")[-1].startswith(name)]
        if len(found) != 1 or not name:
            known = ", ".join(f"{node[:12]} ({url.split('//')[-1]})" for node, url in sorted(urls.items())[:10])
            raise UsageError(f"{name!r} is {'no node' if not found else 'more than one node'}; there are: {known}")
        return found[0]

    def sources_of(self, keys: Collection[str]) -> set[str]:
        """Those shards whose source can be asked for them now: their Hub has the commit, and lets us see it."""
        with self._lock:
            homes = self.ledger.with_keys(keys)
            entries = {entry.manifest: entry for entry in self.ledger.entries() if entry.manifest in homes.values()}
        good = {name for name, entry in entries.items() if self._source_is_there(name, entry.ref)}
        return {key for key, name in homes.items() if name in good}

    def _source_is_there(self, manifest_id: str, repo: RepoRef) -> bool:
        told = {"options": dict(self.ledger.order(manifest_id).options or {})}
        settings = options_of(told, self._settings).on_this_node()
        what = repo, settings.endpoint
        with self._lock:
            question = self._questions.setdefault(what, threading.Lock())
        with question:  # of many nodes that want room at once, one asks, and the others hear what it was told
            at, answer = self._answers.get(what, (float("-inf"), False))
            if time.monotonic() - at > (SOURCE_GOOD_S if answer else SOURCE_BAD_S):
                answer = source_answers(repo, settings)
                self._answers[what] = (time.monotonic(), answer)
        return answer


class _Held:
    """Those of some shards that one of the nodes holds; can be gone over again."""

    def __init__(
        self, shards: Iterable[Wanted], holders: Callable[[str], Collection[NodeId]], nodes: set[NodeId]
    ) -> None:
        self._shards, self._holders, self._nodes = shards, holders, nodes

    def __iter__(self) -> Iterator[Wanted]:
        return (one for one in self._shards if not self._nodes.isdisjoint(self._holders(one.key)))
