"""Which bytes of a file are there: a set of byte ranges that never changes, only gives a bigger one. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ranges:
    """Half-open byte ranges, sorted, none empty, none touching another. `add` costs a copy of the tuples: O(ranges)."""

    _starts: tuple[int, ...] = ()
    _stops: tuple[int, ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> Ranges:
        """From (start, stop) pairs in any order, overlapping as they like; empty ones add nothing."""
        starts: list[int] = []
        stops: list[int] = []
        for start, stop in sorted(ranges):
            _check(start, stop)
            if start == stop:
                continue
            if stops and start <= stops[-1]:
                stops[-1] = max(stops[-1], stop)
            else:
                starts.append(start)
                stops.append(stop)
        return cls(tuple(starts), tuple(stops))

    def add(self, start: int, stop: int) -> Ranges:
        """These and [start, stop)."""
        _check(start, stop)
        if start == stop:
            return self
        first = bisect_left(self._stops, start)  # the first range that ends at or behind `start`: it touches
        last = bisect_right(self._starts, stop)  # the first range that begins behind `stop`: it does not
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        return Ranges(
            (*self._starts[:first], start, *self._starts[last:]), (*self._stops[:first], stop, *self._stops[last:])
        )

    def missing(self, size: int) -> tuple[tuple[int, int], ...]:
        """What of [0, size) is not covered, in order."""
        return self.gaps(0, size)

    def gaps(self, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """What of [start, stop) is not covered, in order."""
        _check(start, stop)
        found = []
        at = start
        for number in range(bisect_right(self._stops, start), len(self._starts)):
            if self._starts[number] >= stop:
                break
            if at < self._starts[number]:
                found.append((at, self._starts[number]))
            at = self._stops[number]
        if at < stop:
            found.append((at, stop))
        return tuple(found)

    @property
    def size(self) -> int:
        """Bytes covered."""
        return sum(self._stops) - sum(self._starts)

    @property
    def frontier(self) -> int:
        """How far the file is whole from its beginning, in bytes."""
        return self._stops[0] if self._starts[:1] == (0,) else 0

    def covers(self, start: int, stop: int) -> bool:
        """True if every byte of [start, stop) is there; an empty range always is."""
        _check(start, stop)
        at = bisect_right(self._starts, start) - 1
        return start == stop or (at >= 0 and stop <= self._stops[at])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._stops, strict=True))

    def __len__(self) -> int:
        return len(self._starts)


def _check(start: int, stop: int) -> None:
    if not 0 <= start <= stop:
        raise ValueError(f"a range needs 0 <= start <= stop, got [{start}, {stop})")
