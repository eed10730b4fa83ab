"""A disk that is full at any point of any write: what can be seen is right, and with room the same thing completes."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from crucible.cache.book import RoomBook
from crucible.cache.pins import Pins
from crucible.cache.store import Store
from crucible.cluster.prepare import prepare
from crucible.config import Settings
from crucible.dataset import IterableDataset
from crucible.errors import DiskFull, NoRoom, StoreError, StoreReadOnly
from crucible.hashing import sha256_file, shard_digest
from crucible.manifest import Manifest
from crucible.refs import NodeId, RepoRef, SourceFile
from crucible.report import ItemResult, Tally
from crucible.session import data_request, local_job
from crucible.workers import drafts, room
from crucible.workers.fetch import NodeShards
from crucible.workers.litter import litter
from crucible.workers.scrub import scrub
from crucible.workers.work import Workplace, run_item
from tests.hubserver.faults import FaultyHub
from tests.workers.keeping_cases import ROWS, lay_out, small_disk

FILES = 3
IDS = list(range(FILES * ROWS))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 8 << 20) as folder:
        yield folder


@pytest.fixture
def repo(hub: FaultyHub, tmp_path: Path) -> FaultyHub:
    hub.import_folder("org/data", lay_out(tmp_path / "repo", files=FILES))
    return hub


def fill(disk: Path, left: int) -> Path:
    """Leave so many bytes free."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file, suppress(OSError):
        while (more := os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - left) > 0:
            file.write(b"\0" * min(more, 1 << 16))
            file.flush()
    return ballast


def settings_of(hub: FaultyHub, home: Path) -> Settings:
    return Settings(home, endpoint=hub.endpoint, shard_bytes=128 << 10, part_bytes=64 << 10, backoff_cap_s=0.05)


def prefetch(settings: Settings) -> Manifest:
    return local_job(data_request("org/data", None, split="train", revision=None, columns=None), settings)[0][0]


def ids(dataset: Any) -> list[int]:
    return [row["id"] for row in dataset]


def is_whole(home: Path, digests: dict[str, str]) -> None:
    """Everything that can be seen by its name loads, and has the right bytes."""
    store = Store(home)
    for key, _ in store.shards():
        assert shard_digest(store.shard_path(key)) == digests[key]
    assert [one for one in scrub(store, deep=True) if one.kind not in ("unreferenced",)] == []
    for path in (home / "raw").glob("*"):
        if "." not in path.name:
            assert len(path.name) == 40 or sha256_file(path) == path.name
    assert RoomBook(home).reserved() == 0
    assert [one.path for one in litter(store)] == []


def refused_by(do: Callable[[], object]) -> StoreError | None:
    """What a full or frozen disk makes of it: nothing, or an error of ours."""
    try:
        do()
    except StoreError as error:
        return error
    return None


