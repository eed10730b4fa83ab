"""Work items by the million: a sequence that makes each when it is asked for. Pure.

A job of a million items asks for few of them at a time. As objects all of them took 300 MB and seconds of garbage
collection; as what tells them apart (where each one's files end, its bytes and its key) they take 48 bytes each.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import accumulate
from typing import overload

import numpy as np
from numpy.typing import NDArray

from crucible.cluster.place import point_of
from crucible.refs import ReadOptions, RepoRef, SourceFile, WorkItem, key_end, key_inputs, made_item

KEY_BYTES = 32
OptionsOf = Callable[[ReadOptions, Sequence[SourceFile]], ReadOptions]


class _Made(Sequence[WorkItem]):
    """Items that are made when asked for. Equal to any sequence of equal items."""

    def at(self, place: int, index: int) -> WorkItem:
        """The item in a place of this sequence, numbered `index`."""
        raise NotImplementedError

    @overload
    def __getitem__(self, place: int) -> WorkItem: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[WorkItem, ...]: ...
    def __getitem__(self, place: int | slice) -> WorkItem | tuple[WorkItem, ...]:
        if isinstance(place, slice):
            return tuple(self[one] for one in range(*place.indices(len(self))))
        length = len(self)
        if not -length <= place < length:
            raise IndexError(f"there are {length} items, and none in place {place}")
        if place < 0:
            place += length
        return self.at(place, place)

    def __iter__(self) -> Iterator[WorkItem]:
        return (self.at(place, place) for place in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]


class Items(_Made):
    """The items of one split whose files follow one another: item i has those from the end of i - 1 to `ends[i]`."""

    def __init__(
        self,
        repo: RepoRef,
        files: Sequence[SourceFile],
        ends: Sequence[int],
        options: ReadOptions,
        shard_bytes: int,
        options_of: OptionsOf | None = None,
    ) -> None:
        """`options_of` gives the options of an item from those of the split and its files, where they differ."""
        self._repo, self._files, self._ends = repo, files, array("Q", ends)
        self._options, self._shard_bytes, self._options_of = options, shard_bytes, options_of
        self.sizes = array("Q", bytes(8 * len(self._ends)))
        keys = bytearray(KEY_BYTES * len(self._ends))
        end, start = key_end(options, shard_bytes), 0
        sizes = self.sizes
        for number, stop in enumerate(self._ends):
            own = (files[start],) if stop == start + 1 else files[start:stop]
            if options_of is not None:
                end = key_end(options_of(options, own), shard_bytes)
            sizes[number] = own[0].size if len(own) == 1 else sum([file.size for file in own])
            oid = own[0].oid
            if len(own) == 1 and oid.isalnum():
                inputs = f'{{"files":[["{oid}",{own[0].size}]{end}'.encode()
            else:
                inputs = key_inputs(own, end)
            at = number * KEY_BYTES
            keys[at : at + KEY_BYTES] = sha256(inputs).digest()
            start = stop
        self.keys = bytes(keys)

    def __len__(self) -> int:
        return len(self._ends)

    def at(self, place: int, index: int) -> WorkItem:
        ends, options = self._ends, self._options
        files = tuple(self._files[ends[place - 1] if place else 0 : ends[place]])
        if self._options_of is not None:
            options = self._options_of(options, files)
        at = place * KEY_BYTES
        return made_item(index, self._repo, files, options, self._shard_bytes, self.keys[at : at + KEY_BYTES].hex())


class Joined(_Made):
    """The items of several splits in one row, numbered through."""

    def __init__(self, parts: Sequence[Sequence[WorkItem]]) -> None:
        self._parts = tuple(parts)
        self._ends = list(accumulate(len(part) for part in parts))
        self.sizes = array("Q")
        for part in parts:
            self.sizes.extend(sizes_of(part))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def at(self, place: int, index: int) -> WorkItem:
        number = bisect_right(self._ends, place)
        part, own = self._parts[number], place - (self._ends[number - 1] if number else 0)
        return part.at(own, index) if isinstance(part, _Made) else replace(part[own], index=index)

    def points(self) -> NDArray[np.uint64]:
        return np.concatenate([points_of(part) for part in self._parts]) if self._parts else np.zeros(0, np.uint64)


def sizes_of(items: Sequence[WorkItem]) -> array[int]:
    """Source bytes of each item."""
    return items.sizes if isinstance(items, (Items, Joined)) else array("Q", [item.size for item in items])


def points_of(items: Sequence[WorkItem]) -> NDArray[np.uint64]:
    """Where each item stands on the circle of nodes: `place.point_of` its key."""
    if isinstance(items, Joined):
        return items.points()
    if isinstance(items, Items):
        return np.frombuffer(items.keys, ">u8")[:: KEY_BYTES // 8].astype(np.uint64)
    return np.array([point_of(item.key) for item in items], np.uint64)
