"""Rows of a parquet file that `filters` keep: `[[column, operator, value], ...]`, all of which must hold, or a list of
such lists, of which one must. Nulls are never kept by a comparison, as in Arrow and so in `datasets`.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crucible.errors import UsageError


class RowFilter:
    """What of a file is read, and what of that is kept. `filters` None keeps every row.

    Raises UsageError for filters that have another form, name a column that is not there, or do not fit its type.
    """

    def __init__(self, filters: Any, schema: pa.Schema, name: str, columns: list[str] | None) -> None:
        self._wanted, self._name = columns, name
        self.columns = columns
        self._expression: Any = None
        if filters is None:
            return
        try:
            terms = [filters] if isinstance(filters[0][0], str) else filters
            terms = [[(column, operator, value) for column, operator, value in every] for every in terms]
        except (TypeError, ValueError, IndexError, KeyError):
            raise UsageError(f"filters are a list of [column, operator, value], got {filters!r}") from None
        named = dict.fromkeys(column for every in terms for column, _, _ in every)
        for column in named:
            if column not in schema.names:
                raise UsageError(f"{name} has no column {column!r} to filter by; there are: {', '.join(schema.names)}")
        if columns is not None:
            self.columns = [*columns, *(column for column in named if column not in columns)]
        try:
            typed = [
                [(column, how, _typed(value, schema.field(column).type)) for column, how, value in t] for t in terms
            ]
            self._expression = pq.filters_to_expression(typed)
            self(
                pa.RecordBatch.from_pylist([], schema=schema)
            )  # a comparison that cannot be made is told before a row is
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise UsageError(f"{name}: filters {filters!r} cannot be applied: {error}") from error

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The rows that are kept, of the columns that are wanted."""
        if self._expression is not None:
            table = pa.Table.from_batches([batch]).filter(self._expression).combine_chunks()
            batch = pa.RecordBatch.from_arrays(
                [column.chunk(0) if column.num_chunks else pa.array([], column.type) for column in table.columns],
                schema=batch.schema,
            )
        if self._wanted is None or self._wanted == batch.schema.names:
            return batch
        return batch.select(self._wanted)


def _typed(value: Any, type_: pa.DataType) -> Any:
    """Dates and times, which a card's JSON has as text, as what the column holds."""
    if isinstance(value, list):
        return [_typed(one, type_) for one in value]
    if isinstance(value, str) and pa.types.is_temporal(type_):
        return pa.scalar(value).cast(type_)
    return value
