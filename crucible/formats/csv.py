"""CSV and TSV, with the types pandas gives and so `datasets` gives.

Fields are read as text by pyarrow, ragged files by Python's csv, and each column's type is settled by the first 10,000
rows: integers; else floats, also for integers with a gap; else booleans; else strings. Wanted differences from
`datasets`: a later row that does not fit widens the column instead of failing, text stays as it is written, floats are
rounded correctly in the last digit, and a line with too many fields is an error even where pandas guesses an index.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
from pyarrow import csv as arrow_csv

from crucible.casts import is_text
from crucible.errors import CorruptFile, UnsupportedFormat
from crucible.feature_types import Feature, arrow_type, parse_features
from crucible.formats.limits import MOST_BYTES, Limits
from crucible.formats.parquet import first_line
from crucible.formats.streams import open_bytes
from crucible.refs import ReadOptions

pc: Any = pyarrow.compute  # its functions are made at run time, which no type checker follows

INFER_ROWS = 10_000
"""Rows that settle the types: the chunk `datasets` hands to pandas."""
HELD_BYTES = 32 << 20
"""Where those rows are more than this, they are read twice: for their types, and for their values."""

_BLOCK = 4 << 20
_SUPPORTED = frozenset(
    (
        *("sep", "delimiter", "header", "names", "column_names", "quotechar", "doublequote", "escapechar"),
        *("na_values", "keep_default_na", "na_filter", "encoding", "encoding_errors", "skiprows"),
    )
)
_NA = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA")
) | {"NULL", "NaN", "None", "n/a", "nan", "null"}
_INTEGER = r"^[+-]?[0-9]+$"
_FLOAT = r"(?i)^[+-]?(?:[0-9]+\.?[0-9]*(?:e[+-]?[0-9]+)?|\.[0-9]+(?:e[+-]?[0-9]+)?|inf|infinity|nan)$"
_BOOLEANS = pa.array(["true", "false"], pa.large_string())


def read_csv(path: Path, name: str, options: ReadOptions, limits: Limits | None = None) -> Iterator[pa.RecordBatch]:
    unknown = sorted(key for key, _ in options.params if key not in _SUPPORTED)
    if unknown:
        raise UnsupportedFormat(f"{name} (csv with {', '.join(unknown)})", sorted(_SUPPORTED))
    dialect = _Dialect(options, limits or Limits())
    names, skip = _header(path, name, dialect, options)
    declared = parse_features(options.features) if options.features is not None else None
    columns = {
        place: _Column(dialect.nulls(options), None if declared is None else declared[label])
        for place, label in enumerate(names)
        if declared is None or label in declared  # other columns are left out, as in `datasets`
    }
    labels = [names[place] for place in columns]
    rows = 0
    for batch in _in_steps(partial(_records, path, name, dialect, names, skip), columns):
        converted = [column.convert(batch.column(place)) for place, column in columns.items()]
        yield pa.RecordBatch.from_arrays(converted, labels)
        rows += batch.num_rows
    if not rows:
        yield pa.RecordBatch.from_arrays([pa.nulls(0) for _ in labels], labels)


class _Dialect:
    def __init__(self, options: ReadOptions, limits: Limits) -> None:
        self.row_bytes = min(limits.row_bytes, MOST_BYTES)
        self.delimiter = options.param("delimiter") or options.param("sep", ",")
        self.quote = options.param("quotechar", '"')
        self.double = options.param("doublequote", True)
        self.escape = options.param("escapechar")
        self.encoding = options.param("encoding") or "utf-8"
        self.errors = options.param("encoding_errors") or "strict"
        self.skip_rows = options.param("skiprows") or 0

    def nulls(self, options: ReadOptions) -> frozenset[str]:
        """What counts as missing."""
        if not options.param("na_filter", True):
            return frozenset()
        own = options.param("na_values") or []
        own = [own] if isinstance(own, (str, int, float)) else own
        return (_NA if options.param("keep_default_na", True) else frozenset()) | {str(value) for value in own}

    def text(self, path: Path, name: str) -> io.TextIOWrapper:
        encoding = "utf-8-sig" if self.encoding.lower().replace("_", "-") in ("utf-8", "utf8") else self.encoding
        return io.TextIOWrapper(open_bytes(path, name), encoding=encoding, errors=self.errors, newline="")

    def rows(self, text: io.TextIOWrapper) -> Iterator[list[str]]:
        """Records by Python's csv, blank lines left out."""
        csv.field_size_limit(self.row_bytes)
        lines = _Lines(text, self.row_bytes)
        for _ in range(self.skip_rows):
            next(lines, None)
            lines.used = 0
        reader = csv.reader(
            lines, delimiter=self.delimiter, quotechar=self.quote, doublequote=self.double, escapechar=self.escape
        )
        for row in reader:
            lines.used = 0
            if row:
                yield row


