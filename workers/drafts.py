"""Shards on their way to the disk: Arrow files written, hashed and flushed beside the thread that decodes. In a task.

Profiled on 1.5 GB of chat rows, decoding is half of a conversion's time, hashing 17 %, writing 10 %, fsync 13 %. So a
thread writes, another hashes and a third waits for the disk while others decode, and none of them changes a byte. Data
goes from Arrow's buffers to the hash and to the file without a copy.

Raises DiskFull or StoreReadOnly. A crash leaves drafts without a footer in the task's own folder.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from crucible.cache.store import disk_errors
from crucible.hashing import shard_hasher
from crucible.workers.canonical import canonical_batch

WRITE_BYTES = 16 << 20
"""A record batch inside a shard: big enough that a shard has a handful, small enough to be read one at a time."""
WAITING_BYTES = 2 * WRITE_BYTES
"""What may wait to be written: more would only be memory, because decoding is slower than writing."""
UNFLUSHED = 2
"""Shards that may wait for their fsync. They are in the page cache, not in this process."""

_OPTIONS = pa.ipc.IpcWriteOptions(compression=None, use_threads=False, allow_64bit=False)


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
    """BLAKE3 of the file: `crucible.hashing.shard_hasher`."""
    schema: pa.Schema


class _Runner(Protocol):
    def submit(self, work: Callable[..., Any], /, *arguments: Any) -> Future[Any]: ...
    def shutdown(self, *, cancel_futures: bool) -> None: ...


class _Here:
    """Does the work in the thread that asks."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:  # noqa: BLE001 - raised again by `result`
            future.set_exception(error)
        return future

    def shutdown(self, *, cancel_futures: bool) -> None:
        """There is nothing to end."""


class Drafts:
    """The drafts of one item, `<folder>/<number>.arrow`, in order. Used by one thread; `with` ends its own three.

    `beside` False writes and flushes in the thread that asks: an item of a few files is done before a thread starts.
    """

    def __init__(self, folder: Path, *, beside: bool) -> None:
        self._folder = folder
        self._writer: _Runner = ThreadPoolExecutor(1, "crucible-write") if beside else _Here()
        self._hasher: _Runner = ThreadPoolExecutor(1, "crucible-hash") if beside else _Here()
        self._flusher = ThreadPoolExecutor(1, "crucible-flush") if beside else None
        self._waiting: deque[tuple[Future[Any], int]] = deque()
        self._unflushed: deque[tuple[_Draft, Future[None], Future[DraftShard] | None]] = deque()
        """Each with its end, and with its flush where another thread does that: else it waits to be asked for."""
        self._open: _Draft | None = None
        self._number = 0

    def __enter__(self) -> Drafts:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown(cancel_futures=True)
        self._hasher.shutdown(cancel_futures=True)
        if self._flusher is not None:
            self._flusher.shutdown(cancel_futures=True)
        for draft in (*(draft for draft, *_ in self._unflushed), self._open):
            if draft is not None:
                draft.abandon()

    def write(self, table: pa.Table) -> None:
        """Add a record batch to the shard in the making: all rows of `table`, whose schema is the shard's."""
        if self._open is None:
            self._open = _Draft(self._folder / f"{self._number}.arrow", self._number, table.schema, self._hasher)
        size = table.nbytes
        while self._waiting and (self._waiting[0][0].done() or self._waiting_bytes() + size > WAITING_BYTES):
            self._waiting.popleft()[0].result()
        self._waiting.append((self._writer.submit(self._open.write, table), size))

    def _waiting_bytes(self) -> int:
        return sum(size for _, size in self._waiting)

    def finish(self) -> None:
        """The shard in the making is complete; the next `write` begins another one."""
        draft = self._open
        if draft is None:
            return
        ended = self._writer.submit(draft.end)
        flushed = None if self._flusher is None else self._flusher.submit(_flushed_after, ended, draft)
        self._unflushed.append((draft, ended, flushed))
        self._open = None
        self._number += 1

    def take_back(self) -> Iterator[pa.RecordBatch]:
        """The record batches of the shard in the making, which is then begun anew."""
        draft = self._open
        if draft is None:
            return
        self._settle()
        draft.end()
        draft.close()
        self._open = None
        with pa.OSFile(str(draft.path)) as file:
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)
        draft.path.unlink()

    def _settle(self) -> None:
        while self._waiting:
            self._waiting.popleft()[0].result()

    def flushed(self, *, all_of_them: bool = False) -> Iterator[DraftShard]:
        """Shards that are on the disk; waits while more than a few are not, or until all are."""
        most = 0 if all_of_them else UNFLUSHED
        if all_of_them:
            self._settle()
        while self._unflushed:
            draft, ended, flushed = self._unflushed[0]
            if flushed is not None and len(self._unflushed) <= most and not flushed.done():
                return
            yield _flushed_after(ended, draft) if flushed is None else flushed.result()
            self._unflushed.popleft()


