"""Files on their way while processes are killed, sources misbehave and ranges come in any order.

A poller hashes whatever has a visible name all the while: it must never see a wrong byte. What was in the journal when
a process was killed is never asked for again.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible.cache.blobs import BlobFolder
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.errors import ChecksumMismatch, SizeMismatch, SourceUnavailable
from crucible.hub.http import HubHttp
from crucible.refs import RepoRef, SourceFile
from crucible.report import Tally
from crucible.workers.download import DownloadOptions, bring
from crucible.workers.sources import HubSource
from tests.hubserver.faults import FaultyHub

REPO = "org/raw"
_CHILD = """
import json, pathlib, sys
from crucible.cache.blobs import BlobFolder
from crucible.config import Settings
from crucible.errors import TransferError
from crucible.hub.http import HubHttp
from crucible.refs import RepoRef, SourceFile
from crucible.report import Tally
from crucible.workers.download import DownloadOptions, bring
from crucible.workers.sources import HubSource
work = json.loads(sys.argv[1])
settings = Settings(pathlib.Path(work["home"]), endpoint=work["endpoint"], timeout_s=2)
tally = Tally()
sources = [HubSource(HubHttp(settings, tally), RepoRef(work["repo"], work["commit"]))]
options = DownloadOptions(work["part"], tries=4, backoff_cap_s=0.02, streams=work["streams"], stall_s=0.5)
blobs = BlobFolder(settings.home / "raw", settings.home / "locks")
print("ready", flush=True)
try:
    bring(SourceFile(*work["file"]), sources, blobs, options, tally)
except TransferError as error:
    sys.exit(3)
"""


class Work:
    """One random file in a Hub, and what it takes to bring it."""

    def __init__(self, hub: FaultyHub, home: Path, size: int, *, lfs: bool, part: int, streams: int) -> None:
        data = random.Random(size).randbytes(size)
        commit = hub.import_files(REPO, {"file.bin": data}, lfs=lfs)
        header = b"" if lfs else b"blob %d\0" % size
        oid = (hashlib.sha256 if lfs else hashlib.sha1)(header + data).hexdigest()
        self.hub, self.home, self.data = hub, home, data
        self.file = SourceFile("file.bin", size, oid, lfs)
        self.lfs, self.part, self.streams, self.commit = lfs, part, streams, commit
        self.raw = home / "raw"

    def served(self) -> int:
        """Bytes of the file that the Hub sent, in all."""
        return sum(record.sent for record in self.hub.log if record.status in (200, 206) and "file.bin" in record.path)

    @contextmanager
    def child(self) -> Iterator[subprocess.Popen[str]]:
        """A process that brings the file; killed at the end of the `with` if it has not ended."""
        arguments = {
            "home": str(self.home), "endpoint": self.hub.endpoint, "repo": REPO, "commit": self.commit,
            "part": self.part, "streams": self.streams,
            "file": [self.file.path, self.file.size, self.file.oid, self.lfs],
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(arguments)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
            process.communicate(timeout=20)

    def bring_here(self) -> bytes:
        tally = Tally()
        http = HubHttp(Settings(self.home, endpoint=self.hub.endpoint, timeout_s=5), tally)
        options = DownloadOptions(self.part, tries=4, backoff_cap_s=0.02, streams=self.streams)
        source = HubSource(http, RepoRef(REPO, self.commit))
        try:
            return bring(self.file, [source], Store(self.home).raw, options, tally).read_bytes()
        finally:
            http.close()


class Poller:
    """Looks at every visible name again and again; remembers the first whose bytes are wrong."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._end = folder, threading.Event()
        self.wrong: list[str] = []
        self.looks = 0
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Poller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(20)
        self.look()

    def _look(self) -> None:
        while not self._end.wait(0.02):
            self.look()

    def look(self) -> None:
        self.looks += 1
        for path in list(self._folder.glob("*")):
            if "." in path.name:
                continue
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            found = hashlib.sha256(data) if len(path.name) == 64 else hashlib.sha1(b"blob %d\0" % len(data) + data)
            if found.hexdigest() != path.name:
                self.wrong.append(path.name)


