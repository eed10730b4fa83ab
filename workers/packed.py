"""Bring many small files in one git pack, and put each on the disk while the next is read out of it.

An offer like `gitpack` itself: what does not come this way is asked for file by file, and the log says why. Runs in the
calling thread and a few of its own; a crash leaves what `keep` leaves.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from crucible.errors import SourceUnavailable
from crucible.hub.gitpack import fetch_blobs
from crucible.hub.http import HubHttp
from crucible.refs import RepoRef, SourceFile

KEEP_AT_ONCE = 4
"""Batches being written together: each waits for the disk to say that it has it."""
KEEP_WAITING = 8
"""Batches held in memory for that."""
BATCH_FILES = 64
BATCH_BYTES = 4 << 20
"""A batch ends with the file that fills it."""
_log = logging.getLogger(__name__)


class _Stopped(Exception):
    """Nobody waits for the rest."""


def bring_packed(
    http: HubHttp,
    repo: RepoRef,
    wanted: Sequence[SourceFile],
    listing: Sequence[SourceFile],
    keep: Callable[[Sequence[tuple[SourceFile, bytes]]], None],
    *,
    folder: Path,
    stopped: Callable[[], bool],
) -> None:
    """Call `keep`, from several threads, with batches of those of `wanted` that come in a pack, verified.

    `stopped` is looked at often; once true, what is not here stays where it is. Raises what `keep` raises.
    """
    room, failures = threading.Semaphore(KEEP_WAITING), list[BaseException]()
    batch: list[tuple[SourceFile, bytes]] = []

    def look(_: int = 0) -> None:
        if failures or stopped():
            raise _Stopped

    def run(full: list[tuple[SourceFile, bytes]]) -> None:
        try:
            keep(full)
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that called
            failures.append(error)
        finally:
            room.release()

    with ThreadPoolExecutor(KEEP_AT_ONCE, thread_name_prefix="crucible-keep") as pool:

        def send() -> None:
            look()
            room.acquire()
            pool.submit(run, batch.copy())
            batch.clear()

        def sink(file: SourceFile, data: bytes | memoryview) -> None:
            batch.append((file, bytes(data)))
            if len(batch) == BATCH_FILES or sum(file.size for file, _ in batch) >= BATCH_BYTES:
                send()

        try:
            missing = fetch_blobs(http, repo, wanted, listing, sink, folder=folder, on_bytes=look)
            if missing:
                _log.info("%s: %d of %d files were not in its git pack", repo, len(missing), len(wanted))
        except SourceUnavailable as error:
            _log.info("%s; asking for the files one by one", error)
        except _Stopped:
            batch.clear()
        if batch:
            with suppress(_Stopped):
                send()
    if failures:
        raise failures[0]
