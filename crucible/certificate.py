"""Proof that an epoch was delivered: what each process handed out, added up and compared with the plan. Pure.

Each row id has a 128-bit hash, keyed by dataset and epoch; a process keeps the sum of those it has handed out (two sums
modulo 2**64), which depends on no order. What the sum has to be follows from the stream alone, so a record proves its
span: a lost, repeated or foreign row changes the sum, and by how much tells which row it was, if it was one or two.

A row counts as handed out when the loop received it. Rows that a filter let fall, or that could not be decoded and were
left out because that was asked for, are in the sum and counted apart. Padding is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from crucible.errors import UsageError
from crucible.order import Int64s, UInt64s, scattered
from crucible.refs import canonical_json
from crucible.share import Share
from crucible.streams import Stream

RECORD_FORMAT = 1
CHUNK = 1 << 18
"""Positions worked on at once, so that an epoch of any length takes little memory."""

Keys = tuple[np.uint64, np.uint64]


class Sum(NamedTuple):
    """Of the hashes of some rows: two numbers modulo 2**64, and how many rows."""

    low: int = 0
    high: int = 0
    rows: int = 0

    def plus(self, other: Sum) -> Sum:
        return Sum((self.low + other.low) & _ALL, (self.high + other.high) & _ALL, self.rows + other.rows)

    def minus(self, other: Sum) -> Sum:
        return Sum((self.low - other.low) & _ALL, (self.high - other.high) & _ALL, self.rows - other.rows)


_ALL = (1 << 64) - 1


def keys_of(identity: str, epoch: int) -> Keys:
    """The keys of the rows' hashes: other ones for each dataset and epoch, so that no record passes for another."""
    digest = hashlib.sha256(canonical_json(["crucible certificate 1", identity, epoch])).digest()
    return np.uint64(int.from_bytes(digest[:8], "little")), np.uint64(int.from_bytes(digest[8:16], "little"))


def hashes(ids: Int64s, keys: Keys) -> tuple[UInt64s, UInt64s]:
    """The two halves of each row id's hash."""
    rows = ids.astype(np.uint64)
    low = scattered(rows ^ keys[0])
    return low, scattered((rows + keys[1]) ^ (low >> np.uint64(32)))


def sum_of(ids: Int64s, keys: Keys) -> Sum:
    low, high = hashes(ids, keys)
    return Sum(int(np.add.reduce(low)), int(np.add.reduce(high)), len(ids))


@dataclass(frozen=True, slots=True)
class Record:
    """What one process has handed out of one epoch since it began at `share.start`."""

    identity: str
    """Digest of the stream."""
    dataset: str
    """Its name, for people."""
    stream: list[Any]
    """`Stream.told()`, from which the order can be had again."""
    total: int
    epoch: int
    share: Share
    units: int
    sum: Sum
    """Over delivered, filtered and skipped rows."""
    filtered: int
    skipped: int
    padded: int
    host: str
    process: int
    began: float
    """Seconds since 1970."""

    @property
    def who(self) -> str:
        share = self.share
        worker = f", worker {share.worker} of {share.workers}" if share.workers > 1 else ""
        return f"rank {share.rank} of {share.world_size}{worker}"

    def to_dict(self) -> dict[str, Any]:
        told = {"format": RECORD_FORMAT, **asdict(self)}
        told["sum"] = {"low": f"{self.sum.low:016x}", "high": f"{self.sum.high:016x}", "rows": self.sum.rows}
        return told


def record_from(raw: Mapping[str, Any]) -> Record:
    """Raises UsageError for what is no record, or one of another version."""
    if raw.get("format") != RECORD_FORMAT:
        raise UsageError(f"a record of format {raw.get('format')!r}; this crucible reads {RECORD_FORMAT}")
    try:
        told = {field.name: raw[field.name] for field in fields(Record)}
        told["share"] = Share(**raw["share"])
        told["sum"] = Sum(int(raw["sum"]["low"], 16), int(raw["sum"]["high"], 16), int(raw["sum"]["rows"]))
        return Record(**told)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"not a record of a delivery ({error!r})") from error


