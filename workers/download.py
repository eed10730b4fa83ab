"""Bring one file onto this node's disk, checked while it arrives. Runs inside a Ray task, or in a process without Ray.

The bytes go to a file in a workspace and are hashed as they are written. `download` returns only when size and hash are
what was promised; whoever called it then renames or converts the file. A broken connection goes on at its offset; a
source whose bytes hash wrong is asked once more (one flipped bit may be the network's) and then dropped. Raises
`ChecksumMismatch`, `SizeMismatch`, `SourceUnavailable`, a `RepoError`, or what the disk says.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from crucible.cache.store import disk_errors
from crucible.errors import ChecksumMismatch, SizeMismatch, SourceUnavailable, TransferError
from crucible.hashing import Hasher, hasher_for
from crucible.hub.http import Refusal, wait_after
from crucible.refs import SourceFile
from crucible.report import Tally
from crucible.workers.sources import LinkExpired, Source

LIES_ALLOWED = 2
"""How often one source may deliver a whole file whose hash is wrong before it is dropped."""


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """How one file is brought. All from `Settings`."""

    part_bytes: int
    tries: int
    """Tries without a new byte, per source."""
    backoff_cap_s: float
    sleep: Callable[[float], None] = time.sleep


def download(
    file: SourceFile,
    sources: Sequence[Source],
    target: Path,
    options: DownloadOptions,
    tally: Tally,
    progress: Callable[[int], None] = lambda _: None,
) -> Path:
    """Write `file` to `target` from the first source that has it right; sources are tried in the order given.

    `progress` is called with the number of bytes that arrived since its last call; a negative number takes back bytes
    that turned out wrong. Returns `target`, fsynced.
    """
    problems: list[Exception] = []
    with disk_errors(target, f"{file.size:,} bytes for {file.path}"), target.open("wb") as out:
        arrival = _Arrival(file, out.fileno(), progress)
        for source in sources:
            try:
                _from_one(file, source, arrival, options, tally)
            except TransferError as error:
                problems.append(error)
                continue
            os.fsync(out.fileno())
            tally.add(verified_files=1)
            return target
    target.unlink(missing_ok=True)
    if not problems:
        raise SourceUnavailable(file.path, "anywhere", "no source was given")
    raise problems[-1]


class _Arrival:
    """The file as far as it has come: offset and hash of what is written. A wrong start throws both away."""

    def __init__(self, file: SourceFile, descriptor: int, progress: Callable[[int], None]) -> None:
        self.file, self._descriptor, self._progress = file, descriptor, progress
        self.offset = 0
        self.hasher: Hasher = hasher_for(file)

    def restart(self) -> None:
        self._progress(-self.offset)
        self.offset = 0
        self.hasher = hasher_for(self.file)
        os.ftruncate(self._descriptor, 0)

    def take(self, chunk: memoryview | bytes, source: str) -> None:
        if self.offset + len(chunk) > self.file.size:
            extra = self.offset + len(chunk)
            self.restart()
            raise SizeMismatch(self.file.path, source, self.file.size, extra)
        view = memoryview(chunk)
        while view:
            view = view[os.pwrite(self._descriptor, view, self.offset + len(chunk) - len(view)) :]
        self.hasher.update(chunk)
        self.offset += len(chunk)
        self._progress(len(chunk))


def _from_one(file: SourceFile, source: Source, arrival: _Arrival, options: DownloadOptions, tally: Tally) -> None:
    """All of `file` from one source, or a TransferError (another source may do) or RepoError (none will)."""
    lies = failures = expired = 0
    while True:
        before = arrival.offset
        try:
            while arrival.offset < file.size:
                _one_range(file, source, arrival, min(file.size, arrival.offset + options.part_bytes))
            actual = arrival.hasher.hexdigest()
            if actual == file.oid:
                return
            arrival.restart()
            raise ChecksumMismatch(file.path, source.name, file.oid, actual)
        except (ChecksumMismatch, SizeMismatch):
            lies += 1
            if lies >= LIES_ALLOWED:
                raise
            tally.add(retries=1)
        except LinkExpired as refusal:
            expired = 0 if arrival.offset > before else expired + 1
            if expired >= options.tries:
                raise source.refused(file, refusal) from refusal
            tally.add(retries=1)
        except Refusal as refusal:
            if refusal.status == 416 and arrival.offset > 0:
                arrival.restart()  # the source's file is shorter than what came so far: begin again
            failures = 1 if arrival.offset > before else failures + 1
            if not (refusal.retryable or refusal.status == 416) or failures >= options.tries:
                raise source.refused(file, refusal) from refusal
            tally.add(retries=1)
            wait = wait_after(refusal.status, refusal.headers, failures - 1, cap_s=options.backoff_cap_s)
            options.sleep(wait * (1 + 0.1 * random.random()))


def _one_range(file: SourceFile, source: Source, arrival: _Arrival, stop: int) -> None:
    """Read [offset, stop) into the arrival. A body that ends early raises Refusal: the next try goes on there."""
    with source.open(file, arrival.offset, stop) as body:
        if body.start != arrival.offset:
            arrival.restart()
            stop = file.size  # the range was ignored: this body is the whole file
        for chunk in body.chunks:
            source.count(len(chunk))
            arrival.take(chunk, source.name)
    if arrival.offset < stop:
        raise Refusal(None, {}, f"the body ended after {arrival.offset:,} of {file.size:,} bytes")
