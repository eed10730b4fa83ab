"""Plain text: a row a line, a paragraph or a file, in the column `text`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from crucible.errors import CorruptFile, UnsupportedFormat
from crucible.feature_types import parse_features
from crucible.formats.streams import open_bytes
from crucible.refs import ReadOptions

CHUNK = 10 << 20
"""Characters read at a time."""


def read_text(path: Path, name: str, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    """Line ends of all three kinds count, as in Python's text mode. Bytes that do not decode raise CorruptFile."""
    encoding = options.param("encoding", "utf-8")
    column = next(iter(parse_features(options.features)), "text") if options.features else "text"
    split = {"line": _lines, "paragraph": _paragraphs, "document": _document}.get(options.param("sample_by", "line"))
    if split is None:
        raise UnsupportedFormat(f"{name} (sample_by {options.param('sample_by')!r})", ("line", "paragraph", "document"))
    keep = bool(options.param("keep_linebreaks", False))
    rows = 0
    with io.TextIOWrapper(open_bytes(path, name), encoding=encoding, errors=options.param("encoding_errors")) as file:
        try:
            for texts in split(file, keep):
                if texts:
                    rows += len(texts)
                    yield pa.RecordBatch.from_arrays([pa.array(texts, pa.string())], names=[column])
        except UnicodeError as error:
            raise CorruptFile(name, f"after row {rows:,}", f"not {encoding} ({error})") from error


def _lines(file: io.TextIOWrapper, keep: bool) -> Iterator[list[str]]:
    while chunk := file.read(CHUNK):
        chunk += file.readline()
        lines = chunk.split("\n")
        ended = lines.pop() if lines[-1] == "" else None
        if keep:
            whole = [line + "\n" for line in lines]
            yield whole if ended is not None else [*whole[:-1], lines[-1]]
        else:
            yield lines


def _paragraphs(file: io.TextIOWrapper, _keep: bool) -> Iterator[list[str]]:
    rest = ""
    while chunk := file.read(CHUNK):
        parts = (rest + chunk + file.readline()).split("\n\n")
        rest = parts.pop()
        yield [part for part in parts if part]
    if rest:
        yield [rest]


def _document(file: io.TextIOWrapper, _keep: bool) -> Iterator[list[str]]:
    yield [file.read()]