def wait_until(condition: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.mark.parametrize("streams", [1, 4])
def test_after_a_kill_at_70_percent_only_what_was_in_flight_is_fetched_again(
    hub: FaultyHub, tmp_path: Path, streams: int
) -> None:
    """Checklist item 49; the official client fetches 100 % again."""
    work = Work(hub, tmp_path / "home", 12_000_000, lfs=True, part=500_000, streams=streams)
    hub.add("slow", origin="cdn", skip=16, piece=50_000, wait=0.15)  # seconds from the kill to the end
    with work.child() as process:
        wait_until(lambda: work.served() >= 0.7 * work.file.size)
        process.kill()
        process.wait(10)
    assert not (work.raw / work.file.oid).exists()
    hub.clear_faults()
    before = work.served()
    assert work.bring_here() == work.data
    assert work.served() - before < 0.5 * work.file.size
    assert work.served() <= work.file.size + streams * work.part
    assert [path.name for path in work.raw.iterdir()] == [work.file.oid], "no partial is left"


def test_a_file_killed_again_and_again_costs_its_bytes_once_and_what_was_in_flight_at_each_kill(
    hub: FaultyHub, tmp_path: Path
) -> None:
    work = Work(hub, tmp_path / "home", 12_000_000, lfs=True, part=300_000, streams=3)
    hub.add("slow", origin="cdn", piece=30_000, wait=0.01)
    kills = 0
    with Poller(work.raw) as poller:
        for share in (0.2, 0.4, 0.5, 0.6, 0.8):
            with work.child() as process:
                wait_until(lambda share=share: work.served() >= share * work.file.size)
                process.kill()
                process.wait(10)
                kills += 1
        hub.clear_faults()
        assert work.bring_here() == work.data
    assert poller.wrong == []
    assert work.served() <= work.file.size + kills * work.streams * work.part


def test_a_file_whose_download_ended_before_its_process_was_killed_is_not_fetched_again(
    hub: FaultyHub, tmp_path: Path
) -> None:
    work = Work(hub, tmp_path / "home", 3_000_000, lfs=True, part=500_000, streams=2)
    with work.child() as process:
        assert process.wait(30) == 0
    assert work.bring_here() == work.data
    assert work.served() == work.file.size


fault = st.sampled_from(
    [
        ("flip", {"after": 700_000}), ("flip", {"after": 10}), ("cut", {"after": 100_000}), ("ignore-range", {}),
        ("wrong-range", {}), ("wrong-length", {"by": 17}), ("status", {"status": 503}), ("status", {"status": 500}),
        ("reset", {}), ("expired", {"origin": "cdn"}), ("stall", {"after": 150_000}),
        ("slow", {"piece": 60_000, "wait": 0.005}),
        ("status", {"status": 416}), ("gzip", {}),
    ]
)  # fmt: skip
story = st.fixed_dictionaries(
    {
        "size": st.integers(1, 6_000_000),
        "lfs": st.booleans(),
        "part": st.integers(100_000, 3_000_000),
        "streams": st.integers(1, 6),
        "faults": st.lists(st.tuples(fault, st.integers(0, 4), st.integers(1, 3)), max_size=5),
        "kills": st.lists(st.floats(0.0, 0.6), max_size=3),
    }
)


def tell(folder: Path, said: dict[str, object]) -> None:
    """Faults that pass, processes killed at any time, then a run that nothing disturbs."""
    with FaultyHub(folder / "hub") as hub:
        size, part, streams = int(str(said["size"])), int(str(said["part"])), int(str(said["streams"]))
        work = Work(hub, folder / "home", size, lfs=bool(said["lfs"]), part=part, streams=streams)
        for (kind, options), skip, times in said["faults"]:  # type: ignore[attr-defined]
            hub.add(kind, path="*file.bin*", skip=skip, times=times, **options)
        with Poller(work.raw) as poller:
            for seconds in said["kills"]:  # type: ignore[attr-defined]
                with work.child() as process:
                    try:
                        process.wait(seconds)
                    except subprocess.TimeoutExpired:
                        process.kill()
                    assert process.wait(20) in (0, 3, -9)
            try:
                assert work.bring_here() == work.data
            except (ChecksumMismatch, SizeMismatch, SourceUnavailable):
                hub.clear_faults()  # more faults than tries: the next run has to have it
                assert work.bring_here() == work.data
        assert poller.wrong == []
        BlobFolder(work.raw, None).sweep(0)  # a small file's unfinished write has no journal to be found by
        assert [path.name for path in work.raw.iterdir()] == [work.file.oid], "no partial is left"


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(said=story)
def test_faults_and_kills_in_any_order_never_show_a_wrong_byte(
    tmp_path_factory: pytest.TempPathFactory, said: dict[str, object]
) -> None:
    tell(tmp_path_factory.mktemp("story"), said)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(said=story)
def test_faults_and_kills_in_any_order_never_show_a_wrong_byte_for_long(
    tmp_path_factory: pytest.TempPathFactory, said: dict[str, object]
) -> None:
    tell(tmp_path_factory.mktemp("story"), said)
