"""JSON: a value a line, one array of values, or one object with the rows under a `field`.

Types are inferred as `datasets` infers them: from the first ten megabytes of the file, by pyarrow; fields without a
common type become JSON text. Later chunks are cast to that, or widen it where a value needs more room.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import json as arrow_json

from crucible.casts import cast_batch, dump_json, unify
from crucible.errors import CorruptFile, SchemaConflict
from crucible.feature_types import features_of, parse_features, schema_of
from crucible.formats import mixed
from crucible.formats.ahead import made_in_order
from crucible.formats.fields import field_values, goes_on
from crucible.formats.limits import Limits
from crucible.formats.nulls import whole_lists
from crucible.formats.parquet import first_line
from crucible.formats.streams import open_bytes, rest_of_line
from crucible.refs import ReadOptions

CHUNK = 10 << 20
"""Bytes parsed at a time. `datasets` infers from a first chunk of this size: another size could infer other types."""
_SMALL = 1 << 18
"""A file that ends before gets no chunk of its own: zeros to fill one were a tenth of what many files of 2 KB cost."""

_PARSERS = 2
"""Threads that parse one file. Two keep up with one that unpacks gzip; each holds a chunk as text and as columns."""

_TYPE_CHANGED = re.compile(r"JSON parse error: Column\((.*)\) changed from", re.DOTALL)
_NULL = re.compile(rb"\s*null")
_ROW = re.compile(r"in row (\d+)")
_SPACE = re.compile(r"[ \t\r\n]*")
_LINE = re.compile(rb"[^\r\n]+")


def read_json(
    path: Path, name: str, options: ReadOptions, threads: int = 1, limits: Limits | None = None
) -> Iterator[pa.RecordBatch]:
    """Chunks are unpacked by one thread and parsed by `threads` others; their types are settled here, in order."""
    with open_bytes(path, name) as raw:
        file = _as_utf8(raw, name, options)
        head = file.peek(len(codecs.BOM_UTF8))
        if head.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        parser = _Parser(name, options)
        yield from parser.batches(_chunks(file, name, options.param("field"), parser, limits or Limits()), threads)


def _as_utf8(file: io.BufferedReader, name: str, options: ReadOptions) -> io.BufferedReader:
    encoding = codecs.lookup(options.param("encoding", "utf-8")).name
    if encoding == "utf-8":
        return file
    text = io.TextIOWrapper(file, encoding=encoding, errors=options.param("encoding_errors"), newline="")
    return io.BufferedReader(_Recoded(text, name))


class _Recoded(io.RawIOBase):
    """Text as UTF-8 bytes again: pyarrow reads nothing else."""

    def __init__(self, text: io.TextIOWrapper, name: str) -> None:
        super().__init__()
        self._text, self._path, self._left = text, name, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            try:
                self._left = self._text.read(1 << 16).encode()
            except UnicodeError as error:
                raise CorruptFile(self._path, "", f"not {self._text.encoding} ({error})") from error
        part, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def _chunks(
    file: io.BufferedReader, name: str, field: str | None, parser: _Parser, limits: Limits
) -> Iterator[bytes | bytearray]:
    """Whole lines of JSON, about CHUNK bytes at a time, whichever form the file has."""
    if field is not None:
        yield from _lines_of(_as_rows(field_values(file, name, field, limits)))
        return
    first = _read(file)
    if first.lstrip()[:1] == b"[":
        yield from _lines_of(_as_rows(_values(io.BytesIO(first), file, name, limits, array=True)))
        return
    first += rest_of_line(file, name, limits)
    if first.lstrip()[:1] == b"{" and not _is_lines(first):
        # values that span lines: they are taken apart one by one, because a chunk may end inside one
        parser.compare_keys = False  # `datasets` compares the keys of structs only where a line is a value
        yield from _lines_of(_values(io.BytesIO(first), file, name, limits, array=False))
        return
    chunk = first
    del first  # or it would be held to the end of the file
    while chunk:
        yield chunk
        chunk = _read(file)
        chunk += rest_of_line(file, name, limits) if chunk else b""


def _read(file: io.BufferedReader) -> bytearray:
    """The next CHUNK bytes, less at the end. They are read to where they stay: a fresh copy costs a chunk's pages."""
    begun = file.read(_SMALL)
    if len(begun) < _SMALL:
        return bytearray(begun)
    chunk = bytearray(CHUNK)
    chunk[:_SMALL] = begun
    with memoryview(chunk) as whole, whole[_SMALL:] as rest:
        size = file.readinto(rest)
    del chunk[_SMALL + size :]
    return chunk


