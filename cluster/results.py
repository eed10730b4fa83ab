"""What became of a job's items, and on which nodes their shards lie. Pure: part of the mind's state.

A million results as objects take a gigabyte; packed they take a hundred bytes each, and are objects again when they are
asked for. What a try has cost is added up as it is reported (`drive`) and not kept here.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

from crucible.refs import NodeId, ShardInfo, WorkItem
from crucible.report import Counts, ItemResult

NOTHING = Counts()

NOT_DONE = -1
_SHARD = struct.Struct("<QQIIII32s32s")
"""Rows, bytes, number, schema among the item's, the item's schemas, 1 if it was reused, key, digest."""
_COPY = struct.Struct("<II")
"""Place of the shard among the item's, and node."""


class Results(Mapping[int, ItemResult]):
    """index -> result of every item that is done. `counts` and `seconds` of what comes out are nothing.

    Keys, digests and schemas are hashes of 64 hex digits; of others (in no real store) the objects are kept.
    """

    def __init__(self, items: Sequence[WorkItem]) -> None:
        self._items = items
        count = len(items)
        self._born = array("i", [NOT_DONE]) * count
        """The node of each, as a number."""
        self._only = bytearray(_SHARD.size * count)
        """The shard of each item that has one, as nearly all have."""
        self._others: dict[int, ItemResult] = {}
        """Items of no shard, or of several."""
        self._copies: dict[int, bytes] = {}
        self._done = 0
        self._nodes: dict[NodeId, int] = {}
        self._names: list[NodeId] = []
        self._on: dict[int, array[int]] = {}
        """node -> items that had shards there once; some twice, some not any more."""
        self._schemas: dict[str, int] = {}
        self._told: list[tuple[tuple[str, str], ...]] = []
        """Schemas of an item, by number: as good as always the same."""

    def put(self, result: ItemResult) -> None:
        index, shards, born = result.index, result.shards, self._born
        number = self._nodes.get(result.node)
        if number is None:
            number = self._number(result.node)
        if born[index] == NOT_DONE:
            self._done += 1
        born[index] = number
        self._on[number].append(index)
        if len(shards) == 1 and len(result.schemas) == 1:
            shard, schemas = shards[0], result.schemas
            kept = self._schemas.get(shard.schema)
            if kept is None:
                kept = self._schemas[shard.schema] = len(self._told)
                self._told.append(schemas)
            key, digest = shard.key, shard.digest
            if len(key) == 64 == len(digest) and shard.schema == schemas[0][0]:
                told = (shard.rows, shard.size, shard.number, 0, kept, result.reused)
                try:
                    hashes = bytes.fromhex(key), bytes.fromhex(digest)
                    _SHARD.pack_into(self._only, index * _SHARD.size, *told, *hashes)
                except ValueError:
                    pass
                else:
                    return
        self._others[index] = replace(result, counts=NOTHING, seconds=0.0)

    def forget(self, index: int) -> None:
        """The item is to be done again."""
        self._born[index] = NOT_DONE
        self._others.pop(index, None)
        self._copies.pop(index, None)
        self._done -= 1

    def node(self, index: int) -> NodeId:
        """Where the item was done."""
        return self._names[self._born[index]]

    def shards(self, index: int) -> tuple[ShardInfo, ...]:
        """Those of an item that is done, in the order of their rows."""
        if (other := self._others.get(index)) is not None:
            return other.shards
        rows, size, number, schema, kept, _, key, digest = self._unpacked(index)
        return (ShardInfo(key.hex(), rows, size, digest.hex(), self._told[kept][schema][0], index, number),)

    def _unpacked(self, index: int) -> tuple[int, int, int, int, int, int, bytes, bytes]:
        if self._born[index] == NOT_DONE:
            raise KeyError(index)
        return cast(
            "tuple[int, int, int, int, int, int, bytes, bytes]", _SHARD.unpack_from(self._only, index * _SHARD.size)
        )

    def copied(self, index: int, place: int, node: NodeId) -> None:
        """The node has a copy of the item's shard in that place."""
        number = self._number(node)
        if node not in self.holders(index, place):
            self._copies[index] = self._copies.get(index, b"") + _COPY.pack(place, number)
            self._on[number].append(index)

    def holders(self, index: int, place: int) -> set[NodeId]:
        """The nodes that have the shard in that place: where it was born, unless that is lost, and the copies."""
        copies = _COPY.iter_unpack(self._copies.get(index, b""))
        found = {self._names[number] for of, number in copies if of == place}
        born = self._born[index]
        if born != NOT_DONE and self._nodes.get(self._names[born]) == born:  # it may have gone, and be back empty
            found.add(self._names[born])
        return found

    def lose(self, node: NodeId) -> tuple[list[int], list[int]]:
        """The node is gone, and its shards with it: (items of which a shard is left nowhere, items with fewer copies).

        The first are forgotten. Linear in what the node had.
        """
        gone = self._nodes.pop(node, None)
        lost: list[int] = []
        fewer: list[int] = []
        for index in sorted(set(self._on.pop(gone, ()))) if gone is not None else ():
            copies = self._copies.get(index, b"")
            left = [one for one in _COPY.iter_unpack(copies) if one[1] != gone]
            if self._born[index] == NOT_DONE or (self._born[index] != gone and len(left) * _COPY.size == len(copies)):
                continue
            if copies:
                self._copies[index] = b"".join(_COPY.pack(*one) for one in left)
            if all(self.holders(index, place) for place in range(self.count(index))):
                fewer.append(index)
            else:
                self.forget(index)
                lost.append(index)
        return lost, fewer

    def births(self) -> dict[NodeId, tuple[int, int]]:
        """node -> (shards that were made there, their bytes), wherever else they are by now."""
        found: dict[NodeId, tuple[int, int]] = {}
        for index in self:
            shards, size = found.get(node := self.node(index), (0, 0))
            other = self._others.get(index)
            sizes = [self._unpacked(index)[1]] if other is None else [shard.size for shard in other.shards]
            found[node] = (shards + len(sizes), size + sum(sizes))
        return found

    @property
    def reused(self) -> int:
        """Items that were there already, and moved nothing."""
        kept = self._others
        return sum(kept[index].reused if index in kept else self._unpacked(index)[5] for index in self)

    def count(self, index: int) -> int:
        """How many shards an item that is done has."""
        other = self._others.get(index)
        return 1 if other is None else len(other.shards)

    def __getitem__(self, index: int) -> ItemResult:
        if index not in self:
            raise KeyError(index)
        if (other := self._others.get(index)) is not None:
            return other
        *_, kept, reused, _, _ = self._unpacked(index)
        key, schemas = self._items[index].key, self._told[kept]
        return ItemResult(index, key, self.node(index), self.shards(index), schemas, reused=bool(reused))

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and 0 <= index < len(self._born) and self._born[index] != NOT_DONE

    def __iter__(self) -> Iterator[int]:
        return (index for index, born in enumerate(self._born) if born != NOT_DONE)

    def __len__(self) -> int:
        return self._done

    def _number(self, node: NodeId) -> int:
        number = self._nodes.get(node)
        if number is None:
            number = self._nodes[node] = len(self._names)
            self._names.append(node)
            self._on[number] = array("I")
        return number
