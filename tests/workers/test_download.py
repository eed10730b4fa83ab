"""Downloading one file, over real sockets, from sources that fail and lie. What lands is right, or nothing lands."""

from __future__ import annotations

import hashlib
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.cache.blobs import BlobFolder
from crucible.errors import ChecksumMismatch, SizeMismatch, SourceUnavailable
from crucible.refs import SourceFile
from crucible.report import Observer, Tally, unobserved
from crucible.workers.download import DownloadOptions, bring
from crucible.workers.sources import PeerSource
from tests.fakes.scripted import DATA, Request, server

PART = 700_000
KEY = "ab" * 32
FILE = SourceFile(KEY, len(DATA), hashlib.sha256(DATA).hexdigest(), lfs=True)
OPTIONS = DownloadOptions(part_bytes=PART, tries=4, backoff_cap_s=0, sleep=lambda _: None)


def fetch(
    folder: Path,
    *urls: str,
    timeout_s: float = 5,
    tally: Tally | None = None,
    options: DownloadOptions = OPTIONS,
    file: SourceFile = FILE,
    observe: Observer = unobserved,
) -> bytes:
    tally = tally or Tally()
    sources = [PeerSource(url, "secret", tally, timeout_s=timeout_s) for url in urls]
    path = bring(file, sources, BlobFolder(folder, None), options, tally, observe)
    assert path == folder / file.oid
    return path.read_bytes()


def landed(folder: Path) -> list[Path]:
    """What is visible by a blob's name."""
    return [path for path in folder.iterdir() if "." not in path.name] if folder.exists() else []


def test_a_file_comes_in_parts_and_is_verified(tmp_path: Path) -> None:
    tally = Tally()
    with server(Request.right) as (url, asked):
        assert fetch(tmp_path, url, tally=tally) == DATA
    assert asked == [(0, PART), (PART, 2 * PART), (2 * PART, 3 * PART), (3 * PART, len(DATA))]
    assert (tally.counts.peer_bytes, tally.counts.verified_files) == (len(DATA), 1)


def test_a_cut_body_goes_on_at_its_offset(tmp_path: Path) -> None:
    def cut_once(request: Request) -> None:
        if request.number == 1:
            request.send(DATA[request.start : request.start + 100_000], length=request.stop - request.start)
        else:
            request.right()

    with server(cut_once) as (url, asked):
        assert fetch(tmp_path, url) == DATA
    assert asked[2][0] == PART + 100_000


def test_a_source_that_ignores_ranges_is_read_as_a_whole(tmp_path: Path) -> None:
    with server(lambda request: request.send(DATA, status=200)) as (url, asked):
        assert fetch(tmp_path, url) == DATA
    assert len(asked) == 1


def test_a_source_that_ignores_the_range_midway_restarts_the_file(tmp_path: Path) -> None:
    with server(lambda r: r.right() if r.number == 0 else r.send(DATA, status=200)) as (url, _):
        assert fetch(tmp_path, url) == DATA


def test_a_wrong_content_range_is_not_believed(tmp_path: Path) -> None:
    def shifted(request: Request) -> None:
        if request.number == 1:
            body = DATA[0 : request.stop - request.start]
            request.send(body, content_range=f"bytes 0-{len(body) - 1}/{len(DATA)}")
        else:
            request.right()

    with server(shifted) as (url, _):
        assert fetch(tmp_path, url) == DATA


def test_a_flipped_byte_is_tried_again_and_then_the_source_is_dropped_for_another(tmp_path: Path) -> None:
    def flipped(request: Request) -> None:
        body = bytearray(DATA[request.start : request.stop])
        body[0] ^= 1
        request.send(bytes(body))

    with server(flipped) as (liar, asked), server(Request.right) as (honest, _):
        with pytest.raises(ChecksumMismatch, match=liar):
            fetch(tmp_path, liar)
        assert landed(tmp_path) == []
        assert len(asked) == 8, "twice the whole file, in four parts"
        assert fetch(tmp_path, liar, honest) == DATA


