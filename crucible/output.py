"""What a reader hands out: a table of rows as dicts, numpy arrays, tensors, or as it is. No I/O.

Types follow `datasets` (`crucible.tensors`). Images are decoded to PIL for Python and to arrays otherwise, by the
threads of `crucible.threads`, ahead of whoever consumes the rows.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from crucible.decode import Decoder
from crucible.errors import CorruptFile, UsageError
from crucible.images import Claim, unbounded
from crucible.tensors import maker
from crucible.threads import Job, loader_workers, process_pool

Format = Literal["python", "numpy", "arrow", "torch", "jax"]
Row = dict[str, Any]

_ROWS = 100
"""Rows turned into Python objects at once. Profiled on chat rows, medians of nine interleaved runs: 32 at a time give
494k rows/s, 64 to 128 give 565k, 250 419k, 1,000 320k, because so many containers alive at once set off Python's
older-generation collections again and again. (Zipping columns instead of `to_pylist` was tried: no faster.)"""


def check_format(name: str | None) -> Format:
    """None means Python objects. Raises UsageError for a format crucible does not have."""
    if name is None or name == "python":
        return "python"
    if name in ("numpy", "arrow", "torch", "jax"):
        return name  # type: ignore[return-value]
    raise UsageError(f"no format {name!r}; there are None, 'numpy', 'arrow', 'torch' and 'jax'")


_JOB_BYTES = 32 << 10
"""Bytes of media that one job decodes: several small images, as handing over a job costs what decoding 1 KB does."""

_JOB_ROWS = 32
_WORTH_THREADS = 4
"""Rows of a table by itself for which threads are started: starting them costs what decoding one image does."""
_PART_BYTES = 4 << 20
"""Media turned into Python objects at once."""


class _Skipped:
    """Stands for a row that was left out, and is passed to nobody."""


SKIPPED = _Skipped()

OnBad = Callable[[int, CorruptFile], None]
"""Told the number in the table of a row that cannot be decoded, and why. It raises, or the row is left out."""


def shifted(bad: OnBad, first: int) -> OnBad:
    """`bad` for a table that begins with row `first` of the one it knows."""
    return lambda row, error: bad(first + row, error)


def _raise(_row: int, error: CorruptFile) -> None:
    raise error


class _Part(NamedTuple):
    """Some rows of a table."""

    table: pa.Table
    start: int
    """Number of the first one in the table that `bad` knows."""
    bad: OnBad
    group: int
    """Rows that are worth a job of their own."""
    ends: bool
    """Whether its table ends with it."""


Decoded = list[Row | CorruptFile]
"""The decoded columns of each row, or why they are not."""


class Output:
    """Rows and batches of tables in one format. `decode` is `crucible.decode.decoder`'s, or None.

    Raises UsageError if the format's library is not installed.
    """

    def __init__(self, format_: Format, decode: Decoder | None) -> None:
        self._format = format_
        self._decode = decode
        self._maker = None if format_ in ("python", "arrow") else maker(format_)

    def rows(self, table: pa.Table, bad: OnBad = _raise) -> Iterator[Any]:
        """Row by row; SKIPPED in the place of one that `bad` let pass."""
        return self._rows([(table, bad)], ahead=table.num_rows >= _WORTH_THREADS)

    def batch(self, table: pa.Table, bad: OnBad = _raise) -> Any:
        """All rows as one dict of columns, or as the table itself; SKIPPED if `bad` let all of them pass."""
        return next(self._batches([(table, bad)], ahead=table.num_rows >= _WORTH_THREADS))

    def stream_rows(self, tables: Iterable[tuple[pa.Table, OnBad]]) -> Iterator[Any]:
        """`rows` of one table after the other. Media of the next ones are decoded before they are asked for."""
        return self._rows(tables, ahead=True)

    def stream_batches(self, tables: Iterable[tuple[pa.Table, OnBad]]) -> Iterator[Any]:
        """`batch` of one table after the other. Media of the next ones are decoded before they are asked for."""
        return self._batches(tables, ahead=True)

    def _rows(self, tables: Iterable[tuple[pa.Table, OnBad]], *, ahead: bool) -> Iterator[Any]:
        for part, decoded in self._parts(tables, _ROWS, ahead=ahead):
            if self._format == "arrow":
                yield from (_sendable(part.table.slice(row, 1)) for row in range(part.table.num_rows))
            elif decoded is None:
                yield from self._plain(part.table)
            else:
                yield from self._merged(part, decoded)

    def _batches(self, tables: Iterable[tuple[pa.Table, OnBad]], *, ahead: bool) -> Iterator[Any]:
        held: list[tuple[_Part, Decoded]] = []
        for part, decoded in self._parts(tables, None, ahead=ahead):
            if self._format == "arrow":
                yield _sendable(part.table)
            elif decoded is None:
                yield {name: self._column(part.table.column(name)) for name in part.table.column_names}
            else:
                held.append((part, decoded))
                if part.ends:
                    yield self._joined(held)
                    held = []

    def collate(self, columns: Mapping[str, Sequence[Any]]) -> Any:
        """A batch of values that are decoded already, such as functions of the user's return: lists of one length."""
        if self._format == "arrow":
            return pa.table({name: pa.array(values) for name, values in columns.items()})
        if self._maker is None:
            return {name: list(values) for name, values in columns.items()}
        return {name: self._maker.collated(values) for name, values in columns.items()}

    def finish(self, row: Row) -> Any:
        """`collate` for one row."""
        if self._format == "python":
            return row
        if self._maker is None:
            return pa.table({name: pa.array([value]) for name, value in row.items()})
        return {name: self._maker.value(self._maker.unpacked(value)) for name, value in row.items()}

    # --- without anything to decode ---

    def _plain(self, table: pa.Table) -> Iterator[Row]:
        names = table.column_names
        if self._maker is None:
            yield from table.to_pylist() if names else ({} for _ in range(table.num_rows))
        elif names:
            for values in zip(*(self._maker.rows(table.column(name)) for name in names)):
                yield dict(zip(names, values))
        else:
            yield from ({} for _ in range(table.num_rows))

    def _column(self, column: pa.ChunkedArray) -> Any:
        if self._maker is not None:
            return self._maker.column(column)
        with _collected_later():
            return column.to_pylist()

    # --- with something to decode ---

    def _parts(
        self, tables: Iterable[tuple[pa.Table, OnBad]], most_rows: int | None, *, ahead: bool
    ) -> Iterator[tuple[_Part, Decoded | None]]:
        """All rows of `tables` in parts of at most `most_rows`, with what was decoded, if there is anything to."""
        cut = (part for table, bad in tables for part in self._cut(table, bad, most_rows))
        if self._decode is None or self._format == "arrow":
            yield from ((part, None) for part in cut)
            return
        begun: deque[tuple[_Part, int]] = deque()
        """Parts whose jobs were given, and how many those are."""

        def jobs() -> Iterator[Job[Decoded]]:
            for part in cut:
                made = self._jobs(part)
                begun.append((part, len(made)))
                yield from made

        decoded: Decoded = []
        done = 0
        threaded = ahead and self._decode.media
        for rows in process_pool().in_order(jobs()) if threaded else (job(unbounded) for job in jobs()):
            decoded += rows
            done += 1
            if done == begun[0][1]:
                yield begun.popleft()[0], decoded
                decoded, done = [], 0

    def _cut(self, table: pa.Table, bad: OnBad, most_rows: int | None) -> Iterator[_Part]:
        rows, step, group = table.num_rows, most_rows or max(1, table.num_rows), 1
        if self._decode is not None and self._format != "arrow":
            row_bytes = max(1, table.nbytes // max(1, rows))
            step = min(step, _ROWS, max(1, _PART_BYTES // row_bytes))
            group = min(_JOB_ROWS, max(1, _JOB_BYTES // row_bytes))
        for start in range(0, max(1, rows), step):
            yield _Part(table.slice(start, step), start, bad, group, start + step >= rows)

    def _jobs(self, part: _Part) -> list[Job[Decoded]]:
        assert self._decode is not None
        names = [name for name in part.table.column_names if name in self._decode.columns]
        rows = part.table.select(names).to_pylist()
        starts = range(0, max(1, len(rows)), part.group)
        return [partial(self._decode_rows, rows[start : start + part.group]) for start in starts]

    def _decode_rows(self, rows: list[Row], claim: Claim) -> Decoded:
        """In any thread."""
        assert self._decode is not None
        made: Decoded = []
        for row in rows:
            try:
                decoded = self._decode(row, claim)
                made.append(decoded if self._maker is None else self._maker.unpacked(decoded))
            except CorruptFile as error:
                made.append(error)
        return made

    def _merged(self, part: _Part, decoded: Decoded) -> Iterator[Any]:
        """The rows of a part."""
        names, own = part.table.column_names, self._others(part.table)
        for number, (others, row) in enumerate(zip(self._plain(own), decoded), part.start):
            if isinstance(row, CorruptFile):
                part.bad(number, row)
                yield SKIPPED
            elif self._maker is None:
                yield {name: row[name] if name in row else others[name] for name in names}
            else:
                yield {name: self._maker.value(row[name]) if name in row else others[name] for name in names}

    def _joined(self, parts: list[tuple[_Part, Decoded]]) -> Any:
        """The batch that these parts are the rows of."""
        rows: list[Row] = []
        kept: list[int] = []
        for part, decoded in parts:
            for number, row in enumerate(decoded, part.start):
                if isinstance(row, CorruptFile):
                    part.bad(number, row)
                else:
                    rows.append(row)
                    kept.append(number)
        table = pa.concat_tables([part.table for part, _ in parts])
        if table.num_rows and not rows:
            return SKIPPED
        if len(rows) < table.num_rows:
            table = table.take(pa.array(kept, pa.int64()))
        others = {name: self._column(table.column(name)) for name in self._others(table).column_names}
        values = self._maker.values if self._maker is not None else list
        return {
            name: others[name] if name in others else values([row[name] for row in rows]) for name in table.column_names
        }

    def _others(self, table: pa.Table) -> pa.Table:
        """The columns that are not decoded."""
        assert self._decode is not None
        return table.select([name for name in table.column_names if name not in self._decode.columns])


def _sendable(table: pa.Table) -> pa.Table:
    """In a DataLoader worker, the table in memory of its own: pickled, a slice takes along what it is a slice of."""
    if loader_workers() is None:
        return table
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


@contextmanager
def _collected_later() -> Iterator[None]:
    """Without Python's collector, which has nothing to find here and looks through all of it again and again."""
    enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if enabled:
            gc.enable()