class _Lines:
    """The lines of a file, of which one record may have `most` characters: csv bounds its fields, and no line."""

    def __init__(self, text: io.TextIOWrapper, most: int) -> None:
        self._text, self._most, self.used = text, most, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(self._most + 1)
        self.used += len(line)
        if self.used > self._most:
            raise csv.Error(f"field larger than field limit ({self._most})")
        if not line:
            raise StopIteration
        return line


def _header(path: Path, name: str, dialect: _Dialect, options: ReadOptions) -> tuple[list[str], int]:
    """Column names and how many records they take up."""
    given = options.param("column_names") or options.param("names")
    header = options.param("header", "infer")
    if header not in ("infer", 0, None):
        raise UnsupportedFormat(f"{name} (csv with header {header!r})", ("infer", "0", "null"))
    if given and header in ("infer", None):
        return [str(label) for label in given], 0
    with dialect.text(path, name) as text:
        try:
            first = next(dialect.rows(text), None)
        except (csv.Error, UnicodeError) as error:
            raise CorruptFile(name, "its header", _problem(error)) from error
    if first is None:
        raise CorruptFile(name, "byte 0", "is empty: a csv file has at least its header")
    if header is None:
        return [str(place) for place in range(len(first))], 0
    return [str(label) for label in given] if given else _distinct(first), 1


def _distinct(labels: list[str]) -> list[str]:
    """Names as pandas makes them distinct: `a`, `a.1`; an empty one is `Unnamed: <place>`."""
    taken: set[str] = set()
    counts: dict[str, int] = {}
    out = []
    for place, label in enumerate(labels):
        own = label or f"Unnamed: {place}"
        new = own
        while new in taken:
            counts[own] = counts.get(own, 0) + 1
            new = f"{own}.{counts[own]}"
        taken.add(new)
        out.append(new)
    return out


def _records(path: Path, name: str, dialect: _Dialect, names: list[str], skip: int) -> Iterator[pa.RecordBatch]:
    """All fields as text: by pyarrow up to a record with too few of them, from there by Python's csv."""
    done = 0
    try:
        for batch in _fast(path, name, dialect, names, skip):
            yield batch
            done += batch.num_rows
    except pa.ArrowInvalid as error:
        yield from _slow(path, name, dialect, names, skip, done, error)


def _fast(path: Path, name: str, dialect: _Dialect, names: list[str], skip: int) -> Iterator[pa.RecordBatch]:
    places = [str(place) for place in range(len(names))]  # names of the file may repeat, places do not
    if len(dialect.delimiter) != 1 or dialect.errors != "strict":
        raise pa.ArrowInvalid("not for the fast reader")
    with open_bytes(path, name) as file:
        try:
            reader = arrow_csv.open_csv(
                pa.PythonFile(file, "r"),
                read_options=arrow_csv.ReadOptions(
                    use_threads=False,
                    block_size=_BLOCK,
                    skip_rows=dialect.skip_rows,
                    skip_rows_after_names=skip,
                    column_names=places,
                    encoding=dialect.encoding,
                ),
                parse_options=arrow_csv.ParseOptions(
                    delimiter=dialect.delimiter,
                    quote_char=dialect.quote,
                    double_quote=dialect.double,
                    escape_char=dialect.escape or False,
                    newlines_in_values=True,
                ),
                convert_options=arrow_csv.ConvertOptions(
                    column_types=dict.fromkeys(places, pa.large_string()),
                    strings_can_be_null=False,
                ),
            )
        except pa.ArrowInvalid as error:
            if "Empty CSV file" in str(error):
                return
            raise
        yield from reader


