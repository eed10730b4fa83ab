"""A repo of every kind of file, and how the tests of pulls look at a Hub cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from crucible import session
from crucible.hashing import hasher_for
from crucible.refs import SourceFile
from crucible.workers.pull import PullReport

CARD = b"---\nlicense: mit\n---\n"
BIG = os.urandom(3 << 20)
LINES = b"".join(b'{"n": %d}\n' % n for n in range(40_000))
FILES: dict[str, bytes | Path] = {
    "README.md": CARD,
    "data/train.jsonl": LINES,
    "extra/big.bin": BIG,
    "extra/same.bin": BIG,
    "empty.txt": b"",
    **{f"small/{number}.txt": b"%d" % number for number in range(30)},
}
SIZES = {path: len(data) for path, data in FILES.items() if isinstance(data, bytes)}


def pulled(**options: object) -> PullReport:
    return session.pull("org/data", **options)  # type: ignore[arg-type]


@contextmanager
def offline() -> Iterator[None]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        del os.environ["HF_HUB_OFFLINE"]


def pulled_offline(**options: object) -> PullReport:
    with offline():
        return pulled(**options)


def blob_names_are_true(home: Path) -> None:
    """Every blob that can be seen by its name has the bytes that the name says (checklist 47)."""
    for path in (home / "hub").glob("*/blobs/*"):
        if path.name.endswith(".incomplete"):
            continue
        hasher = hasher_for(SourceFile("", path.stat().st_size, "", len(path.name) == 64))
        hasher.update(path.read_bytes())
        assert hasher.hexdigest() == path.name


def wait_for(condition: Callable[[], bool], most_s: float = 30.0) -> None:
    until = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)
