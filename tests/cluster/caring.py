"""A coordinator's upkeep over agents and hands that are not there: a catalog is what they hold, copies are instant."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

from crucible.cache.store import Store
from crucible.cluster.agents import Agents
from crucible.cluster.care import Care
from crucible.cluster.catalog import Catalog
from crucible.cluster.given import Given
from crucible.cluster.hands import RayHands
from crucible.cluster.operation import Recipe
from crucible.config import Settings
from crucible.manifest import Manifest
from crucible.refs import NodeId, ReadOptions, RepoRef, ShardInfo, SourceFile, WorkItem, digest_of
from crucible.report import ItemResult

CLUSTER = "session-1"


class FakeNotes:
    """Standing orders in memory."""

    def __init__(self) -> None:
        self.told: dict[str, dict[str, Mapping[str, Any]]] = {}

    def note(self, kind: str, key: str, record: Mapping[str, Any] | None) -> None:
        self.told.setdefault(kind, {})[key] = record or {}
        if record is None:
            del self.told[kind][key]

    def notes(self, kind: str) -> Mapping[str, Mapping[str, Any]]:
        return dict(self.told.get(kind, {}))


class FakeAgents:
    """Nodes with a catalog of what they hold."""

    def __init__(self, nodes: Sequence[str]) -> None:
        self.catalog = Catalog()
        self.nodes = {NodeId(name): f"http://10.0.0.{number}:4000" for number, name in enumerate(nodes)}
        self.drained: Collection[NodeId] = ()
        self.given = Given()
        self.items = Catalog()
        self.quiet: set[NodeId] = set()
        """Nodes whose agents do not answer."""

    def notice(self) -> None: ...

    def ensure(self) -> None: ...

    def rebuild(self, nodes: Collection[NodeId] | None = None) -> None: ...

    def handles(self) -> dict[NodeId, Any]:
        return {node: None for node in self.nodes if node not in self.quiet}

    def silent(self) -> dict[NodeId, str]:
        return dict.fromkeys(self.quiet, "it hangs")

    def urls(self) -> dict[NodeId, str]:
        return dict(self.nodes)

    def locate(self, keys: Sequence[str]) -> dict[str, list[str]]:
        return {key: [self.nodes[node] for node in sorted(self.catalog.holders(key))] for key in keys}

    def agent_url(self, node: NodeId) -> str | None:
        return self.nodes.get(node)

    def weights(self) -> dict[NodeId, float]:
        return {node: 1.0 for node in self.handles() if node not in self.drained}

    def notes_of(self, _: NodeId) -> list[str]:
        return []

    def refused(self) -> dict[NodeId, str]:
        return {}

    def recorded(self, item: str) -> set[NodeId]:
        return self.items.holders(item)

    def held_by(self, node: NodeId) -> list[str]:
        return sorted(self.catalog.keys_of(node))

    def dropped(self, node: NodeId, keys: Collection[str]) -> None:
        self.catalog.remove(node, keys)

    def lose(self, name: str) -> None:
        del self.nodes[NodeId(name)]
        self.catalog.drop(NodeId(name))
        self.items.drop(NodeId(name))


class FakeHands:
    """What is told to be done is done at once."""

    def __init__(self, agents: FakeAgents) -> None:
        self.agents = agents
        self.remade: list[str] = []
        self.leaving: dict[NodeId, float | None] = {}
        self.answers: dict[str, dict[NodeId, Any]] = {}

    def reached(self) -> Collection[NodeId]:
        return self.agents.handles()

    def copy(self, node: NodeId, shards: Sequence[ShardInfo]) -> Future[dict[str, str]]:
        self.agents.catalog.add(node, [one.key for one in shards], [one.size for one in shards])
        return _done()

    def remake(self, node: NodeId, recipe: Recipe) -> Future[dict[str, str]]:
        self.remade += recipe.promised
        self.agents.catalog.add(node, recipe.promised)
        return _done()

    def bring(self, node: NodeId, items: Sequence[ItemResult]) -> Future[dict[str, str]]:
        for item in items:
            self.agents.catalog.add(node, [one.key for one in item.shards], [one.size for one in item.shards])
            self.agents.items.add(node, [item.key])
        return _done()

    def drop(self, node: NodeId, keys: Sequence[str]) -> Future[dict[str, str]]:
        self.agents.catalog.remove(node, keys)
        return _done()

    def ask(self, method: str, *_: Any, **__: Any) -> tuple[dict[NodeId, Any], dict[NodeId, str]]:
        return self.answers.get(method, {}), self.agents.silent()

    def ask_each(self, method: str, *_: Any, **__: Any) -> tuple[dict[NodeId, Any], dict[NodeId, str]]:
        return self.ask(method)

    def labels(self, name: str) -> dict[NodeId, str]:
        return {}

    def draining(self) -> dict[NodeId, float | None]:
        return self.leaving


def _done() -> Future[dict[str, str]]:
    future: Future[dict[str, str]] = Future()
    future.set_result({})
    return future


def caring(
    home: Path, nodes: Sequence[str], manifests: Sequence[Manifest] = (), **settings: Any
) -> tuple[Care, FakeAgents, FakeHands]:
    """The upkeep of a cluster of these nodes, whose coordinator's store has these manifests."""
    store, agents = Store(home), FakeAgents(nodes)
    for manifest in manifests:
        store.put_manifest(manifest)
    hands = FakeHands(agents)
    care = Care(
        store,
        cast("Agents", agents),
        FakeNotes(),
        CLUSTER,
        Settings(home, **settings),
        cast("RayHands", hands),
    )
    return care, agents, hands


def make_manifest(shards: int, *, repo: str = "org/data", split: str = "train") -> Manifest:
    """Two shards an item, each of 100 bytes."""
    ref = RepoRef(repo, "c" * 40)
    items = tuple(
        WorkItem(
            number, ref, (SourceFile(f"{split}-{number}", 9, digest_of({repo: number}), True),), ReadOptions("json"), 1
        )
        for number in range((shards + 1) // 2)
    )
    made = tuple(
        ShardInfo(items[n // 2].shard_key(n % 2), 7, 100, f"{n:064x}", "", n // 2, n % 2) for n in range(shards)
    )
    return Manifest(ref, "main", split, None, "", (), items, made)