def _slow(
    path: Path, name: str, dialect: _Dialect, names: list[str], skip: int, done: int, cause: Exception
) -> Iterator[pa.RecordBatch]:
    """The same records, from record `done`, with short ones filled up. Raises CorruptFile for one too long."""
    width = len(names)
    if len(dialect.delimiter) != 1:
        raise UnsupportedFormat(f"{name} (csv with separator {dialect.delimiter!r})", ("one character",)) from cause
    pending: list[list[str]] = []
    size = 0
    number = -skip
    with dialect.text(path, name) as text:
        try:
            for row in dialect.rows(text):
                if number >= done:
                    if len(row) > width:
                        raise CorruptFile(name, f"row {number:,}", f"has {len(row)} fields, the header {width}")
                    pending.append(row + [""] * (width - len(row)))
                    size += sum(map(len, row))
                number += 1
                if len(pending) == INFER_ROWS or size > _BLOCK:
                    yield _batch(pending, width)
                    pending, size = [], 0
        except (csv.Error, UnicodeError) as error:
            raise CorruptFile(name, f"row {max(number, 0):,}", _problem(error)) from error
    if pending:
        yield _batch(pending, width)


def _problem(error: Exception) -> str:
    advice = "; set CRUCIBLE_ROW_BYTES higher if its quotes are right" if "field limit" in str(error) else ""
    return first_line(error) + advice


def _batch(rows: list[list[str]], width: int) -> pa.RecordBatch:
    columns = [pa.array([row[place] for row in rows], pa.large_string()) for place in range(width)]
    return pa.RecordBatch.from_arrays(columns, [str(place) for place in range(width)])


def _in_steps(
    records: Callable[[], Iterator[pa.RecordBatch]], columns: Mapping[int, _Column]
) -> Iterator[pa.RecordBatch]:
    """First a batch of INFER_ROWS rows (or all there are), then the batches as they come.

    Where that batch would be too big, all batches as they come, once the types of `columns` are settled by their rows.
    """
    batches = records()
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        held.append(batch)
        rows += batch.num_rows
        size += batch.nbytes
        if rows >= INFER_ROWS or size > HELD_BYTES:
            break
    if size > HELD_BYTES:
        _settle(chain(held, batches), columns)
        del held
        batches = records()
    elif rows:
        table = pa.Table.from_batches(held).combine_chunks()
        del held
        yield from table.slice(0, INFER_ROWS).to_batches()
        yield from table.slice(INFER_ROWS).to_batches()
        del table
    yield from (batch for batch in batches if batch.num_rows)


def _settle(batches: Iterable[pa.RecordBatch], columns: Mapping[int, _Column]) -> None:
    """Let each column's type be what its first INFER_ROWS texts say, of which no more than a batch is held."""
    evidence = {place: _Evidence() for place, column in columns.items() if column.declared is None}
    left = INFER_ROWS
    for batch in batches:
        batch = batch.slice(0, left)
        for place, one in evidence.items():
            one.add(*columns[place].cleaned(batch.column(place)))
        left -= batch.num_rows
        if not left:
            break
    for place, one in evidence.items():
        columns[place].type = one.type()


