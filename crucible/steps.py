"""What happens to rows after they were read: functions of the user's, and columns chosen or renamed after them.

A step sees rows as Python dicts (or as the format had them when the first step was added). Each row carries its owner,
the number of the position it came from: a filter leaves out rows and a batched map may make other numbers of them, but
where a reader is, and so its state, is told in positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from crucible.errors import UsageError

Row = dict[str, Any]
LeftOut = Callable[[Iterable[int]], None]


class Place(Protocol):
    """What owners stand for."""

    def index(self, owner: int) -> int:
        """The row's number in its split."""
        ...

    def said(self, owners: Sequence[int]) -> str:
        """Which rows these are, in words, and where they come from."""
        ...


class Rows(NamedTuple):
    """Rows in order, each with its owner: a number that never falls from one row to the next."""

    rows: list[Row]
    owners: list[int]


@dataclass(frozen=True)
class Call:
    """A function of the user's and what it is called with."""

    function: Callable[..., Any]
    columns: tuple[str, ...] | None = None
    """Its positional arguments, each a column; None: one argument, the row or the batch."""
    keywords: Mapping[str, Any] = field(default_factory=dict)
    batch: int | None = None
    """It is given dicts of lists of at most so many rows; None: a row at a time."""
    indices: bool = False
    """It is told the row's number in its split too, or those of the rows, after its other positional arguments."""

    def __call__(self, given: Mapping[str, Any], owners: Sequence[int], place: Place) -> Any:
        arguments: list[Any] = [given] if self.columns is None else [self.column(given, name) for name in self.columns]
        if self.indices:
            numbers = [place.index(owner) for owner in owners]
            arguments.append(numbers[0] if self.batch is None else numbers)
        return self.function(*arguments, **self.keywords)

    @staticmethod
    def column(given: Mapping[str, Any], name: str) -> Any:
        if name not in given:
            raise UsageError(f"no column {name!r} for the function to read; the row has: {', '.join(given)}")
        return given[name]

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


@dataclass(frozen=True)
class Map:
    """What the function returns is added to the row, over what has the same name."""

    call: Call
    remove: tuple[str, ...] = ()
    """Columns of the row that go; a column that the function returns stays, whatever its name."""

    def apply(self, given: Rows, unit: int, place: Place) -> Rows:
        if self.call.batch is not None:
            return _joined(self._batch(part, place) for part in batches(given, self.call.batch, unit))
        return Rows([self.one(row, owner, place) for row, owner in zip(given.rows, given.owners)], given.owners)

    def one(self, row: Row, owner: int, place: Place) -> Row:
        try:
            made = self.call(row, (owner,), place)
        except Exception as error:
            _note(error, "map", self.call, (owner,), place)
            raise
        if made is not None and not isinstance(made, Mapping):
            raise UsageError(f"map: {self.call.name} has to return a dict (or None), and returned {_kind(made)}")
        kept = {name: value for name, value in row.items() if name not in self.remove}
        return {**kept, **(made or {})}

    def _batch(self, given: Rows, place: Place) -> Rows:
        columns = as_columns(given.rows)
        try:
            made = self.call(columns, given.owners, place)
        except Exception as error:
            _note(error, "map", self.call, given.owners, place)
            raise
        if made is not None and not isinstance(made, Mapping):
            raise UsageError(f"map: {self.call.name} has to return a dict of lists, and returned {_kind(made)}")
        made = made or {}
        kept = {name: values for name, values in columns.items() if name not in self.remove and name not in made}
        lengths = {name: len(values) for name, values in (*kept.items(), *made.items())}
        counts = {len(values) for values in made.values()} or {len(given.rows)}
        if len(counts) > 1 or (kept and counts != {len(given.rows)}):
            raise UsageError(
                f"map: {self.call.name} made columns of other lengths than the {len(given.rows)} rows it got "
                f"({lengths}); a function that changes the number of rows needs remove_columns for those that stay"
            )
        count = counts.pop()
        owners = given.owners if count == len(given.rows) else [given.owners[0]] * count if given.owners else []
        columns = {**kept, **made}
        names = list(columns)
        return Rows([dict(zip(names, values)) for values in zip(*columns.values())] if names else [], owners)


@dataclass(frozen=True)
class Filter:
    """Rows for which the function says no are left out."""

    call: Call

    def apply(self, given: Rows, unit: int, place: Place) -> Rows:
        if self.call.batch is not None:
            return _joined(self._batch(part, place) for part in batches(given, self.call.batch, unit))
        return _kept(given, [self.one(row, owner, place) is not None for row, owner in zip(given.rows, given.owners)])

    def one(self, row: Row, owner: int, place: Place) -> Row | None:
        try:
            return row if self.call(row, (owner,), place) else None
        except Exception as error:
            _note(error, "filter", self.call, (owner,), place)
            raise

    def _batch(self, given: Rows, place: Place) -> Rows:
        try:
            said = list(self.call(as_columns(given.rows), given.owners, place))
        except Exception as error:
            _note(error, "filter", self.call, given.owners, place)
            raise
        if len(said) != len(given.rows):
            raise UsageError(f"filter: {self.call.name} got {len(given.rows)} rows and answered for {len(said)}")
        return _kept(given, [bool(one) for one in said])


