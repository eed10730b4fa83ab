"""Tables into one file: parquet, Arrow, JSON, CSV, text. What is written reads back equal, or is refused.

Each writer takes the schema with its features and the rows as tables, holds one table at a time, and writes under a
temporary name beside the file; a crash leaves that, and the file as it was. Raises UsageError for what the format
cannot hold, naming column and row, and DiskFull or StoreReadOnly.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from crucible.cache.disk import disk_errors
from crucible.casts import cast_batch, is_text
from crucible.errors import UsageError

Binary = Literal["error", "base64"]
Nan = Literal["error", "null"]
AnyPath = str | os.PathLike[str]

_BIGGEST = (1 << 63) - 1
"""pyarrow's JSON reader, and so crucible's and `datasets`', makes fractions of whole numbers above this."""

_LINE_END = re.compile(r"[\n\r]")


def write_parquet(path: AnyPath, schema: pa.Schema, tables: Iterable[pa.Table], *, compression: str = "snappy") -> int:
    """Row groups are the tables. Types that parquet has no room for are refused by name."""
    _check_types(schema, _not_parquet, "parquet")
    with _whole(path) as file:
        try:
            writer = pq.ParquetWriter(file, schema, compression=compression)
        except (pa.ArrowException, ValueError) as error:
            raise UsageError(f"{path}: {error}") from error
        with writer:
            for table in _as(schema, tables):
                writer.write_table(table)
    return Path(path).stat().st_size


def write_arrow(
    path: AnyPath, schema: pa.Schema, tables: Iterable[pa.Table], *, compression: Literal["lz4", "zstd"] | None = None
) -> int:
    if compression not in (None, "lz4", "zstd"):
        raise UsageError(f"Arrow files are compressed with lz4, zstd or not at all, not with {compression!r}")
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with _whole(path) as file, pa.ipc.new_file(file, schema, options=options) as writer:
        for table in _as(schema, tables):
            writer.write_table(table)
    return Path(path).stat().st_size


def write_json(
    path: AnyPath,
    schema: pa.Schema,
    tables: Iterable[pa.Table],
    *,
    form: Literal["lines", "records", "columns"] = "lines",
    binary: Binary = "error",
    nan: Nan = "error",
) -> int:
    """`lines`: an object a line; `records`: one array of objects; `columns`: one object of arrays, held in memory."""
    rows = _plain_rows(schema, tables, binary, nan, biggest=_BIGGEST)
    with _whole(path) as file:
        if form == "columns":
            columns: dict[str, list[Any]] = {name: [] for name in schema.names}
            for row in rows:
                for name, value in row.items():
                    columns[name].append(value)
            file.write(_dump(columns))
        elif form == "lines":
            for row in rows:
                file.write(_dump(row) + b"\n")
        else:
            before = b"["
            for row in rows:
                file.write(before + b"\n" + _dump(row))
                before = b","
            file.write(b"[]\n" if before == b"[" else b"\n]\n")
    return Path(path).stat().st_size


def write_csv(
    path: AnyPath,
    schema: pa.Schema,
    tables: Iterable[pa.Table],
    *,
    sep: str = ",",
    header: bool = True,
    na_rep: str = "",
    binary: Binary = "error",
    nan: Nan = "error",
) -> int:
    """Fields are quoted where they need it. Lists and structs are JSON text.

    A column in which a null and the text `na_rep` both occur could not be told apart, and is refused.
    """
    if len(sep) != 1 or sep in '"\r\n':
        raise UsageError(f"sep must be one character that is no quote and no line end, got {sep!r}")
    names = schema.names
    nulls, same = set[str](), set[str]()
    with _whole(path) as file, _as_text(file) as text:
        writer = csv.writer(text, delimiter=sep, lineterminator="\n")
        if header:
            writer.writerow(names)
        for row in _plain_rows(schema, tables, binary, nan):
            fields = [na_rep if row[name] is None else _field(row[name]) for name in names]
            for name, field in zip(names, fields, strict=True):
                if field == na_rep:
                    (nulls if row[name] is None else same).add(name)
            if nulls & same:
                raise UsageError(
                    f"column {min(nulls & same)!r} has nulls and the text {na_rep!r}: choose another na_rep"
                )
            _write_row(writer, text, fields)
    return Path(path).stat().st_size


@contextmanager
def _as_text(file: BinaryIO) -> Iterator[io.TextIOWrapper]:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    try:
        yield text
    finally:
        text.detach()  # else it would close the file