class _Column:
    """One column's texts to values. The first batch settles the type; a later one that does not fit widens it."""

    def __init__(self, nulls: frozenset[str], declared: Feature | None) -> None:
        self.nulls = pa.array(sorted(nulls), pa.large_string())
        self.declared = declared
        self.type: pa.DataType | None = None

    def cleaned(self, text: Any) -> tuple[Any, Any]:
        """The texts with nulls where they are missing, and those without blanks and signs that say nothing."""
        missing = pc.is_in(text, value_set=self.nulls)
        text = pc.if_else(missing, pa.scalar(None, pa.large_string()), text)
        if self.declared is not None and is_text(arrow_type(self.declared)):
            return text, text  # not by way of a number: 007 stays 007
        return text, pc.replace_substring_regex(pc.utf8_trim_whitespace(text), r"^\+", "")

    def convert(self, text: Any) -> Any:
        text, trimmed = self.cleaned(text)
        if self.declared is not None:
            return trimmed
        if self.type is None:
            self.type = _infer(text, trimmed)
        elif not (_match_all(trimmed, _FLOAT) if self.type == pa.float64() else _fits(self.type, trimmed)):
            self.type = pa.float64() if pa.types.is_integer(self.type) and _fits(pa.float64(), trimmed) else None
            self.type = self.type or pa.large_string()
        if pa.types.is_boolean(self.type):
            return pc.equal(pc.utf8_lower(trimmed), "true")  # null where the text is
        return text if self.type == pa.large_string() else trimmed.cast(self.type)


class _Evidence:
    """What `_infer` finds in all texts of a column, from one batch of them after the other."""

    def __init__(self) -> None:
        self._fits = dict.fromkeys((pa.int64(), pa.uint64(), pa.bool_()), True)
        self._values = self._nulls = False
        self._numbers = self._whole = True

    def add(self, text: Any, trimmed: Any) -> None:
        self._nulls = self._nulls or text.null_count > 0
        self._values = self._values or text.null_count < len(text)
        for type_, fits in self._fits.items():
            self._fits[type_] = fits and _fits(type_, text if pa.types.is_boolean(type_) else trimmed)
        self._numbers = self._numbers and _match_all(trimmed, _FLOAT)
        self._whole = self._whole and self._numbers and _match_all(trimmed, _INTEGER)

    def type(self) -> pa.DataType:
        if not self._values:
            return pa.float64()
        for type_ in (pa.int64(), pa.uint64()) if not self._nulls else ():
            if self._fits[type_]:
                return type_
        if self._numbers and (not self._whole or self._fits[pa.int64()]):
            return pa.float64()
        return pa.bool_() if self._fits[pa.bool_()] else pa.large_string()


def _infer(text: Any, trimmed: Any) -> pa.DataType:
    if text.null_count == len(text):
        return pa.float64()
    if not text.null_count:
        for type_ in (pa.int64(), pa.uint64()):
            if _fits(type_, trimmed):
                return type_
    for type_ in (pa.float64(), pa.bool_()):
        if _fits(type_, text if pa.types.is_boolean(type_) else trimmed):
            return type_
    return pa.large_string()


def _fits(type_: pa.DataType, values: Any) -> bool:
    """True when every text that is not null is a value of the type."""
    if pa.types.is_large_string(type_):
        return True
    if pa.types.is_boolean(type_):
        folded = pc.utf8_lower(values.drop_null())
        return bool(pc.all(pc.is_in(folded, value_set=_BOOLEANS), min_count=0).as_py())
    pattern = _INTEGER if pa.types.is_integer(type_) else _FLOAT
    if not _match_all(values, pattern):
        return False
    if pa.types.is_floating(type_):
        # digits alone that overflow both integer types stay text, as pandas leaves them
        whole = pc.match_substring_regex(values.drop_null(), _INTEGER)
        return len(values) == values.null_count or not pc.all(whole).as_py() or _casts(values, pa.int64())
    return _casts(values, type_)


def _match_all(values: Any, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(values.drop_null(), pattern), min_count=0).as_py())


def _casts(values: Any, type_: pa.DataType) -> bool:
    try:
        values.cast(type_)
    except pa.ArrowInvalid:
        return False
    return True
