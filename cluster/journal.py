"""What a coordinator has to remember, as a text that a kill may cut anywhere. Pure; `logbook` keeps it on a disk.

A journal says the newest value of named cells: `job/<name>` is one, and so is every standing order (`drain/<node>`).
Line 1 is JSON and says who writes; each other line is a checksum and one cell:

    <crc32, 8 hex digits> {"cell": "job/...", "stamp": [epoch, number, "<coordinator>"], "value": {...} or null}

A line counts when its newline is there and its checksum is right. Each line has the whole of its cell, and of two lines
about one cell the later stamp counts, so what is true is the same in whatever order, and however often, lines are read:
journals of several coordinators, and what agents were told of them, are put together by reading them all.
No token is in it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from crucible.cache.owner import Owner

FORMAT = 1
ENDED = ("finished", "failed", "superseded", "interrupted")
"""Phases that a job does not leave."""
JOBS_KEPT = 256
"""Ended jobs that are remembered, for `crucible jobs`."""
REPORTS_KEPT = 32
"""Of these, those with what a driver that comes late is told: their reports name every node."""
REMOVED_KEPT = 256
"""Cells without a value. They must outlive the copies that still have one, which the next telling replaces."""
TOLD = 16
"""Ended jobs that agents are told of. They need to know what must go on; the rest is history."""

Value = Mapping[str, Any]
Stamp = tuple[int, int, str]
"""(epoch, number, coordinator): later in every one of one coordinator, and between two by their epochs."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one name means, and since when. `value` None: nothing any more."""

    stamp: Stamp
    value: Value | None


Cells = Mapping[str, Cell]


@dataclass(frozen=True, slots=True)
class Header:
    """Who writes a journal."""

    cluster: str
    """Ray's name for its session: epochs mean something inside one only."""
    embedded: bool
    """A cluster inside of one process: what it had not done when that ended, nobody goes on with."""
    owner: Owner
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Page:
    """A journal as it was read."""

    header: Header
    cells: dict[str, Cell]
    damaged: int
    """Lines that were no lines; a torn last one is not counted."""


def header_line(header: Header) -> bytes:
    record = {"crucible_journal": header.format, **asdict(header)}
    del record["format"]
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def cell_line(name: str, cell: Cell) -> bytes:
    """One cell as a line, without the newline that makes it count."""
    record = {"cell": name, "stamp": list(cell.stamp), "value": cell.value}
    text = json.dumps(record, separators=(",", ":"), sort_keys=True).encode()
    return b"%08x %b" % (zlib.crc32(text), text)


def parse(data: bytes) -> Page | None:
    """What a journal says; None if it is none, or of a later format: then nothing of it is believed."""
    first, *lines = data.split(b"\n")
    if not lines or (header := _header(first)) is None:
        return None
    lines.pop()  # empty, or torn
    found = [_cell(line) for line in lines]
    told = [cell for cell in found if cell is not None]
    return Page(header, merge({}, told), len(found) - len(told))


def merge(cells: Cells, more: Iterable[tuple[str, Cell]]) -> dict[str, Cell]:
    """Both together: of every cell the later one. The order does not matter."""
    merged = dict(cells)
    for name, cell in more:
        known = merged.get(name)
        if known is None or _later(cell, known):
            merged[name] = cell
    return merged


def _later(one: Cell, other: Cell) -> bool:
    if one.stamp != other.stamp:
        return one.stamp > other.stamp
    # nobody gives a stamp twice; should it be so all the same, all who read choose the same
    return cell_line("", one) > cell_line("", other)


def compact(cells: Cells) -> dict[str, Cell]:
    """Without the oldest ended jobs, reports and removed cells. What is not over stays, whatever there is of it."""
    ended = sorted((n for n in cells if is_over(n, cells[n])), key=lambda n: cells[n].stamp, reverse=True)
    removed = sorted((n for n in cells if cells[n].value is None), key=lambda n: cells[n].stamp, reverse=True)
    gone = {*ended[JOBS_KEPT:], *removed[REMOVED_KEPT:]}
    bare = set(ended[REPORTS_KEPT:])
    return {name: _bare(cell) if name in bare else cell for name, cell in cells.items() if name not in gone}


def told(cells: Cells) -> dict[str, Cell]:
    """What every node should know, for a coordinator that comes up there: small, whatever was done before."""
    over = sorted((name for name in cells if is_over(name, cells[name])), key=lambda n: cells[n].stamp, reverse=True)
    history = set(over[TOLD:])
    return {name: _bare(cell) for name, cell in cells.items() if name not in history}


def is_over(name: str, cell: Cell) -> bool:
    """True for a job that has ended."""
    return name.startswith("job/") and cell.value is not None and cell.value.get("phase") in ENDED


def _bare(cell: Cell) -> Cell:
    if cell.value is None or not cell.value.get("report"):
        return cell
    return Cell(cell.stamp, {**cell.value, "report": None})


def notes(cells: Cells, kind: str) -> dict[str, Value]:
    """The standing orders of a kind, by their keys."""
    start = f"{kind}/"
    return {
        name.removeprefix(start): cell.value
        for name, cell in sorted(cells.items())
        if name.startswith(start) and cell.value is not None
    }


def highest(cells: Cells) -> int:
    """The latest epoch that anything was said in; 0 when nothing was."""
    return max((cell.stamp[0] for cell in cells.values()), default=0)


def to_lines(cells: Cells) -> bytes:
    """Cells as text, for a call or a file."""
    return b"".join(cell_line(name, cell) + b"\n" for name, cell in sorted(cells.items()))


def from_lines(data: bytes) -> dict[str, Cell]:
    """The cells of `to_lines`; what is damaged is left out."""
    found = (_cell(line) for line in data.split(b"\n")[:-1])
    return merge({}, [one for one in found if one is not None])


def _header(line: bytes) -> Header | None:
    try:
        record = json.loads(line)
        if record["crucible_journal"] != FORMAT:
            return None
        owner = {**record["owner"], "pid": int(record["owner"]["pid"]), "started": int(record["owner"]["started"])}
        return Header(str(record["cluster"]), bool(record["embedded"]), Owner(**owner))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _cell(line: bytes) -> tuple[str, Cell] | None:
    checksum, _, text = line.partition(b" ")
    if b"%08x" % zlib.crc32(text) != checksum:
        return None
    try:
        record = json.loads(text)
        epoch, number, coordinator = record["stamp"]
        value = record["value"]
        if not (value is None or isinstance(value, dict)):
            return None
        return str(record["cell"]), Cell((int(epoch), int(number), str(coordinator)), value)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
