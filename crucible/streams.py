"""Which row stands at each position of an epoch, for datasets that are made of others. Pure: no I/O, no state.

A stream is a frozen tree. Its leaves are splits (`Source`); above them stand shuffles, slices, sums, mixes and
repetitions. `stream.at(epoch)` gives a `Walk`, which answers for any positions in any order without walking there, so
the state of a reader is a position whatever the tree, and ranks are dealt positions of the root and nothing else.

A row id is a row's place in the splits of the tree laid end to end, in the order of its leaves.

The epoch reaches every shuffle and every mix, but not what lies below a slice: which rows `take` and `skip` part is
settled once, so that what was held out for validation stays held out in every epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from crucible.errors import UsageError
from crucible.mix import Mix, MixSpec
from crucible.order import EXACT_ROWS, EpochOrder, Int64s, OrderSpec
from crucible.refs import digest_of

PIECE = 1024
"""Rows that are kept together when something without shards of its own, such as a mix, is shuffled by lanes."""

EXACT_BYTES = 2 << 30
"""What an exact permutation that is asked for by name may take of each process; it takes 8 bytes a row."""

PASS = 1 << 32
"""When an epoch comes to a stream again, as a mix may, that pass is shuffled as if it were epoch e + k * PASS."""


class Walk(Protocol):
    """One epoch of a stream. Concurrency: any number of threads may ask."""

    def rows(self, positions: Int64s) -> Int64s:
        """Row id at each position, in the shape and order of `positions`, all of which are in [0, total)."""
        ...

    def open_shards(self, rank: int, world_size: int) -> int:
        """How many shards a rank's reader draws on at once, at most."""
        ...


class Stream(Protocol):
    """A node of the tree."""

    @property
    def total(self) -> int:
        """Positions of an epoch, of every epoch."""
        ...

    @property
    def pieces(self) -> Int64s:
        """Lengths of the runs of positions whose rows lie together, such as a shard's. Their sum is `total`."""
        ...

    def at(self, epoch: int) -> Walk: ...

    def shifted(self, by: int) -> Stream:
        """The same stream, with the row ids of its leaves beginning `by` later."""
        ...

    def told(self) -> list[Any]:
        """All that the order depends on, as JSON."""
        ...


def digest(stream: Stream) -> str:
    """64 hex that name the stream: equal for equal orders of equal data."""
    return digest_of({"stream": stream.told()})


@dataclass(frozen=True, eq=False)
class Source:
    """One split, in source order."""

    name: str
    """Of its manifest, as a state names it."""
    shard_rows: Int64s
    first: int = 0
    """Row id of its first row."""

    @property
    def total(self) -> int:
        return self._total

    @cached_property
    def _total(self) -> int:
        return int(self.shard_rows.sum())

    @property
    def pieces(self) -> Int64s:
        return self.shard_rows

    def at(self, epoch: int) -> Walk:  # noqa: ARG002 - the same in each
        return _Shift(self.first)

    def shifted(self, by: int) -> Source:
        return replace(self, first=self.first + by)

    def told(self) -> list[Any]:
        return ["split", self.name, self.first]


@dataclass(frozen=True, eq=False)
class Shuffled:
    """Another stream's positions in the order that `order.py` gives its pieces."""

    of: Stream
    spec: OrderSpec

    @property
    def total(self) -> int:
        return self.of.total

    @property
    def pieces(self) -> Int64s:
        return even_pieces(self.total)

    def at(self, epoch: int) -> Walk:
        return _Chain(EpochOrder(self.of.pieces, replace(self.spec, epoch=epoch)), self.of.at(epoch))

    def shifted(self, by: int) -> Shuffled:
        return replace(self, of=self.of.shifted(by))

    def told(self) -> list[Any]:
        spec = self.spec
        return ["shuffle", spec.mode, spec.seed, spec.lanes, spec.window, spec.reshuffle, self.of.told()]


