"""Parquet row groups as record batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from crucible.errors import CorruptFile, UsageError
from crucible.formats.plain import plain_batch, plain_schema
from crucible.refs import ReadOptions

BATCH_BYTES = 16 << 20
"""Uncompressed bytes a batch aims for; a row group may be gigabytes."""
_MOST_ROWS = 1 << 16
_BUFFER = 1 << 20


def read_parquet(path: Path, name: str, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    """All rows, or those of the row groups [start, stop) when `options` has the param `row_groups`."""
    try:
        # pre_buffer would hold all chunks of a row group at once
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise CorruptFile(name, "the footer", f"not a parquet file ({first_line(error)})") from error
    with file:
        columns = _columns(file, name, options)
        start, stop = options.param("row_groups", (0, file.num_row_groups))
        rows = 0
        for group in range(start, min(stop, file.num_row_groups)):
            for batch in _row_group(file, name, group, columns):
                rows += batch.num_rows
                yield batch
        if not rows:
            schema = plain_schema(file.schema_arrow)
            yield (
                pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)
                if columns is None
                else pa.RecordBatch.from_pylist([], schema=schema).select(columns)
            )


def _columns(file: pq.ParquetFile, name: str, options: ReadOptions) -> list[str] | None:
    if options.columns is None:
        return None
    there = file.schema_arrow.names
    for column in options.columns:
        if column not in there:
            raise UsageError(f"{name} has no column {column!r}; there are: {', '.join(there)}")
    return list(options.columns)


def _row_group(file: pq.ParquetFile, name: str, group: int, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    described = file.metadata.row_group(group)
    if not described.num_rows:
        return
    row_bytes = max(1, described.total_byte_size // described.num_rows)
    size = max(1, min(_MOST_ROWS, BATCH_BYTES // row_bytes))
    rows = 0
    try:
        for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=columns, use_threads=False):
            batch.validate()
            rows += batch.num_rows
            yield plain_batch(batch)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise CorruptFile(name, f"row group {group}, after row {rows:,}", first_line(error)) from error
    if rows != described.num_rows:
        raise CorruptFile(name, f"row group {group}", f"has {rows:,} rows, its footer says {described.num_rows:,}")


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
