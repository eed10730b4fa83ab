"""How many rows of a parquet row group to decode at a time, so that what comes out is small whatever went in.

A footer says how big a row group is as it is encoded. A text that a thousand rows repeat is there once, and a list of
a million equal numbers is a few bytes; decoded, rows may be a thousand times as big. So the first step is a few rows,
each goes by what the one before came to, and none is so long that the longest text of a dictionary in each row would be
too much. All of it depends on the file alone, so the batches are the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from crucible.formats.limits import Limits
from crucible.formats.thrift import BadThrift, Spec, read_struct

pc: Any = pyarrow.compute  # its functions are made at run time, which no type checker follows

STEP_BYTES = 2 << 20
"""What a step aims for: rows may become a hundred times as long from one step to the next and still fit a task."""
_COLUMN_BYTES = 128 << 10
"""The same for each of many columns: below it, calls cost more than what they bring."""
_MOST_BYTES = 16 << 20
_MOST_FIXED = 1 << 16
"""Rows of a step where every row is as long as the next."""
_MOST_ROWS = 1 << 13
"""Elsewhere: texts of 50 kB behind a million short ones still make a step of 400 MB at most."""
_FIRST_ROWS = 16
_GROWTH = 4
_PAGE: Spec = {2: None, 3: None}
_HEADER_BYTES = 64 << 10
_REPEATED_BYTES = 64 << 20
"""What the texts of a dictionary may come to if each row of a step has the longest of them."""


class Steps:
    """The rows of one row group, step by step.

    Raises an Arrow error for a footer that makes no sense, CorruptFile for a page bigger than a row may be.
    """

    def __init__(
        self, file: pq.ParquetFile, path: Path, name: str, group: int, columns: list[str] | None, limits: Limits
    ) -> None:
        leaves = _leaves(file, columns)
        self._bytes = min(_MOST_BYTES, max(STEP_BYTES, _COLUMN_BYTES * len(leaves)))
        schema = file.schema_arrow
        width = _width([field.type for field in schema if columns is None or field.name in columns])
        self._most = _MOST_ROWS if width is None else _MOST_FIXED
        _check_pages(file, path, group, leaves, limits, name)
        if width is not None:
            self.rows = max(1, min(_MOST_FIXED, self._bytes // max(1, width)))
            return
        self.rows = _FIRST_ROWS
        longest = _longest(file, path, group, leaves)
        if longest:
            self._most = max(1, min(_MOST_ROWS, _REPEATED_BYTES // longest))
            self.rows = min(self.rows, self._most)

    def after(self, rows: int, size: int) -> int:
        """How many rows come next, after `rows` that decoded to `size` bytes."""
        fit = self._bytes * rows // max(1, size)
        self.rows = max(1, min(fit, self._most, _GROWTH * max(rows, 1)))
        return self.rows


def _leaves(file: pq.ParquetFile, columns: list[str] | None) -> list[int]:
    """The numbers of the file's columns, of which a nested one has several, that these columns are made of."""
    paths = [file.schema.column(number).path for number in range(len(file.schema))]
    if columns is None:
        return list(range(len(paths)))
    return [
        number
        for number, path in enumerate(paths)
        if any(path == column or path.startswith(f"{column}.") for column in columns)
    ]


def _width(types: list[pa.DataType]) -> int | None:
    """Bytes of a row whose columns are all of a fixed size; None for others."""
    try:
        return sum(-(-int(type_.bit_width) // 8) for type_ in types)
    except ValueError:
        return None


def _chunks(file: pq.ParquetFile, group: int, leaves: list[int]) -> list[Any]:
    """What the footer says of columns of a row group, as pyarrow has it."""
    # a step of no rows: it opens every column's chunk and raises where the footer has nonsense for one, where a look at
    # `column(n)` would end the process
    next(file.reader.iter_batches(0, row_groups=[group], column_indices=leaves, use_threads=False), None)
    described = file.metadata.row_group(group)
    return [described.column(leaf) for leaf in leaves]


def _check_pages(file: pq.ParquetFile, path: Path, group: int, leaves: list[int], limits: Limits, name: str) -> None:
    """A page is unpacked as a whole, so one may be no bigger than a row. Most files cannot have any that is."""
    if file.metadata.row_group(group).total_byte_size <= limits.row_bytes:
        return
    for chunk in _chunks(file, group, leaves):
        if chunk.total_uncompressed_size > limits.row_bytes:
            at = chunk.data_page_offset
            if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < at:
                at = chunk.dictionary_page_offset
            where = f"row group {group}, a page of column {chunk.path_in_schema!r}"
            with path.open("rb") as raw:
                for size in _page_sizes(raw, at, at + chunk.total_compressed_size):
                    limits.check_row(name, where, size)


def _page_sizes(raw: BinaryIO, at: int, stop: int) -> Iterator[int]:
    """Bytes of each page that begins in [at, stop), unpacked; as far as its headers are whole."""
    while at < stop:
        raw.seek(at)
        try:
            header, length = read_struct(raw.read(_HEADER_BYTES), _PAGE)
            yield int(header[2])
            at += length + max(0, int(header[3]))
        except (BadThrift, KeyError, TypeError):
            return  # whoever reads the page says what is wrong with it


def _longest(file: pq.ParquetFile, path: Path, group: int, leaves: list[int]) -> int:
    """Bytes of the longest text of each dictionary of a row group, summed over columns that may repeat it too often."""
    rows = min(_MOST_ROWS, file.metadata.row_group(group).num_rows)
    repeated = []
    for chunk in _chunks(file, group, leaves):
        there = chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page
        if there and rows * chunk.total_uncompressed_size > _REPEATED_BYTES and "." not in chunk.path_in_schema:
            repeated.append(chunk.path_in_schema)
    if not repeated:
        return 0
    with pq.ParquetFile(path, metadata=file.metadata, read_dictionary=repeated, pre_buffer=False) as again:
        batch = next(again.iter_batches(1, row_groups=[group], columns=repeated, use_threads=False))
    return sum(
        pc.max(pc.binary_length(column.dictionary)).as_py() or 0
        for column in batch.columns
        if pa.types.is_dictionary(column.type)
    )
