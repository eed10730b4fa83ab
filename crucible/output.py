"""What a reader hands out: a table of rows as dicts, numpy arrays, tensors, or as it is. No I/O.

Types follow `datasets`: numpy and torch give int64 and float32 whatever the width in the file, images are decoded to
PIL for Python and to arrays (torch: channels first) otherwise. torch is imported when its format is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from crucible.decode import Decoder
from crucible.errors import CorruptFile, UsageError

Format = Literal["python", "numpy", "arrow", "torch"]
Row = dict[str, Any]

_ROWS = 100
"""Rows turned into Python objects at once. Profiled on chat rows, medians of nine interleaved runs: 32 at a time give
494k rows/s, 64 to 128 give 565k, 250 419k, 1,000 320k, because so many containers alive at once set off Python's
older-generation collections again and again. (Zipping columns instead of `to_pylist` was tried: no faster.)"""


def check_format(name: str | None) -> Format:
    """None means Python objects. Raises UsageError for a format crucible does not have."""
    if name is None or name == "python":
        return "python"
    if name in ("numpy", "arrow", "torch"):
        return name  # type: ignore[return-value]
    raise UsageError(f"no format {name!r}; there are None, 'numpy', 'arrow' and 'torch'")


class _Skipped:
    """Stands for a row that was left out, and is passed to nobody."""


SKIPPED = _Skipped()

OnBad = Callable[[int, CorruptFile], None]
"""Told the number in the table of a row that cannot be decoded, and why. It raises, or the row is left out."""


def shifted(bad: OnBad, first: int) -> OnBad:
    """`bad` for a table that begins with row `first` of the one it knows."""
    return lambda row, error: bad(first + row, error)


def _raise(_row: int, error: CorruptFile) -> None:
    raise error


class Output:
    """Rows and batches of a table in one format. `decode` is `crucible.decode.decoder`'s, or None."""

    def __init__(self, format_: Format, decode: Decoder | None) -> None:
        self._format = format_
        self._decode = decode

    def rows(self, table: pa.Table, bad: OnBad = _raise) -> Iterator[Any]:
        """Row by row; SKIPPED in the place of one that `bad` let pass."""
        for start in range(0, table.num_rows, _ROWS):
            part = table.slice(start, _ROWS)
            if self._format == "arrow":
                yield from (part.slice(row, 1) for row in range(part.num_rows))
            elif self._format == "python":
                rows = part.to_pylist()
                yield from rows if self._decode is None else self._decoded(self._decode, rows, start, bad)
            elif self._decode is None:
                columns = self.batch(part)
                for row in range(part.num_rows):
                    yield {name: column[row] for name, column in columns.items()}
            else:  # one by one: a batch of decoded media may be big, and may lack rows
                for row in range(part.num_rows):
                    whole = self.batch(part.slice(row, 1), shifted(bad, start + row))
                    yield whole if whole is SKIPPED else {name: column[0] for name, column in whole.items()}

    @staticmethod
    def _decoded(decode: Decoder, rows: list[Row], start: int, bad: OnBad) -> Iterator[Any]:
        for number, row in enumerate(rows, start):
            try:
                made: Any = decode(row)
            except CorruptFile as error:
                bad(number, error)
                made = SKIPPED
            yield made

    def batch(self, table: pa.Table, bad: OnBad = _raise) -> Any:
        """All rows as one dict of columns, or as the table itself; SKIPPED if `bad` let all of them pass."""
        if self._format == "arrow":
            return table
        columns: dict[str, Any] = {name: table.column(name) for name in table.column_names}
        if self._decode is not None:
            columns = _decode_columns(table, self._decode, bad)
            if table.num_rows and not columns:
                return SKIPPED
        if self._format == "python":
            return {name: _to_list(column) for name, column in columns.items()}
        make = _to_numpy if self._format == "numpy" else _to_torch
        return {name: make(column) for name, column in columns.items()}

    def collate(self, columns: Mapping[str, Sequence[Any]]) -> Any:
        """A batch of values that are decoded already, such as functions of the user's return: lists of one length."""
        if self._format == "arrow":
            return pa.table({name: pa.array(values) for name, values in columns.items()})
        if self._format == "python":
            return {name: list(values) for name, values in columns.items()}
        make = _array_of if self._format == "numpy" else _tensor_of
        return {name: make(list(values)) for name, values in columns.items()}

    def finish(self, row: Row) -> Any:
        """`collate` for one row."""
        if self._format == "python":
            return row
        if self._format == "arrow":
            return pa.table({name: pa.array([value]) for name, value in row.items()})
        return {
            name: column[0] for name, column in self.collate({name: [value] for name, value in row.items()}).items()
        }


