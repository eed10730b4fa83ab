"""A file is brought in memory that does not depend on its size: of a process that may not have more, and by its peak.

The server makes the bytes while it sends them, so nothing but the file that is brought is on this machine.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import pytest

MB = 10**6
LIMIT = 256 << 20
BLOCK = bytes(range(256)) * 4096  # 1 MiB
KEY = "ab" * 32
SECRET = "s" * 43

CHILD = """
import json, resource, sys
from pathlib import Path
spec = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (spec["limit"], spec["limit"]))  # heap, thread stacks, private mappings

from crucible.cache.blobs import BlobFolder
from crucible.config import Settings
from crucible.hub.http import HubHttp
from crucible.refs import RepoRef, SourceFile
from crucible.report import Tally
from crucible.workers.download import DownloadOptions, bring
from crucible.workers.sources import HubSource, PeerSource

home, tally = Path(spec["home"]), Tally()
settings = Settings(home, endpoint=spec["url"])
if spec["kind"] == "peer":
    source = PeerSource(spec["url"], spec["secret"], tally, timeout_s=60)
else:
    source = HubSource(HubHttp(settings, tally), RepoRef("org/data", "0" * 40))
file = SourceFile(spec["path"], spec["size"], spec["oid"], lfs=True)
path = bring(file, [source], BlobFolder(home / "raw", None), DownloadOptions.of(settings), tally)
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(json.dumps({
    "size": path.stat().st_size,
    "verified": tally.counts.verified_files,
    "requests": tally.counts.requests + tally.counts.peer_requests,
    "peak": int(peak.split()[1]) << 10,  # of this program; ru_maxrss begins with what its parent had
}))
"""


class Generator(http.server.BaseHTTPRequestHandler):
    """Any range of `BLOCK` repeated, `size` bytes long, `late_s` after it was asked for."""

    protocol_version = "HTTP/1.1"
    size: ClassVar[int]
    late_s: ClassVar[float]

    def do_GET(self) -> None:
        first, _, last = self.headers.get("range", f"bytes=0-{self.size - 1}").removeprefix("bytes=").partition("-")
        start, stop = int(first), int(last) + 1
        time.sleep(self.late_s)
        self.send_response(206)
        self.send_header("content-length", str(stop - start))
        self.send_header("content-range", f"bytes {start}-{stop - 1}/{self.size}")
        self.end_headers()
        block = memoryview(BLOCK)
        while start < stop:
            at = start % len(BLOCK)
            piece = block[at : at + stop - start]
            self.wfile.write(piece)
            start += len(piece)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(size: int, late_s: float) -> Iterator[str]:
    handler = type("Handler", (Generator,), {"size": size, "late_s": late_s})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def sha256_of_repeated(size: int) -> str:
    hasher = hashlib.sha256()
    for start in range(0, size, len(BLOCK)):
        hasher.update(BLOCK[: size - start])
    return hasher.hexdigest()


def bring(home: str, kind: str, size: int, late_s: float) -> dict[str, int]:
    """What the child says of itself after it has brought `size` bytes."""
    with serving(size, late_s) as url:
        spec = {"home": home, "kind": kind, "url": url, "size": size, "limit": LIMIT, "secret": SECRET}
        spec |= {"path": KEY if kind == "peer" else "train.bin", "oid": sha256_of_repeated(size)}
        child = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(spec)], capture_output=True, text=True, timeout=150
        )
    assert child.returncode == 0, child.stderr
    return dict(json.loads(child.stdout))


# late: a far source, which gets all its streams at once
@pytest.mark.parametrize(("kind", "late_s"), [("hub", 0.0), ("hub", 0.05), ("peer", 0.05)])
def test_400_megabytes_come_through_a_process_of_256_mib(
    tmp_path_factory: pytest.TempPathFactory, kind: str, late_s: float
) -> None:
    peaks = {}
    for size in (40 * MB, 400 * MB):
        home = tmp_path_factory.mktemp("home")
        said = bring(str(home), kind, size, late_s)
        assert (said["size"], said["verified"]) == (size, 1)
        peaks[size] = said["peak"]
        for path in (home / "raw").iterdir():
            path.unlink()
    assert max(peaks.values()) < LIMIT
    # ten times the bytes may only mean more ranges in flight, with a buffer each
    assert peaks[400 * MB] - peaks[40 * MB] < 24 * MB


def test_what_only_moves_bytes_does_not_load_what_converts_them() -> None:
    program = "import sys, crucible.workers.pull; print({'pyarrow', 'numpy', 'ray'} & set(sys.modules))"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert child.stdout.strip() == "set()", child.stderr


@pytest.mark.slow
def test_4_gigabytes_take_no_more_memory_than_400_megabytes(tmp_path_factory: pytest.TempPathFactory) -> None:
    peaks = []
    for size in (400 * MB, 4000 * MB):
        home = tmp_path_factory.mktemp("home")
        said = bring(str(home), "hub", size, 0.05)
        assert (said["size"], said["verified"]) == (size, 1)
        peaks.append(said["peak"])
        for path in (home / "raw").iterdir():
            path.unlink()
    assert max(peaks) < LIMIT
    assert peaks[1] - peaks[0] < 16 * MB
