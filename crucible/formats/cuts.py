"""Where a parquet item is cut into shards: a function of its files' footers, so that it is known before the data moves.

A row group is taken to have its rows spread evenly over the bytes that its footer names. Shards then come out near the
target; only where one long text is repeated in many rows, which a footer does not tell, are they bigger.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from crucible.errors import CrucibleError
from crucible.formats.plain import plain_schema
from crucible.refs import ReadOptions

MOST_UNPACKED = 100
"""A footer that claims more than so many times its file's bytes is not believed: it would cut every row off."""

RowGroup = tuple[int, int]
"""(rows, about how many bytes of Arrow data)."""


def unpacked_groups(metadata: pq.FileMetaData, schema: pa.Schema, size: int) -> tuple[RowGroup, ...]:
    """Every row group of a file of `size` bytes whose rows have `schema`. Raises ValueError for a negative number."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    # no look at the columns: on a damaged footer `group.column(n)` ends the process instead of raising
    told = [(group.num_rows, group.total_byte_size) for group in groups]
    if any(rows < 0 or unpacked < 0 for rows, unpacked in told):
        raise ValueError("a row group has a negative size")
    bits = sum(_bits(field.type) for field in schema)
    return tuple((rows, max(min(unpacked, MOST_UNPACKED * size), rows * bits // 8)) for rows, unpacked in told)


def _bits(kind: pa.DataType) -> int:
    """What a value takes at least, in the buffers that have a place for each row."""
    if pa.types.is_struct(kind):
        return sum(_bits(field.type) for field in kind)
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) * _bits(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _bits(kind.storage_type)
    try:
        return int(kind.bit_width)
    except ValueError:
        return 32  # text, bytes and lists: an offset


def shard_rows(groups: Iterable[RowGroup], shard_bytes: int) -> list[int]:
    """Rows of each shard of an item with these row groups: every one at least one row, and about `shard_bytes`."""
    shards: list[int] = []
    held = filled = 0
    for rows, size in groups:
        left = rows
        while left:
            fit = left + 1 if not size else max(1, -((filled - shard_bytes) * rows // size))
            taken = min(left, fit)
            held += taken
            left -= taken
            filled += size * taken // rows
            if taken == fit:
                shards.append(held)
                held = filled = 0
    return [*shards, held] if held else shards


def known_from_footers(options: ReadOptions) -> bool:
    """Whether the rows of files read so are those that their footers count."""
    return options.builder == "parquet" and options.param("filters") is None


def item_shard_rows(paths: Iterable[Path], options: ReadOptions, shard_bytes: int) -> list[int] | None:
    """Rows of each shard of an item whose files are here; None if nothing but reading them tells."""
    if not known_from_footers(options):
        return None
    groups: list[RowGroup] = []
    first: pa.Schema | None = None
    try:
        for path in paths:
            metadata = pq.read_metadata(path)
            schema = plain_schema(metadata.schema.to_arrow_schema())
            first = first or schema
            if options.features is None and not schema.equals(first, check_metadata=True):
                return None  # their shard is held until its schema is known: by bytes, because memory is bounded
            start, stop = options.param("row_groups", (0, metadata.num_row_groups))
            groups += unpacked_groups(metadata, schema, path.stat().st_size)[start:stop]
    except (pa.ArrowException, OSError, ValueError, CrucibleError):
        return None  # who reads the file says what is wrong with it
    return shard_rows(groups, shard_bytes)
