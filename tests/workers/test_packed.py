"""`pull` of many small files: two requests where the Hub speaks git, one a file where it does not, the same files."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from crucible.cache.blobs import BlobFolder
from crucible.cache.hubcache import HubCache
from crucible.config import Settings
from crucible.errors import DiskFull, PullIncomplete, StoreError
from crucible.refs import RepoRef, SourceFile
from crucible.report import Progress
from crucible.workers.pull import PullReport, pull
from tests.hubserver.faults import Fault, FaultyHub

RANDOM = Random(5)
SMALL = {f"d{n % 9}/{n:03}.txt": bytes(RANDOM.choices(b"abcdefgh \n", k=n * 9)) for n in range(200)}
FILES: dict[str, bytes | Path] = {
    **SMALL,
    "again.txt": SMALL["d1/100.txt"],
    "model.bin": bytes(9000),
    "big.txt": b"b" * (3 << 20),
}
REPO = RepoRef("org/data")


@pytest.fixture
def repo(hub: FaultyHub) -> FaultyHub:
    hub.import_files("org/data", FILES)
    hub.clear_log()
    return hub


def settings(hub: FaultyHub, home: Path) -> Settings:
    return Settings(home / "home", endpoint=hub.endpoint, hub_cache=home / "hub", tries=2, backoff_cap_s=0.01)


def pulled(hub: FaultyHub, home: Path, **options: object) -> PullReport:
    return pull(REPO, settings(hub, home), HubCache(home / "hub"), **options)  # type: ignore[arg-type]


def shown(report: PullReport) -> dict[str, bytes]:
    top = Path(report.path)
    return {path.relative_to(top).as_posix(): path.read_bytes() for path in top.rglob("*") if path.is_file()}


def by_name(hub: FaultyHub) -> list[str]:
    """The files that were asked for one by one."""
    return sorted({record.path.partition("/resolve/")[2].partition("/")[2] for record in hub.requests("*/resolve/*")})


def test_small_files_come_in_one_pack_and_the_others_by_name(repo: FaultyHub, tmp_path: Path) -> None:
    heard: list[Progress] = []
    report = pulled(repo, tmp_path, on_progress=heard.append)
    assert shown(report) == FILES
    assert by_name(repo) == ["big.txt", "model.bin"]
    assert len(repo.requests("*.git/*")) == 2
    assert (report.files, report.reused_files) == (len(FILES), 0)
    assert report.counts.verified_files == len(FILES) - 1  # one content lies at two paths
    assert heard[-1].bytes_done == heard[-1].bytes == report.size
    assert heard[-1].items_done == heard[-1].items == len(FILES)
    repo.clear_log()
    again = pulled(repo, tmp_path)
    assert again.reused_files == len(FILES)
    assert len(repo.log) == 1  # where the branch points


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", "*/info/refs", status=404),
        Fault("status", "*/git-upload-pack", status=403),
        Fault("status", "*/git-upload-pack", status=500),
        Fault("reset", "*/git-upload-pack"),
        Fault("cut", "*/git-upload-pack", after=0),
        Fault("flip", "*/git-upload-pack", after=90_000),
    ],
    ids=lambda fault: f"{fault.kind} {fault.path[2:]} {fault.status}",
)
def test_a_hub_whose_git_is_broken_is_asked_for_each_file(
    repo: FaultyHub, tmp_path: Path, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    repo.add(fault)
    with caplog.at_level(logging.INFO, "crucible.workers.packed"):
        report = pulled(repo, tmp_path)
    assert shown(report) == FILES
    assert len(by_name(repo)) > len(SMALL) * 0.9
    assert f"git from {repo.endpoint}" in caplog.text
    assert "one by one" in caplog.text


def test_what_came_before_the_line_broke_is_not_asked_for_again(repo: FaultyHub, tmp_path: Path) -> None:
    fault = repo.add("cut", path="*/git-upload-pack", after=80_000)
    report = pulled(repo, tmp_path)
    assert repo.hits(fault) == 1
    assert shown(report) == FILES
    assert 20 < len(by_name(repo)) < len(SMALL) - 20


def test_a_pull_that_was_stopped_asks_for_the_rest_only(repo: FaultyHub, tmp_path: Path) -> None:
    first = pulled(repo, tmp_path, include=["d0/*", "d1/*", "d2/*"])
    repo.clear_log()
    assert shown(first).keys() == {path for path in FILES if path.startswith(("d0/", "d1/", "d2/"))}
    report = pulled(repo, tmp_path)
    assert shown(report) == FILES
    assert report.reused_files == first.files + 1  # `again.txt` has the content of a file of d1
    assert by_name(repo) == ["big.txt", "model.bin"]


def test_few_files_and_mirrored_ones_are_asked_for_by_name(repo: FaultyHub, tmp_path: Path) -> None:
    pulled(repo, tmp_path / "few", include=["d0/*"])
    mirrored = replace(settings(repo, tmp_path / "mirrored"), mirrors=(repo.endpoint,))
    pull(REPO, mirrored, HubCache(tmp_path / "mirrored" / "hub"))
    assert repo.requests("*.git/*") == []


def test_a_full_disk_stops_the_pull(repo: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, guard, calls = BlobFolder.put_all, threading.Lock(), [0]

    def put_all(self: BlobFolder, blobs: Sequence[tuple[SourceFile, bytes | bytearray | memoryview]]) -> None:
        with guard:
            calls[0] += 1
            if calls[0] > 2:
                raise DiskFull(str(self.root))
        real(self, blobs)

    monkeypatch.setattr(BlobFolder, "put_all", put_all)
    with pytest.raises(StoreError):
        pulled(repo, tmp_path)
    assert calls[0] < 20
    assert len(list((tmp_path / "hub").glob("*/blobs/*.incomplete"))) == 0
    monkeypatch.setattr(BlobFolder, "put_all", real)
    assert shown(pulled(repo, tmp_path)) == FILES


def test_a_hub_that_lies_about_a_file_loses_that_file_only(repo: FaultyHub, tmp_path: Path) -> None:
    repo.add("flip", path="*/d3/003.txt", after=3)
    repo.add("status", path="*.git/*", status=404)
    with pytest.raises(PullIncomplete, match=r"d3/003\.txt"):
        pulled(repo, tmp_path)
    repo.clear_faults()
    assert shown(pulled(repo, tmp_path)) == FILES


def test_small_blobs_that_are_put_together_are_all_on_the_disk_before_one_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [(SourceFile(f"{n}", n, f"{n:040x}", False), bytes(n)) for n in range(5)]
    real, fail_at, seen = os.fsync, 9, 0

    def fsync(descriptor: int) -> None:
        nonlocal seen
        seen += 1
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".incomplete"]
        if seen == fail_at:
            raise OSError(errno.ENOSPC, "full")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    blobs = BlobFolder(tmp_path, None)
    blobs.put_all([])
    fail_at = 3
    with pytest.raises(DiskFull, match="10 bytes for 0 and 4 more"):
        blobs.put_all(some)
    with pytest.raises(StoreError, match="3 bytes were given"):
        blobs.put_all([*some, (some[4][0], b"abc")])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    fail_at = 0
    blobs.put_all(some)
    assert [blobs.path(file.oid).read_bytes() for file, _ in some] == [data for _, data in some]
