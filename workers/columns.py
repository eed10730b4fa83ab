"""Bring only some columns of a parquet file, where that was opted in to: its footer by range, then their chunks.

Runs where `download` does, and is it: sources, streams, hedges, journal, lease and spare are the same. What differs is
the proof. No hash covers a part of a file, so each range is checked by its length and by the file's size that the
source says, each source by its ETag, and what came by parquet's own structure (`formats.chunks`). The bytes lie where
they lie in the file, with holes between them, under a name that is the hash of no content (`ranges_of`): neither this
code nor any other takes them for the file. Where nearly all of the file would come, or the sources know no ranges, the
file comes whole and is verified as ever.

Raises what `download` raises; CorruptFile where the structure is wrong, whoever is asked; UsageError for a column that
is not there.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from crucible.cache.blobs import BlobFolder, Partial
from crucible.errors import CorruptFile, CrucibleError, DiskFull, SourceUnavailable, StoreError, UsageError
from crucible.hub.http import Refusal
from crucible.parts import SMALL_BYTES
from crucible.refs import ByteRange, ReadOptions, SourceFile, WorkItem, digest_of
from crucible.report import Observer, Tally, TransferEvent, unobserved
from crucible.workers.assemble import Assembly, Attempt, parts_of
from crucible.workers.download import Delivery, bring
from crucible.workers.ladder import Ladder
from crucible.workers.options import DownloadOptions, retried
from crucible.workers.sources import Body, Source

RULE = 1
"""Raise it when the same columns would be brought as other ranges: what an older one left has another name then."""


def ranges_of(file: SourceFile, columns: Collection[str]) -> SourceFile:
    """The name under which the ranges of `columns` of `file` lie: no content's hash, and another for other columns."""
    oid = digest_of({"ranges": RULE, "file": file.oid, "size": file.size, "columns": sorted(set(columns))})
    return SourceFile(file.path, file.size, oid, lfs=True)


def staged_as(file: SourceFile, options: ReadOptions) -> tuple[SourceFile, ...]:
    """The names under which an item with these options may stage `file`, the file's own first."""
    if options.partial and options.columns and file.size >= SMALL_BYTES:
        return (file, ranges_of(file, options.columns))
    return (file,)


def bring_columns(
    file: SourceFile,
    columns: Collection[str],
    sources: Sequence[Source],
    blobs: BlobFolder,
    options: DownloadOptions,
    tally: Tally,
    observe: Observer = unobserved,
) -> tuple[Path, SourceFile]:
    """Make sure that `blobs` has `columns` of `file`, at their places in a file of its size; or the whole file.

    Returns where it is, and the name that it has there: `ranges_of(file, columns)`, or `file` when it came whole.
    `sources` are those that know ranges: not Xet storage, which makes the whole file to read from.
    """
    if file.size < SMALL_BYTES or blobs.has(file):
        return bring(file, sources, blobs, options, tally, observe), file
    began, staged = time.monotonic(), ranges_of(file, columns)
    observe(TransferEvent("started", file.path, file.size))
    ladder = Ladder(file, sources, tries=options.tries, backoff_cap_s=options.backoff_cap_s)
    path: Path | None = None
    try:
        while path is None:
            with blobs.claim(staged, stopped=options.stopped) as partial:
                if partial is None:
                    observe(TransferEvent("progress", file.path, file.size, source="disk"))
                    path = blobs.path(staged.oid)
                    continue
                try:
                    delivery = _ColumnsDelivery(file, ladder, partial, options, tally, observe, columns)
                    if delivery.run():
                        path = partial.publish()
                except (_Whole, SourceUnavailable, CorruptFile, DiskFull, UsageError) as error:
                    if isinstance(error, SourceUnavailable) and not _without_ranges(error):
                        raise  # what came is gone on with when somebody can be asked again
                    with suppress(StoreError):
                        partial.reset()  # nothing in it is worth going on with
                    raise
    except (_Whole, CrucibleError) as error:
        if isinstance(error, _Whole) or _without_ranges(error):
            observe(TransferEvent("retried", file.path, file.size, reason=str(error)))
            return bring(file, sources, blobs, options, tally, observe), file
        observe(TransferEvent("failed", file.path, file.size, reason=str(error)))
        raise
    observe(TransferEvent("finished", file.path, file.size, seconds=time.monotonic() - began))
    return path, staged


class _Whole(Exception):
    """Nearly all of the file would come: it may as well come whole, and be verified."""


class _NoRanges(Refusal):
    """A source answers a request for a range with the whole file. Asking again would not help."""


def _without_ranges(error: Exception) -> bool:
    """True for what `Ladder` raises when the last source had no ranges."""
    return isinstance(error.__cause__, _NoRanges)