def test_a_body_that_does_not_end_is_cut_off_at_the_promised_size(tmp_path: Path) -> None:
    tally = Tally()
    with (
        server(lambda request: request.send(DATA * 5, status=200)) as (url, _),
        pytest.raises(SizeMismatch, match="expected 2,400,000"),
    ):
        fetch(tmp_path, url, tally=tally)
    assert tally.counts.peer_bytes < 2 * (len(DATA) + (2 << 20))
    assert landed(tmp_path) == []


def test_a_lying_content_length_is_an_error_that_names_the_source(tmp_path: Path) -> None:
    with (
        server(lambda request: request.send(b"short", status=200, length=len(DATA))) as (url, _),
        pytest.raises(SourceUnavailable, match=url),
    ):
        fetch(tmp_path, url)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_not_now_is_tried_again(tmp_path: Path, status: int) -> None:
    with server(lambda r: r.send(b"", status=status) if r.number < 3 else r.right()) as (url, _):
        assert fetch(tmp_path, url) == DATA


@pytest.mark.parametrize("status", [400, 401, 403, 404, 412])
def test_not_you_is_not_tried_again(tmp_path: Path, status: int) -> None:
    with server(lambda request: request.send(b"", status=status)) as (url, asked):
        with pytest.raises(SourceUnavailable, match=str(status)):
            fetch(tmp_path, url)
        assert len(asked) == 1


def test_a_stalled_source_is_left_for_another(tmp_path: Path) -> None:
    release = threading.Event()

    def stall(request: Request) -> None:
        request.handler.send_response(206)
        request.handler.end_headers()
        release.wait(20)

    with server(stall) as (stalled, _), server(Request.right) as (good, _):
        try:
            assert fetch(tmp_path, stalled, good, timeout_s=1) == DATA
        finally:
            release.set()


def test_a_dead_port_is_an_error_that_says_so(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # a port that nobody else gets meanwhile
        with pytest.raises(SourceUnavailable, match="ConnectError"):
            fetch(tmp_path, f"http://127.0.0.1:{closed.getsockname()[1]}")


def test_an_empty_file_asks_for_nothing(tmp_path: Path) -> None:
    empty = SourceFile(KEY, 0, hashlib.sha256(b"").hexdigest(), lfs=True)
    source = PeerSource("http://127.0.0.1:9", "secret", Tally(), timeout_s=1)
    assert bring(empty, [source], BlobFolder(tmp_path, None), OPTIONS, Tally()).read_bytes() == b""


@settings(deadline=None, max_examples=30)
@given(
    faults=st.lists(st.sampled_from(["right", "cut", "flip", "whole", "503", "shift", "416"]), max_size=8),
    streams=st.sampled_from([1, 4]),
)
def test_whatever_a_source_does_what_lands_is_right_or_nothing(
    tmp_path_factory: pytest.TempPathFactory, faults: list[str], streams: int
) -> None:
    def script(request: Request) -> None:
        fault = faults[request.number] if request.number < len(faults) else "right"
        body = DATA[request.start : request.stop]
        match fault:
            case "cut":
                request.send(body[: len(body) // 2], length=len(body))
            case "flip":
                request.send(bytes([body[0] ^ 255]) + body[1:])
            case "whole":
                request.send(DATA, status=200)
            case "503" | "416":
                request.send(b"", status=int(fault))
            case "shift":
                request.send(body, content_range=f"bytes {request.start + 1}-{request.stop}/{len(DATA)}")
            case _:
                request.right()

    folder = tmp_path_factory.mktemp("landed")
    with server(script) as (url, _):
        try:
            assert fetch(folder, url, options=replace(OPTIONS, streams=streams)) == DATA
        except (ChecksumMismatch, SizeMismatch, SourceUnavailable):
            assert landed(folder) == []
