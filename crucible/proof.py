"""The records of a delivery on disk, and the verdict over all of them.

A process writes its record into a file of its own, again and again while it reads. There are two places in the file,
written in turn and each with a checksum, so a process that is killed leaves its last whole word: what was written is
with the kernel, and survives everything but the loss of the node.
"""

from __future__ import annotations

import json
import os
import socket
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from crucible.cache.disk import disk_errors
from crucible.certificate import Finding, Keys, Record, Sum, examine, keys_of, record_from, sum_of, units_before
from crucible.errors import UsageError
from crucible.order import Int64s
from crucible.retold import retold, sources_of
from crucible.share import Share
from crucible.streams import Stream, digest

SUFFIX = ".delivered.json"
PLAN_SUFFIX = ".plan.json"
PAUSE_S = 0.2
"""A record is written when it is this old and more has been handed out; a training step is seldom shorter."""


class Proof:
    """What this process hands out in one iteration. Written to `folder`, or only kept when that is None.

    `received` is told how many units the loop has; `left_out` which rows of the block it does not get. Concurrency: one
    thread, which is the one that iterates.
    """

    def __init__(self, folder: Path | None, stream: Stream, epoch: int, share: Share, name: str) -> None:
        self.record = Record(
            identity=digest(stream),
            dataset=name,
            stream=stream.told(),
            total=stream.total,
            epoch=epoch,
            share=share,
            units=0,
            sum=Sum(),
            filtered=0,
            skipped=0,
            padded=0,
            host=socket.gethostname(),
            process=os.getpid(),
            began=time.time(),
        )
        self._keys: Keys = keys_of(self.record.identity, epoch)
        self._file = None
        if folder is not None:
            write_plan(folder, self.record.identity, stream)
            self._file = _File(folder, self.record)
        self._blocks: deque[tuple[Int64s, Any]] = deque()
        """Ids and validity of the blocks that are not received as a whole."""
        self._first = 0
        """Of their rows, which one of this process's stream is the first."""
        self._units = 0
        self._filtered: deque[int] = deque()
        self._skipped: deque[int] = deque()
        self._due = time.monotonic() + PAUSE_S

    def block(self, ids: Int64s, valid: Any) -> None:
        """These rows are read next; `valid` is False for padding, None where there is none."""
        self._blocks.append((ids, valid))

    def left_out(self, rows: Iterable[int], *, skipped: bool) -> None:
        """Rows of this process's stream that are not handed out: broken ones, or those that a filter let fall."""
        (self._skipped if skipped else self._filtered).extend(rows)

    def received(self, units: int) -> None:
        """The loop has so many units of this iteration."""
        self._units = units
        if time.monotonic() >= self._due:
            self.settle()

    def settle(self, units: int = 0) -> Record:
        """The record as of now, if the loop has `units` or what it was said to have; written, if that is news."""
        self._units = max(self._units, units)
        record, unit = self.record, self.record.share.unit
        if self._units > record.units:
            start, stop = record.units * unit, self._units * unit
            found, padded, filtered, skipped = Sum(), 0, 0, 0
            # each filter told its own in order
            self._filtered, self._skipped = deque(sorted(self._filtered)), deque(sorted(self._skipped))
            while self._blocks:
                ids, valid = self._blocks[0]
                here = slice(max(0, start - self._first), max(0, stop - self._first))
                mine = ids[here]
                if valid is not None:
                    padded += len(mine) - int(valid[here].sum())
                    mine = mine[valid[here]]
                found = found.plus(sum_of(mine, self._keys))
                filtered += _taken(self._filtered, stop, self._first, len(ids), valid)
                skipped += _taken(self._skipped, stop, self._first, len(ids), valid)
                if stop < self._first + len(ids):
                    break
                self._first += len(ids)
                self._blocks.popleft()
            self.record = replace(
                record,
                units=self._units,
                sum=record.sum.plus(found),
                padded=record.padded + padded,
                filtered=record.filtered + filtered,
                skipped=record.skipped + skipped,
            )
            if self._file is not None:
                self._file.write(self.record)
        self._due = time.monotonic() + PAUSE_S
        return self.record

    def close(self, units: int) -> None:
        """The iteration is over, or was left, with so many units."""
        self.settle(units)
        if self._file is not None:
            self._file.close()


