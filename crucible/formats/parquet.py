"""Parquet row groups as record batches of bounded size, several of them decoded at once.

Decoding is what a parquet ingest costs, so the row groups of one file are shared by threads, each with a file of its
own. Where a row group is too big for that, its columns are. The batches are the same for any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

import pyarrow as pa
import pyarrow.parquet as pq

from crucible.errors import CorruptFile, UsageError
from crucible.formats.ahead import streams_in_order
from crucible.formats.filters import RowFilter
from crucible.formats.limits import Limits
from crucible.formats.plain import plain_pieces, plain_schema
from crucible.formats.steps import Steps
from crucible.formats.streams import refuse_packed
from crucible.refs import ReadOptions

BATCH_BYTES = 16 << 20
"""Most that a batch aims for; a row group may be gigabytes."""
_BUFFER = 1 << 16
"""For each column that is being read. A megabyte was no faster, and 200 columns have 200 of them."""
_PAGE = 1 << 20
"""Writers aim for pages of this size; a column's page is in memory packed and unpacked."""
_AT_ONCE = 192 << 20
"""What all threads of one file may hold, by what its footer says of its row groups."""
_SHARE = 4 << 20
"""Uncompressed bytes that are worth a turn of a thread: smaller row groups share one."""


def read_parquet(
    path: Path, name: str, options: ReadOptions, threads: int = 1, limits: Limits | None = None
) -> Iterator[pa.RecordBatch]:
    """All rows, or those of the row groups [start, stop) when `options` has the param `row_groups`.

    Of the params `columns` chooses columns, in the file's order, and `filters` rows. Raises UsageError for a column
    that is not there, and for filters that do not fit the columns.
    """
    with ExitStack() as stack:
        file = stack.enter_context(_open(path, name))
        columns = _columns(file, name, options)
        chosen = RowFilter(options.param("filters"), file.schema_arrow, name, columns)
        start, stop = options.param("row_groups", (0, file.num_row_groups))
        groups = range(start, min(stop, file.num_row_groups))
        threads = _affordable(file.metadata, groups, threads)
        shares = list(_shares(file.metadata, groups))
        idle: SimpleQueue[pq.ParquetFile] = SimpleQueue()
        idle.put(file)

        def decode(share: range) -> Iterator[pa.RecordBatch]:
            try:
                mine = idle.get_nowait()
            except Empty:
                mine = stack.enter_context(_open(path, name, file.metadata))
            by_column = threads > 1 and len(shares) < threads
            for group in share:
                steps = partial(Steps, mine, path, name, group, chosen.columns, limits or Limits())
                yield from _row_group(mine, name, group, chosen, steps, by_column=by_column)
            idle.put(mine)

        works: list[Callable[[], Iterator[pa.RecordBatch]]] = [partial(decode, share) for share in shares]
        rows = 0
        for batch in streams_in_order(works, min(threads, len(works)), lambda batch: batch.nbytes):
            rows += batch.num_rows
            yield batch
        if not rows:
            schema = plain_schema(file.schema_arrow)
            yield (
                pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)
                if columns is None
                else pa.RecordBatch.from_pylist([], schema=schema).select(columns)
            )


def _open(path: Path, name: str, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    try:
        # pre_buffer would hold all chunks of a row group at once
        return pq.ParquetFile(path, metadata=metadata, pre_buffer=False, buffer_size=_BUFFER)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        refuse_packed(path, name, "parquet")
        raise CorruptFile(name, "the footer", f"not a parquet file ({first_line(error)})") from error


def _affordable(metadata: pq.FileMetaData, groups: range, threads: int) -> int:
    """At most `threads`, and no more than `_AT_ONCE` allows: wide row groups and long rows are big in each of them."""
    most = 0
    for group in groups if threads > 1 else ():
        described = metadata.row_group(group)
        size = described.total_byte_size
        rows = BATCH_BYTES + size // max(1, described.num_rows)  # what is ready, and what is being made
        pages = 2 * _PAGE * described.num_columns  # no look at `column(n)`: on a damaged footer it ends the process
        most = max(most, 2 * min(size, rows) + min(2 * size, pages))
    return max(1, min(threads, _AT_ONCE // max(1, most)))


def _shares(metadata: pq.FileMetaData, groups: range) -> Iterator[range]:
    """Neighbouring row groups that are decoded in one turn."""
    start, size = groups.start, 0
    for group in groups:
        size += metadata.row_group(group).total_byte_size
        if size >= _SHARE:
            yield range(start, group + 1)
            start, size = group + 1, 0
    if start < groups.stop:
        yield range(start, groups.stop)


def _columns(file: pq.ParquetFile, name: str, options: ReadOptions) -> list[str] | None:
    there, listed = file.schema_arrow.names, options.param("columns")
    for column in options.columns or listed or ():
        if column not in there:
            raise UsageError(f"{name} has no column {column!r}; there are: {', '.join(there)}")
    if options.columns is not None:
        return list(options.columns)
    return None if listed is None else [column for column in there if column in listed]


def _row_group(
    file: pq.ParquetFile,
    name: str,
    group: int,
    chosen: RowFilter,
    steps_of: Callable[[], Steps],
    *,
    by_column: bool,
) -> Iterator[pa.RecordBatch]:
    described = file.metadata.row_group(group)
    if not described.num_rows:
        return
    rows = 0
    try:
        steps = steps_of()
        reader = file.reader
        for batch in file.iter_batches(steps.rows, row_groups=[group], columns=chosen.columns, use_threads=by_column):
            batch.validate(full=True)  # text that is not UTF-8 would only be met by whoever asks for the row
            rows += batch.num_rows
            kept, size = chosen(batch), 0
            for piece in plain_pieces(kept, BATCH_BYTES):
                size += piece.nbytes
                yield piece
            reader.set_batch_size(steps.after(batch.num_rows, max(size, batch.nbytes - kept.nbytes)))
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise CorruptFile(name, f"row group {group}, after row {rows:,}", first_line(error)) from error
    if rows != described.num_rows:
        raise CorruptFile(name, f"row group {group}", f"has {rows:,} rows, its footer says {described.num_rows:,}")


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
