"""Rows of one source file as record batches. The one entrance to the readers, one of which there is for each builder.

Batch boundaries depend on the file and the options alone. A file is read to its end or an error is raised: CorruptFile
names the file and the row or byte. Memory holds one batch, not one file or row group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from crucible.errors import UnsupportedFormat, UsageError
from crucible.formats.arrow import read_arrow
from crucible.formats.csv import read_csv
from crucible.formats.json import read_json
from crucible.formats.limits import Limits
from crucible.formats.parquet import read_parquet
from crucible.formats.text import read_text
from crucible.formats.webdataset import read_webdataset
from crucible.refs import ReadOptions

Reader = Callable[[Path, str, ReadOptions], Iterator[pa.RecordBatch]]

READERS: dict[str, Callable[..., Iterator[pa.RecordBatch]]] = {
    "arrow": read_arrow,
    "csv": read_csv,
    "json": read_json,
    "parquet": read_parquet,
    "text": read_text,
    "webdataset": read_webdataset,
}

SHARED = frozenset(("json", "parquet"))
"""Those that can use several threads for one file."""
BOUNDED = frozenset(("csv", "json", "parquet", "text", "webdataset"))
"""Those that may find more in a row, or in what is read with it, than fits into memory."""


def read_file(
    path: Path, name: str, options: ReadOptions, threads: int = 1, limits: Limits | None = None
) -> Iterator[pa.RecordBatch]:
    """The file's rows in order. `name` is what errors call it: its path in the repo.

    The batches are the same for any number of `threads`. A row bigger than `limits` has it raises CorruptFile.

    A file that has columns but no rows gives one batch of no rows, so that its schema is known. With `options.columns`
    only those, in that order; one that is missing raises UsageError naming the ones there are.
    """
    if options.builder not in READERS:
        raise UnsupportedFormat(f"{name} ({options.builder})", tuple(READERS))
    more: dict[str, Any] = {"threads": threads} if options.builder in SHARED else {}
    if options.builder in BOUNDED:
        more["limits"] = limits
    for batch in READERS[options.builder](path, name, options, **more):
        yield select_columns(batch, name, options)


def select_columns(batch: pa.RecordBatch, name: str, options: ReadOptions) -> pa.RecordBatch:
    """The columns that were asked for, in that order. Raises UsageError naming the ones there are."""
    if options.columns is None:
        return batch
    check_columns(batch.schema.names, name, options.columns)
    return batch.select(list(options.columns))


def check_columns(there: list[str], name: str, columns: tuple[str, ...]) -> None:
    for column in columns:
        if column not in there:
            raise UsageError(f"{name} has no column {column!r}; there are: {', '.join(there)}")


def read_schema(path: Path, name: str, options: ReadOptions) -> pa.Schema | None:
    """The schema of the file's first batch; None for a file that is empty altogether."""
    for batch in read_file(path, name, options):
        return batch.schema
    return None