def _taken(places: deque[int], stop: int, first: int, length: int, valid: Any) -> int:
    """How many places before `stop` are of a block of `length` from `first`, and no padding; they are forgotten."""
    end = min(stop, first + length)
    count = 0
    while places and places[0] < end:
        place = places.popleft()
        count += valid is None or bool(valid[place - first])
    return count


class _File:
    """Two places for a record, written in turn."""

    def __init__(self, folder: Path, record: Record) -> None:
        share = record.share
        name = f"{record.identity[:12]}-e{record.epoch}-r{share.rank}w{share.worker}-{os.getpid()}-{time.time_ns():x}"
        self.path = folder / f"{name}{SUFFIX}"
        with disk_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._size = 2 * len(_line(record))
        self._turn = 0

    def write(self, record: Record) -> None:
        line = _line(record).ljust(self._size - 1) + b"\n"
        with disk_errors(self.path):
            os.pwrite(self._handle, line, self._turn * self._size)
        self._turn = 1 - self._turn

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        self.close()


def _line(record: Record) -> bytes:
    told = json.dumps(record.to_dict(), separators=(",", ":")).encode()
    return b"%08x %s" % (zlib.crc32(told), told)


def write_plan(folder: Path, identity: str, stream: Stream) -> None:
    """Leave beside the records what the order was made from, so that it can be had again where no store is."""
    path = folder / f"{identity[:24]}{PLAN_SUFFIX}"
    if path.exists():
        return
    told = {"identity": identity, "splits": {name: rows.tolist() for name, rows in sources_of(stream).items()}}
    draft = path.with_name(f"{path.name}.{os.getpid()}.{time.time_ns():x}.tmp")
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(told, separators=(",", ":")))
        draft.replace(path)


def read_plan(paths: Iterable[Path], record: Record) -> Stream:
    """The stream that a record is about, from the plan beside it. Raises UsageError when there is none, or another."""
    for path in paths:
        folder = path if path.is_dir() else path.parent
        for found in folder.rglob(f"{record.identity[:24]}{PLAN_SUFFIX}"):
            try:
                told = json.loads(found.read_bytes())
                rows = {name: np.asarray(lengths, dtype=np.int64) for name, lengths in told["splits"].items()}
                stream = retold(record.stream, rows.__getitem__)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(f"{found} cannot be read ({error!r})") from error
            if digest(stream) != record.identity or stream.total != record.total:
                raise UsageError(f"{found} is not of the dataset that the records are about")
            return stream
    raise UsageError(
        f"no {record.identity[:24]}{PLAN_SUFFIX} beside the records of {record.dataset}: name its folder too"
    )


def read_records(paths: Iterable[Path]) -> list[Record]:
    """The last word of every process, from files and from all such files in folders.

    Raises UsageError naming a path that is not there or holds no record.
    """
    found = []
    for path in paths:
        if path.is_dir():
            found += [one for file in sorted(path.rglob(f"*{SUFFIX}")) if (one := _last(file)) is not None]
        elif path.is_file():
            record = _last(path)
            if record is None:
                raise UsageError(f"{path} holds no record of a delivery")
            found.append(record)
        else:
            raise UsageError(f"no such file or folder: {path}")
    return found


def _last(path: Path) -> Record | None:
    words = []
    for line in path.read_bytes().split(b"\n"):
        check, _, told = line.strip().partition(b" ")
        if told and len(check) == 8 and check == b"%08x" % zlib.crc32(told):
            words.append(record_from(json.loads(told)))
    return max(words, key=lambda record: record.units, default=None)


# --- the verdict ---


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an epoch was delivered exactly once."""

    identity: str
    dataset: str
    epoch: int
    total: int
    spans: tuple[tuple[int, int, int], ...]
    """(start, stop, ranks): the positions that each run delivered, in order. They cover the epoch when it is proven."""
    findings: tuple[Finding, ...]
    """The records that do not prove what they should."""
    missing: tuple[tuple[int, int, int, int], ...]
    """(start, stop, rank, worker) of which there is no record."""
    filtered: int
    skipped: int
    padded: int

    @property
    def proven(self) -> bool:
        return not self.findings and not self.missing and bool(self.spans or not self.total)


def epochs_of(records: Sequence[Record]) -> list[list[Record]]:
    """The records of each epoch of each dataset, apart."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record.identity, record.epoch), []).append(record)
    return [groups[key] for key in sorted(groups, key=lambda key: (groups[key][0].dataset, key))]