@pytest.mark.parametrize("admits", [True, False], ids=["asked-first", "at-any-write"])
def test_at_any_fill_what_is_visible_is_right_and_with_room_the_same_completes(
    repo: FaultyHub, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, admits: bool
) -> None:
    """Admission refuses most of it before a byte is written; without it each write meets the full disk itself."""
    whole = prefetch(settings_of(repo, tmp_path / "whole"))
    digests = {shard.key: shard.digest for shard in whole.shards}
    if not admits:  # as when other programs fill the disk after we asked
        measure = room.room_of
        monkeypatch.setattr(room, "room_of", lambda home, quota: replace(measure(home, quota), free=1 << 40))
    levels = random.Random(8)
    refused = 0
    for number in range(14):
        home = disk / f"home{number}"
        settings = settings_of(repo, home)
        ballast = fill(disk, levels.choice([0, 4096, 100_000]) if number < 3 else levels.randrange(300_000, 1_700_000))
        refusal = refused_by(partial(prefetch, settings))
        if refusal is not None:
            refused += 1
            assert str(home) in str(refusal)
            assert os.uname().nodename in str(refusal)
            assert refusal.problem, "how much, or what for"
        is_whole(home, digests)
        ballast.unlink()
        assert prefetch(settings).id == whole.id
        assert ids(IterableDataset(whole, NodeShards(settings))) == IDS
        is_whole(home, digests)
        for path in sorted(home.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    assert refused >= 3


def test_what_does_not_fit_at_all_is_refused_before_a_byte_is_asked_for(repo: FaultyHub, disk: Path) -> None:
    fill(disk, 300_000)
    with pytest.raises(NoRoom, match="train-"):
        prefetch(settings_of(repo, disk / "home"))
    assert repo.bytes_sent() == 0


def test_source_files_that_are_kept_on_another_disk_need_room_there(
    repo: FaultyHub, disk: Path, tmp_path: Path
) -> None:
    settings = replace(settings_of(repo, tmp_path / "home"), hub_cache=disk / "hub")
    request = data_request("org/data", None, split="train", revision=None, columns=None)
    item = prepare(request, settings, Store(settings.home), Tally()).items[0][0]
    ballast = fill(disk, 200_000)
    place = Workplace(Store(settings.home), settings, NodeId("n"), keep_raw=True)
    with pytest.raises(NoRoom, match="Hub cache"):
        run_item(item, place)
    assert repo.bytes_sent() == 0
    ballast.unlink()
    assert run_item(item, place).shards


def write_item(store: Store, manifest: Manifest) -> None:
    store.put_item(ItemResult(0, manifest.items[0].key, NodeId("n"), manifest.shards, manifest.schemas))


def bring_range(store: Store, manifest: Manifest) -> None:
    del manifest
    with store.raw.claim(SourceFile("a", 1 << 20, "ab" * 32, True)) as partial:
        assert partial is not None
        partial.write(0, b"x" * 100_000)
        partial.record(0, 100_000, 1)


def enter_workspace(store: Store, _: Manifest) -> None:
    with store.workspace() as folder:
        assert folder.is_dir()


WRITES: dict[str, Callable[[Store, Manifest], object]] = {
    "item": write_item,
    "manifest": lambda store, manifest: store.put_manifest(manifest, ("main",)),
    "survey": lambda store, manifest: store.put_survey(manifest.repo, {"configs": ["x" * 5000]}),
    "small file": lambda store, _: store.write_small("agent.json", b"y" * 5000),
    "pin": lambda store, manifest: Pins(store.home).pin(manifest.id, "z" * 5000),
    "promise": lambda store, _: RoomBook(store.home).reserve(1, "it").close(),
    "workspace": enter_workspace,
    "range": bring_range,
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_every_write_names_the_disk_and_leaves_what_was_there(disk: Path, tmp_path: Path, name: str, how: str) -> None:
    folder = lay_out(tmp_path / "repo", files=1)
    settings = Settings(disk / "home", shard_bytes=4 << 20)
    manifest = local_job(data_request(str(folder), None, split="train", revision=None, columns=None), settings)[0][0]
    store = Store(settings.home)
    before = {path: path.read_bytes() for path in settings.home.rglob("*") if path.is_file()}
    ballast = disk / "ballast"
    if how == "full":
        fill(disk, 0)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], timeout=20, check=True)
    try:
        refused = refused_by(lambda: WRITES[name](store, manifest))
    finally:
        if how == "read-only":
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], timeout=20, check=True)
    if refused is not None:
        assert isinstance(refused, DiskFull if how == "full" else StoreReadOnly)
        assert str(settings.home) in str(refused)
        assert os.uname().nodename in str(refused)
    else:
        assert how == "full", "and what it needs was a page that was there"
    after = {path: path.read_bytes() for path in before if path.is_file()}
    assert after == before
    assert ids(IterableDataset(manifest, NodeShards(settings))) == list(range(ROWS))
    assert [one.kind for one in litter(store)] in ([], ["dead workspace"])
    ballast.unlink(missing_ok=True)
    WRITES[name](store, manifest)


def test_leases_and_notes_that_cannot_be_written_stop_nobody(disk: Path, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "repo", files=2)
    settings = Settings(disk / "home", shard_bytes=4 << 20)
    manifest = local_job(data_request(str(folder), None, split="train", revision=None, columns=None), settings)[0][0]
    for page in (settings.home / "seen").iterdir():
        page.unlink()
    fill(disk, 0)
    assert ids(IterableDataset(manifest, NodeShards(settings))) == list(range(2 * ROWS))
    store = Store(settings.home)
    path = store.shard_path(manifest.shards[0].key)
    with path.open("r+b") as file:
        file.write(b"\xff")
    (settings.home / "quarantine").mkdir(exist_ok=True)
    with suppress(NoRoom, DiskFull):  # a wrong one goes, and makes the room for the right one
        assert ids(IterableDataset(manifest, NodeShards(settings))) == list(range(2 * ROWS))
    assert all(
        shard_digest(store.shard_path(key)) in {one.digest for one in manifest.shards} for key, _ in store.shards()
    )


def test_a_repo_ref_is_not_touched_by_a_full_disk(disk: Path) -> None:
    store = Store(disk / "home")
    repo = RepoRef("org/data", "c" * 40)
    store.put_survey(repo, {"configs": ["one"]})
    fill(disk, 0)
    with pytest.raises(DiskFull):
        store.put_survey(repo, {"configs": ["x" * 100_000]})
    assert store.get_survey(repo) == {"configs": ["one"]}


@pytest.mark.parametrize("beside", [True, False])
def test_a_shard_whose_rows_did_not_fit_is_no_shard_though_its_end_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    """A footer is small: it found room where the rows had found none, and what it ended got its name."""
    write = drafts._Sink.write

    def full(sink: Any, data: Any) -> int:
        if len(data) > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(sink, data)

    monkeypatch.setattr(drafts._Sink, "write", full)
    found = []
    with pytest.raises(DiskFull, match=r"0\.arrow"), drafts.Drafts(tmp_path, beside=beside) as making:  # noqa: PT012
        making.write(pa.table({"id": list(range(10_000))}))
        for _ in range(100):  # the threads beside it end when they will
            found += making.flushed()
            making.finish()
        found += making.flushed(all_of_them=True)
    assert found == []
