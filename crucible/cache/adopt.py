"""What a new holder takes over from those before it: the most that one of them recorded and the disk still agrees with.

The data file of a process that is dead or let go is renamed and kept in place. One that only went silent may wake up
and write on, so its bytes are copied. All others' data files are removed; their journals stay, as numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from crucible.cache import journal
from crucible.cache.journal import Entry, Journal
from crucible.cache.lease import Lease, Names
from crucible.cache.partial import Partial
from crucible.hashing import crc32
from crucible.refs import SourceFile

PIECE = 1 << 20


class Occupied(Exception):
    """The name of our data file belongs to somebody else, by chance or by litter: take the next generation."""


def take_over(names: Names, lease: Lease, file: SourceFile) -> Partial:
    """A Partial under `lease` with the best of what the generations before left. Raises OSError, Occupied."""
    data = names.data(lease.generation)
    before = [generation for generation in range(1, lease.generation) if os.path.lexists(names.data(generation))]
    found = [
        (said.claimed, generation) for generation in before if (said := journal.read(names.journal(generation), file))
    ]
    partial = None
    for claimed, generation in sorted(found, reverse=True):
        if claimed and (partial := _adopt(names, lease, file, generation)) is not None:
            break
    if partial is None:
        partial = Partial(file, names, data, _create(data), lease)
    for generation in before:
        with suppress(OSError):
            names.data(generation).unlink()
    return partial


def _adopt(names: Names, lease: Lease, file: SourceFile, generation: int) -> Partial | None:
    """Go on with the data file of `generation`; None if nothing in it is right."""
    try:
        source, writable = _open(names.data(generation))
    except OSError:
        return None
    keep = False
    try:
        # judged after the file was opened: the journal that is there now is the one of the file that is there still
        path = names.journal(generation)
        holder, said = journal.glance(path), journal.read(path, file)
        if holder is None or said is None:
            return None
        at_rest = holder.released or said.owner.fate() == "dead"
        if at_rest and writable and os.fstat(source).st_nlink == 1:
            partial = _keep(names, lease, file, generation, source, said)
            keep = partial is not None
            return partial
        return _copy(names, lease, file, source, said)
    finally:
        if not keep:
            os.close(source)


def _keep(names: Names, lease: Lease, file: SourceFile, generation: int, source: int, said: Journal) -> Partial | None:
    right = tuple(entry for entry in said.distinct if _crc32(source, entry) == entry.crc32)
    if not right:
        return None
    data = names.data(lease.generation)
    if os.path.lexists(data):
        raise Occupied
    _inherit(lease, right, said)  # before the rename: a kill between the two leaves the old pair as it was
    try:
        os.rename(names.data(generation), data)
        if os.path.samestat(os.stat(data), os.fstat(source)):
            if os.fstat(source).st_size > file.size:
                os.ftruncate(source, file.size)
            return Partial(file, names, data, source, lease, right, said.etags)
    except FileNotFoundError:
        pass
    lease.clear()  # somebody swept it away under our hands
    return None


def _copy(names: Names, lease: Lease, file: SourceFile, source: int, said: Journal) -> Partial | None:
    data = names.data(lease.generation)
    target = _create(data)
    right = []
    try:
        for entry in said.distinct:
            crc, at = 0, entry.start
            for piece in _pieces(source, entry):
                crc, at = crc32(piece, crc), _write(target, piece, at)
            if at == entry.stop and crc == entry.crc32:
                right.append(entry)
        if right:
            _inherit(lease, tuple(right), said)
            return Partial(file, names, data, target, lease, tuple(right), said.etags)
    except BaseException:
        os.close(target)
        data.unlink(missing_ok=True)
        raise
    os.close(target)
    data.unlink(missing_ok=True)
    return None


def _inherit(lease: Lease, entries: tuple[Entry, ...], said: Journal) -> None:
    lines = [journal.etag_line(source, etag) for source, etag in said.etags.items()]
    lease.append(b"".join(lines + [entry.line() for entry in entries]))


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor and whether it can be written; another user's file often cannot."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC), True
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False


def _create(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        raise Occupied from None


def _pieces(descriptor: int, entry: Entry) -> Iterator[bytes]:
    """The bytes of a range; ends early where the file does."""
    at = entry.start
    while at < entry.stop and (piece := os.pread(descriptor, min(PIECE, entry.stop - at), at)):
        at += len(piece)
        yield piece


def _crc32(descriptor: int, entry: Entry) -> int | None:
    """zlib's crc32 of a range, None if the file is too short or cannot be read there."""
    crc, read = 0, 0
    try:
        for piece in _pieces(descriptor, entry):
            crc, read = crc32(piece, crc), read + len(piece)
    except OSError:
        return None
    return crc if read == entry.stop - entry.start else None


def _write(descriptor: int, piece: bytes, at: int) -> int:
    """Write all of it; returns where it ends."""
    rest = memoryview(piece)
    while rest:
        written = os.pwrite(descriptor, rest, at)
        rest, at = rest[written:], at + written
    return at
