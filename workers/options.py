"""How one file is brought: what the two ways of `download` share."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from crucible.config import Settings
from crucible.hub.http import Refusal
from crucible.refs import SourceFile
from crucible.report import Observer, Tally, TransferEvent
from crucible.stopping import never, rest


class Spare(Protocol):
    """Told of every finished range of a big file, so that it exists somewhere else as well. Must not raise."""

    def __call__(self, file: SourceFile, descriptor: int, start: int, stop: int) -> None: ...


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """How one file is brought. All from `Settings`."""

    part_bytes: int
    tries: int
    """Tries of one range without a new byte, per source."""
    backoff_cap_s: float
    streams: int = 1
    stall_s: float = 3.0
    sleep: Callable[[float], None] = time.sleep
    quarantine: Path | None = None
    """Where bytes that turned out wrong are kept for a look; None: nowhere."""
    spare: Spare | None = None
    stopped: Callable[[], bool] = never
    """True once nobody waits for the file: `bring` then raises Stopped."""

    @classmethod
    def of(
        cls, settings: Settings, *, spare: Spare | None = None, stopped: Callable[[], bool] = never
    ) -> DownloadOptions:
        return cls(
            part_bytes=settings.part_bytes,
            tries=settings.tries,
            backoff_cap_s=settings.backoff_cap_s,
            streams=settings.streams,
            stall_s=settings.stall_s,
            quarantine=settings.home / "quarantine",
            spare=spare,
            stopped=stopped,
        )


def retried(
    file: SourceFile,
    source: str,
    error: Exception,
    wait: float,
    options: DownloadOptions,
    tally: Tally,
    observe: Observer,
) -> None:
    """Count another try, tell of it, and wait for it."""
    tally.add(retries=1)
    reason = error.reason if isinstance(error, Refusal) else str(error)
    observe(TransferEvent("retried", file.path, source=source, reason=reason))
    if wait > 0:
        wait *= 1 + 0.1 * random.random()  # a cluster must not return as one
        observe(TransferEvent("waiting", file.path, seconds=wait, source=source, reason=reason))
        rest(wait, options.stopped, options.sleep)
