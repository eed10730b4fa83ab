"""Who holds which shard. Pure and soft: rebuilt at any time from what the stores report."""

from __future__ import annotations

from collections.abc import Iterable

from crucible.refs import NodeId


class Catalog:
    """shard key -> nodes that hold it.

    Concurrency: none; its owner (the coordinator) guards it.
    """

    def __init__(self) -> None:
        self._holders: dict[str, set[NodeId]] = {}

    def add(self, node: NodeId, keys: Iterable[str]) -> None:
        for key in keys:
            self._holders.setdefault(key, set()).add(node)

    def replace(self, node: NodeId, keys: Iterable[str]) -> None:
        """What a store reported in full: whatever else we believed of this node was wrong."""
        self.drop(node)
        self.add(node, keys)

    def drop(self, node: NodeId) -> None:
        """A node is gone. Linear in the number of shards, and nodes go seldom."""
        for key in [key for key, nodes in self._holders.items() if node in nodes]:
            self._holders[key].discard(node)
            if not self._holders[key]:
                del self._holders[key]

    def holders(self, key: str) -> set[NodeId]:
        return set(self._holders.get(key, ()))

    def __len__(self) -> int:
        return len(self._holders)
