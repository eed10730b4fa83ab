"""One blob of random bytes, and processes that bring it: what the tests of the blob folder share."""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from crucible.cache import journal
from crucible.cache.blobs import BlobFolder, Partial
from crucible.refs import SourceFile

CHECKOUT = Path(__file__).resolve().parents[2]
SIZE = 1_500_000
DATA = random.Random(7).randbytes(SIZE)
FILE = SourceFile("data/train.parquet", SIZE, hashlib.sha256(DATA).hexdigest(), True)
HALF = SIZE // 2
PIECE = 50_000
WAIT_S = 60.0


def folder(home: Path) -> BlobFolder:
    return BlobFolder(home / "raw", home / "locks")


def fill(partial: Partial, start: int, stop: int) -> None:
    """Write and record the right bytes."""
    partial.write(start, memoryview(DATA)[start:stop])
    partial.record(start, stop, zlib.crc32(DATA[start:stop]))


def finish(partial: Partial) -> Path:
    """Write what is missing, check all as an engine would, publish."""
    for start, stop in partial.ranges.missing(SIZE):
        fill(partial, start, stop)
    assert hashlib.sha256(os.pread(partial.descriptor, SIZE + 1, 0)).hexdigest() == FILE.oid
    return partial.publish()


def names(home: Path) -> list[str]:
    """What lies in the folder, the oid written as `oid`."""
    return sorted(path.name.replace(FILE.oid, "oid") for path in (home / "raw").iterdir())


def leave(home: Path, *ranges: tuple[int, int]) -> None:
    """A process was here, got so far, and let go."""
    with folder(home).claim(FILE) as held:
        assert held is not None
        for start, stop in ranges:
            fill(held, start, stop)


def journal_path(home: Path, generation: int = 1) -> Path:
    return home / "raw" / f"{FILE.oid}.{generation:08x}.journal.incomplete"


def data_path(home: Path, generation: int = 1) -> Path:
    return home / "raw" / f"{FILE.oid}.{generation:08x}.incomplete"


def disown(home: Path, **changes: object) -> None:
    """Let generation 1 be another process's, one that did not let go."""
    lines = journal_path(home).read_bytes().removesuffix(journal.RELEASED).split(b"\n", 1)
    header = json.dumps({**json.loads(lines[0]), **changes}).encode()
    journal_path(home).write_bytes(header + b"\n" + lines[1])


BRING = """
with folder(home).claim(FILE) as held:
    if held is None:
        say("complete")
        sys.exit()
    say("adopted", held.adopted)
    pieces = [piece for gap in held.ranges.missing(SIZE) for piece in range(gap[0], gap[1], 10_000)]
    seed, most = map(int, hear().split())
    random.Random(seed).shuffle(pieces)
    for count, start in enumerate(pieces):
        if count == most:
            hear()  # far enough: here it waits for its end
        say("writes", start)
        held.write(start, DATA[start : start + 5_000])
        held.write(start + 5_000, DATA[start + 5_000 : start + 10_000])
        held.record(start, start + 10_000, zlib.crc32(DATA[start : start + 10_000]))
        say("recorded", start)
        time.sleep(0.001)
    finish(held)
    say("published")
"""


class Child:
    """A process that runs a piece of code with everything of this module in reach, and `home`."""

    def __init__(self, home: Path, code: str) -> None:
        start = "import os, sys, time, signal\nfrom pathlib import Path\nfrom tests.crucible.blob_cases import *\n"
        start += "from crucible.cache import lease, partial\nhome = Path(sys.argv[1])\n"
        start += "def say(*words): print(*words, flush=True)\ndef hear(): return sys.stdin.readline().strip()\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start + code, str(home)],
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._rest = b""

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word.encode() + b"\n")

    def line(self, wait_s: float = WAIT_S) -> str:
        """The next line it says; "" when it said its last."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + wait_s
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the child said nothing more for {wait_s} s"
            piece = os.read(self.process.stdout.fileno(), 65536)
            if not piece:
                return ""
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def lines(self) -> list[str]:
        """All it still says, to its end."""
        return list(iter(self.line, ""))

    def expect(self, word: str) -> None:
        assert self.line() == word

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for its end; its exit status."""
        return self.process.wait(WAIT_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)


@contextmanager
def child(home: Path, code: str) -> Iterator[Child]:
    """A child that is gone afterwards, whatever happened."""
    process = Child(home, code)
    try:
        yield process
    finally:
        process.kill()
        for stream in (process.process.stdin, process.process.stdout):
            assert stream is not None
            stream.close()


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, f"waited {WAIT_S} s for {what}"
        time.sleep(0.01)