@dataclass(frozen=True)
class Pick:
    """These columns, in this order, under these names. `{old: new}`."""

    columns: Mapping[str, str]

    def apply(self, given: Rows, unit: int, place: Place) -> Rows:  # noqa: ARG002
        return Rows([self.one(row) for row in given.rows], given.owners)

    def one(self, row: Row, *_: Any) -> Row:
        return {new: Call.column(row, old) for old, new in self.columns.items()}


@dataclass(frozen=True)
class Rename:
    """Other names, `{old: new}`, or none (`{old: None}`: the column goes); the other columns stay as they are."""

    columns: Mapping[str, str | None]

    def apply(self, given: Rows, unit: int, place: Place) -> Rows:  # noqa: ARG002
        return Rows([self.one(row) for row in given.rows], given.owners)

    def one(self, row: Row, *_: Any) -> Row:
        for old in self.columns:
            Call.column(row, old)
        named = {name: self.columns.get(name, name) for name in row}
        return {new: row[old] for old, new in named.items() if new is not None}


Step = Map | Filter | Pick | Rename


def keeps_rows(steps: Sequence[Step]) -> bool:
    """True when these steps give one row for each row, as far as can be said without calling anything."""
    return all(isinstance(step, (Pick, Rename)) or (isinstance(step, Map) and not step.call.batch) for step in steps)


def columns_after(names: Sequence[str] | None, steps: Sequence[Step]) -> dict[str, str | None] | None:
    """Shown name to the name among `names` that it had before, which is None if a function may have made it.

    None altogether after a `Map`, whose columns nobody knows before it is called, and when `names` are not known.
    """
    known: dict[str, str | None] | None = None if names is None else {name: name for name in names}
    for step in steps:
        if isinstance(step, Map):
            known = None
        elif isinstance(step, Pick):
            known = {new: None if known is None else known[old] for old, new in step.columns.items()}
        elif isinstance(step, Rename) and known is not None:
            renamed = {step.columns.get(name, name): source for name, source in known.items()}
            known = {name: source for name, source in renamed.items() if name is not None}
    return known


def run_steps(steps: Sequence[Step], given: Rows, unit: int, place: Place, left_out: LeftOut | None = None) -> Rows:
    """The rows after all steps. Rows are batched inside units of `unit` owners (0: over them, for rows one by one).

    `left_out` is told the owners of which a filter let nothing pass.

    Raises what a function raises, with a note of which row it was, and UsageError for what one should not return.
    """
    for step in steps:
        count, before = len(given.rows), given.owners
        given = step.apply(given, unit, place)
        if left_out is not None and isinstance(step, Filter) and len(given.rows) != count:
            left_out(set(before) - set(given.owners))
        if not unit and isinstance(step, Map) and len(given.rows) != count:
            raise UsageError(
                f"map: {step.call.name} got {count} rows and made {len(given.rows)}; read such a dataset in batches "
                "(`.batch(n)`: the rows made of n), so that its position can be told"
            )
    return given


def run_one(steps: Sequence[Step], row: Row, owner: int, place: Place, left_out: LeftOut | None = None) -> Row | None:
    """`run_steps` for one row and steps of which none is batched; None when a filter left it out."""
    made: Row | None = row
    for step in steps:
        made = step.one(row, owner, place)
        if made is None:
            if left_out is not None:
                left_out((owner,))
            return None
        row = made
    return made


def batches(given: Rows, size: int, unit: int) -> Iterator[Rows]:
    """Runs of at most `size` rows that do not reach over the end of a unit."""
    start = 0
    while start < len(given.rows):
        stop = min(len(given.rows), start + size)
        if unit:
            here = given.owners[start] // unit
            while given.owners[stop - 1] // unit != here:
                stop -= 1
        yield Rows(given.rows[start:stop], given.owners[start:stop])
        start = stop


def merged(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts in the order of their owners."""
    owners = [owner for part in parts for owner in part.owners]
    rows = [row for part in parts for row in part.rows]
    order = sorted(range(len(rows)), key=owners.__getitem__)  # stable: rows of one owner stay in their order
    return Rows([rows[place] for place in order], [owners[place] for place in order])


def as_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Rows as a dict of lists; a row that lacks a column has None there."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _note(error: Exception, what: str, call: Call, owners: Sequence[int], place: Place) -> None:
    error.add_note(f"in {what}({call.name}) of {place.said(owners)}")


def _kept(given: Rows, keep: Sequence[bool]) -> Rows:
    chosen = [number for number, kept in enumerate(keep) if kept]
    return Rows([given.rows[number] for number in chosen], [given.owners[number] for number in chosen])


def _joined(parts: Iterator[Rows]) -> Rows:
    rows: list[Row] = []
    owners: list[int] = []
    for part in parts:
        rows += part.rows
        owners += part.owners
    return Rows(rows, owners)


def _kind(value: object) -> str:
    return f"{type(value).__name__} ({str(value)[:60]})"
