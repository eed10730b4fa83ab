"""Parquet footers from ranged reads: rows, row groups and schema of a file whose data has not moved yet. No I/O."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from crucible.errors import CorruptFile
from crucible.feature_types import METADATA_KEY, dump_features, features_of
from crucible.formats.cuts import RowGroup, unpacked_groups
from crucible.formats.parquet import first_line
from crucible.formats.plain import plain_schema
from crucible.refs import ByteRange

TAIL_BYTES = 64 << 10
"""What is asked for first: nearly every footer fits, and it costs no more time than fewer bytes would."""

_MAGIC = b"PAR1"
_END = 8  # the footer's length and the magic


@dataclass(frozen=True, slots=True)
class ParquetFooter:
    rows: int
    row_groups: tuple[tuple[int, int], ...]
    """(rows, about how many bytes of the file) of each row group, in order."""
    unpacked: tuple[RowGroup, ...]
    """(rows, about how many bytes of Arrow data) of each row group, in order: what shards are cut by."""
    schema: pa.Schema
    """As shards will have it: with features, without dictionaries."""
    features: str | None
    """JSON of the features the file itself states, or None when the types say it all."""


def footer_tail(size: int) -> ByteRange:
    """The end of a file of `size` bytes, where its footer is."""
    return ByteRange(max(0, size - TAIL_BYTES), size)


def parse_footer(path: str, size: int, tail: bytes) -> ParquetFooter | ByteRange:
    """Read a footer from the last bytes of a file, or say which bigger range holds it. Raises CorruptFile."""
    if size < 12 or len(tail) < _END or len(tail) > size:
        raise CorruptFile(path, "the footer", f"too short for a parquet file ({size:,} bytes)")
    if tail[-4:] == b"PARE":
        raise CorruptFile(path, "the footer", "is encrypted")
    if tail[-4:] != _MAGIC:
        raise CorruptFile(path, "the footer", "does not end like a parquet file")
    length = struct.unpack("<I", tail[-8:-4])[0] + _END
    if length + len(_MAGIC) > size:
        raise CorruptFile(path, "the footer", f"claims {length:,} bytes of a file of {size:,}")
    if length > len(tail):
        return ByteRange(size - length, size)
    try:
        # a file that is only its footer reads like the whole as long as no data page is asked for
        metadata = pq.read_metadata(pa.BufferReader(_MAGIC + tail[-length:]))
        arrow = metadata.schema.to_arrow_schema()
        schema = plain_schema(arrow)
        groups = unpacked_groups(metadata, schema, size)
        sizes = _shares(size, groups)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise CorruptFile(path, "the footer", first_line(error)) from error
    if metadata.num_rows != sum(rows for rows, _ in sizes):
        raise CorruptFile(path, "the footer", "its row groups do not add up to its rows")
    stated = METADATA_KEY in (arrow.metadata or {})
    features = dump_features(features_of(arrow)) if stated else None
    return ParquetFooter(metadata.num_rows, sizes, groups, schema, features)


def _shares(size: int, groups: tuple[RowGroup, ...]) -> tuple[tuple[int, int], ...]:
    """Each row group's part of the file's bytes, by its unpacked size."""
    total = sum(unpacked for _, unpacked in groups) or 1
    return tuple((rows, size * unpacked // total) for rows, unpacked in groups)
