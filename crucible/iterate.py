"""Read rows of a manifest in a given order from mapped shards. The only module of the loader that opens files.

`ShardReader.take` gives any rows in any order as one table. Readers ask for a block of rows at a time, so that what
each shard contributes is gathered at once. A shard that cannot be had, cannot be read or is not what the manifest says
raises: rows are never skipped.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from crucible.cache.seen import Stamp, stamp_of
from crucible.errors import CorruptFile, NoRoom, StoreError, UsageError
from crucible.feed import Feeder
from crucible.manifest import Manifest
from crucible.order import Int64s, shard_rows
from crucible.sources import Leases
from crucible.sources import ShardSource as ShardSource

FIRST_BLOCK_ROWS = 1
"""Rows looked ahead before the first one is delivered; doubles block by block, so that a reader starts at once. Each
row of a shuffle may lie in a shard of its own, which is a millisecond to open where it has 64 MiB. From a loaded state
to the first row of 24 such shards: 2.4 ms with 1, 4.5 with 4, 11 with 16 (on a busy machine)."""

BLOCK_ROWS = 8192
"""Most rows looked ahead. A lane reader may have a thousand shards open, and a take costs about 25 us however little it
takes, so a block of 1,024 rows would spend its time on takes of one row (measured: 36k rows/s; 140k/s with 8,192)."""

BLOCK_BYTES = 32 << 20
"""Most bytes looked ahead, by the manifest's average row."""

OPEN_SHARDS = 2048
"""Most shards mapped at once in a process; Linux allows 65,530 maps."""

_log = logging.getLogger("crucible.feed")
LOOK_S = 1.0
"""How long an open shard is believed to be what it was. A look costs 3 us; a shard of a block, 25 us and more."""

_FEW = 6
"""Up to this many rows of a shard are sliced one by one: six slices cost what one take costs (4.4 us against 27 us)."""

_BIG_ROW = 8 << 10
"""Rows of so many bytes are sliced one by one and copied once, in their order: a slice costs what copying this does.
Images of 29 KB then take a third of the fresh memory: 13 us a row of a whole shuffled read in a new process, not 30."""

_LONG_RUN = 16
"""Rows that lie together in runs at least this long on average are delivered as slices of the map, without a copy."""


class ShardReader:
    """Rows by id from the shards of one manifest. Maps are opened when needed; the least recently used are closed.

    Shards that are mapped are leased, so that nobody evicts them. Once in LOOK_S seconds, and when an epoch begins, the
    file of one that is used is looked at: one that was written to since is asked for anew. `source` may be a `Feeder`,
    which fetches ahead.

    Concurrency: threads may share a reader. Not picklable; a process makes its own.
    """

    def __init__(
        self,
        manifest: Manifest,
        source: ShardSource,
        *,
        columns: tuple[str, ...] | None = None,
        most_open: int = OPEN_SHARDS,
    ) -> None:
        self.manifest = manifest
        self.schema = select_columns(manifest.arrow_schema, columns)
        """Of every table this reader gives."""
        self.total = manifest.rows
        self.most_open = most_open
        row_bytes = max(1, manifest.size // max(1, self.total))
        self.block_rows = int(min(BLOCK_ROWS, max(1, BLOCK_BYTES // row_bytes)))
        self.feeder = source if isinstance(source, Feeder) else Feeder(source)
        """Where shards come from. Another one may take its place at any time."""
        self._columns = columns
        rows = shard_rows(manifest)
        self._stops = np.cumsum(rows)
        self._starts = self._stops - rows
        self._row_bytes: int | None = None
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._look_at: dict[int, float] = {}
        self._leased: dict[int, tuple[Leases, str]] = {}
        weakref.finalize(self, _give_back, self._leased).atexit = False

    @property
    def most_open(self) -> int:
        """How many shards stay mapped. Never more than `OPEN_SHARDS`, however many an order draws on."""
        return self._most_open

    @most_open.setter
    def most_open(self, count: int) -> None:
        self._most_open = min(max(1, count), OPEN_SHARDS)

    @property
    def open_shards(self) -> int:
        return len(self._open)

    def take(self, ids: Int64s) -> pa.Table:
        """The rows `ids`, in that order. Long runs are slices of the mapped file, scattered rows are copied."""
        if not ids.size:
            return self.schema.empty_table()
        breaks = np.flatnonzero(np.diff(ids) != 1) + 1
        if ids.size >= _LONG_RUN * (len(breaks) + 1) or ids.size == 1:
            edges = [0, *breaks.tolist(), ids.size]
            runs = [self._run(int(ids[a]), int(ids[b - 1]) + 1) for a, b in pairwise(edges)]
            return pa.Table.from_batches([batch for run in runs for batch in run], self.schema)
        return self._gather(ids)

    def slice(self, start: int, stop: int) -> pa.Table:
        """Rows [start, stop), mapped."""
        return pa.Table.from_batches(list(self._run(start, stop)), self.schema)

    def _run(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        number = int(np.searchsorted(self._stops, start, side="right"))
        while start < stop:
            shard = self._shard(number)
            base = int(self._starts[number])
            for batch, first in zip(shard.batches, shard.starts.tolist()):
                low, high = max(start - base, first), min(stop - base, first + batch.num_rows)
                if low < high:
                    yield self._cast(batch.slice(low - first, high - low), number)
            start, number = int(self._stops[number]), number + 1

    def _gather(self, ids: Int64s) -> pa.Table:
        # One piece a record batch, joined, then one take that puts the rows in order. Table.take over many chunks does
        # the same at a tenth of the speed, and a to_pylist for every shard at a third.
        if self._rows_are_big(int(ids[0])):
            return pa.Table.from_batches([pa.concat_batches(self._singles(ids))], self.schema)
        order = np.argsort(ids)
        ascending = ids[order]
        number = np.searchsorted(self._stops, ascending, side="right")
        edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(ids)]
        pieces: list[pa.RecordBatch] = []
        for low, high in pairwise(edges):
            here = int(number[low])
            shard = self._shard(here)
            inside = ascending[low:high] - self._starts[here]
            if len(shard.batches) == 1:
                found = _pick(shard.batches[0], inside)
            else:
                cuts = [*np.searchsorted(inside, shard.starts).tolist(), len(inside)]
                found = [
                    piece
                    for batch, first, a, b in zip(shard.batches, shard.starts.tolist(), cuts, cuts[1:])
                    if a < b
                    for piece in _pick(batch, inside[a:b] - first)
                ]
            if self.manifest.shards[here].schema != self.manifest.schema:
                found = [self._cast(pa.concat_batches(found), here)]
            pieces += found
        place = np.empty(len(ids), dtype=np.int64)
        place[order] = np.arange(len(ids))
        return pa.Table.from_batches([pa.concat_batches(pieces).take(pa.array(place))], self.schema)

    def _rows_are_big(self, row: int) -> bool:
        """Going by the shard of `row`, as far as its columns are read."""
        known = self._row_bytes
        if known is None:
            shard = self._shard(int(np.searchsorted(self._stops, row, side="right")))
            batch = next(one for one in shard.batches if one.num_rows)
            self._row_bytes = known = batch.nbytes // batch.num_rows
        return known >= _BIG_ROW

    def _singles(self, ids: Int64s) -> Iterator[pa.RecordBatch]:
        """Each row as a slice of the map, in the order of `ids`."""
        numbers = np.searchsorted(self._stops, ids, side="right")
        for number, row in zip(numbers.tolist(), (ids - self._starts[numbers]).tolist()):
            shard = self._shard(number)
            place = int(np.searchsorted(shard.starts, row, side="right")) - 1
            yield self._cast(shard.batches[place].slice(row - int(shard.starts[place]), 1), number)

    def _cast(self, batch: pa.RecordBatch, number: int) -> pa.RecordBatch:
        info = self.manifest.shards[number]
        if info.schema == self.manifest.schema:
            return batch
        from crucible.casts import cast_batch

        return cast_batch(batch, self.schema, f"shard {info.key[:12]}")

    def recheck(self) -> None:
        """An epoch begins: look at the file of every open shard before it is next used."""
        self._look_at.clear()

    def close(self) -> None:
        """Close all maps and give back their leases. Tables that were taken stay valid; taking more opens anew."""
        with self._lock:
            self._open.clear()
            _give_back(self._leased)

    def _shard(self, number: int) -> _OpenShard:
        feeder, info, now = self.feeder, self.manifest.shards[number], time.monotonic()
        with self._lock:
            shard = self._open.get(number)
            if shard is not None and self._look_at.get(number, 0.0) < now:
                self._look_at[number] = now + LOOK_S
                if not feeder.still(info, shard.stamp):
                    del self._open[number]  # whoever has its rows already keeps them
                    shard = None
            if shard is not None:
                self._open.move_to_end(number)
                return shard
        leases = feeder.holds
        if leases is not None:
            leases.hold(info.key)  # before it is looked for: from here on nobody evicts it
        try:
            while True:
                try:
                    shard = self._fetched(number, feeder)
                    break
                except NoRoom as refusal:
                    if not self._shed(refusal):
                        raise
        except BaseException:
            if leases is not None:
                leases.release(info.key)
            raise
        with self._lock:
            if leases is not None and number in self._leased:  # another thread has opened it meanwhile
                leases.release(info.key)
            elif leases is not None:
                self._leased[number] = leases, info.key
            self._open[number] = shard
            self._look_at[number] = now + LOOK_S
            while len(self._open) > self._most_open:
                self._close_oldest()
        feeder.opened(self.manifest, info)
        return shard

    def _shed(self, refusal: NoRoom) -> bool:
        """There is no room for what this reader keeps on the disk: keep half as much. False if it keeps nothing."""
        self.feeder.shed()
        with self._lock:
            kept = len(self._open)
            if not kept and self._most_open == 1:
                return False
            self._most_open = max(1, kept // 2)
            while len(self._open) > kept // 2:
                self._close_oldest()
        _log.warning("keeping at most %d shards open: %s", self._most_open, refusal)
        return True

    def _close_oldest(self) -> None:
        oldest, _ = self._open.popitem(last=False)
        if (lease := self._leased.pop(oldest, None)) is not None:
            lease[0].release(lease[1])

    def _fetched(self, number: int, feeder: Feeder) -> _OpenShard:
        info = self.manifest.shards[number]
        try:
            return _open_shard(feeder.path(self.manifest, info), self.manifest, number, self._columns)
        except FileNotFoundError:  # evicted between being named and being opened: the source fetches it again, once
            path = feeder.path(self.manifest, info)
        try:
            return _open_shard(path, self.manifest, number, self._columns)
        except FileNotFoundError as error:
            raise StoreError(str(path), f"shard {info.key[:12]} vanished twice before it could be mapped") from error


def _give_back(leased: dict[int, tuple[Leases, str]]) -> None:
    while leased:
        _, (leases, key) = leased.popitem()
        leases.release(key)


def select_columns(schema: pa.Schema, columns: tuple[str, ...] | None) -> pa.Schema:
    """`schema` with these columns, in this order. Raises UsageError naming a column that is not there."""
    if columns is None:
        return schema
    for name in columns:
        if name not in schema.names:
            raise UsageError(f"no column {name!r}; there are: {', '.join(schema.names)}")
    return pa.schema([schema.field(name) for name in columns], metadata=schema.metadata)


class _OpenShard(NamedTuple):
    batches: list[pa.RecordBatch]
    """Mapped; their buffers keep the map alive after the file is closed, and after it is unlinked."""
    starts: Int64s
    """First row of each batch inside the shard."""
    stamp: Stamp
    """Of the file, before it was mapped."""


def _open_shard(path: Path, manifest: Manifest, number: int, columns: tuple[str, ...] | None) -> _OpenShard:
    """Map a shard, checked to be the one the manifest means. Raises CorruptFile, StoreError or FileNotFoundError."""
    info = manifest.shards[number]
    first, whole = manifest.cut(number) or (0, info.rows)
    where = f"shard {info.key[:12]}"
    try:
        stamp = stamp_of(os.stat(path))
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            schema = reader.schema
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate()  # offsets that would lead outside the map; costs microseconds
    except FileNotFoundError:
        raise
    except pa.ArrowException as error:
        raise CorruptFile(str(path), where, f"not a readable Arrow file ({error}); remove it and read again") from error
    except OSError as error:
        if error.errno is None:  # Arrow's own: a footer that does not parse
            raise CorruptFile(str(path), where, f"not a readable Arrow file ({error})") from error
        raise StoreError(str(path), f"{where} cannot be opened ({error.strerror}); read again to fetch it") from error
    held = sum(batch.num_rows for batch in batches)
    if held != whole:
        raise CorruptFile(str(path), where, f"holds {held:,} rows, the manifest says {whole:,}; remove it")
    if not schema.equals(manifest.arrow_schema_of(info.schema)):
        raise CorruptFile(str(path), where, "has other columns than the manifest says; remove it and read again")
    if columns is not None:
        present = [name for name in columns if name in schema.names]
        batches = [batch.select(present) for batch in batches]
    if info.rows != whole:
        batches = list(_part(batches, first, first + info.rows))
    lengths = np.asarray([batch.num_rows for batch in batches], dtype=np.int64)
    return _OpenShard(batches, np.cumsum(lengths) - lengths, stamp)


def _part(batches: list[pa.RecordBatch], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Rows [start, stop) of consecutive batches, still mapped."""
    base = 0
    for batch in batches:
        low, high = max(start - base, 0), min(stop - base, batch.num_rows)
        if low < high:
            yield batch.slice(low, high - low)
        base += batch.num_rows


def _pick(batch: pa.RecordBatch, rows: Int64s) -> list[pa.RecordBatch]:
    if len(rows) <= _FEW:
        return [batch.slice(row, 1) for row in rows.tolist()]
    return [batch.take(pa.array(rows))]
