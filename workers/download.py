"""Bring one file onto this node's disk, checked while it arrives. Runs inside a Ray task, or in a process without Ray.

`bring` returns the path of a complete file whose size and hash are what was promised, under its content's own name;
until then no such name exists. Big files come in ranges, several at once where the source is far; finished ranges are
in a journal, so a killed process loses only what was in flight. A broken connection goes on at its offset, from the
next source where there is one; a source that stalls is hedged by another; bytes that hash wrong are put aside and their
sources asked once more, then dropped. Raises `ChecksumMismatch`, `SizeMismatch`, `SourceUnavailable`, a `RepoError`, or
what the disk says (`StoreError`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from crucible.cache.blobs import BlobFolder, Partial
from crucible.errors import ChecksumMismatch, CrucibleError, DiskFull, StoreError
from crucible.hub.http import Refusal
from crucible.parts import SMALL_BYTES, part_size
from crucible.refs import SourceFile
from crucible.report import Observer, Tally, TransferEvent, unobserved
from crucible.stopping import check
from crucible.workers.assemble import Assembly, Attempt, Part
from crucible.workers.ladder import Ladder
from crucible.workers.options import DownloadOptions as DownloadOptions
from crucible.workers.options import Spare as Spare
from crucible.workers.options import retried
from crucible.workers.small import bring_small
from crucible.workers.sources import Body, Source

TICK_S = 0.1
FAR_S = 0.02
"""A source that needs longer to its first byte is worth several streams at once: a window of bytes a round trip is all
that one connection carries. Nearer ones are not: 8 ranges on loopback gave 1.1 times the speed of one."""
SLOW_STREAM = 200e6
"""Bytes a second below which one stream of a near source gets company: each connection may be throttled by itself."""
SLOW_AFTER_S = 0.5
PUSH_WAIT_S = 30.0
"""How long a finished file waits for its last ranges to reach the spare; whatever is later is only lost effort."""


def bring(
    file: SourceFile,
    sources: Sequence[Source],
    blobs: BlobFolder,
    options: DownloadOptions,
    tally: Tally,
    observe: Observer = unobserved,
) -> Path:
    """Make sure that `blobs` has `file`, from the first of `sources` (in order of cost) that has it right.

    Returns the file's path there: complete, verified, and fsynced if `blobs` are to last. Of several processes that ask
    at once, one brings it.
    """
    began = time.monotonic()
    observe(TransferEvent("started", file.path, file.size))
    ladder = Ladder(file, sources, tries=options.tries, backoff_cap_s=options.backoff_cap_s)
    try:
        path = bring_small(file, ladder, blobs, options, tally, observe) if file.size < SMALL_BYTES else None
        while path is None:
            with blobs.claim(file, stopped=options.stopped) as partial:
                if partial is None:
                    observe(TransferEvent("progress", file.path, file.size, source="disk"))
                    path = blobs.path(file.oid)
                    continue
                try:
                    if Delivery(file, ladder, partial, options, tally, observe).run():
                        path = partial.publish()
                    # else: fenced. Whoever took this over while this process was not heard of is waited for.
                except DiskFull:
                    with suppress(StoreError):
                        partial.reset()  # what does not fit must not keep the disk full for everything else
                    raise
    except CrucibleError as error:
        observe(TransferEvent("failed", file.path, file.size, reason=str(error)))
        raise
    observe(TransferEvent("finished", file.path, file.size, seconds=time.monotonic() - began))
    return path


class Delivery:
    """One file on its way into one `Partial`: stream threads bring parts, this thread watches over them.

    `columns` brings ranges of a file with it, in an assembly and with a proof of its own.
    """

    def __init__(
        self,
        file: SourceFile,
        ladder: Ladder,
        partial: Partial,
        options: DownloadOptions,
        tally: Tally,
        observe: Observer,
    ) -> None:
        self._file, self._ladder, self._partial = file, ladder, partial
        self._options, self._tally, self._observe = options, tally, observe
        most = part_size(file.size, options.streams, options.part_bytes)
        self._assembly = self._assemble(most)
        self._spare = options.spare if file.size > options.part_bytes else None
        self._running = 0
        self._pushing = 0
        self._error: BaseException | None = None
        self._began, self._bytes = time.monotonic(), 0
        self._first_byte_s: float | None = None
        self._changed_etags: set[str] = set()

    def _assemble(self, most: int) -> Assembly:
        return Assembly(self._file, self._partial, most, self._arrived)

    def run(self) -> bool:
        """True when the partial holds the whole file, verified; False when it was fenced. Raises what ended it."""
        if adopted := self._partial.ranges.size:
            self._observe(TransferEvent("progress", self._file.path, adopted, source="journal"))
        assembly = self._assembly
        assembly.follow()
        try:
            if self._spare is not None and adopted:
                self._start(self._push, tuple(self._partial.ranges))
            while True:
                if self._error is not None:
                    raise self._error
                check(self._options.stopped)
                if self._partial.fenced:
                    return False
                if assembly.complete and self._verified():
                    break
                self._start_streams()
                self._start_hedges()
                with assembly.changed:
                    assembly.changed.wait_for(self._noteworthy, TICK_S)
            with assembly.changed:
                assembly.changed.wait_for(lambda: self._pushing == 0, PUSH_WAIT_S)
            return True
        finally:
            assembly.close()

    # --- what this thread watches

    def _noteworthy(self) -> bool:
        return self._error is not None or self._assembly.complete

    def _start_streams(self) -> None:
        with self._assembly.changed:
            free = sum(part.owner is None and not part.done for part in self._assembly.parts)
            for _ in range(min(free, self._wanted() - self._running)):
                self._running += 1
                self._start(self._stream)

    def _wanted(self) -> int:
        """How many streams this source is worth: one at first, all of them when it turns out far or slow."""
        elapsed = time.monotonic() - self._began
        far = self._first_byte_s is not None and self._first_byte_s > FAR_S
        slow = elapsed > SLOW_AFTER_S and self._bytes < SLOW_STREAM * elapsed
        return self._options.streams if far or slow else 1

    def _start_hedges(self) -> None:
        # what waits for its turn (the governor) before it was even asked does not stall, unless another source is free
        for part in self._assembly.stalled(self._options.stall_s, lambda a: a.opened or self._ladder.others(a.source)):
            with self._assembly.changed:
                self._running += 1
            self._start(self._hedge, part)

    def _verified(self) -> bool:
        file, assembly = self._file, self._assembly
        actual = assembly.digest()
        if actual == file.oid:
            self._tally.add(verified_files=1)
            self._observe(TransferEvent("verified", file.path, file.size, source=", ".join(sorted(assembly.sources))))
            return True
        liars = sorted(assembly.sources)
        error = ChecksumMismatch(file.path, ", ".join(liars) or "the partial on this disk", file.oid, actual)
        self._ladder.lied(liars, error)
        retried(file, ", ".join(liars), error, 0, self._options, self._tally, self._observe)
        folder = self._options.quarantine
        assembly.restart(lambda: self._partial.quarantine(folder) if folder else self._partial.reset())
        assembly.follow()
        return False

    # --- what the other threads do

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        # daemons: one that hangs on a dead socket must not keep the process; it owns nothing and writes nothing then
        threading.Thread(target=target, args=arguments, name="crucible-download", daemon=True).start()

    def _stream(self, attempt: Attempt | None = None) -> None:
        try:
            while True:
                taken = attempt or self._assembly.take_part(lambda part: self._ladder.pick(part.failures).name)
                attempt = None
                if taken is None:
                    return
                self._bring_part(taken)
        except BaseException as error:  # noqa: BLE001 - it is raised again by the thread that waits
            self._error = self._error or error
        finally:
            with self._assembly.changed:
                self._running -= 1
                self._assembly.changed.notify_all()

    def _bring_part(self, attempt: Attempt) -> None:
        """All of one part, until it is done or somebody else's."""
        assembly, options = self._assembly, self._options
        while True:
            part = attempt.part
            source = self._ladder.named(attempt.source)
            try:
                self._one_range(attempt, source)
            except Exception as error:  # noqa: BLE001 - the ladder raises again what no source can help with
                if not assembly.owns(attempt):
                    return
                try:
                    wait = self._ladder.failed(source, error, part.failures)
                    part.moved = time.monotonic() + 2 * wait  # it rests, it does not stall
                    retried(self._file, source.name, error, wait, options, self._tally, self._observe)
                    again = assembly.retry(attempt, self._ladder.pick(part.failures).name)
                finally:
                    # a no-op after `retry`: the part has another owner by then
                    assembly.give_up(attempt)
                if again is None:
                    return
                attempt = again
                continue
            part = attempt.part  # `alone` may have given it another one
            if part.done and assembly.owns(attempt):
                self._push([(part.start, part.stop)])
            return

    def _one_range(self, attempt: Attempt, source: Source) -> None:
        """Read what is missing of a part. A body that ends early raises Refusal: the next try goes on there."""
        part, asked = attempt.part, time.monotonic()
        self._observe(TransferEvent("asking", self._file.path, source=source.name))
        with source.open(self._file, part.at, part.stop) as body:
            if self._first_byte_s is None:
                # not what went by before it was asked: a turn of the governor's makes no source a far one
                self._first_byte_s = body.answer_s if body.answer_s is not None else time.monotonic() - asked
            attempt.opened, attempt.cut = True, body.cut
            if not self._same_file(source.name, body):
                return
            skip = 0
            if body.whole and (part.at, part.stop) != (0, self._file.size):
                if not self._assembly.alone(attempt):
                    return
                part = attempt.part
                skip = part.at - body.start
            if not self._pump(attempt, source, body.chunks, skip):
                return
        if not part.done:
            raise Refusal(None, {}, f"the body ended after {part.at:,} of {part.stop:,} bytes")

    def _pump(self, attempt: Attempt, source: Source, chunks: Iterator[memoryview | bytes], skip: int = 0) -> bool:
        for chunk in chunks:
            source.count(len(chunk))
            if skip >= len(chunk):
                skip -= len(chunk)
                continue
            if not self._assembly.write(attempt, chunk[skip:] if skip else chunk):
                return False
            skip = 0
        return True

    def _same_file(self, source: str, body: Body) -> bool:
        """False when a source has another file than before: all that came is forgotten, once a source."""
        etag = body.etag
        if not etag or self._partial.note_etag(source, etag) or source in self._changed_etags:
            return True
        self._changed_etags.add(source)
        self._tally.add(retries=1)
        self._observe(TransferEvent("retried", self._file.path, source=source, reason=f"its ETag became {etag}"))
        self._assembly.restart(self._partial.reset)
        return False

    def _hedge(self, part: Part) -> None:
        """Ask another source, or another connection, for the rest of a part that stalled. The first byte decides."""
        seen, at = part.owner, part.at
        attempt: Attempt | None = None
        if seen is not None:
            reason = f"no byte from {seen.source} for {self._options.stall_s:g} s"
            try:
                source = self._ladder.pick(part.failures, avoid=seen.source)
                self._tally.add(retries=1)
                self._observe(TransferEvent("retried", self._file.path, source=seen.source, reason=reason))
                self._observe(TransferEvent("asking", self._file.path, source=source.name))
                with source.open(self._file, at, part.stop) as body:
                    first = next(body.chunks, None) if body.start == at and not body.whole else None
                    if first is not None:
                        source.count(len(first))
                        attempt = self._assembly.overtake(part, source.name, seen, at)
                        if attempt is not None:
                            attempt.cut = body.cut
                        if attempt is not None and self._assembly.write(attempt, first):
                            self._pump(attempt, source, body.chunks)
            except Exception as error:  # noqa: BLE001 - a hedge that fails leaves everything as it was
                self._observe(TransferEvent("retried", self._file.path, reason=f"hedge: {error}"))
        self._assembly.unhedged(part)
        if attempt is not None and part.done:
            self._push([(part.start, part.stop)])
        if attempt is not None and not part.done and self._assembly.owns(attempt):
            self._stream(attempt)
        else:
            self._stream()

    def _push(self, ranges: Sequence[tuple[int, int]]) -> None:
        if self._spare is None:
            return
        with self._assembly.changed:
            self._pushing += 1
        descriptor = os.dup(self._partial.descriptor)  # its own: this thread may be slower than the file's end
        try:
            for start, stop in ranges:
                self._spare(self._partial.file, descriptor, start, stop)
        finally:
            os.close(descriptor)
            with self._assembly.changed:
                self._pushing -= 1
                self._assembly.changed.notify_all()

    def _arrived(self, size: int) -> None:
        self._bytes += max(size, 0)
        self._observe(TransferEvent("progress", self._file.path, size))
