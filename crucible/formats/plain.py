"""Arrow as `datasets` keeps it: no dictionaries, nothing non-nullable, no metadata but the features."""

from __future__ import annotations

import pyarrow as pa

from crucible.casts import cast_array
from crucible.feature_types import features_of, schema_of


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema with the file's own features, or those its types mean."""
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
