"""Long work that its caller may lose interest in. It is told by a function, which it asks wherever it waits.

A thread cannot be ended from outside; so a reader that is closed while a shard is on its way leaves no thread behind
only because every wait on that way looks up now and then. What is stopped raises `Stopped` and leaves the disk as a
crash would: with what the next one goes on with.
"""

from __future__ import annotations

import time
from collections.abc import Callable

LOOK_S = 0.1
"""How often whoever waits asks whether it still should."""


class Stopped(Exception):
    """Nobody waits for this any more. Caught by whoever said so, and shown to nobody."""


def never() -> bool:
    """The answer of a caller who stays."""
    return False


def check(stopped: Callable[[], bool]) -> None:
    """Raise Stopped if so."""
    if stopped():
        raise Stopped


def rest(seconds: float, stopped: Callable[[], bool], sleep: Callable[[float], None] = time.sleep) -> None:
    """Sleep, or raise Stopped soon after one is told to."""
    if stopped is never:
        sleep(seconds)
        return
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check(stopped)
        sleep(min(left, LOOK_S))
    check(stopped)
