"""Where the columns of a parquet file lie in it, and whether what lies there is whole, as far as structure can tell.

For files of which only some columns came (`partial`), so that no hash can vouch for a byte. The footer is read by our
own reader (`thrift`), because pyarrow ends the process on some damaged ones. Which bytes are then wanted is a function
of the footer and the columns alone: the plan counts with it what the download then asks for.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from crucible.cache.ranges import Ranges
from crucible.errors import CorruptFile, UsageError
from crucible.formats.footer import ParquetFooter, parse_footer
from crucible.formats.thrift import BadThrift, CutShort, Spec, read_struct
from crucible.hashing import crc32
from crucible.refs import ByteRange, SourceFile

GAP_BYTES = 256 << 10
"""Chunks nearer than this to each other come in one range: so much arrives in the time of a round trip or two."""
MOST_RANGES = 1024
"""Of one file. Where there would be more the gaps that are bridged grow, so that a file of a million small chunks is
neither a million requests nor a list that is searched a million times."""
WHOLE_SHARE = 7 / 8
"""A file of which this share would come anyway comes whole: then its hash can be checked."""

_FOOTER: Spec = {
    2: {1: None, 3: None, 4: None, 5: None},
    3: None,
    4: {
        1: {1: None, 3: {1: None, 3: None, 5: None, 7: None, 9: None, 11: None}, 8: {}},
        3: None,
    },
    6: None,
}
_PAGE: Spec = {1: None, 2: None, 3: None, 4: None, 5: {1: None}, 7: {1: None}, 8: {1: None, 3: None}}
_HEADER_BYTES, _HEADER_MOST = 16 << 10, 16 << 20
"""A page's header is a few dozen bytes, but may carry two values of its column."""
_BLOCK = 1 << 20
_PADDING = 100
"""Old versions of parquet-mr leave the dictionary's header out of a chunk's size; every reader knows of it."""
_REPEATED = 2


@dataclass(frozen=True, slots=True)
class Chunk:
    """One column of one row group: bytes [start, stop) of the file."""

    column: str
    """The column that it belongs to, as a user names it: of a nested one the outermost name."""
    row_group: int
    start: int
    stop: int
    values: int
    """How many values its pages hold, nulls included."""
    rows: int | None
    """Rows of its row group; None where a row may hold several values."""

    @property
    def where(self) -> str:
        return f"column {self.column!r}, row group {self.row_group}"


@dataclass(frozen=True, slots=True)
class Layout:
    """A parquet file's footer, and the chunks of the columns that are wanted."""

    footer: ParquetFooter
    footer_bytes: int
    """Of the end of the file: the footer with its length and magic."""
    chunks: tuple[Chunk, ...]


def parse_layout(path: str, size: int, tail: bytes, columns: Collection[str]) -> Layout | ByteRange:
    """Read the last bytes of a file, or say which bigger range holds its footer.

    Raises CorruptFile for a footer that contradicts itself or the file, UsageError for a column that is not there.
    """
    footer = parse_footer(path, size, tail)
    if isinstance(footer, ByteRange):
        return footer
    for column in columns:
        if column not in footer.schema.names:
            raise UsageError(f"{path} has no column {column!r}; there are: {', '.join(footer.schema.names)}")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    try:
        said, _ = read_struct(tail[-length:-8], _FOOTER)
        chunks = tuple(_chunks(path, size - length, said, columns))
    except (BadThrift, KeyError, TypeError, ValueError, AttributeError, UnicodeDecodeError) as error:
        raise CorruptFile(path, "the footer", f"cannot be read ({error})") from error
    before = 0
    for chunk in sorted(chunks, key=lambda chunk: chunk.start):
        if chunk.start < before:
            raise CorruptFile(path, f"the footer, {chunk.where}", "lies over another chunk")
        before = chunk.stop
    return Layout(footer, length, chunks)


def _chunks(path: str, end: int, said: dict[int, Any], columns: Collection[str]) -> Iterator[Chunk]:
    """The chunks of `columns`. `end` is where the file's data ends."""
    leaves = _leaves(said[2])
    padding = _PADDING if _whole(said.get(6, b"")).startswith(b"parquet-mr") else 0
    for number, group in enumerate(said[4]):
        if len(group[1]) != len(leaves):
            raise ValueError(f"row group {number} has {len(group[1])} of {len(leaves)} columns")
        for (names, kind, repeated), entry in zip(leaves, group[1], strict=True):
            if names[0] not in columns:
                continue
            where = f"the footer, column {names[0]!r}, row group {number}"
            if 8 in entry or 3 not in entry:
                raise CorruptFile(path, where, "is encrypted" if 8 in entry else "has no description")
            if entry.get(1):
                raise CorruptFile(path, where, "lies in another file")
            about = entry[3]
            start, size, values, rows = int(about[9]), int(about[7]), int(about[5]), int(group[3])
            if 0 < int(about.get(11) or 0) < start:
                start = about[11]
            if about[1] != kind or [part.decode() for part in about[3]] != names:
                raise CorruptFile(path, where, "is not the column that the schema has there")
            if start < 4 or size < 0 or start + size > end:
                raise CorruptFile(path, where, f"bytes [{start:,}, {start + size:,}) are not in the file's {end:,}")
            if values < 0 or (not repeated and values != rows):
                raise CorruptFile(path, where, f"has {values:,} values, its row group {rows:,} rows")
            yield Chunk(names[0], number, start, min(end, start + size + padding), values, None if repeated else rows)


