"""Named places where a test may have a process die as by `kill -9`. Nothing happens at them otherwise.

CRUCIBLE_FAILPOINTS is a folder. A process that reaches the point `p` while there is a file `p` in it renames the file
to `p.reached` and kills itself: once, however often it is started again. The file may hold a number n: then the n-th
time that a process comes by it dies, counted over all processes. Without the setting a point costs nothing.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from crucible.config import failpoint_folder

POINTS: Mapping[str, str] = {
    "coordinator.claimed": "it has its epoch; no agent has heard of it, and no job goes on",
    "coordinator.recovering": "it has heard what the agents were told; no job goes on yet",
    "journal.before": "a job was asked for; nothing of it is on disk",
    "journal.torn": "half a line of the journal is written",
    "journal.after": "the line is on disk; nobody was told",
    "journal.compacting": "a shorter journal is written, beside the old one",
    "job.resolved": "the commit is pinned and noted; no item has begun",
    "job.dispatched": "a task was sent",
    "job.done": "an item is done; the job does not know it yet",
    "job.copying": "a replica was asked for",
    "job.sharing": "the manifests are made; no node has them",
    "job.shared": "every node has the manifests; the job has not ended",
    "job.ended": "the end is in the journal; the driver has not heard of it",
    "agent.starting": "the agent has its secret; it does not serve yet",
    "agent.keeping": "one manifest of a job is kept, the next is not, nor the names of both",
    "worker.began": "a task has begun; nothing is brought",
    "worker.brought": "the source files are here and right; no shard is made",
    "worker.converted": "a shard is written; it has no visible name",
    "worker.committed": "a shard is visible; its item is not done",
    "worker.recorded": "the item is done; its source files are still there, and nobody was told",
    "worker.copied": "a replica is visible; nobody was told",
}
"""What has happened, and what has not, when a process gets there."""


def reach(name: str) -> None:
    """Die here if a test has armed this point."""
    folder = _folder()
    if folder is not None:
        _look(folder, name)


@functools.cache
def _folder() -> Path | None:
    return failpoint_folder()


def _look(folder: Path, name: str) -> None:
    if name not in POINTS:
        raise ValueError(f"there is no failpoint {name!r}")
    armed = folder / name
    with suppress(FileNotFoundError):
        if _passed(armed) < int(armed.read_text() or 1):
            return
        armed.rename(armed.with_suffix(f"{armed.suffix}.reached"))  # for one of two that get here at once
        os.kill(os.getpid(), signal.SIGKILL)


def _passed(armed: Path) -> int:
    """The how-manieth this process is to come by. Each leaves a byte, and its place among them is its number."""
    if not armed.exists():
        raise FileNotFoundError(armed)
    counter = os.open(armed.with_suffix(f"{armed.suffix}.count"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(counter, b".")
        return os.lseek(counter, 0, os.SEEK_CUR)
    finally:
        os.close(counter)
