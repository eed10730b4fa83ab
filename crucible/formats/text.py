"""Plain text: a row a line, a paragraph or a file, in the column `text`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from crucible.errors import CorruptFile, UnsupportedFormat
from crucible.feature_types import parse_features
from crucible.formats.limits import Limits
from crucible.formats.streams import open_bytes, rest_of_line
from crucible.refs import ReadOptions

CHUNK = 10 << 20
"""Characters read at a time."""


def read_text(path: Path, name: str, options: ReadOptions, limits: Limits | None = None) -> Iterator[pa.RecordBatch]:
    """Line ends of all three kinds count, as in Python's text mode. Bytes that do not decode raise CorruptFile."""
    encoding = options.param("encoding", "utf-8")
    column = next(iter(parse_features(options.features)), "text") if options.features else "text"
    split = {"line": _lines, "paragraph": _paragraphs, "document": _document}.get(options.param("sample_by", "line"))
    if split is None:
        raise UnsupportedFormat(f"{name} (sample_by {options.param('sample_by')!r})", ("line", "paragraph", "document"))
    bounds = _Bounds(name, limits or Limits())
    keep = bool(options.param("keep_linebreaks", False))
    rows = 0
    with io.TextIOWrapper(open_bytes(path, name), encoding=encoding, errors=options.param("encoding_errors")) as file:
        try:
            for texts in split(file, keep, bounds):
                if texts:
                    rows += len(texts)
                    yield pa.RecordBatch.from_arrays([pa.array(texts, pa.string())], names=[column])
        except UnicodeError as error:
            raise CorruptFile(name, f"after row {rows:,}", f"not {encoding} ({error})") from error


@dataclass(frozen=True, slots=True)
class _Bounds:
    name: str
    limits: Limits


def _lines(file: io.TextIOWrapper, keep: bool, bounds: _Bounds) -> Iterator[list[str]]:
    while chunk := file.read(CHUNK):
        chunk += rest_of_line(file, bounds.name, bounds.limits)
        lines = chunk.split("\n")
        ended = lines.pop() if lines[-1] == "" else None
        if keep:
            whole = [line + "\n" for line in lines]
            yield whole if ended is not None else [*whole[:-1], lines[-1]]
        else:
            yield lines


def _paragraphs(file: io.TextIOWrapper, _keep: bool, bounds: _Bounds) -> Iterator[list[str]]:
    rest = ""
    while chunk := file.read(CHUNK):
        parts = (rest + chunk + rest_of_line(file, bounds.name, bounds.limits)).split("\n\n")
        rest = parts.pop()
        bounds.limits.check_row(bounds.name, "a paragraph of it", len(rest))
        yield [part for part in parts if part]
    if rest:
        yield [rest]


def _document(file: io.TextIOWrapper, _keep: bool, bounds: _Bounds) -> Iterator[list[str]]:
    text = file.read(bounds.limits.row_bytes + 1)
    bounds.limits.check_row(bounds.name, "", len(text))
    yield [text]
