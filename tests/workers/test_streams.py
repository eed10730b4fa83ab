"""Several ranges and several sources at once: each byte once, a stall is hedged, what changed midway is begun anew."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from crucible.cache.blobs import BlobFolder
from crucible.config import Settings
from crucible.errors import ChecksumMismatch
from crucible.hub.http import HubHttp
from crucible.parts import LEAST_PART, SMALL_BYTES, part_size
from crucible.refs import RepoRef, SourceFile
from crucible.report import Tally, TransferEvent
from crucible.workers.download import FAR_S, DownloadOptions, bring
from crucible.workers.sources import HubSource, PeerSource
from tests.fakes.scripted import DATA, Request, server
from tests.hubserver.faults import FaultyHub

FILE = SourceFile("ab" * 32, len(DATA), hashlib.sha256(DATA).hexdigest(), lfs=True)
PART = 300_000
OPTIONS = DownloadOptions(part_bytes=PART, tries=4, backoff_cap_s=0.01, streams=4, stall_s=15)
HEDGING = replace(OPTIONS, stall_s=1)


def fetch(
    folder: Path,
    *urls: str,
    options: DownloadOptions = OPTIONS,
    timeout_s: float = 20,
    tally: Tally | None = None,
    events: list[TransferEvent] | None = None,
) -> bytes:
    tally = tally or Tally()
    sources = [PeerSource(url, "secret", tally, timeout_s=timeout_s) for url in urls]
    observe = events.append if events is not None else lambda event: None
    return bring(FILE, sources, BlobFolder(folder, None), options, tally, observe).read_bytes()


class Crowd:
    """How many requests were in flight at once."""

    def __init__(self, full: int = 0) -> None:
        self._lock = threading.Lock()
        self._now, self._full, self.peak = 0, full, 0
        self.was_full = threading.Event()

    def __enter__(self) -> None:
        with self._lock:
            self._now += 1
            self.peak = max(self.peak, self._now)
            if self._now == self._full:
                self.was_full.set()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._now -= 1


def test_a_far_source_is_read_in_several_streams_and_each_byte_comes_once(tmp_path: Path) -> None:
    crowd = Crowd(OPTIONS.streams)

    def far(request: Request) -> None:
        with crowd:
            time.sleep(3 * FAR_S)
            if request.number:  # the first reply is what shows that it is far; the next waits for company
                crowd.was_full.wait(10)
            request.right()

    tally = Tally()
    with server(far) as (url, asked):
        assert fetch(tmp_path, url, tally=tally) == DATA
    assert crowd.peak == OPTIONS.streams
    assert sorted(asked) == [(at, min(at + PART, len(DATA))) for at in range(0, len(DATA), PART)]
    assert tally.counts.peer_bytes == len(DATA)


def test_a_near_source_is_read_in_one_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # on a machine that is busy enough, everything is far
    monkeypatch.setattr("crucible.workers.download.FAR_S", 15.0)
    monkeypatch.setattr("crucible.workers.download.SLOW_AFTER_S", 15.0)
    crowd = Crowd()

    def near(request: Request) -> None:
        with crowd:
            request.right()

    with server(near) as (url, _):
        assert fetch(tmp_path, url) == DATA
    assert crowd.peak == 1


def test_ranges_that_arrive_in_any_order_are_hashed_in_the_files_order(tmp_path: Path) -> None:
    """The first range comes last, so nothing can be hashed until all the others are on the disk."""
    others = threading.Semaphore(0)

    def last_first(request: Request) -> None:
        time.sleep(2 * FAR_S)
        if request.start == 0:
            request.begin()
            for _ in range(-(-len(DATA) // PART) - 1):
                assert others.acquire(timeout=10)
            request.body()
        else:
            request.right()
            others.release()

    with server(last_first) as (url, _):
        assert fetch(tmp_path, url) == DATA


def test_a_stall_midway_is_hedged_by_another_source_and_nothing_comes_twice(tmp_path: Path) -> None:
    release = threading.Event()

    def stalls(request: Request) -> None:
        if request.number == 1:
            request.begin()
            request.part(100_000)
            release.wait(20)
        else:
            request.right()

    tally, events = Tally(), list[TransferEvent]()
    with server(stalls) as (first, _), server(Request.right) as (second, hedged):
        try:
            assert fetch(tmp_path, first, second, options=HEDGING, tally=tally, events=events) == DATA
            assert not release.is_set()
        finally:
            release.set()
    assert len(hedged) == 1
    (start, stop) = hedged[0]
    assert start % PART == 100_000, "the hedge begins where the stalled one is"
    assert stop % PART == 0
    assert tally.counts.peer_bytes == len(DATA)
    assert any(event.kind == "retried" and first in event.reason for event in events), "the event names who stalled"


def test_the_only_source_is_hedged_by_a_second_connection(tmp_path: Path) -> None:
    release = threading.Event()

    def stalls_once(request: Request) -> None:
        if request.number == 2:
            request.begin()
            request.part(1000)
            release.wait(20)
        else:
            request.right()

    with server(stalls_once) as (url, _):
        try:
            assert fetch(tmp_path, url, options=HEDGING) == DATA
            assert not release.is_set()
        finally:
            release.set()


def test_a_stalled_connection_is_cut_when_it_is_given_up(tmp_path: Path) -> None:
    """It would hold one of the cluster's connections until its timeout, which is far away here."""
    release = threading.Event()

    def stalls(request: Request) -> None:
        request.begin()
        request.part(1000)
        release.wait(20)

    with server(stalls) as (first, _), server(Request.right) as (second, _):
        try:
            assert fetch(tmp_path, first, second, options=HEDGING, timeout_s=60) == DATA
            deadline = time.monotonic() + 10
            while any(thread.name == "crucible-download" for thread in threading.enumerate()):
                assert time.monotonic() < deadline, "a thread still waits for the stalled source"
                time.sleep(0.02)
        finally:
            release.set()


