"""The text of a journal: who brings a blob, and which of its ranges are on disk. Parsing only; `lease` writes it.

Line 1 is JSON: the blob's oid and size, and the process that made the journal. Then one line each, in any order:
    <start> <stop> <crc32>         these bytes were written to the data file beside it
    etag ["<source>", "<etag>"]    what a source called its version of the file
    released                       the last line of a process that let go in good order
A line counts when its newline is there. Reading stops at the first line that is none of these: what a kill or a power
cut left behind it is not believed. What is believed is still only a claim; the checksums say whether the disk agrees.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from crucible.cache.owner import Owner
from crucible.refs import SourceFile

VERSION = 1
HEADER_BYTES = 4096
RELEASED = b"released\n"
SUFFIX = ".incomplete"
"""Ends the name of everything that is not a blob: the Hub cache's own prune looks for it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One finished range: bytes [start, stop) and zlib's crc32 of them."""

    start: int
    stop: int
    crc32: int

    def line(self) -> bytes:
        return b"%d %d %d\n" % (self.start, self.stop, self.crc32)


@dataclass(frozen=True, slots=True)
class Journal:
    """What a journal says."""

    owner: Owner
    entries: tuple[Entry, ...] = ()
    etags: dict[str, str] = field(default_factory=dict)

    @property
    def distinct(self) -> tuple[Entry, ...]:
        """The entries without repeats."""
        return tuple(dict.fromkeys(self.entries))

    @property
    def claimed(self) -> int:
        """Bytes it says are there, an upper bound."""
        return sum(entry.stop - entry.start for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Glance:
    """A journal as one that waits sees it: cheap however long the journal is."""

    inode: int
    size: int
    mtime: float
    owner: Owner | None
    """None while its header is not written yet, or is not one."""
    released: bool


def header(file: SourceFile, owner: Owner) -> bytes:
    """The first line."""
    record = {"journal": VERSION, "oid": file.oid, "size": file.size, **asdict(owner)}
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def etag_line(source: str, etag: str) -> bytes:
    return b"etag " + json.dumps([source, etag]).encode() + b"\n"


def parse(data: bytes, file: SourceFile) -> Journal | None:
    """The journal, or None if it is not one of this very file: then the data beside it means nothing either."""
    lines = data.split(b"\n")
    lines.pop()  # empty, or torn
    if not lines:
        return None
    found = _parse_header(lines[0])
    if found is None or found[1:] != (file.oid, file.size):
        return None
    entries: list[Entry] = []
    etags: dict[str, str] = {}
    for line in lines[1:]:
        if line.startswith(b"etag "):
            try:
                source, etag = json.loads(line[5:])
            except (ValueError, TypeError):
                break
            etags[str(source)] = str(etag)
        elif (entry := _parse_entry(line, file.size)) is not None:
            entries.append(entry)
        else:
            break
    return Journal(found[0], tuple(entries), etags)


def read(path: Path, file: SourceFile) -> Journal | None:
    """The journal at `path`, or None."""
    try:
        return parse(path.read_bytes(), file)
    except OSError:
        return None


def glance(path: Path) -> Glance | None:
    """Owner, age and end of the journal at `path`; None when there is none."""
    try:
        # opened, not only asked for its mtime: over NFS an open is what fetches a fresh one
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        first, newline, _ = os.pread(descriptor, HEADER_BYTES, 0).partition(b"\n")
        found = _parse_header(first) if newline else None
        tail = os.pread(descriptor, len(RELEASED) + 1, max(0, status.st_size - len(RELEASED) - 1))
    finally:
        os.close(descriptor)
    owner = found[0] if found else None
    return Glance(status.st_ino, status.st_size, status.st_mtime, owner, tail == b"\n" + RELEASED)


def _parse_header(line: bytes) -> tuple[Owner, str, int] | None:
    try:
        record = json.loads(line)
        if record["journal"] != VERSION:
            return None
        return Owner.of(record), str(record["oid"]), int(record["size"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _parse_entry(line: bytes, size: int) -> Entry | None:
    fields = line.split(b" ")
    if len(fields) != 3 or not all(part.isdigit() and len(part) <= 20 for part in fields):
        return None
    start, stop, crc32 = map(int, fields)
    return Entry(start, stop, crc32) if start < stop <= size and crc32 < 1 << 32 else None