def _write_row(writer: Any, text: io.TextIOWrapper, fields: list[str]) -> None:
    if len(fields) == 1 and fields[0] == "":
        text.write('""\n')  # an empty line would be no row at all
    elif any(_LINE_END.search(field) for field in fields):
        text.flush()
        csv.writer(text, delimiter=writer.dialect.delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(
            fields
        )
    else:
        writer.writerow(fields)


def write_text(path: AnyPath, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    if len(schema) != 1 or not is_text(schema.field(0).type):
        raise UsageError(f"a text file holds one column of text, not {', '.join(schema.names)}: use select_columns")
    name, number = schema.names[0], 0
    with _whole(path) as file:
        for value in (value for table in tables for value in table.column(0).to_pylist()):
            if value is None or _LINE_END.search(value):
                what = "null" if value is None else "text of several lines"
                raise UsageError(f"column {name!r}, row {number:,}: {what} is no line of a text file")
            file.write(value.encode() + b"\n")
            number += 1
    return Path(path).stat().st_size


@contextmanager
def _whole(path: AnyPath) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole, flushed to the disk."""
    target = Path(path)
    draft = target.with_name(f".{target.name[:200]}.{os.getpid()}.incomplete")
    try:
        with disk_errors(target), draft.open("wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with disk_errors(target):
            draft.replace(target)
    finally:
        with suppress(OSError):
            draft.unlink()


def _as(schema: pa.Schema, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    for table in tables:
        if table.schema.equals(schema, check_metadata=True):
            yield table
        else:
            yield pa.Table.from_batches(
                [cast_batch(batch, schema, "the split") for batch in table.to_batches()], schema
            )


def _plain_rows(
    schema: pa.Schema, tables: Iterable[pa.Table], binary: Binary, nan: Nan, biggest: int | None = None
) -> Iterator[dict[str, Any]]:
    """Rows in what JSON has: text, numbers, booleans, null, lists and dicts. JSON columns as the values they hold."""
    if binary not in ("error", "base64") or nan not in ("error", "null"):
        raise UsageError(f"no such way: binary={binary!r}, nan={nan!r}")
    ways = {field.name: _way(field.type, field.name, binary, nan, biggest) for field in schema}
    number = 0
    for table in tables:
        for row in _told(table).to_pylist():
            try:
                yield {name: None if row[name] is None else way(row[name]) for name, way in ways.items()}
            except _NotJson as error:
                column, problem = error.args
                raise UsageError(f"column {column!r}, row {number:,}: {problem}") from None
            number += 1


class _NotJson(Exception):
    pass


def _told(table: pa.Table) -> pa.Table:
    """Dates, times and decimals as text, durations as whole numbers, at any depth: Python's own would lose digits."""
    for to in (_in_utc, _as_text_or_number):
        for place, field in enumerate(table.schema):
            if (type_ := _mapped(field.type, to)) != field.type:
                table = table.set_column(place, field.name, table.column(place).cast(type_))
    return table


def _mapped(type_: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    if isinstance(type_, pa.BaseExtensionType):
        return type_
    if pa.types.is_struct(type_):
        return pa.struct([pa.field(field.name, _mapped(field.type, leaf)) for field in type_])
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(_mapped(type_.value_type, leaf), type_.list_size)
    if pa.types.is_list(type_):
        return pa.list_(_mapped(type_.value_type, leaf))
    if pa.types.is_large_list(type_):
        return pa.large_list(_mapped(type_.value_type, leaf))
    return leaf(type_)


def _in_utc(type_: pa.DataType) -> pa.DataType:
    return pa.timestamp(type_.unit, "UTC") if pa.types.is_timestamp(type_) and type_.tz else type_


def _as_text_or_number(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_duration(type_):
        return pa.int64()
    if pa.types.is_float16(type_):
        return pa.float32()
    return pa.string() if pa.types.is_temporal(type_) or pa.types.is_decimal(type_) else type_


def _way(type_: pa.DataType, column: str, binary: Binary, nan: Nan, biggest: int | None) -> Callable[[Any], Any]:
    """How values of a type that are not null are said in JSON."""
    if isinstance(type_, pa.JsonType):
        return lambda value: json.loads(value, parse_constant=lambda text: _no_number(text, column, nan))
    if isinstance(type_, pa.BaseExtensionType):
        return _way(type_.storage_type, column, binary, nan, biggest)
    if pa.types.is_struct(type_):
        ways = {field.name: _way(field.type, column, binary, nan, biggest) for field in type_}
        return lambda value: {name: None if value[name] is None else way(value[name]) for name, way in ways.items()}
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        way = _way(type_.value_type, column, binary, nan, biggest)
        return lambda value: [None if one is None else way(one) for one in value]
    if pa.types.is_floating(type_):
        return lambda value: value if math.isfinite(value) else _no_number(value, column, nan)
    if pa.types.is_uint64(type_) and biggest is not None:
        return lambda value: value if value <= biggest else _too_big(value, column)
    if "binary" in str(type_):
        return lambda value: _bytes_text(value, column, binary)
    return lambda value: value


def _too_big(value: int, column: str) -> None:
    raise _NotJson(column, f"readers of JSON keep whole numbers to {_BIGGEST}, not {value}; cast the column to string")


def _no_number(value: Any, column: str, nan: Nan) -> None:
    if nan == "error":
        raise _NotJson(column, f"{value} would not read back; nan='null' writes null in its place")


def _bytes_text(value: bytes, column: str, binary: Binary) -> str:
    if binary == "error":
        raise _NotJson(column, "bytes have no text; binary='base64' writes them as base64:…, or remove the column")
    return "base64:" + base64.b64encode(value).decode("ascii")


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(
        "utf-8", "surrogatepass"
    )


def _field(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return repr(value)
    return (
        json.dumps(value, ensure_ascii=False, separators=(",", ":")) if isinstance(value, (list, dict)) else str(value)
    )


def _check_types(schema: pa.Schema, problem: Callable[[pa.DataType], str | None], format_: str) -> None:
    for field in schema:
        if (said := problem(field.type)) is not None:
            raise UsageError(f"column {field.name!r}: {format_} has no {said}; cast or remove it")


def _not_parquet(type_: pa.DataType) -> str | None:
    if pa.types.is_struct(type_) and type_.num_fields == 0:
        return "struct without fields"
    children = [type_.field(number).type for number in range(type_.num_fields)]
    return next((said for child in children if (said := _not_parquet(child)) is not None), None)