def test_a_source_that_wakes_up_after_its_hedge_writes_nothing(tmp_path: Path) -> None:
    """It wakes up with wrong bytes, while the file is still on its way: none of them may land."""
    wake, woken = threading.Event(), threading.Event()
    events = list[TransferEvent]()

    def sleeper(request: Request) -> None:
        if request.start == 0:
            request.begin()
            request.part(1000)
            wake.wait(20)
            request.raw(b"\0" * (request.stop - request.start - 1000))
            woken.set()
        else:
            request.send(b"", status=503)

    def hedge(request: Request) -> None:
        if request.start >= PART:
            deadline = time.monotonic() + 10
            while sum(event.size for event in list(events) if event.kind == "progress") < PART:
                assert time.monotonic() < deadline, "the hedge did not bring the first part"
                time.sleep(0.01)
            wake.set()
            woken.wait(2)
            time.sleep(0.05)
        request.right()

    with server(sleeper) as (first, _), server(hedge) as (second, _):
        tally = Tally()
        assert fetch(tmp_path, first, second, options=HEDGING, tally=tally, events=events) == DATA
    assert tally.counts.verified_files == 1


def test_a_source_whose_etag_changes_midway_is_read_from_the_start(tmp_path: Path) -> None:
    old = bytes(255 - byte for byte in DATA)

    def replaced(request: Request) -> None:
        now, etag = (old, '"old"') if request.number < 3 else (DATA, '"new"')
        request.send(now[request.start : request.stop], etag=etag)

    tally, events = Tally(), list[TransferEvent]()
    with server(replaced) as (url, asked):
        assert fetch(tmp_path, url, options=replace(OPTIONS, streams=1), tally=tally, events=events) == DATA
    starts = Counter(start for start, _ in asked)
    assert starts[0] == starts[PART] == 2
    assert max(starts.values()) == 2
    assert not any("expected" in event.reason for event in events), "noticed by the ETag, not by the hash at the end"


def test_wrong_bytes_are_put_aside_for_a_look_and_fetched_elsewhere(tmp_path: Path) -> None:
    def flipped(request: Request) -> None:
        body = bytearray(DATA[request.start : request.stop])
        body[7] ^= 1
        request.send(bytes(body))

    aside = tmp_path / "quarantine"
    options = replace(OPTIONS, quarantine=aside)
    with server(flipped) as (liar, asked), server(Request.right) as (honest, _):
        assert fetch(tmp_path / "raw", liar, honest, options=options) == DATA
        once = len(asked)
        assert once <= len(DATA) // PART + 1, "another source is asked before the one that lied is asked again"
        with pytest.raises(ChecksumMismatch, match=liar):
            fetch(tmp_path / "other", liar, options=options)
    kept = list(aside.iterdir())
    assert kept
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() != FILE.oid for path in kept)


def test_every_finished_range_is_offered_to_the_spare(tmp_path: Path) -> None:
    import os

    told: list[tuple[int, int, bytes]] = []
    lock = threading.Lock()

    def spare(file: SourceFile, descriptor: int, start: int, stop: int) -> None:
        with lock:
            told.append((start, stop, os.pread(descriptor, stop - start, start)))

    def far(request: Request) -> None:
        time.sleep(2 * FAR_S)
        request.right()

    with server(far) as (url, _):
        assert fetch(tmp_path, url, options=replace(OPTIONS, spare=spare)) == DATA
    assert b"".join(data for _, _, data in sorted(told)) == DATA


