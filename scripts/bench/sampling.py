"""Where the time of a run goes: cProfile for the thread that calls, samples of the stack for all threads.

A sample costs tens of microseconds and is taken every 2 ms, so a profiled run is slower than one that is measured;
read shares, not seconds.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import FrameType

INTERVAL_S = 0.002
ROOT = Path(__file__).resolve().parents[2]


def _place(frame: FrameType) -> str:
    name = frame.f_code.co_filename
    short = name.removeprefix(f"{ROOT}/") if name.startswith(str(ROOT)) and "site-packages" not in name else name
    return f"{'/'.join(short.split('/')[-3:])}:{frame.f_lineno} {frame.f_code.co_name}"


def _ours(frame: FrameType | None) -> str:
    """The innermost line of this checkout on a stack: who asked for what the innermost frame does."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(str(ROOT)) and "site-packages" not in name and "scripts/bench" not in name:
            return _place(frame)
        frame = frame.f_back
    return "-"


@contextmanager
def profiled(target: Path) -> Iterator[None]:
    """Write `target` when the block ends: the profile of this thread, then the samples by thread."""
    stop = threading.Event()
    inner: dict[str, Counter[str]] = {}
    outer: dict[str, Counter[str]] = {}

    def sample() -> None:
        own = threading.get_ident()
        while not stop.wait(INTERVAL_S):
            names = {thread.ident: thread.name.rstrip("0123456789") for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                if ident != own:
                    kind = names.get(ident, "?")
                    inner.setdefault(kind, Counter())[_place(frame)] += 1
                    outer.setdefault(kind, Counter())[_ours(frame)] += 1

    sampler = threading.Thread(target=sample, name="sampler", daemon=True)
    profile = cProfile.Profile()
    sampler.start()
    profile.enable()
    try:
        yield
    finally:
        profile.disable()
        stop.set()
        sampler.join(5)
        text = StringIO()
        for order in ("tottime", "cumulative"):
            pstats.Stats(profile, stream=text).sort_stats(order).print_stats(30)
        for title, counts in (("innermost line", inner), ("innermost line of ours", outer)):
            for kind, counter in sorted(counts.items()):
                text.write(f"\nthreads {kind!r}, {title}, {counter.total()} samples\n")
                for place, count in counter.most_common(20):
                    text.write(f"  {100 * count / counter.total():5.1f} %  {place}\n")
        target.write_text(text.getvalue())
