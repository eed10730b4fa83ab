"""Turn the source files of a work item into shards: Arrow IPC files any process can map. Runs inside a task.

The same item gives the same bytes on any node, in any run and with any number of threads: batch boundaries, types and
layout are functions of the source bytes and the options. A shard is flushed to disk and hashed before it is handed on;
giving it its name is `commit`'s work, so a killed conversion leaves only numbered drafts in its own folder.

A big file is decoded by several threads of this process, and written by another one (`drafts`). What is held: the
record batch in the making, what each thread has ready, and what waits to be written; a shard as a whole only while the
batches in it are of different types.

Raises CorruptFile, SchemaConflict, UnsupportedFormat or UsageError (a column that is not there), DiskFull or
StoreReadOnly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import pyarrow as pa

from crucible.casts import cast_batch, unify
from crucible.feature_types import features_of, schema_for, schema_of, select_features
from crucible.formats.cuts import item_shard_rows
from crucible.formats.items import read_heads, read_item
from crucible.formats.limits import Limits
from crucible.formats.read import read_file
from crucible.refs import ReadOptions, WorkItem
from crucible.workers.drafts import WRITE_BYTES, Drafts
from crucible.workers.drafts import DraftShard as DraftShard

MOST_THREADS = 4
"""That decode one file. Writing and hashing keep up with about three of them."""
SHARED_BYTES = 4 << 20
"""A smaller file is decoded before threads for it have started."""


def usable_threads(at_work: int = 1) -> int:
    """How many threads are worth decoding one file with, while `at_work` items are being worked on on this node.

    Threads of one process wait for each other where the kernel gives them memory, so items beside each other are the
    cheaper way to use the cores: 12 files of 82 MB by 4 items took 5.8 s of CPU with one thread each, 7.7 with four.
    """
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // max(1, at_work)))


def convert(
    item: WorkItem,
    paths: Sequence[Path],
    folder: Path,
    *,
    threads: int | None = None,
    limits: Limits | None = None,
    turn: AbstractContextManager[int] | None = None,
) -> Iterator[DraftShard]:
    """Convert `item.files`, whose bytes are at `paths`, into `folder/<number>.arrow`, each yielded when it is on disk.

    Rows keep the order of the files. Shards have about `item.shard_bytes` of Arrow data and at least one row; an item
    without rows yields nothing, and `schema_of_item` tells its columns. Parquet is cut where its footers say (`cuts`).
    `threads` decode; by default as many as there are cores, at most `MOST_THREADS`. `turn` is held while rows are
    decoded and written, and not while the last shards wait for the disk; it says how many items have one.
    """

    names = [file.path for file in item.files]
    bounds, made, source = limits or Limits(), 0, sum(path.stat().st_size for path in paths)
    with ExitStack() as opened, ExitStack() as held:
        at_work = held.enter_context(turn or nullcontext(1))
        count = usable_threads(at_work) if threads is None else threads

        def read(path: Path, name: str, options: ReadOptions) -> Iterator[pa.RecordBatch]:
            return read_file(path, name, options, count if path.stat().st_size >= SHARED_BYTES else 1, limits)

        drafts = opened.enter_context(Drafts(folder, beside=count > 1 and item.size >= SHARED_BYTES))
        making = _Making(item, drafts, item_shard_rows(paths, item.options, item.shard_bytes))
        for name, batch in read_item(names, paths, item.options, folder, limits, read):
            for piece in making.pieces(batch):
                making.add(name, piece)
                made += piece.nbytes
                bounds.check_made(name, made, source)
                if making.full:
                    making.finish()
                    yield from drafts.flushed()
        making.finish()
        held.close()  # the disk has something to do, and the core may have too
        yield from drafts.flushed(all_of_them=True)


def schema_of_item(
    item: WorkItem, paths: Sequence[Path], folder: Path, limits: Limits | None = None
) -> pa.Schema | None:
    """The schema of the item's rows from the heads of its files; None when the files are empty altogether."""
    names = [file.path for file in item.files]
    schemas = list(read_heads(names, paths, item.options, folder, limits))
    if not schemas and item.options.features is None:
        return None
    return _target(item, schemas)