def _leaves(schema: Sequence[dict[int, Any]]) -> list[tuple[list[str], int, bool]]:
    """(path, physical type, may a row hold several values) of each column of the file, in its order."""
    found: list[tuple[list[str], int, bool]] = []

    def walk(at: int, above: list[str], repeated: bool) -> int:
        element = schema[at]
        name, several = [*above, element[4].decode()], repeated or element.get(3) == _REPEATED
        if len(name) > len(schema):
            raise ValueError("its schema is deeper than it is long")
        if not element.get(5):
            found.append((name, element[1], several))
            return at + 1
        at += 1
        for _ in range(element[5]):
            at = walk(at, name, several)
        return at

    at = 1  # the first is the whole
    try:
        for _ in range(schema[0].get(5) or 0):
            at = walk(at, [], False)
    except (IndexError, RecursionError):
        raise ValueError("its schema ends in the middle") from None
    if at != len(schema):
        raise ValueError("its schema has more elements than it says")
    return found


def _whole(value: Any) -> bytes:
    return value if isinstance(value, bytes) else b""


def wanted_ranges(layout: Layout, size: int) -> Ranges | None:
    """The bytes that bring the columns of `layout`, without the footer's; None where the whole file might as well come.

    Chunks that lie near each other come together, with what is between them.
    """
    gap = GAP_BYTES
    while len(wanted := _bridged(((chunk.start, chunk.stop) for chunk in layout.chunks), gap)) > MOST_RANGES:
        gap *= 2
    return None if wanted.size + layout.footer_bytes >= WHOLE_SHARE * size else wanted


def _bridged(ranges: Iterable[tuple[int, int]], gap: int) -> Ranges:
    joined: list[list[int]] = []
    for start, stop in sorted((start, stop) for start, stop in ranges if start < stop):
        if joined and start - joined[-1][1] <= gap:
            joined[-1][1] = max(joined[-1][1], stop)
        else:
            joined.append([start, stop])
    return Ranges.of((start, stop) for start, stop in joined)


def fetches(file: SourceFile, layout: Layout, tails: Sequence[ByteRange], *, most: int) -> tuple[int, int]:
    """(bytes, requests for ranges) that bringing the columns of one file takes when nothing goes wrong.

    `tails` are the ranges in which its footer is asked for, `most` bytes are one range at most. A file that comes whole
    after all comes after its footer.
    """
    have, asked = Ranges(), 0
    for tail in tails:
        asked += _parts(have.gaps(tail.start, tail.stop), most)
        have = have.add(tail.start, tail.stop)
    wanted = wanted_ranges(layout, file.size)
    if wanted is None:
        return have.size + file.size, asked + _parts([(0, file.size)], most)
    missing = [gap for start, stop in wanted for gap in have.gaps(start, stop)]
    return have.size + sum(stop - start for start, stop in missing), asked + _parts(missing, most)


def _parts(ranges: Iterable[tuple[int, int]], most: int) -> int:
    return sum(-(-(stop - start) // most) for start, stop in ranges)


def check_chunks(path: str, descriptor: int, chunks: Iterable[Chunk]) -> None:
    """Walk the pages of chunks that are on the disk: headers, sizes, counts, and CRCs where there are any.

    Raises CorruptFile naming the column and the row group. Holds a block of a MiB, or the header of one page.
    """
    for chunk in chunks:
        try:
            _walk(descriptor, chunk)
        except (KeyError, TypeError) as error:
            raise CorruptFile(path, chunk.where, "a page's header is none") from error
        except ValueError as error:
            raise CorruptFile(path, chunk.where, str(error)) from error


def _walk(descriptor: int, chunk: Chunk) -> None:
    at, values, rows, rows_said = chunk.start, 0, 0, True
    while values < chunk.values:
        if at >= chunk.stop:
            raise ValueError(f"its pages end after {values:,} of {chunk.values:,} values")
        header, at = _header(descriptor, at, chunk.stop)
        kind, packed = header[1], int(header[3])
        if packed < 0 or int(header[2]) < 0 or at + packed > chunk.stop:
            raise ValueError(f"a page of {packed:,} bytes does not fit into its chunk")
        if (said := header.get(4)) is not None and (actual := _crc32(descriptor, at, at + packed)) != said & 0xFFFFFFFF:
            raise ValueError(f"a page has crc {actual:08x}, its header says {said & 0xFFFFFFFF:08x}")
        at += packed
        if kind not in (0, 1, 2, 3):
            raise ValueError(f"a page of the unknown type {kind}")
        if kind in (0, 3):  # the others hold a dictionary, or an index
            told = header[5 if kind == 0 else 8]
            if (more := int(told[1])) < 0:
                raise ValueError(f"a page says that it has {more:,} values")
            values += more
            rows, rows_said = rows + int(told.get(3) or 0), rows_said and kind == 3
    if values != chunk.values:
        raise ValueError(f"its pages have {values:,} values, its footer says {chunk.values:,}")
    if chunk.rows is not None and values and rows_said and rows != chunk.rows:
        raise ValueError(f"its pages have {rows:,} rows, its footer says {chunk.rows:,}")


def _header(descriptor: int, at: int, stop: int) -> tuple[dict[int, Any], int]:
    """(a page's header, where its bytes begin)."""
    size = _HEADER_BYTES
    while True:
        data = os.pread(descriptor, min(size, stop - at), at)
        try:
            header, length = read_struct(data, _PAGE)
            return header, at + length
        except CutShort:
            if len(data) < size or size >= _HEADER_MOST:
                raise
            size *= 4


def _crc32(descriptor: int, start: int, stop: int) -> int:
    crc = 0
    while start < stop:
        piece = os.pread(descriptor, min(_BLOCK, stop - start), start)
        if not piece:
            raise ValueError("the file ends in the middle of a page")
        crc, start = crc32(piece, crc), start + len(piece)
    return crc