# --- what has to be ---


def units_before(share: Share, total: int, stop: int) -> int:
    """Units of this process of which a row stands before position `stop`."""
    rows = max(0, -((share.start + (share.rank - share.start) % share.world_size - stop) // share.world_size))
    of_rank = -(-rows // share.unit)
    return min(share.units(total), max(0, -((share.worker - of_rank) // share.workers)))


def expected(stream: Stream, epoch: int, share: Share, units: int, keys: Keys) -> Sum:
    """The sum of a process that has handed out its first `units` units."""
    walk, total, found = stream.at(epoch), stream.total, Sum()
    step = max(1, CHUNK // share.unit)
    for first in range(0, units, step):
        positions = share.positions(total, first, min(units, first + step))
        found = found.plus(sum_of(walk.rows(positions[positions < total]), keys))
    return found


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a record, if anything is."""

    record: Record
    lacking: int = 0
    """Rows fewer than it should have handed out by then; less than 0: more."""
    short: int = 0
    """Units that it should have handed out before the next run went on, and of which it says nothing."""
    lost: tuple[int, ...] = ()
    """Row ids that were not handed out, where that can be told."""
    again: tuple[int, ...] = ()
    """Row ids that were handed out twice, or are not its own."""

    @property
    def proven(self) -> bool:
        return not (self.lacking or self.short or self.lost or self.again) and self.matches

    matches: bool = True


def examine(record: Record, stream: Stream, needed: int) -> Finding:
    """Compare a record with what its process had to hand out. `needed` units are those that the epoch counts on."""
    keys = keys_of(record.identity, record.epoch)
    want = expected(stream, record.epoch, record.share, record.units, keys)
    short = max(0, needed - record.units)
    if record.sum == want:
        return Finding(record, short=short)
    difference = record.sum.minus(want)
    lost, again = _rows_behind(difference, record, stream, keys)
    return Finding(record, want.rows - record.sum.rows, short, lost, again, matches=False)


def _rows_behind(
    difference: Sum, record: Record, stream: Stream, keys: Keys
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(lost, again): the one row of each that explains a difference. Empty where it takes more than that."""
    walk, share, total = stream.at(record.epoch), record.share, stream.total
    positions = share.positions(total, 0, record.units)
    own = walk.rows(positions[positions < total])
    if difference.rows == -1:
        row = _with_hash(own, (-difference.low) & _ALL, (-difference.high) & _ALL, keys)
        return ((), ()) if row is None else ((row,), ())
    if difference.rows == 1:
        row = _with_hash(own, difference.low, difference.high, keys)
        if row is None:
            row = _with_hash(_all_rows(stream, record.epoch), difference.low, difference.high, keys)
        return ((), ()) if row is None else ((), (row,))
    if difference.rows == 0:
        everything = _all_rows(stream, record.epoch)
        low, high = hashes(everything, keys)
        by_low = np.argsort(low)
        own_low, own_high = hashes(own, keys)
        wanted = own_low + np.uint64(difference.low)  # of the row that came in the place of an own one
        place = np.minimum(np.searchsorted(low[by_low], wanted), len(low) - 1)
        met = by_low[place]
        fits = (low[met] == wanted) & (high[met] == own_high + np.uint64(difference.high))
        at = np.flatnonzero(fits)
        if at.size:
            return (int(own[at[0]]),), (int(everything[met[at[0]]]),)
    return (), ()


MOST_ROWS = 1 << 26
"""In a bigger epoch a row in the place of another is not looked for: that takes 40 bytes a row."""


def _all_rows(stream: Stream, epoch: int) -> Int64s:
    return np.unique(stream.at(epoch).rows(np.arange(min(stream.total, MOST_ROWS), dtype=np.int64)))


def _with_hash(ids: Int64s, low: int, high: int, keys: Keys) -> int | None:
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        lows, highs = hashes(part, keys)
        at = np.flatnonzero((lows == np.uint64(low)) & (highs == np.uint64(high)))
        if at.size:
            return int(part[at[0]])
    return None