def _is_lines(chunk: bytes | bytearray) -> bool:
    """True when the first line that is not blank is a whole value by itself."""
    line = next((found[0] for found in _LINE.finditer(chunk) if found[0].strip()), b"")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        # one line that is broken, or the first of a value's many: a second line that starts a value of its own tells
        return b"\n{" in chunk.strip()
    return True


def _as_rows(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield value if isinstance(value, dict) else {"text": value}


def _lines_of(rows: Iterable[Any]) -> Iterator[bytes]:
    lines, size = [], 0
    for row in rows:
        line = dump_json(row)
        lines.append(line)
        size += len(line)
        if size >= CHUNK:
            yield "\n".join(lines).encode("utf-8", "surrogatepass")
            lines, size = [], 0
    if lines:
        yield "\n".join(lines).encode("utf-8", "surrogatepass")


def _values(first: io.BytesIO, rest: io.BufferedReader, name: str, limits: Limits, *, array: bool) -> Iterator[Any]:
    """The values of one array, or values one after the other. Holds a chunk, or one value if that is bigger."""
    decoder, text, at, done, count, want = json.JSONDecoder(), "", 0, False, 0, 1 << 20
    decode = codecs.getincrementaldecoder("utf-8")()

    def problem(what: str) -> CorruptFile:
        return CorruptFile(name, f"value {count:,}", what)

    opened = not array
    after_value = closed = False
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty string too
        if at < len(text):
            if closed:
                raise problem("has something after the end of the array")
            if not opened:
                at, opened = at + 1, True
                continue
            if array and text[at] == "]":
                at, closed = at + 1, True
                continue
            if array and after_value:
                if text[at] != ",":
                    raise problem(f"is followed by {text[at]!r}, not by a comma")
                at, after_value = at + 1, False
                continue
            try:
                value, end = decoder.raw_decode(text, at)
            except (JSONDecodeError, RecursionError) as error:
                if done:
                    raise problem(f"not JSON ({error})") from error
            else:
                if done or not goes_on(text, end):
                    yield value
                    count, at, after_value = count + 1, end, True
                    continue
        if done:
            break
        text, at = text[at:], 0
        limits.check_row(name, f"value {count:,}", len(text))
        want = max(1 << 20, len(text))  # doubles while one value does not fit, so that a big value costs no square
        data = first.read(want) or rest.read(want)
        done = not data
        try:
            text += decode.decode(data, final=done)
        except UnicodeError as error:
            raise problem(f"not UTF-8 ({error})") from error
    if array and not closed:
        raise problem("is missing: the file ends inside its array")


class _Parser:
    """Chunks of JSON lines to batches of one schema, which only ever widens."""

    def __init__(self, name: str, options: ReadOptions) -> None:
        self.name = name
        self.declared = parse_features(options.features) if options.features is not None else None
        self.use_json = options.param("on_mixed_types", "use_json") == "use_json"
        self.compare_keys = self.use_json and self.declared is None
        self.paths = mixed.json_paths(self.declared) if self.declared is not None else set()
        self.schema: pa.Schema | None = None
        self.rows = 0

    def batches(self, chunks: Iterable[bytes | bytearray], threads: int = 1) -> Iterator[pa.RecordBatch]:
        for number, (chunk, parsed) in enumerate(made_in_order(chunks, self._parse_early, min(threads, _PARSERS))):
            if chunk.isspace():
                continue
            if number == 0 and self.compare_keys:
                parsed = cache(parsed)
                if not _keys_agree(parsed):
                    self._find_mixed(chunk)
            table = self._table(chunk, parsed)
            for batch in table.combine_chunks().to_batches():
                yield self._settle(batch)
            self.rows += table.num_rows

    def _find_mixed(self, chunk: bytes | bytearray) -> None:
        try:
            rows = [json.loads(line) for line in chunk.splitlines()]
        except (ValueError, RecursionError):
            return  # not one value a line: left to pyarrow, as in `datasets`
        self.paths |= mixed.mixed_paths(rows)

    def _parse_early(self, chunk: bytes | bytearray) -> pa.Table | None:
        """The chunk as it is; None where columns are known that it is not parsed as it is for, or it is blank."""
        return None if self.paths or chunk.isspace() else _parse(chunk)

    def _table(self, chunk: bytes | bytearray, parsed: Callable[[], pa.Table | None]) -> pa.Table:
        """Parse, and let fields that turn out to have no common type become JSON text."""
        while True:
            text = self._encode(chunk) if self.paths else chunk
            try:
                early = None if self.paths else parsed()
                table = _parse(text) if early is None else early
            except (pa.ArrowException, UnicodeError, ValueError) as error:
                changed = _TYPE_CHANGED.match(str(error)) if self.use_json else None
                path = None
                if changed is not None and changed[1]:
                    path = mixed.find_path(changed[1], self._loaded(text))
                if path is None or any(path[: len(known)] == known for known in self.paths):
                    raise self._corrupt(error) from error
                self.paths = mixed.add_path(self.paths, path)
                continue
            break
        features = mixed.with_json(features_of(table.schema), self.paths)
        schema = schema_of(features)
        return pa.Table.from_batches([cast_batch(b, schema, self.name) for b in table.to_batches()], schema)

    def _encode(self, chunk: bytes | bytearray) -> bytes:
        rows = list(self._loaded(chunk))
        for path in self.paths:
            rows = [mixed.encode(row, path) for row in rows]
        return "\n".join(map(dump_json, rows)).encode("utf-8", "surrogatepass")

    def _loaded(self, chunk: bytes | bytearray) -> Iterator[Any]:
        for number, line in enumerate(bytes(chunk).splitlines()):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise CorruptFile(self.name, f"row {self.rows + number:,}", f"not JSON ({error})") from error

    def _corrupt(self, error: BaseException) -> CorruptFile:
        text = first_line(error).removeprefix("JSON parse error: ")
        row = _ROW.search(text)
        where = f"row {self.rows + int(row[1]):,}" if row else f"after row {self.rows:,}"
        return CorruptFile(self.name, where, text)

    def _settle(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Cast to what the file's first chunk said; where that cannot hold the values, to something wider."""
        if self.declared is not None:
            return batch
        if self.schema is None:
            self.schema = batch.schema
            return batch
        try:
            return cast_batch(batch, self.schema, self.name)
        except SchemaConflict:
            self.schema = unify([(self.name, self.schema), (self.name, batch.schema)])
            return cast_batch(batch, self.schema, self.name)


def _keys_agree(parsed: Callable[[], pa.Table | None]) -> bool:
    """True when Arrow's columns show that all structs of a field have the same keys: then no row need be looked at.

    A key that is not there is a null. So is one whose value is null, which only the rows can tell from that. Rows cost
    four times what Arrow's columns do, and the first ten megabytes are all of many a file.
    """
    try:
        table = parsed()
    except (pa.ArrowException, UnicodeError, ValueError):
        return False
    return table is not None and all(_is_uniform(chunk) for column in table.columns for chunk in column.chunks)


def _is_uniform(array: pa.Array) -> bool:
    type_ = array.type
    if pa.types.is_list(type_):
        return _is_uniform(array.flatten())
    if not pa.types.is_struct(type_):
        return True
    children = array.flatten()
    return bool(children) and all(child.null_count == array.null_count and _is_uniform(child) for child in children)


def _parse(text: bytes | bytearray) -> pa.Table:
    """One block, because pyarrow refuses a value that straddles two; no threads, because a task has one core.

    Raises ValueError for text that is not UTF-8: pyarrow would hand it on as a string, to be met by whoever reads it.
    """
    _check_utf8(text)
    # pyarrow ends the process where the first row is a null; behind another row a null is a row of nulls
    first = _NULL.match(text) is not None
    if first:
        text = b"{}\n" + text
    options = arrow_json.ReadOptions(block_size=max(len(text), 1), use_threads=False)
    try:
        table = whole_lists(arrow_json.read_json(pa.BufferReader(text), read_options=options))
    except pa.ArrowException as error:
        if not first:
            raise
        raise pa.ArrowInvalid(_ROW.sub(lambda row: f"in row {int(row[1]) - 1}", str(error))) from error
    table.validate()
    return table.slice(1) if first else table


def _check_utf8(text: bytes | bytearray) -> None:
    """Raises ValueError. Arrow checks without making a str of it, which for a long row would be four times as big."""
    ends = pa.array([0, len(text)], pa.int64()).buffers()[1]
    try:
        pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(text)]).cast(pa.large_string())
    except pa.ArrowInvalid:
        for row, line in enumerate(bytes(text).split(b"\n")):
            try:
                line.decode()
            except UnicodeError as error:
                raise ValueError(f"not UTF-8 ({error}) in row {row}") from None
        raise
