"""`Dataset`: the rows of a split by index, mapped from disk. `DatasetDict`: the splits of a config by name.

Rows are read when they are asked for; nothing is held but the maps of the shards. Writing one to a file goes batch by
batch, under a temporary name until it is whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from crucible.errors import CorruptFile, UsageError
from crucible.iterate import FIRST_BLOCK_ROWS, ShardSource
from crucible.manifest import Manifest
from crucible.order import shard_rows
from crucible.output import SKIPPED
from crucible.view import Column, OnError, Split, View, located

if TYPE_CHECKING:
    from crucible.dataset import IterableDataset

Path = str | PathLike[str]


class Dataset(Split):
    """The rows of a split by index, mapped from disk: `ds[0]`, `ds[-1]`, `ds[10:20]`, `ds["column"]`, `len`, iteration.

    Concurrency: threads may share it; processes get copies.
    """

    def __init__(self, manifest: Manifest, source: ShardSource) -> None:
        super().__init__(manifest, source, View())

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, key: Any) -> Any:
        """A row for a number, a dict of lists for a slice or numbers, a `ColumnView` for a name.

        A row that cannot be decoded raises CorruptFile here whatever `on_error` says: there is nothing else to give.
        """
        if isinstance(key, str):
            if key not in self.column_names:
                raise KeyError(f"no column {key!r}; there are: {', '.join(self.column_names)}")
            return ColumnView(self, key)
        reader, output = self._opened()
        if isinstance(key, slice):
            start, stop, step = key.indices(self.num_rows)
            rows = np.arange(start, stop, step, dtype=np.int64)
            table = reader.slice(start, max(start, stop)) if step == 1 else reader.take(rows)
        elif isinstance(key, Iterable):
            rows = np.asarray([self._index(number) for number in key], dtype=np.int64)
            table = reader.take(rows)
        else:
            row = self._index(key)
            return next(iter(output.rows(reader.slice(row, row + 1), partial(self._refuse, [row]))))
        return output.batch(table, partial(self._refuse, rows))

    def __iter__(self) -> Iterator[Any]:
        reader, output = self._opened()
        reader.recheck()
        first, ahead = 0, min(FIRST_BLOCK_ROWS, reader.block_rows)
        while first < self.num_rows:
            stop = min(self.num_rows, first + ahead)
            for row in output.rows(reader.slice(first, stop), partial(self._bad_after, first)):
                if row is not SKIPPED:
                    yield row
            first, ahead = stop, min(ahead * 2, reader.block_rows)

    def class_encode_column(self, column: str, include_nulls: bool = False) -> Dataset:
        """The column as a ClassLabel whose names are its distinct values as text, sorted. Reads the column once.

        Nulls stay nulls, or with `include_nulls` are the label `None`.
        """
        feature = self.features[column] if column in self.column_names else None
        if feature is None or "dtype" not in feature or "_type" not in feature or feature["_type"] != "Value":
            raise UsageError(f"class_encode_column needs a column of plain values, and {column!r} is {feature}")
        names = {
            str(value)
            for table in self.select_columns(column).tables()
            for value in table.column(0).unique().to_pylist()
            if include_nulls or value is not None
        }
        label = {"names": sorted(names), "_type": "ClassLabel"}
        target = self._column(column)
        if target.feature is not None:
            raise UsageError(f"{column!r} is cast already: class_encode_column comes first")
        encoded = replace(target, feature=label, named="values and nulls" if include_nulls else "values")
        return self._shown(tuple(encoded if one == target else one for one in self._columns))

    def iter(self, batch_size: int, drop_last_batch: bool = False) -> Iterator[Any]:
        """Dicts of lists of `batch_size` rows."""
        yield from self.to_iterable().batch(batch_size, drop_last=drop_last_batch)

    def to_iterable(self) -> IterableDataset:
        """The same rows as a stream that can be shuffled, sharded and resumed."""
        from crucible.dataset import IterableDataset
        from crucible.reading import Leaf
        from crucible.shaping import Delivery
        from crucible.streams import Source

        leaf = Leaf(self._manifest, self._source, replace(self._view, format="python"))
        stream = Source(self._manifest.order_id, shard_rows(self._manifest))
        return IterableDataset.of((leaf,), stream, Delivery(format=self._view.format))

    def tables(self, rows: int | None = None) -> Iterator[pa.Table]:
        """All rows as they are stored, in Arrow tables of at most `rows`: mapped, and small enough to hold one."""
        if rows is not None and rows < 1:
            raise UsageError(f"batch_size must be 1 or more, got {rows}")
        reader, _ = self._opened()
        step = rows or reader.block_rows
        for start in range(0, self.num_rows, step):
            yield reader.slice(start, min(self.num_rows, start + step))

    def to_list(self) -> list[dict[str, Any]]:
        """All rows as Python objects, as they are stored: images are `{bytes, path}`."""
        return [row for table in self.tables() for row in table.to_pylist()]

    def to_dict(self) -> dict[str, list[Any]]:
        """All columns as lists, as they are stored."""
        tables = list(self.tables())
        return {name: [value for one in tables for value in one.column(name).to_pylist()] for name in self.column_names}

    # --- files ---

    def to_parquet(self, path: Path, *, compression: str = "snappy", batch_size: int | None = None) -> int:
        """Write a parquet file that carries the features; returns its bytes."""
        from crucible.formats.writers import write_parquet

        return write_parquet(path, self._schema, self.tables(batch_size), compression=compression)

    def to_arrow(
        self, path: Path, *, compression: Literal["lz4", "zstd"] | None = None, batch_size: int | None = None
    ) -> int:
        """Write an Arrow IPC file that carries the features; returns its bytes."""
        from crucible.formats.writers import write_arrow

        return write_arrow(path, self._schema, self.tables(batch_size), compression=compression)

    def to_json(
        self,
        path: Path,
        *,
        lines: bool = True,
        orient: Literal["records", "columns"] = "records",
        binary: Literal["error", "base64"] = "error",
        nan: Literal["error", "null"] = "error",
        batch_size: int | None = None,
    ) -> int:
        """Write JSON: a row a line, or with `lines=False` one array of rows, or one object of columns.

        Dates, times and decimals are text, which `features=` reads back. Bytes, and fractions that are no number,
        have no JSON: they raise UsageError, or become `base64:…` text and null.
        """
        from crucible.formats.writers import write_json

        if lines and orient != "records":
            raise UsageError("a row a line has orient='records'; for 'columns' say lines=False")
        form: Literal["lines", "records", "columns"] = "lines" if lines else orient
        return write_json(path, self._schema, self.tables(batch_size), form=form, binary=binary, nan=nan)

    def to_csv(
        self,
        path: Path,
        *,
        sep: str = ",",
        header: bool = True,
        na_rep: str = "",
        binary: Literal["error", "base64"] = "error",
        nan: Literal["error", "null"] = "error",
        batch_size: int | None = None,
    ) -> int:
        """Write CSV; lists and structs are JSON text in it. A null is `na_rep`, which must not be a value beside it."""
        from crucible.formats.writers import write_csv

        tables = self.tables(batch_size)
        return write_csv(path, self._schema, tables, sep=sep, header=header, na_rep=na_rep, binary=binary, nan=nan)

    def to_text(self, path: Path, *, batch_size: int | None = None) -> int:
        """Write the only column, which is text, a row a line. Raises UsageError for nulls and for line ends in it."""
        from crucible.formats.writers import write_text

        return write_text(path, self._schema, self.tables(batch_size))

    # --- inside ---

    @property
    def _schema(self) -> pa.Schema:
        """With the features in its metadata."""
        return self.features.arrow_schema

    def _cast(self, columns: tuple[Column, ...]) -> Dataset:
        """Refused at once, as `datasets` does, if a value does not fit: columns that change are read for it once."""
        made = self._shown(columns)
        before = {column.source: column for column in self._columns}
        changed = [column.name for column in columns if before[column.source] != column]
        if changed:
            for _ in made.select_columns(changed).tables():
                pass
        return made

    def _refuse(self, rows: Any, number: int, error: CorruptFile) -> None:
        raise located(error, self._manifest, int(rows[number])) from error

    def _bad_after(self, first: int, number: int, error: CorruptFile) -> None:
        self._bad(error, first + number)

    def _index(self, number: Any) -> int:
        index = operator.index(number)
        if not -self.num_rows <= index < self.num_rows:
            raise IndexError(f"row {index} of a dataset of {self.num_rows} rows")
        return index % self.num_rows

    def _with(self, view: View) -> Dataset:
        made = Dataset(self._manifest, self._source)
        made._view = view
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_dataset, (self._manifest, self._source, self._view)


class ColumnView(Sequence[Any]):
    """One column of a Dataset, read when it is asked for: `ds["text"][5]`, `ds["text"][:10]`, `list(ds["text"])`.

    Equal to the list of its values. A field of a struct is `ds["answers"]["text"]`.
    """

    def __init__(self, dataset: Dataset, name: str, fields: tuple[str, ...] = ()) -> None:
        self._dataset, self._name, self._fields = dataset.select_columns(name), name, fields

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            made = ColumnView(self._dataset, self._name, (*self._fields, key))
            made._feature()  # a wrong name is refused here
            return made
        found = self._dataset[key][self._name]
        if not self._fields:
            return found
        return [self._field(one) for one in found] if isinstance(key, (slice, Iterable)) else self._field(found)

    def __iter__(self) -> Iterator[Any]:
        for row in self._dataset:
            yield self._field(row[self._name])

    def __len__(self) -> int:
        return len(self._dataset)

    def __eq__(self, other: object) -> bool:
        return list(self) == (list(other) if isinstance(other, ColumnView) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(value) for value in self[:5])
        return f"ColumnView([{shown}{', …' if len(self) > 5 else ''}])"

    def _field(self, value: Any) -> Any:
        for name in self._fields:
            value = None if value is None else value[name]
        return value

    def _feature(self) -> Any:
        feature: Any = self._dataset.features[self._name]
        for name in self._fields:
            if not isinstance(feature, dict) or "_type" in feature or name not in feature:
                raise KeyError(f"column {self._name!r} has no field {name!r}")
            feature = feature[name]
        return feature


class DatasetDict(dict[str, Any]):
    """The splits of a dataset by name. A transform is that of each split."""

    @property
    def num_rows(self) -> dict[str, int]:
        return {name: split.num_rows for name, split in self.items()}

    @property
    def num_columns(self) -> dict[str, int]:
        return {name: split.num_columns for name, split in self.items()}

    @property
    def shape(self) -> dict[str, tuple[int, int]]:
        return {name: split.shape for name, split in self.items()}

    @property
    def column_names(self) -> dict[str, list[str]]:
        return {name: split.column_names for name, split in self.items()}

    def with_format(self, type: str | None = None) -> DatasetDict:
        return self._each(lambda split: split.with_format(type))

    def select_columns(self, column_names: str | Sequence[str]) -> DatasetDict:
        return self._each(lambda split: split.select_columns(column_names))

    def remove_columns(self, column_names: str | Sequence[str]) -> DatasetDict:
        return self._each(lambda split: split.remove_columns(column_names))

    def rename_column(self, original_column_name: str, new_column_name: str) -> DatasetDict:
        return self._each(lambda split: split.rename_column(original_column_name, new_column_name))

    def rename_columns(self, column_mapping: Mapping[str, str]) -> DatasetDict:
        return self._each(lambda split: split.rename_columns(column_mapping))

    def cast(self, features: Mapping[str, Any]) -> DatasetDict:
        return self._each(lambda split: split.cast(features))

    def cast_column(self, column: str, feature: Any) -> DatasetDict:
        return self._each(lambda split: split.cast_column(column, feature))

    def decode(self, enable: bool = True, on_error: OnError = "raise") -> DatasetDict:
        return self._each(lambda split: split.decode(enable, on_error))

    def _each(self, transform: Callable[[Dataset], Dataset]) -> DatasetDict:
        return DatasetDict({name: transform(split) for name, split in self.items()})


def _unpickle_dataset(manifest: Manifest, source: ShardSource, view: View) -> Dataset:
    made = Dataset(manifest, source)
    made._view = view
    return made
