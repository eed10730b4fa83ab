"""Arrow as `datasets` keeps it: no dictionaries, nothing non-nullable, no metadata but the features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from crucible.casts import cast_array
from crucible.feature_types import features_of, schema_of

pc: Any = pyarrow.compute  # its functions are made at run time, which no type checker follows


_last: tuple[pa.Schema, pa.Schema] | None = None
"""The schema that was asked about last, and its answer: batches of one file come by the hundred, and to work it out for
each was a twentieth of what decoding them took."""


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema with the file's own features, or those its types mean. Raises ValueError for two columns of a name."""
    global _last  # one assignment of a whole pair: of two threads either is right
    last = _last
    if last is None or not last[0].equals(schema, check_metadata=True):
        _last = last = (schema, _worked_out(schema))
    return last[1]


def _worked_out(schema: pa.Schema) -> pa.Schema:
    if len(names := schema.names) != len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two columns are called {twice!r}")
    return schema_of(features_of(schema))


def plain_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same values under `plain_schema`: dictionaries decoded, unknown extensions as their storage."""
    schema = plain_schema(batch.schema)
    if batch.schema.equals(schema, check_metadata=True):
        return batch
    columns = []
    for column, field in zip(batch.columns, schema, strict=True):
        if column.type != field.type:
            column = cast_array(column, features_of(pa.schema([field]))[field.name])
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def plain_pieces(batch: pa.RecordBatch, most: int) -> Iterator[pa.RecordBatch]:
    """`plain_batch` of slices of a batch, cut where the texts of its dictionaries would come to more than `most`."""
    sizes = [_decoded_sizes(column) for column in batch.columns if pa.types.is_dictionary(column.type)]
    if not sizes:
        yield plain_batch(batch)
        return
    ends = np.cumsum(np.sum(sizes, axis=0))
    start = 0
    while start < batch.num_rows:
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield plain_batch(batch.slice(start, stop - start))
        start = stop


def _decoded_sizes(column: pa.DictionaryArray) -> Any:
    """Bytes of each value of a column with a dictionary, as an array; 8 where values are all of a size."""
    if not (pa.types.is_binary(column.type.value_type) or _is_variable(column.type.value_type)):
        return np.full(len(column), 8, np.int64)
    lengths = pc.binary_length(column.dictionary).cast(pa.int64())
    return pc.fill_null(pc.take(lengths, column.indices), 0).to_numpy(zero_copy_only=False)


def _is_variable(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_large_binary(type_))