def _flushed_after(ended: Future[None], draft: _Draft) -> DraftShard:
    ended.result()
    return draft.flush()


class _Draft:
    """One file. `write` and `end` run in the writing thread, `flush` in the flushing one, after them."""

    def __init__(self, path: Path, number: int, schema: pa.Schema, hasher: _Runner) -> None:
        self.path, self._number, self._schema = path, number, schema
        self._rows = 0
        self._hasher, self._digest = hasher, shard_hasher()
        self._hashed: Future[None] | None = None
        self._failure: BaseException | None = None
        """Of a batch that could not be written: what is in the file is then no shard."""
        with disk_errors(path, "a new shard"):
            self._file = path.open("wb", buffering=0)
        self._sink = _Sink(self._file)
        self._writer = pa.ipc.new_file(pa.PythonFile(self._sink, "w"), schema, options=_OPTIONS)

    def write(self, table: pa.Table) -> None:
        try:
            with disk_errors(self.path, f"about {table.nbytes:,} bytes for a shard"):
                for batch in table.combine_chunks().to_batches():
                    self._writer.write_batch(canonical_batch(batch))
        except BaseException as error:
            self._failure = error
            raise
        self._rows += table.num_rows
        self._hash()

    def end(self) -> None:
        if self._failure is not None:  # a footer may fit where a batch did not, and would make a shard of what is there
            raise self._failure
        with disk_errors(self.path, "the end of a shard"):
            self._writer.close()
        self._hash()

    def _hash(self) -> None:
        """Hash what was written since the last time, while the next is written. A shard is not read again for it."""
        if self._hashed is not None:
            self._hashed.result()
        self._hashed = self._hasher.submit(_hash_all, self._digest, self._sink.take())

    def flush(self) -> DraftShard:
        with disk_errors(self.path, f"{self._sink.size:,} bytes of a shard"):
            os.fsync(self._file.fileno())
        self.close()
        assert self._hashed is not None  # by `end`
        self._hashed.result()
        digest = self._digest.hexdigest()
        return DraftShard(self.path, self._number, self._rows, self._sink.size, digest, self._schema)

    def close(self) -> None:
        self._file.close()

    def abandon(self) -> None:
        """Close, without a footer if there is none yet: what was written is nothing."""
        self._sink.deaf = True
        with suppress(Exception):
            self._writer.close()
        self._file.close()


def _hash_all(digest: Any, parts: list[Any]) -> None:
    while parts:
        digest.update(parts.pop(0))


class _Sink:
    """A file, and what has just been written to it."""

    closed = False

    def __init__(self, file: Any) -> None:
        self._file = file
        self._parts: list[Any] = []
        self.size = 0
        self.deaf = False

    def take(self) -> list[Any]:
        parts, self._parts = self._parts, []
        return parts

    def write(self, data: Any) -> int:
        size = len(data)
        if not self.deaf:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            self._parts.append(data)
            self.size += size
        return size

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """The draft flushes once, with fsync."""

    def close(self) -> None:
        """The draft closes the file."""
