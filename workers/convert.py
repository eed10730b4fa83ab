"""Turn the source files of a work item into shards: Arrow IPC files any process can map. Runs inside a task.

The same item gives the same bytes on any node and in any run: batch boundaries, types and layout are functions of the
source bytes and the options. A shard is flushed to disk and hashed before it is handed on; giving it its name is
`commit`'s work, so a killed conversion leaves only numbered drafts in its own folder.

Raises CorruptFile, SchemaConflict, UnsupportedFormat or UsageError (a column that is not there), DiskFull or
StoreReadOnly.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from crucible.cache.store import disk_errors
from crucible.casts import cast_batch, unify
from crucible.feature_types import features_of, schema_for, schema_of, select_features
from crucible.formats.items import read_heads, read_item
from crucible.formats.limits import Limits
from crucible.refs import WorkItem
from crucible.workers.canonical import canonical_batch

WRITE_BYTES = 16 << 20
"""A record batch inside a shard: big enough that a shard has a handful, small enough to be read one at a time."""


@dataclass(frozen=True, slots=True)
class DraftShard:
    """A shard on disk that does not have its name yet."""

    path: Path
    number: int
    """Place among the item's shards, from 0."""
    rows: int
    size: int
    """Bytes of the file."""
    digest: str
    """sha256 of the file."""
    schema: pa.Schema


def convert(
    item: WorkItem, paths: Sequence[Path], folder: Path, *, limits: Limits | None = None
) -> Iterator[DraftShard]:
    """Convert `item.files`, whose bytes are at `paths`, into `folder/<number>.arrow`, each yielded when it is on disk.

    Rows keep the order of the files. Shards have about `item.shard_bytes` of Arrow data and at least one row; an item
    without rows yields nothing, and `schema_of_item` tells its columns.
    """
    number, held = 0, _Held(item)
    for name, batch in read_item([file.path for file in item.files], paths, item.options, folder, limits):
        for piece in held.pieces(batch):
            held.add(name, piece)
            if held.bytes >= item.shard_bytes:
                yield held.write(folder, number)
                number += 1
    if held.rows:
        yield held.write(folder, number)


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


class _Held:
    """Rows of the shard in the making. Never more than the target and one batch."""

    def __init__(self, item: WorkItem) -> None:
        self.item = item
        self.batches: list[tuple[str, pa.RecordBatch]] = []
        self.bytes = self.rows = 0

    def pieces(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """`batch` cut where the shard in the making is full, going by the average size of its rows."""
        start = 0
        row_bytes = max(1, batch.nbytes // max(1, batch.num_rows))
        while start < batch.num_rows:
            room = max(1, -(-(self.item.shard_bytes - self.bytes) // row_bytes))
            piece = batch.slice(start, room)
            start += piece.num_rows
            yield piece

    def add(self, path: str, batch: pa.RecordBatch) -> None:
        self.batches.append((path, batch))
        self.bytes += batch.nbytes
        self.rows += batch.num_rows

    def write(self, folder: Path, number: int) -> DraftShard:
        """Write what is held as shard `number` and start the next."""
        schema = _target(self.item, [(path, batch.schema) for path, batch in self.batches])
        batches = [cast_batch(batch, schema, path) for path, batch in self.batches]
        self.batches, self.bytes, self.rows = [], 0, 0
        return write_shard(folder / f"{number}.arrow", number, schema, batches)


def write_shard(path: Path, number: int, schema: pa.Schema, batches: Sequence[pa.RecordBatch]) -> DraftShard:
    """Write batches of one schema as an Arrow file in canonical layout, flush it to disk, and hash it."""
    table = pa.Table.from_batches(batches, schema)
    step = max(1, table.num_rows * WRITE_BYTES // max(WRITE_BYTES, table.nbytes))
    with disk_errors(path, f"about {table.nbytes:,} bytes for a shard"), path.open("wb") as file:
        sink = _Hashing(file)
        with pa.ipc.new_file(pa.PythonFile(sink, "w"), schema, options=_OPTIONS) as writer:
            for start in range(0, table.num_rows, step):
                for batch in table.slice(start, step).combine_chunks().to_batches():
                    writer.write_batch(canonical_batch(batch))
        file.flush()
        os.fsync(file.fileno())
    return DraftShard(path, number, table.num_rows, sink.size, sink.digest.hexdigest(), schema)


_OPTIONS = pa.ipc.IpcWriteOptions(compression=None, use_threads=False, allow_64bit=False)


class _Hashing:
    """A file that is hashed while it is written: a shard is not read again to learn its digest."""

    closed = False

    def __init__(self, file: object) -> None:
        self._write = file.write  # type: ignore[attr-defined]
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return int(self._write(data))

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """The caller flushes once, with fsync."""

    def close(self) -> None:
        """The caller closes the file."""
