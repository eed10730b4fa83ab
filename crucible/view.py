"""What is read of a split, under which names and types: the part that both kinds of dataset share.

A view is frozen data; a transform makes another one. What it costs is paid when rows are read: columns that are not in
the view are not touched, a new name copies nothing, and a cast copies only the columns whose Arrow type changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa

from crucible.errors import CorruptFile, UsageError
from crucible.iterate import ShardReader, ShardSource
from crucible.manifest import Manifest
from crucible.order import Int64s, shard_rows
from crucible.output import Format, Output, check_format

if TYPE_CHECKING:
    from crucible.feature_classes import Features
    from crucible.feature_types import Feature

OnError = Literal["raise", "skip"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column as it is shown."""

    source: str
    """Its name in the shards."""
    name: str
    feature: Any = None
    """What it is cast to; None: as it is stored."""
    named: Literal["", "values", "values and nulls"] = ""
    """The label of a value is its text as Python prints it, also of a number; and of a null, or a null stays one."""


@dataclass(frozen=True, slots=True)
class View:
    columns: tuple[Column, ...] | None = None
    """None: all, as they are stored."""
    format: Format = "python"
    on_error: OnError = "raise"


class Split:
    """A manifest, where its shards come from, and a view."""

    def __init__(self, manifest: Manifest, source: ShardSource, view: View) -> None:
        self._manifest = manifest
        self._source = source
        self._view = view
        self._reader: ViewReader | None = None
        self._output: Output | None = None
        self._skipped = 0

    def _with(self, view: View) -> Self:
        raise NotImplementedError

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def num_rows(self) -> int:
        """Rows of the split, over all ranks."""
        return self._manifest.rows

    @property
    def num_columns(self) -> int:
        return len(self._columns)

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.num_columns

    @property
    def column_names(self) -> list[str]:
        return [column.name for column in self._columns]

    @property
    def features(self) -> Features:
        """Column to feature, as `datasets` has them: `ds.features["label"].int2str(1)`, `ds.features.to_dict()`."""
        from crucible.feature_classes import Features

        return Features(shown_features(self._manifest, self._columns))

    @property
    def skipped(self) -> int:
        """Rows that `decode(on_error="skip")` has left out in this process so far."""
        return self._skipped

    def read_counts(self) -> dict[str, int]:
        """Shards and bytes that this process has asked for, by where each was first found: disk, peer or hub."""
        return dict(self._source.note())

    def __repr__(self) -> str:
        repo = f"{self._manifest.repo.repo_id}, {self._manifest.config}, {self._manifest.split}"
        return f"{type(self).__name__}({repo}: {self.num_rows:,} rows of {', '.join(self.column_names)})"

    # --- transforms ---

    def with_format(self, type: str | None = None) -> Self:
        """Rows and batches as Python objects (None), `numpy`, `torch` or `arrow` (tables, mapped where possible)."""
        return self._with(replace(self._view, format=check_format(type)))

    def select_columns(self, column_names: str | Sequence[str]) -> Self:
        """Only these columns are read, in this order."""
        return self._shown(tuple(self._column(name) for name in _names(column_names)))

    def remove_columns(self, column_names: str | Sequence[str]) -> Self:
        """All columns but these."""
        gone = {self._column(name).name for name in _names(column_names)}
        return self._shown(tuple(column for column in self._columns if column.name not in gone))

    def rename_column(self, original_column_name: str, new_column_name: str) -> Self:
        return self.rename_columns({original_column_name: new_column_name})

    def rename_columns(self, column_mapping: Mapping[str, str]) -> Self:
        """The same columns under other names: `{old: new}`. Raises UsageError for a name that would be there twice."""
        renamed = {self._column(old).name: new for old, new in column_mapping.items()}
        columns = tuple(replace(column, name=renamed.get(column.name, column.name)) for column in self._columns)
        names = [column.name for column in columns]
        twice = next((name for name in names if not name or names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"{twice!r} cannot be the name of a column: it is empty, or another one has it")
        return self._shown(columns)

    def cast(self, features: Mapping[str, Any]) -> Self:
        """The same values under other features, which name exactly the columns that there are."""
        from crucible.feature_classes import plain_features

        wanted = plain_features(features)
        if sorted(wanted) != sorted(self.column_names):
            raise UsageError(f"the features have the columns {sorted(wanted)}, the dataset {sorted(self.column_names)}")
        columns = {column.name: replace(column, feature=wanted[column.name]) for column in self._columns}
        return self._cast(tuple(columns[name] for name in wanted))

    def cast_column(self, column: str, feature: Any) -> Self:
        """One column under another feature: `ds.cast_column("image", Image(mode="RGB"))`."""
        from crucible.feature_classes import plain_features

        wanted, target = plain_features({column: feature})[column], self._column(column)
        return self._cast(tuple(replace(one, feature=wanted) if one == target else one for one in self._columns))

    def _cast(self, columns: tuple[Column, ...]) -> Self:
        return self._shown(columns)

    def decode(self, enable: bool = True, on_error: OnError = "raise") -> Self:
        """Whether media columns are decoded; if not, they are `{bytes, path}`.

        `on_error` says what happens to a row that cannot be: `raise` CorruptFile, which names row and file; or `skip`
        it while iterating, and count it in `skipped`. Ranks then no longer deliver equally many rows.
        """
        from crucible.decode import without_decoding

        if on_error not in ("raise", "skip"):
            raise UsageError(f"on_error is 'raise' or 'skip', got {on_error!r}")
        features = shown_features(self._manifest, self._columns)
        wanted = {name: without_decoding(feature, decode=enable) for name, feature in features.items()}
        columns = tuple(
            column if wanted[column.name] == features[column.name] else replace(column, feature=wanted[column.name])
            for column in self._columns
        )
        made = self if columns == self._columns else self._shown(columns)
        return made._with(replace(made._view, on_error=on_error))

    # --- reading ---

    @property
    def _columns(self) -> tuple[Column, ...]:
        if self._view.columns is not None:
            return self._view.columns
        return tuple(Column(name, name) for name in self._manifest.arrow_schema.names)

    def _column(self, name: str) -> Column:
        for column in self._columns:
            if column.name == name:
                return column
        raise UsageError(f"no column {name!r}; there are: {', '.join(self.column_names)}")

    def _shown(self, columns: tuple[Column, ...]) -> Self:
        return self._with(replace(self._view, columns=columns))

    def _opened(self, most_open: int | None = None) -> tuple[ViewReader, Output]:
        if self._reader is None or self._output is None:
            from crucible.decode import decoder
            from crucible.feature_types import dump_features

            self._reader = ViewReader(self._manifest, self._source, self._view.columns)
            features = dump_features(shown_features(self._manifest, self._columns))
            decode = None if self._view.format == "arrow" else decoder(features, self._reader.schema)
            self._output = Output(self._view.format, decode)
        if most_open is not None:  # for an iteration
            self._reader.most_open = most_open
            self._reader.recheck()
        return self._reader, self._output

    def _bad(self, error: CorruptFile, row: int) -> None:
        """Raise the error of a row with its place, or count it."""
        if self._view.on_error == "skip":
            self._skipped += 1
            return
        raise located(error, self._manifest, row) from error


class ViewReader(ShardReader):
    """Rows by id under the names and types of a view."""

    def __init__(self, manifest: Manifest, source: ShardSource, columns: tuple[Column, ...] | None) -> None:
        super().__init__(
            manifest, source, columns=None if columns is None else tuple(column.source for column in columns)
        )
        self._shown: pa.Schema | None = None
        self._names = self.schema.names
        self._view = columns or ()
        self._encoded = [place for place, column in enumerate(self._view) if column.named]
        if columns is not None and any(one.feature is not None or one.name != one.source for one in columns):
            from crucible.feature_types import schema_of

            self._shown = schema_of(shown_features(manifest, columns))
            self._names = [column.name for column in columns]

    def take(self, ids: Int64s) -> pa.Table:
        return self._show(super().take(ids))

    def slice(self, start: int, stop: int) -> pa.Table:
        return self._show(super().slice(start, stop))

    def _show(self, table: pa.Table) -> pa.Table:
        if self._shown is None:
            return table
        from crucible.casts import cast_batch

        for place in self._encoded:
            table = table.set_column(place, self._names[place], self._labels(table.column(place), place))
        batches = table.rename_columns(self._names).to_batches()
        return pa.Table.from_batches([cast_batch(batch, self._shown, "the split") for batch in batches], self._shown)

    def _labels(self, values: pa.ChunkedArray, place: int) -> pa.ChunkedArray:
        column = self._view[place]
        numbers = {name: number for number, name in enumerate(column.feature["names"])}
        chunks = []
        for chunk in values.chunks:
            found = chunk.dictionary_encode("encode")  # a null is a value of its own here
            mapped = [
                None if value is None and column.named == "values" else numbers[str(value)]
                for value in found.dictionary.to_pylist()
            ]
            chunks.append(pa.array(mapped, pa.int64()).take(found.indices))
        return pa.chunked_array(chunks, pa.int64())


def located(error: CorruptFile, manifest: Manifest, row: int) -> CorruptFile:
    """The error of one row's value, with the row and the file that it came from."""
    stops = np.cumsum(shard_rows(manifest))
    number = int(np.searchsorted(stops, row, side="right"))
    shard = manifest.shards[number]
    inside = row - int(stops[number]) + shard.rows + (manifest.cut(number) or (0, 0))[0]
    place = f"row {row:,} (shard {shard.key[:12]}, row {inside:,}), {error.where}"
    if shard.item >= len(manifest.items):
        return CorruptFile(error.path, place, error.problem)
    files = manifest.items[shard.item].files
    file = files[0].path if len(files) == 1 else f"one of {files[0].path} … {files[-1].path}"
    return CorruptFile(file if error.path == "an image" else f"{error.path} in {file}", place, error.problem)


def shown_features(manifest: Manifest, columns: Sequence[Column]) -> dict[str, Feature]:
    from crucible.feature_types import features_of, parse_features

    known = features_of(manifest.arrow_schema) if manifest.features is None else parse_features(manifest.features)
    return {one.name: known[one.source] if one.feature is None else one.feature for one in columns}


def _names(columns: str | Sequence[str]) -> tuple[str, ...]:
    return (columns,) if isinstance(columns, str) else tuple(columns)