def test_events_tell_the_story_of_a_file(tmp_path: Path) -> None:
    events = list[TransferEvent]()

    def cut_once(request: Request) -> None:
        if request.number == 1:
            request.send(DATA[request.start : request.start + 1000], length=request.stop - request.start)
        else:
            request.right()

    with server(cut_once) as (url, _):
        fetch(tmp_path, url, options=replace(OPTIONS, streams=1), events=events)
        kinds = [event.kind for event in events]
        assert kinds[0] == "started"
        assert kinds[-2:] == ["verified", "finished"]
        assert kinds.count("retried") == 1
        assert sum(event.size for event in events if event.kind == "progress") == len(DATA)
        events.clear()
        fetch(tmp_path, url, events=events)
    assert [event.kind for event in events] == ["started", "progress", "finished"], "nothing moves the second time"


@pytest.mark.parametrize(
    ("size", "streams", "most", "expected"),
    [
        (1 << 30, 8, 64 << 20, 64 << 20),
        (200 << 20, 8, 64 << 20, -(-(200 << 20) // 8)),
        (100 << 20, 8, 64 << 20, LEAST_PART),
        (10 << 20, 8, 64 << 20, LEAST_PART),
        (10 << 20, 8, 1 << 20, 1 << 20),
        (SMALL_BYTES - 1, 8, 1000, SMALL_BYTES - 1),
        (0, 8, 1000, 1),
    ],
)
def test_a_part_is_a_share_for_every_stream_within_bounds(size: int, streams: int, most: int, expected: int) -> None:
    assert part_size(size, streams, most) == expected


def test_when_one_stream_gets_the_whole_file_the_others_stop(tmp_path: Path) -> None:
    """Checklist item 50: a 200 to a request for a range. What is contiguous is kept, the result verifies."""
    crowd, whole = Crowd(), threading.Event()

    def whole_for_the_third(request: Request) -> None:
        with crowd:
            time.sleep(2 * FAR_S)
            if request.start == 2 * PART:
                request.send(DATA, status=200)
                whole.set()
            elif request.start > 2 * PART:
                request.begin()
                request.part(1000)
                whole.wait(10)  # still sending when the whole file comes
                time.sleep(0.5)
                request.raw(DATA[request.start + 1000 : request.stop])
            else:
                request.right()

    tally = Tally()
    with server(whole_for_the_third) as (url, asked):
        assert fetch(tmp_path, url, tally=tally) == DATA
    assert crowd.peak > 1
    assert max(start for start, _ in asked) < 2 * PART + OPTIONS.streams * PART, "no range was asked for after it"
    assert tally.counts.verified_files == 1


@pytest.mark.parametrize("streams", [1, 4])
def test_an_expired_link_is_resolved_once_more_and_goes_on_at_its_offset(
    hub: FaultyHub, tmp_path: Path, streams: int
) -> None:
    """Checklist item 53: 401 or 403 from the CDN. No byte comes twice, and the streams share the new link."""
    commit = hub.import_files("org/data", {"file.bin": DATA}, lfs=True)
    hub.add("expired", origin="cdn", skip=3, times=1)
    tally = Tally()
    http = HubHttp(Settings(tmp_path / "home", endpoint=hub.endpoint), tally)
    try:
        source = HubSource(http, RepoRef("org/data", commit))
        file = SourceFile("file.bin", len(DATA), FILE.oid, lfs=True)
        path = bring(file, [source], BlobFolder(tmp_path / "raw", None), replace(OPTIONS, streams=streams), tally)
    finally:
        http.close()
    assert path.read_bytes() == DATA
    assert tally.counts.hub_bytes == len(DATA)
    assert len(hub.requests("*/resolve/*", origin="hub")) == 2


def test_streams_that_begin_together_resolve_a_file_once(hub: FaultyHub, tmp_path: Path) -> None:
    commit = hub.import_files("org/data", {"file.bin": DATA}, lfs=True)
    tally = Tally()
    http = HubHttp(Settings(tmp_path / "home", endpoint=hub.endpoint), tally)
    file = SourceFile("file.bin", len(DATA), FILE.oid, lfs=True)
    source, start = HubSource(http, RepoRef("org/data", commit)), threading.Barrier(6)

    def read(at: int) -> bytes:
        start.wait(10)
        with source.open(file, at, at + 1000) as body:
            return b"".join(map(bytes, body.chunks))

    try:
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(read, range(0, 6000, 1000)))
    finally:
        http.close()
    assert b"".join(found) == DATA[:6000]
    assert len(hub.requests("*/resolve/*", origin="hub")) == 1


def test_a_redirect_to_other_content_is_not_worth_a_byte(hub: FaultyHub, tmp_path: Path) -> None:
    commit = hub.import_files("org/data", {"file.bin": DATA}, lfs=True)
    http = HubHttp(Settings(tmp_path / "home", endpoint=hub.endpoint), Tally())
    other = SourceFile("file.bin", len(DATA), "0" * 64, lfs=True)
    try:
        with pytest.raises(ChecksumMismatch, match=r"file\.bin"):
            bring(other, [HubSource(http, RepoRef("org/data", commit))], BlobFolder(tmp_path, None), OPTIONS, Tally())
    finally:
        http.close()
    assert hub.bytes_sent() == 0
