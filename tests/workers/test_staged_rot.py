"""A source file that an earlier process left here complete is not believed: what rotted meanwhile reaches no shard."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crucible.cache import disk
from crucible.cache.blobs import BlobFolder
from crucible.cache.hubcache import HubCache
from crucible.cache.store import Store
from crucible.cluster.prepare import prepare
from crucible.config import Settings
from crucible.data_files import data_request
from crucible.errors import StoreError
from crucible.hashing import shard_digest
from crucible.refs import NodeId, ShardInfo, WorkItem
from crucible.report import Tally
from crucible.workers import cached
from crucible.workers.secret import ensure_secret
from crucible.workers.serve import AgentServer
from crucible.workers.work import Workplace, copy_shard, run_item
from tests.hubserver.faults import FaultyHub

HERE = NodeId("n")
ROWS = {"small": 50, "big": 300_000}


@pytest.fixture(params=sorted(ROWS))
def item(request: pytest.FixtureRequest, hub: FaultyHub, tmp_path: Path) -> tuple[Settings, WorkItem, bytes]:
    """A parquet file of a Hub, below or above the size from which files come in ranges; and its bytes."""
    path = tmp_path / "data" / "train.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"id": list(range(ROWS[request.param]))}), path, compression="none", use_dictionary=False)
    hub.import_folder("org/rot", path.parent)
    settings = Settings(tmp_path / "home", endpoint=hub.endpoint, hub_cache=tmp_path / "cache")
    asked = data_request("org/rot", None, split="train", revision=None, columns=None)
    prepared = prepare(asked, settings, Store(settings.home), Tally())
    return settings, prepared.items[0][0], path.read_bytes()


def done(item: WorkItem, settings: Settings, *, keep_raw: bool = False) -> list[str]:
    """Digests of the item's shards, made in the store of `settings`."""
    place = Workplace(Store(settings.home), settings, HERE, keep_raw=keep_raw)
    return [shard.digest for shard in run_item(item, place).shards]


def left_behind(blobs: BlobFolder, oid: str, data: bytes) -> Path:
    """As a process leaves it that was killed after the file got its name."""
    blobs.root.mkdir(parents=True, exist_ok=True)
    path = blobs.path(oid)
    path.write_bytes(data)
    return path


def flipped(data: bytes) -> bytes:
    """Another value in the middle of a column: the file can still be read."""
    at = len(data) // 3
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("keep_raw", [False, True])
def test_a_source_file_that_rotted_after_it_was_brought_is_named_and_brought_again(
    item: tuple[Settings, WorkItem, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture, keep_raw: bool
) -> None:
    settings, work, data = item
    right = done(work, replace(settings, home=tmp_path / "other"))
    blobs = HubCache(settings.hub_cache).blobs(work.repo) if keep_raw else Store(settings.home).raw
    path = left_behind(blobs, work.files[0].oid, flipped(data))
    with caplog.at_level(logging.WARNING):
        assert done(work, settings, keep_raw=keep_raw) == right
    assert str(path) in caplog.text


def test_what_a_power_cut_left_of_a_source_file_is_brought_again(
    item: tuple[Settings, WorkItem, bytes], tmp_path: Path
) -> None:
    settings, work, data = item
    right = done(work, replace(settings, home=tmp_path / "other"))
    oid, store = work.files[0].oid, Store(settings.home)
    path = left_behind(store.staged, oid, bytes(len(data)))  # its name and length were on the disk, its bytes were not
    now = os.stat(path)
    note = f"{oid} {oid} {'0' * 8} {now.st_ino} {now.st_size} {now.st_mtime_ns} 0\n"  # seen right, before this boot
    (settings.home / "seen").mkdir(parents=True, exist_ok=True)
    (settings.home / "seen" / oid[:2]).write_text(note)
    assert done(work, settings) == right


def test_a_disk_that_refused_a_part_of_a_source_file_is_named_and_what_was_read_of_it_becomes_no_shard(
    item: tuple[Settings, WorkItem, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, work, _ = item
    right = done(work, replace(settings, home=tmp_path / "other"))

    def refuse(*_: int) -> int:
        ctypes.set_errno(errno.EIO)
        return -1

    store = Store(settings.home)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "_SYNC_FILE_RANGE", refuse)
        with pytest.raises(StoreError, match=os.strerror(errno.EIO)) as caught:
            done(work, settings)
    assert str(settings.home) in str(caught.value)
    assert dict(store.shards()) == {}
    assert not store.staged.has(work.files[0]), "it is not believed a second time"
    assert done(work, settings) == right


@pytest.mark.parametrize("missing", [errno.ENOSYS, None])
def test_where_a_system_cannot_be_asked_what_its_disk_refused_the_file_is_synced(
    item: tuple[Settings, WorkItem, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int | None
) -> None:
    settings, work, _ = item

    def unknown(*_: int) -> int:
        ctypes.set_errno(missing or 0)
        return -1

    monkeypatch.setattr(disk, "_SYNC_FILE_RANGE", unknown if missing else None)
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        disk.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size) or real(descriptor)
    )
    done(work, settings)
    assert work.files[0].size in synced


def test_a_source_file_that_is_right_is_not_brought_again(
    item: tuple[Settings, WorkItem, bytes], hub: FaultyHub
) -> None:
    settings, work, data = item
    left_behind(Store(settings.home).raw, work.files[0].oid, data)
    result = run_item(work, Workplace(Store(settings.home), settings, HERE))
    assert result.counts.hub_bytes == 0


def test_items_that_share_a_file_hash_it_once(
    item: tuple[Settings, WorkItem, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, work, data = item
    store, file = Store(settings.home), work.files[0]
    left_behind(store.raw, file.oid, data)
    hashed = []
    real = cached.is_right
    monkeypatch.setattr(cached, "is_right", lambda path, file: hashed.append(path) or real(path, file))
    for _ in range(3):
        cached.drop_rotten(store, store.raw, file)
    assert len(hashed) == (1 if len(data) >= cached.SMALL_BYTES else 3)
    left_behind(store.raw, file.oid, flipped(data))
    cached.drop_rotten(store, store.raw, file)
    assert not store.raw.has(file)


def test_a_copy_that_rotted_before_it_got_its_name_is_copied_again(tmp_path: Path) -> None:
    there, here = Store(tmp_path / "there"), Settings(tmp_path / "here")
    with there.workspace() as folder:
        (folder / "x").write_bytes(b"right" * 100_000)
        shard = ShardInfo("ab" * 32, 1, 500_000, shard_digest(folder / "x"), "s", 0, 0)
        there.commit_shard(folder / "x", shard.key, shard.digest)
    secret = ensure_secret(there)
    left_behind(Store(here.home).raw, shard.digest, b"wrong" * 100_000)
    server = AgentServer(there, secret, HERE, "127.0.0.1", 0, lambda _: [])
    try:
        path = copy_shard(shard, [server.url], secret, Workplace(Store(here.home), here, HERE), Tally())
    finally:
        server.close()
    assert shard_digest(path) == shard.digest