def _array_of(values: list[Any]) -> Any:
    return _stack([_leaf_array(value) for value in values])


def _tensor_of(values: list[Any]) -> Any:
    import torch  # pyright: ignore[reportMissingImports] - an extra

    if values and all(isinstance(value, torch.Tensor) for value in values):
        return torch.stack(values) if len({value.shape for value in values}) == 1 else values
    return _tensor(_array_of(values))


def _decode_columns(table: pa.Table, decode: Decoder, bad: OnBad) -> dict[str, Any]:
    """Columns as Arrow, but for those that are decoded: they are lists. Empty if no row is left."""
    made: dict[str, list[Any]] = {name: table.column(name).to_pylist() for name in decode.columns}
    lost = []
    for row in range(table.num_rows):
        try:
            for name, one in decode.columns.items():
                made[name][row] = one(made[name][row])
        except CorruptFile as error:
            bad(row, error)
            lost.append(row)
    if lost and len(lost) == table.num_rows:
        return {}
    if lost:
        gone = set(lost)
        kept = [row for row in range(table.num_rows) if row not in gone]
        table = table.take(pa.array(kept, pa.int64()))
        made = {name: [values[row] for row in kept] for name, values in made.items()}
    return {name: made.get(name, table.column(name)) for name in table.column_names}


def _to_list(column: Any) -> list[Any]:
    return column if isinstance(column, list) else column.to_pylist()


def _to_numpy(column: Any) -> Any:
    if isinstance(column, list):
        return _stack([_leaf_array(value) for value in column])
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # no chunks at all, or more than fit one
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    return _array_to_numpy(array)


def _array_to_numpy(array: pa.Array) -> Any:
    type_ = array.type
    if isinstance(type_, pa.BaseExtensionType):
        return _array_to_numpy(array.storage)
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return _lists_to_numpy(array)
    if pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_boolean(type_):
        return _widen(array.to_numpy(zero_copy_only=False))
    if pa.types.is_temporal(type_):
        return array.to_numpy(zero_copy_only=False)
    return _objects(array.to_pylist())


def _lists_to_numpy(array: pa.Array) -> Any:
    """A block when all lists are equally long and hold numbers, else an object array of one array a list."""
    flat = _array_to_numpy(array.flatten())
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    equal = len(array) > 0 and not array.null_count and bool((lengths == lengths[0]).all())
    if equal and flat.dtype != object:
        return flat.reshape(len(array), int(lengths[0]), *flat.shape[1:])
    lists = np.split(flat, np.cumsum(lengths)[:-1]) if len(array) else []
    return _objects([None if missing else one for one, missing in zip(lists, array.is_null().to_pylist())])


def _leaf_array(value: Any) -> Any:
    """A decoded value as numpy would have it: images become arrays, the rest stays."""
    if hasattr(value, "__array_interface__"):
        return np.asarray(value)
    return _stack([_leaf_array(one) for one in value]) if isinstance(value, list) else value


def _stack(values: list[Any]) -> Any:
    if values and all(isinstance(value, np.ndarray) and value.dtype != object for value in values):
        if len({value.shape for value in values}) == 1:
            return _widen(np.stack(values))
    elif values and all(isinstance(value, (bool, int, float)) for value in values):
        return _widen(np.asarray(values))
    return _objects(values)


def _objects(values: list[Any]) -> Any:
    out = np.empty(len(values), dtype=object)
    for number, value in enumerate(values):
        out[number] = value
    return out


def _widen(array: Any) -> Any:
    """`datasets` hands out int64 and float32; images (uint8 blocks) keep their type."""
    if array.ndim >= 3 and array.dtype == np.uint8:
        return array
    if np.issubdtype(array.dtype, np.integer):
        return array.astype(np.int64, copy=False)
    return array.astype(np.float32, copy=False) if np.issubdtype(array.dtype, np.floating) else array


def _to_torch(column: Any) -> Any:
    return _tensor(_to_numpy(column))


def _tensor(value: Any) -> Any:
    """Numbers become tensors; strings, structs and ragged lists become lists of what can be."""
    import torch  # pyright: ignore[reportMissingImports] - an extra

    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == object:
        return [_tensor(one) for one in value.tolist()]
    if value.dtype.kind not in "biuf":
        return value.tolist()
    if value.dtype == np.uint8 and value.ndim in (3, 4):
        value = np.moveaxis(value, -1, -3)
    elif value.dtype == np.uint8 and value.ndim == 2:
        value = value[None]
    return torch.from_numpy(
        np.array(value)
    )  # a copy: a mapped column is read-only, and torch warns about writing to it
