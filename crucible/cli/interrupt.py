"""A Ctrl-C that is not lost. Python raises KeyboardInterrupt wherever the main thread happens to be, and a library that
is called back there may swallow it: Ray has done so while it waited for an answer. So it is also remembered, and a
command that reports its progress raises it again there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


@contextmanager
def remembered() -> Iterator[None]:
    """Remember a Ctrl-C for the time of the `with`. Does nothing outside of the main thread, where none arrives."""
    _asked.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def raise_if_asked() -> None:
    """Raise KeyboardInterrupt if there was a Ctrl-C that somebody swallowed."""
    if _asked.is_set():
        _asked.clear()
        raise KeyboardInterrupt


def _interrupt(_: int, __: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt
