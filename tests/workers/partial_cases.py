"""A parquet file of twenty columns on a Hub, and what two of them are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crucible.formats.chunks import Layout, parse_layout, wanted_ranges
from crucible.formats.footer import footer_tail

ROWS, GROUP = 24_000, 8_000
COLUMNS = ("c03", "text")
"""What the tests ask for, of 20 columns."""


def table(rows: int = ROWS, seed: int = 7) -> pa.Table:
    """Nineteen columns of numbers that do not compress, and one of text."""
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {f"c{number:02}": rng.random(rows) for number in range(19)}
    return pa.table(columns | {"text": [f"row {number} of {seed}" for number in range(rows)]})


def parquet(made: pa.Table | None = None, **options: Any) -> bytes:
    """The table as a file of several row groups: about 4 MB, of which two columns are a tenth."""
    sink = io.BytesIO()
    settings = {"row_group_size": GROUP, "use_dictionary": False, "compression": "none"}
    pq.write_table(table() if made is None else made, sink, **{**settings, **options})
    return sink.getvalue()


def layout(data: bytes, columns: Sequence[str] = COLUMNS) -> Layout:
    """Where `columns` lie in a file."""
    found = parse_layout("x", len(data), data, columns)
    assert isinstance(found, Layout)
    return found


def wanted_bytes(data: bytes, columns: Sequence[str] = COLUMNS) -> int:
    """Bytes that a download of `columns` needs: their ranges, and the end of the file."""
    ranges = wanted_ranges(layout(data, columns), len(data))
    assert ranges is not None
    tail = footer_tail(len(data))
    return ranges.add(tail.start, tail.stop).size
