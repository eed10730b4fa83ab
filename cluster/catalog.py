"""Who holds which shard. Pure and soft: rebuilt at any time from what the stores report.

A million shards are an entry each in one dict, by their keys as bytes, and an entry in that of each node that holds
them: so a node's death costs what it held, and what a table of all nodes shows is counted as it changes and never
added up anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat

from crucible.refs import NodeId

Packed = bytes | str
"""A key of 64 hex digits as its 32 bytes, and any other as it is."""


@dataclass(frozen=True, slots=True)
class CatalogSummary:
    """What a person wants to know of all shards at once."""

    shards: int
    """Different ones that somebody holds."""
    copies: Mapping[int, int]
    """Number of holders -> shards that have so many."""
    nodes: Mapping[NodeId, tuple[int, int]]
    """Node -> (shards it holds, their bytes as far as they are known), by name."""

    @property
    def bytes(self) -> int:
        """Of all copies."""
        return sum(size for _, size in self.nodes.values())

    def under(self, replicas: int) -> int:
        """Shards with fewer holders than that. What nobody holds is not known here."""
        return sum(shards for holders, shards in self.copies.items() if holders < replicas)

    def over(self, replicas: int) -> int:
        """Shards with more holders than that."""
        return sum(shards for holders, shards in self.copies.items() if holders > replicas)


class Catalog:
    """shard key -> nodes that hold it, and node -> what it holds.

    Concurrency: none; its owner (the coordinator) guards it. Memory: about 200 bytes a shard with one holder.
    """

    def __init__(self) -> None:
        self._numbers: dict[NodeId, int] = {}
        self._names: list[NodeId] = []
        """By number. Numbers of nodes that went are not given again: there are few, and they are small."""
        self._holders: dict[Packed, int | tuple[int, ...]] = {}
        """The one node that holds a shard, or several: nearly all shards have one, and an int is small."""
        self._held: dict[int, dict[Packed, int]] = {}
        """node -> key -> bytes, 0 where nobody said."""
        self._bytes: dict[int, int] = {}
        self._copies: dict[int, int] = {}
        self.changes = 0
        """Counts up whenever something may have changed: what was counted before is right while it stays."""

    def add(self, node: NodeId, keys: Iterable[str], sizes: Iterable[int] | None = None) -> None:
        """The node holds these too; `sizes` are their bytes, in the order of the keys."""
        self.changes += 1
        number = self._numbers.get(node)
        if number is None:
            number = self._numbers[node] = len(self._names)
            self._names.append(node)
        held = self._held.setdefault(number, {})
        for key, size in zip(keys, repeat(0) if sizes is None else sizes, strict=False):
            packed = _packed(key)
            known = held.get(packed)
            if known is None:
                self._gain(packed, number)
            if known is None or size:
                held[packed] = size
                self._bytes[number] = self._bytes.get(number, 0) + size - (known or 0)

    def replace(self, node: NodeId, keys: Iterable[str], sizes: Iterable[int] | None = None) -> None:
        """What a store reported in full: whatever else we believed of this node was wrong."""
        told = list(keys)
        if (number := self._numbers.get(node)) is not None:
            self._remove(number, self._held.get(number, {}).keys() - {_packed(key) for key in told})
        self.add(node, told, sizes)

    def remove(self, node: NodeId, keys: Iterable[str]) -> None:
        """The node holds these no more. Those that it was not known to hold are passed over."""
        if (number := self._numbers.get(node)) is not None:
            held = self._held.get(number, {})
            self._remove(number, [packed for key in keys if (packed := _packed(key)) in held])

    def drop(self, node: NodeId) -> None:
        """A node is gone. Linear in what it held."""
        if (number := self._numbers.pop(node, None)) is not None:
            self._remove(number, list(self._held.get(number, ())))
            self._held.pop(number, None)
            self._bytes.pop(number, None)

    def holders(self, key: str) -> set[NodeId]:
        """A set of the caller's own."""
        there = self._holders.get(_packed(key))
        if there is None:
            return set()
        return {self._names[there]} if isinstance(there, int) else {self._names[one] for one in there}

    def counts(self, keys: Iterable[Packed]) -> dict[int, int]:
        """Number of holders, 0 too, -> how many of these packed keys have so many.

        A second for a million keys is too long for a table, so the loops are those of C.
        """
        there = list(map(self._holders.get, keys))
        several = [one for one in there if isinstance(one, tuple)]
        nobody = there.count(None)
        found = Counter(map(len, several))
        found[0], found[1] = nobody, len(there) - nobody - len(several)
        return {holders: shards for holders, shards in found.items() if shards}

    def holding(self, node: NodeId, keys: Iterable[Packed]) -> int:
        """How many of these packed keys the node holds."""
        return sum(map(self._held.get(self._numbers.get(node, -1), {}).__contains__, keys))

    def nodes(self) -> list[NodeId]:
        """Those that ever held something and are not gone, by name."""
        return sorted(self._numbers)

    def held(self, node: NodeId) -> int:
        """How many shards the node holds."""
        return len(self._held.get(self._numbers.get(node, -1), ()))

    def bytes(self, node: NodeId) -> int:
        """Of the shards the node holds, as far as they are known."""
        return self._bytes.get(self._numbers.get(node, -1), 0)

    def keys_of(self, node: NodeId) -> Iterator[str]:
        """The shards of a node, in no order. The catalog must not change meanwhile."""
        for packed in self._held.get(self._numbers.get(node, -1), ()):
            yield packed if isinstance(packed, str) else packed.hex()

    def size(self, key: str) -> int:
        """Bytes of a shard as any of its holders told; 0 where none did."""
        there = self._holders.get(packed := _packed(key))
        if there is None:
            return 0
        held = [self._held.get(one, {}) for one in ((there,) if isinstance(there, int) else there)]
        return max(one.get(packed, 0) for one in held)  # it may be on its way out while somebody looks

    def summary(self) -> CatalogSummary:
        """All of it in figures that are kept up to date: as cheap for a million shards as for none."""
        nodes = {node: (self.held(node), self.bytes(node)) for node in self.nodes()}
        return CatalogSummary(len(self._holders), dict(sorted(self._copies.items())), nodes)

    def __len__(self) -> int:
        return len(self._holders)

    def __iter__(self) -> Iterator[str]:
        """Every shard's key, in no order. The catalog must not change meanwhile."""
        for packed in self._holders:
            yield packed if isinstance(packed, str) else packed.hex()

    def _gain(self, packed: Packed, number: int) -> None:
        there = self._holders.get(packed)
        if there is None:
            self._holders[packed] = number
            self._count(1, 1)
            return
        now = tuple(sorted((there, number) if isinstance(there, int) else (*there, number)))
        self._holders[packed] = now
        self._count(len(now) - 1, -1)
        self._count(len(now), 1)

    def _remove(self, number: int, gone: Iterable[Packed]) -> None:
        self.changes += 1
        held = self._held.get(number, {})
        for packed in gone:
            self._bytes[number] -= held.pop(packed)
            there = self._holders[packed]
            if isinstance(there, int):
                del self._holders[packed]
                self._count(1, -1)
                continue
            left = tuple(one for one in there if one != number)
            self._holders[packed] = left[0] if len(left) == 1 else left
            self._count(len(there), -1)
            self._count(len(left), 1)

    def _count(self, holders: int, change: int) -> None:
        now = self._copies[holders] = self._copies.get(holders, 0) + change
        if not now:
            del self._copies[holders]


def _packed(key: str) -> Packed:
    try:
        return bytes.fromhex(key) if len(key) == 64 else key
    except ValueError:
        return key