@dataclass(frozen=True, eq=False)
class Slice:
    """Positions [start, stop) of another stream, as they are in its epoch 0."""

    of: Stream
    start: int
    stop: int

    @property
    def total(self) -> int:
        return self.stop - self.start

    @property
    def pieces(self) -> Int64s:
        stops = np.cumsum(self.of.pieces)
        cut = np.clip(stops, self.start, self.stop)
        lengths: Int64s = np.diff(cut, prepend=self.start)
        return lengths[lengths > 0]

    def at(self, epoch: int) -> Walk:  # noqa: ARG002 - what `take` and `skip` part stays parted
        return _Offset(self.of.at(0), self.start)

    def shifted(self, by: int) -> Slice:
        return replace(self, of=self.of.shifted(by))

    def told(self) -> list[Any]:
        return ["slice", self.start, self.stop, self.of.told()]


@dataclass(frozen=True, eq=False)
class Sum:
    """Streams one after the other."""

    parts: tuple[Stream, ...]

    @property
    def total(self) -> int:
        return self._total

    @cached_property
    def _total(self) -> int:
        return sum(part.total for part in self.parts)

    @property
    def pieces(self) -> Int64s:
        return np.concatenate([part.pieces for part in self.parts])

    def at(self, epoch: int) -> Walk:
        stops = np.cumsum([part.total for part in self.parts])
        return _Joined(tuple(part.at(epoch) for part in self.parts), stops)

    def shifted(self, by: int) -> Sum:
        return Sum(tuple(part.shifted(by) for part in self.parts))

    def told(self) -> list[Any]:
        return ["sum", *(part.told() for part in self.parts)]


@dataclass(frozen=True, eq=False)
class Mixed:
    """Streams mixed by the schedule of `mix.py`. One that it comes to the end of begins again, in another order."""

    parts: tuple[Stream, ...]
    spec: MixSpec

    @property
    def total(self) -> int:
        return self._total

    @cached_property
    def _total(self) -> int:
        return Mix(self.spec).total

    @property
    def pieces(self) -> Int64s:
        return even_pieces(self.total)

    def at(self, epoch: int) -> Walk:
        return _MixedWalk(self.parts, Mix(self.spec, epoch), epoch)

    def shifted(self, by: int) -> Mixed:
        return replace(self, parts=tuple(part.shifted(by) for part in self.parts))

    def told(self) -> list[Any]:
        spec = self.spec
        weights = None if spec.weights is None else [float(one).hex() for one in spec.weights]
        lanes = None if spec.lanes is None else list(spec.lanes)
        return ["mix", weights, spec.seed, spec.stop, lanes, *(part.told() for part in self.parts)]


@dataclass(frozen=True, eq=False)
class Repeated:
    """A stream several times over, each time in another order if it is shuffled."""

    of: Stream
    times: int

    @property
    def total(self) -> int:
        return self.of.total * self.times

    @property
    def pieces(self) -> Int64s:
        return np.tile(self.of.pieces, self.times)

    def at(self, epoch: int) -> Walk:
        return _Passes(self.of, epoch)

    def shifted(self, by: int) -> Repeated:
        return replace(self, of=self.of.shifted(by))

    def told(self) -> list[Any]:
        return ["repeat", self.times, self.of.told()]


