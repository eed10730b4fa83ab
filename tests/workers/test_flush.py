"""A disk that fails while a file is flushed beside its transfer: the file must not get its name."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
from pathlib import Path

import pytest

from crucible.cache.blobs import BlobFolder
from crucible.errors import StoreError
from crucible.refs import SourceFile
from crucible.report import Tally
from crucible.workers import assemble
from crucible.workers.download import DownloadOptions, bring
from crucible.workers.sources import PeerSource
from tests.fakes.scripted import DATA, Request, server

FILE = SourceFile("ab" * 32, len(DATA), hashlib.sha256(DATA).hexdigest(), lfs=True)
OPTIONS = DownloadOptions(part_bytes=300_000, tries=2, backoff_cap_s=0)


def fetch(folder: Path, url: str) -> Path:
    tally = Tally()
    return bring(FILE, [PeerSource(url, "secret", tally, timeout_s=10)], BlobFolder(folder, None), OPTIONS, tally)


def test_the_flush_leaves_a_failed_write_to_the_fsync_that_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports a failed write once to each open file, so the flush must go through one of its own."""
    monkeypatch.setattr(assemble, "FLUSH_BYTES", 100_000)
    modes: list[int] = []
    flushed = threading.Event()

    def fdatasync(descriptor: int) -> None:
        modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        flushed.set()
        raise OSError(errno.EIO, "Input/output error")

    def right(request: Request) -> None:
        if request.start:  # not the first: what came so far is being flushed
            assert flushed.wait(20)
        request.right()

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with server(right) as (url, _):
        assert fetch(tmp_path, url).read_bytes() == DATA, "what a flush says is asked again at the end"
    assert set(modes) == {os.O_RDONLY}, "the data file's own descriptor writes, so this is another open file"


def test_a_file_whose_last_flush_fails_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with server(Request.right) as (url, _), pytest.raises(StoreError, match="Input/output error"):
        fetch(tmp_path, url)
    assert [path for path in tmp_path.iterdir() if "." not in path.name] == []