def _target(item: WorkItem, schemas: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    """What the rows become: the declared features, else a schema that holds all of them."""
    declared = select_features(item.options.features, item.options.columns)
    if declared is not None:
        return schema_for(declared, pa.schema([]))
    return unify([(path, schema_of(features_of(schema))) for path, schema in schemas])


class _Making:
    """The shard in the making. Its batches go to the disk as they come, as long as its schema cannot change any more.

    It cannot when it is declared, and it has not while all batches have one schema. A batch of another one takes all
    back, and the shard is then held until it is full: its schema is one that holds all of them.
    """

    def __init__(self, item: WorkItem, drafts: Drafts, rows: Sequence[int] | None) -> None:
        self._item, self._drafts = item, drafts
        self._cuts = None if rows is None else iter(rows)
        """Rows of the shards to come; None: a shard is full when it has the item's bytes of a shard."""
        declared = select_features(item.options.features, item.options.columns)
        self._declared = None if declared is None else schema_for(declared, pa.schema([]))
        self._begin()

    def _begin(self) -> None:
        self._held: list[tuple[str, pa.RecordBatch]] = []
        self._bytes = self._held_bytes = 0
        self._rows_left = None if self._cuts is None else next(self._cuts, 0)
        self._schema = self._declared
        self._source: tuple[str, pa.Schema] | None = None
        self._whole = False
        """True when it has to be held until it is full."""

    @property
    def full(self) -> bool:
        return self._bytes >= self._item.shard_bytes if self._rows_left is None else self._rows_left == 0

    def pieces(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """`batch` cut where a record batch or the shard is full, going by the average size of its rows."""
        start = 0
        row_bytes = max(1, batch.nbytes // max(1, batch.num_rows))
        while start < batch.num_rows:
            free = WRITE_BYTES - self._held_bytes % WRITE_BYTES
            if self._rows_left is None:
                free = min(free, self._item.shard_bytes - self._bytes)
            rows = max(1, -(-free // row_bytes))
            if self._rows_left:
                rows = min(rows, self._rows_left)
            piece = batch.slice(start, rows)
            start += piece.num_rows
            yield piece

    def add(self, path: str, batch: pa.RecordBatch) -> None:
        if self._declared is None and not self._whole:
            if self._source is None:
                self._source = (path, batch.schema)
                self._schema = _target(self._item, [self._source])
                self._whole = not self._schema.equals(batch.schema, check_metadata=True)
            elif not self._source[1].equals(batch.schema, check_metadata=True):
                before = self._source[0]
                self._held[:0] = [(before, written) for written in self._drafts.take_back()]
                self._whole = True
        size = batch.nbytes
        if self._rows_left is not None:
            self._rows_left -= batch.num_rows
        self._held.append((path, batch))
        self._bytes += size
        self._held_bytes += size
        if self._held_bytes >= WRITE_BYTES and not self._whole:
            self._write(self._held)
            self._held, self._held_bytes = [], 0

    def finish(self) -> None:
        """Write what is held, end the shard, and begin the next."""
        held = self._held
        if self._whole:
            self._schema = _target(self._item, [(path, batch.schema) for path, batch in held])
        while held:
            size, count = 0, 0
            while count < len(held) and size < WRITE_BYTES:
                size, count = size + held[count][1].nbytes, count + 1
            self._write(held[:count])
            del held[:count]
        self._drafts.finish()
        self._begin()

    def _write(self, batches: Sequence[tuple[str, pa.RecordBatch]]) -> None:
        schema = self._schema
        assert schema is not None  # there is a batch, or a declaration
        cast = [cast_batch(batch, schema, path) for path, batch in batches]
        self._drafts.write(pa.Table.from_batches(cast, schema))
