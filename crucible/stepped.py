"""Rows of a block through the functions of the user's, turn by turn: one where they see single rows, else what they see
together.

Functions are called when their turn is due and not before, however far rows are read ahead: one that is slow would hold
up the loop for thousands of rows at once, what it makes may be much bigger than what it was given, and where it raises
the loop has had all rows before. Media are decoded ahead all the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from crucible.errors import UsageError
from crucible.order import Int64s
from crucible.output import SKIPPED, OnBad, Output
from crucible.steps import Filter, LeftOut, Map, Place, Row, Rows, Step, merged, run_one, run_steps

_FRONT_ROWS = 128
"""Rows that filters in front are asked about at a time: they see a few columns, and what they leave out is not read."""


class Rated(NamedTuple):
    """Rows of a block that go through steps of their own."""

    steps: Sequence[Step]
    table: pa.Table
    places: Int64s
    """Where in the block each row stands, in ascending order."""
    output: Callable[[pa.Schema], Output]
    """What makes Python objects of these columns."""


class Turn(NamedTuple):
    """Places [start, stop) of a block, and what became of them; owners are places in the block."""

    start: int
    stop: int
    made: Rows


class Told(NamedTuple):
    """Whom a block's steps tell what becomes of rows, by their place in the block."""

    place: Place
    bad: OnBad
    left_out: LeftOut | None


def turns(parts: Sequence[Rated], last: Sequence[Step] | None, length: int, unit: int, told: Told) -> Iterator[Turn]:
    """What becomes of a block of `length` rows: each of `parts` through its steps, then all together through `last`.

    In units of `unit` rows; of 0, by the row, or by as many as a batched function wants.
    """
    span = unit or together([step for part in parts for step in part.steps] + list(last or ()))
    lines = [(rest, _Line(rows)) for rest, rows in (_line(part, unit, told) for part in parts)]
    for start in range(0, length, span):
        stop = min(length, start + span)
        made = [run_steps(rest, rows.until(stop), unit, told.place, told.left_out) for rest, rows in lines]
        whole = made[0] if last is None else run_steps(last, merged(made), unit, told.place, told.left_out)
        yield Turn(start, stop, whole)


def together(steps: Sequence[Step]) -> int:
    """How many rows functions see at a time, at most."""
    return max((step.call.batch or 1 for step in steps if isinstance(step, (Map, Filter))), default=1)


def one_by_one(part: Rated, told: Told) -> Iterator[tuple[int, Row]]:
    """`turns` for one part whose steps are all of single rows: (place, row) of what is left."""
    steps, rows = _line(part, 0, told)
    place, left_out = told.place, told.left_out
    for owner, row in rows:
        made = run_one(steps, row, owner, place, left_out)
        if made is not None:
            yield owner, made


class _Line:
    """Rows with their owners, of which those up to a place can be had."""

    def __init__(self, rows: Iterator[tuple[int, Row]]) -> None:
        self._rows = rows
        self._next = next(rows, None)

    def until(self, stop: int) -> Rows:
        rows: list[Row] = []
        owners: list[int] = []
        while self._next is not None and self._next[0] < stop:
            owners.append(self._next[0])
            rows.append(self._next[1])
            self._next = next(self._rows, None)
        return Rows(rows, owners)


def _line(part: Rated, unit: int, told: Told) -> tuple[Sequence[Step], Iterator[tuple[int, Row]]]:
    """The steps that are left, and the rows they are for, as Python objects.

    Filters in front that name their columns see nothing else, so what they leave out is never decoded.
    """
    count = 0
    while count < len(part.steps) and isinstance(step := part.steps[count], Filter) and step.call.columns is not None:
        count += 1
    front = [step for step in part.steps[:count] if isinstance(step, Filter)]
    return part.steps[count:], _rows(part, front, unit, told)


def _rows(part: Rated, front: Sequence[Filter], unit: int, told: Told) -> Iterator[tuple[int, Row]]:
    owners: deque[int] = deque()

    def tables() -> Iterator[tuple[pa.Table, OnBad]]:
        for table, places in _passed(part, front, unit, told) if front else [(part.table, part.places)]:
            owners.extend(places.tolist())
            yield table, partial(_bad_at, told.bad, places)

    for row in part.output(part.table.schema).stream_rows(tables()):
        owner = owners.popleft()
        if row is not SKIPPED:
            yield owner, row


def _passed(part: Rated, front: Sequence[Filter], unit: int, told: Told) -> Iterator[tuple[pa.Table, Int64s]]:
    """What the filters in front let pass, some rows at a time, which never end inside of a unit."""
    size = max(_FRONT_ROWS, *(step.call.batch or 1 for step in front))
    size = -(-size // max(1, unit)) * max(1, unit)
    stops = np.searchsorted(part.places, np.arange(size, int(part.places[-1]) + size + 1, size))
    start = 0
    for stop in stops.tolist():
        table, places = part.table.slice(start, stop - start), part.places[start:stop]
        start = stop
        for step in front:
            names = list(dict.fromkeys(step.call.columns or ()))
            missing = [name for name in names if name not in table.column_names]
            if missing:
                raise UsageError(f"filter: no column {missing[0]!r}; there are: {', '.join(table.column_names)}")
            shown = table.select(names)
            seen = part.output(shown.schema).rows(shown, partial(_bad_at, told.bad, places))
            asked = [(row, owner) for row, owner in zip(seen, places.tolist()) if row is not SKIPPED]
            given = Rows([row for row, _ in asked], [owner for _, owner in asked])
            kept = np.flatnonzero(np.isin(places, run_steps([step], given, unit, told.place, told.left_out).owners))
            if len(kept) < len(places):
                table, places = table.take(pa.array(kept)), places[kept]
        if len(places):
            yield table, places


def _bad_at(bad: OnBad, places: Int64s, number: int, error: Any) -> None:
    bad(int(places[number]), error)