class _Sparse(Assembly):
    """Some ranges of a file on their way to their places. Nothing is hashed, and there is no whole to wait for."""

    def __init__(self, file: SourceFile, partial: Partial, most: int, arrived: Callable[[int], None]) -> None:
        self.wanted: tuple[tuple[int, int], ...] = ()
        super().__init__(file, partial, most, arrived)

    def want(self, ranges: Sequence[tuple[int, int]]) -> None:
        """These ranges are to be there; what already is stays. Every part before has to be done."""
        with self.changed, self._bytes_came:
            self.wanted = tuple(ranges)
            self._begin()
            self.changed.notify_all()

    def _begin(self) -> None:
        have = self._partial.ranges
        missing = [gap for start, stop in self.wanted for gap in have.gaps(start, stop)]
        self.parts = parts_of(tuple(have), missing, self._most)

    def follow(self) -> None:
        pass

    def alone(self, attempt: Attempt) -> bool:  # noqa: ARG002 - whoever asked is told
        raise _NoRanges(200, {}, "a request for a range is answered with the whole file")


class _ColumnsDelivery(Delivery):
    """The columns of one file on their way: first the range of the footer, then what the footer says."""

    def __init__(
        self,
        file: SourceFile,
        ladder: Ladder,
        partial: Partial,
        options: DownloadOptions,
        tally: Tally,
        observe: Observer,
        columns: Collection[str],
    ) -> None:
        # pyarrow takes a while to load, and who brings whole files does not need it
        from crucible.formats import chunks, footer

        self._columns, self._chunks = frozenset(columns), chunks
        self._first_tail = footer.footer_tail(file.size)
        self._layout: chunks.Layout | None = None
        super().__init__(file, ladder, partial, options, tally, observe)

    def _assemble(self, most: int) -> Assembly:
        self._sparse = _Sparse(self._file, self._partial, most, self._arrived)
        self._begin_anew()
        self._sparse.want(self._sparse.wanted)
        return self._sparse

    def _begin_anew(self) -> None:
        self._layout, self._tail = None, self._first_tail
        self._sparse.wanted = ((self._tail.start, self._tail.stop),)

    def _verified(self) -> bool:
        """What is wanted is there: True if it is all, and right. Raises _Whole, and what is wrong at last."""
        try:
            if self._layout is None:
                self._read_footer()
                return False
            self._chunks.check_chunks(self._file.path, self._partial.descriptor, self._layout.chunks)
        except CorruptFile as error:
            liars = sorted(self._sparse.sources)
            self._ladder.lied(liars, error)
            retried(self._file, ", ".join(liars), error, 0, self._options, self._tally, self._observe)
            self._sparse.restart(self._forget)
            return False
        self._observe(
            TransferEvent("progress", self._file.path, self._file.size - self._partial.ranges.size, source="left out")
        )
        return True

    def _read_footer(self) -> None:
        size, tail = self._file.size, self._tail
        data = os.pread(self._partial.descriptor, len(tail), tail.start)
        found = self._chunks.parse_layout(self._file.path, size, data, self._columns)
        if isinstance(found, ByteRange):
            self._tail = found
            self._sparse.want([(found.start, found.stop)])
            return
        wanted = self._chunks.wanted_ranges(found, size)
        if wanted is None:
            raise _Whole("nearly all of it is wanted: it comes whole, and is verified")
        self._layout = found
        self._sparse.want([*wanted, (tail.start, tail.stop)])

    def _forget(self) -> None:
        self._partial.reset()
        self._begin_anew()

    def _same_file(self, source: str, body: Body) -> bool:
        """As for a whole file, but no hash at the end makes up for a size that is not said, or for a second change."""
        if body.total is None and not body.whole:
            raise SourceUnavailable(self._file.path, source, "its replies to ranges do not say how long the file is")
        if not body.etag or self._partial.note_etag(source, body.etag):
            return True
        reason = f"its ETag became {body.etag} between two ranges; ask for it without `partial`"
        error = SourceUnavailable(self._file.path, source, reason)
        self._ladder.lied([source], error)  # the second time it is dropped
        retried(self._file, source, error, 0, self._options, self._tally, self._observe)
        self._sparse.restart(self._forget)
        return False


@contextmanager
def naming_columns(item: WorkItem, paths: Sequence[Path]) -> Iterator[None]:
    """Let a CorruptFile of an item of some columns name the column: no hash has said that the bytes are right.

    Decodes the columns of the row group that the error names, one at a time, until one is wrong.
    """
    try:
        yield
    except CorruptFile as error:
        group = re.match(r"row group (\d+)", error.where)
        path = next((path for file, path in zip(item.files, paths) if file.path == error.path), None)
        if not item.options.partial or group is None or path is None:
            raise
        import pyarrow as pa
        import pyarrow.parquet as pq

        for column in item.options.columns or ():
            try:
                with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as file:
                    for batch in file.iter_batches(1024, [int(group[1])], [column], use_threads=False):
                        batch.validate(full=True)
            except (pa.ArrowException, OSError, ValueError) as problem:
                said = (str(problem).splitlines() or [type(problem).__name__])[0][:300]
                raise CorruptFile(error.path, f"column {column!r}, {error.where}", said) from error
        raise