def even_pieces(total: int) -> Int64s:
    """Pieces of `PIECE` rows, the last one maybe shorter, for a stream in which neighbours do not lie together."""
    pieces = np.full(-(-total // PIECE), PIECE, dtype=np.int64)
    if total % PIECE:
        pieces[-1] = total % PIECE
    return pieces


def lanes_of(stream: Stream) -> int:
    """P, where the stream is dealt in lanes, so that a mix can leave its rows with the ranks that hold them; else 1."""
    return stream.spec.lanes if isinstance(stream, Shuffled) else 1


def slice_of(stream: Stream, start: int, stop: int) -> Stream:
    """Positions [start, stop) of `stream`, as far as there are any."""
    start = min(max(0, start), stream.total)
    stop = min(max(start, stop), stream.total)
    return stream if (start, stop) == (0, stream.total) else Slice(stream, start, stop)


def check_exact(rows: int, *, asked: bool) -> bool:
    """Whether so many rows are permuted exactly. Raises UsageError when that was asked for and takes too much."""
    if not asked:
        return rows <= EXACT_ROWS
    if rows * 8 > EXACT_BYTES:
        raise UsageError(
            f"an exact shuffle of {rows:,} rows would take {rows * 8 / (1 << 30):.1f} GiB of every process; leave out "
            'mode="exact" for one of bounded memory'
        )
    return True


# --- walks ---


@dataclass(frozen=True)
class _Shift:
    by: int

    def rows(self, positions: Int64s) -> Int64s:
        return positions + self.by if self.by else positions

    def open_shards(self, rank: int, world_size: int) -> int:  # noqa: ARG002
        return 1


@dataclass(frozen=True)
class _Chain:
    """First `outer`, then `inner` at the positions it says."""

    outer: EpochOrder
    inner: Walk

    def rows(self, positions: Int64s) -> Int64s:
        return self.inner.rows(self.outer.rows(positions))

    def open_shards(self, rank: int, world_size: int) -> int:
        return self.outer.open_shards(rank, world_size) * self.inner.open_shards(0, 1)


@dataclass(frozen=True)
class _Offset:
    of: Walk
    start: int

    def rows(self, positions: Int64s) -> Int64s:
        return self.of.rows(positions + self.start)

    def open_shards(self, rank: int, world_size: int) -> int:
        return self.of.open_shards(rank, world_size)


@dataclass(frozen=True)
class _Joined:
    parts: tuple[Walk, ...]
    stops: Int64s

    def rows(self, positions: Int64s) -> Int64s:
        which = np.searchsorted(self.stops, positions, side="right")
        found = np.empty_like(positions)
        for number in np.unique(which).tolist():
            here = which == number
            first = int(self.stops[number - 1]) if number else 0
            found[here] = self.parts[number].rows(positions[here] - first)
        return found

    def open_shards(self, rank: int, world_size: int) -> int:
        return max((part.open_shards(rank, world_size) for part in self.parts), default=1)


@dataclass(frozen=True)
class _Passes:
    """A stream's endless positions: pass k of it is epoch `epoch + k * PASS`."""

    of: Stream
    epoch: int
    _walks: dict[int, Walk] = field(default_factory=dict)
    """The passes that were asked for last; two at most, where one ends and the next begins."""

    def rows(self, positions: Int64s) -> Int64s:
        turns, inside = np.divmod(positions, self.of.total)
        found = np.empty_like(positions)
        for turn in np.unique(turns).tolist():
            here = turns == turn
            found[here] = self._walk(turn).rows(inside[here])
        return found

    def _walk(self, turn: int) -> Walk:
        walk = self._walks.get(turn)
        if walk is None:
            walk = self.of.at(self.epoch + turn * PASS)
            while len(self._walks) > 1:
                self._walks.pop(next(iter(self._walks)), None)
            self._walks[turn] = walk
        return walk

    def open_shards(self, rank: int, world_size: int) -> int:
        return self._walk(0).open_shards(rank, world_size)


class _MixedWalk:
    def __init__(self, parts: Sequence[Stream], mix: Mix, epoch: int) -> None:
        self._mix = mix
        self._parts = tuple(_Passes(part, epoch) for part in parts)

    def rows(self, positions: Int64s) -> Int64s:
        sources, inside = self._mix.at(positions)
        found = np.empty_like(positions)
        for number in np.unique(sources).tolist():
            here = sources == number
            found[here] = self._parts[number].rows(inside[here])
        return found

    def open_shards(self, rank: int, world_size: int) -> int:  # noqa: ARG002 - each rank meets all of each part
        return sum(part.open_shards(0, 1) for part in self._parts)