def verdict(records: Sequence[Record], stream_of: Callable[[Record], Stream]) -> Verdict:
    """Over the records of one epoch of one dataset.

    Runs are followed back from the end of the epoch: the last one that began counts to the end, the one it went on from
    up to where it began, and so on to position 0. What an earlier run handed out past that point was trained on and
    rolled back, and does not count.
    """
    first = records[0]
    stream = stream_of(first)
    later: Run = {}
    spans: list[tuple[int, int, int]] = []
    findings: list[Finding] = []
    missing: list[tuple[int, int, int, int]] = []
    used: list[Record] = []
    reach = first.total
    for run in sorted(_runs(records), key=lambda run: max(record.began for record in run.values()), reverse=True):
        begins = min(record.share.start for record in run.values())
        if spans and begins >= reach:
            continue  # it was rolled back as a whole
        share = next(iter(run.values())).share
        for rank, worker in product(range(share.world_size), range(share.workers)):
            record = run.get((rank, worker))
            mine = replace(share, rank=rank, worker=worker, start=begins) if record is None else record.share
            needed = units_before(mine, first.total, _stop(mine, later, reach))
            if record is not None:
                used.append(record)
                finding = examine(record, stream, needed)
                findings += [] if finding.proven else [finding]
            elif needed:
                missing.append((begins, reach, rank, worker))
        spans.append((begins, reach, share.world_size))
        reach, later = begins, run
        if reach == 0:
            break
    else:
        if reach:
            missing.append((0, reach, -1, -1))
    return Verdict(
        first.identity,
        first.dataset,
        first.epoch,
        first.total,
        tuple(reversed(spans)),
        tuple(findings),
        tuple(missing),
        filtered=sum(record.filtered for record in used),
        skipped=sum(record.skipped for record in used),
        padded=sum(record.padded for record in used),
    )


Run = dict[tuple[int, int], Record]
"""The records of one start of the training: (rank, worker) to its record."""


def _stop(share: Share, later: Run, reach: int) -> int:
    """The position up to which a process counts: where the next run went on, or its own worker did there."""
    record = later.get((share.rank, share.worker))
    if record is None:
        return reach
    next_ = record.share
    alike = (next_.world_size, next_.workers, next_.unit) == (share.world_size, share.workers, share.unit)
    return next_.start if alike and share.workers > 1 else reach


def _runs(records: Sequence[Record]) -> list[Run]:
    """Records that belong together: one a rank and worker, of one start and one way of sharing.

    A run that died before its first saved state began where the next one did: of two records of one place the later one
    is in the later run.
    """
    alike: dict[tuple[Any, ...], dict[tuple[int, int], list[Record]]] = {}
    for record in sorted(records, key=lambda record: record.began):
        share = record.share
        key = (share.start, share.world_size, share.workers, share.unit, share.end)
        alike.setdefault(key, {}).setdefault((share.rank, share.worker), []).append(record)
    runs = [
        {place: found[-back] for place, found in places.items() if len(found) >= back}
        for places in alike.values()
        for back in range(1, max(len(found) for found in places.values()) + 1)
    ]
    return _joined(runs)


def _joined(runs: Sequence[Run]) -> list[Run]:
    """Workers that a StatefulDataLoader restores go on from a state each, one unit of all of them apart at most."""
    whole: list[Run] = []
    for run in sorted(runs, key=lambda run: next(iter(run.values())).share.start):
        one = next(iter(run.values())).share
        step = one.unit * one.world_size * one.workers
        for other in whole:
            two = next(iter(other.values())).share
            alike = (one.world_size, one.workers, one.unit, one.end) == (two.world_size, two.workers, two.unit, two.end)
            if alike and one.start == two.start + step and one.workers > 1 and not run.keys() & other.keys():
                other.update(run)
                break
        else:
            whole.append(dict(run))
    return whole
