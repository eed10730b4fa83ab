"""What is in the columns of a split: nulls, bytes, smallest and largest values, lengths, labels. One pass, one table
held at a time. Pure over tables; a value is never decoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute

from crucible.casts import is_text
from crucible.feature_types import MEDIA, Feature, arrow_type, kind

pc: Any = pyarrow.compute  # its functions are made at run time, which no type checker follows


@dataclass(slots=True)
class ColumnStats:
    """Of one column. What makes no sense for its type stays None or empty."""

    column: str
    feature: str
    """`int64`, `ClassLabel`, `List`, `struct`, …: a Value by its dtype, else the kind of feature."""
    rows: int = 0
    nulls: int = 0
    bytes: int = 0
    """As Arrow holds them."""
    min: Any = None
    max: Any = None
    mean: float | None = None
    """Of numbers; NaN and infinity are left out of these three and counted in `not_finite`."""
    not_finite: int = 0
    min_length: int | None = None
    max_length: int | None = None
    mean_length: float | None = None
    """Characters of text, bytes of binary and media, values of a list."""
    labels: dict[str, int] = field(default_factory=dict)
    """How many rows have each label; `-1` is no label."""


def column_stats(tables: Iterable[pa.Table], features: Mapping[str, Feature]) -> list[ColumnStats]:
    """The stats of all columns, in their order."""
    columns = [_Running(name, feature) for name, feature in features.items()]
    for table in tables:
        for batch in table.to_batches():
            for column, array in zip(columns, batch.columns, strict=True):
                column.add(array)
    return [column.done() for column in columns]


class _Running:
    def __init__(self, name: str, feature: Feature) -> None:
        what = kind(feature)
        self.stats = ColumnStats(name, feature["dtype"] if what == "Value" else what)
        self.names: list[str] = feature["names"] if what == "ClassLabel" else []
        self.is_label = what == "ClassLabel"
        self.is_media = arrow_type(feature) == MEDIA
        self.sum = self.numbers = self.length_sum = self.lengths = 0
        self.counts: Counter[int] = Counter()

    def add(self, array: pa.Array) -> None:
        stats = self.stats
        stats.rows += len(array)
        stats.nulls += array.null_count
        stats.bytes += array.nbytes
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        if self.is_label:
            self.counts.update(array.drop_null().to_pylist())
        elif self.is_media:
            self._add_lengths(pc.binary_length(pc.struct_field(array, "bytes")))
        elif is_text(array.type):
            self._add_lengths(pc.utf8_length(array.cast(pa.large_string())))
        elif "binary" in str(array.type) and not pa.types.is_nested(array.type):
            self._add_lengths(pc.binary_length(array.cast(pa.large_binary())))
        elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
            self._add_lengths(pc.list_value_length(array))
        elif pa.types.is_floating(array.type):
            finite = pc.is_finite(array)
            stats.not_finite += len(array) - array.null_count - (pc.sum(finite).as_py() or 0)
            self._add_values(array.filter(finite, null_selection_behavior="drop"))
        elif pa.types.is_primitive(array.type) or pa.types.is_decimal(array.type):
            self._add_values(array)

    def _add_values(self, array: pa.Array) -> None:
        found = pc.min_max(array.cast(pa.float64()) if pa.types.is_float16(array.type) else array).as_py()
        if found["min"] is None:
            return
        stats = self.stats
        stats.min = found["min"] if stats.min is None else min(stats.min, found["min"])
        stats.max = found["max"] if stats.max is None else max(stats.max, found["max"])
        if pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type):
            self.sum += pc.sum(array.cast(pa.float64(), safe=False)).as_py()
            self.numbers += len(array) - array.null_count

    def _add_lengths(self, lengths: pa.Array) -> None:
        found = pc.min_max(lengths).as_py()
        if found["min"] is None:
            return
        stats = self.stats
        stats.min_length = found["min"] if stats.min_length is None else min(stats.min_length, found["min"])
        stats.max_length = found["max"] if stats.max_length is None else max(stats.max_length, found["max"])
        self.length_sum += pc.sum(lengths).as_py()
        self.lengths += len(lengths) - lengths.null_count

    def done(self) -> ColumnStats:
        stats = self.stats
        stats.mean = self.sum / self.numbers if self.numbers else None
        stats.mean_length = self.length_sum / self.lengths if self.lengths else None
        known = range(len(self.names))
        stats.labels = {
            self.names[number] if number in known else str(number): count
            for number, count in sorted(self.counts.items())
        }
        return stats
