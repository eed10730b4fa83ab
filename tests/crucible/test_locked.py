"""A job that is held to a lock file gives exactly that again, or names what differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from crucible.bundle import read_lock
from crucible.cache.store import Store
from crucible.cluster.bundles import request_for
from crucible.config import Settings
from crucible.errors import LockMismatch
from crucible.lockfile import Lock
from crucible.session import local_job
from crucible.workers import drafts
from tests.crucible.bundle_cases import Sides, everything, files
from tests.crucible.bundle_cases import sides as sides


@pytest.fixture
def lock(sides: Sides, tmp_path: Path) -> Path:
    """The lock file of `org/data`; this process is then a machine with the Hub and an empty store."""
    sides.export(tmp_path / "data.lock.json", lock_only=True)
    sides.at(tmp_path / "fresh")
    return tmp_path / "data.lock.json"


def do(lock: Path) -> tuple[str, ...]:
    """Run the job without Ray; the ids of the manifests."""
    request, settings = request_for(str(lock), Settings.from_env())
    return tuple(manifest.id for manifest in local_job(request, settings)[0])


def test_a_lock_file_gives_the_same_manifests_again_though_the_branch_has_moved(sides: Sides, lock: Path) -> None:
    expected = tuple(manifest.id for manifest in read_lock(str(lock)).manifests)
    sides.hub.import_files("org/data", {**files(), "data/c.jsonl": b'{"id": 1}\n'})
    sides.monkeypatch.delenv("CRUCIBLE_SHARD_BYTES")  # what the lock file says counts
    assert do(lock) == expected
    sides.hub.clear_log()
    assert do(lock) == expected
    assert sides.hub.log == []
    found = Store(Settings.from_env().home).names()
    assert {id_: len(names) for id_, names in found.items()} == dict.fromkeys(expected, 1)  # the commit, and no branch


def test_a_file_that_the_hub_has_replaced_at_the_commit_is_named_before_anything_moves(
    sides: Sides, lock: Path
) -> None:
    lock.write_bytes(as_if_it_was(read_lock(str(lock)), "data/b.jsonl").to_json())
    sides.hub.clear_log()
    with pytest.raises(LockMismatch) as raised:
        do(lock)
    assert raised.value.what == "source file data/b.jsonl"
    assert "the lock file says" in str(raised.value)
    assert [record for record in sides.hub.log if record.path.endswith(".jsonl")] == []
    assert list(Store(Settings.from_env().home).manifests()) == []


def as_if_it_was(lock: Lock, path: str) -> Lock:
    """The lock file of a time at which the Hub had another content at `path` of the same commit."""
    manifests = []
    for manifest in lock.manifests:
        items = []
        for item in manifest.items:
            kept = tuple(replace(file, oid="ab" * 20) if file.path == path else file for file in item.files)
            items.append(item if kept == item.files else replace(item, files=kept, key=""))
        shards = (replace(shard, key=items[shard.item].shard_key(shard.number)) for shard in manifest.shards)
        manifests.append(replace(manifest, items=tuple(items), shards=tuple(shards)))
    return replace(lock, manifests=tuple(manifests))


def test_shards_that_come_out_with_other_bytes_are_named_and_no_name_leads_to_them(
    sides: Sides, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another pyarrow may write them: here one that aligns its buffers otherwise."""
    other = pa.ipc.IpcWriteOptions(compression=None, use_threads=False, allow_64bit=True, unify_dictionaries=True)
    monkeypatch.setattr(drafts, "_OPTIONS", other)
    monkeypatch.setattr(drafts, "canonical_batch", lambda batch: batch.slice(0))
    plain = drafts._Draft.write

    def write(self: drafts._Draft, table: pa.Table) -> None:
        for start in range(0, table.num_rows, 7):
            plain(self, table.slice(start, 7))

    monkeypatch.setattr(drafts._Draft, "write", write)
    with pytest.raises(LockMismatch) as raised:
        do(lock)
    assert "shard 0 of split t" in raised.value.what
    assert ".jsonl" in raised.value.what
    assert "pyarrow" in str(raised.value)
    store = Store(Settings.from_env().home)
    assert list(store.manifests()) == []
    assert store.names() == {}


def test_a_bundle_will_do_as_a_lock_file(sides: Sides, tmp_path: Path) -> None:
    sides.export(tmp_path / "b.tar")
    sides.at(tmp_path / "fresh")
    assert do(tmp_path / "b.tar") == tuple(manifest.id for manifest in read_lock(str(tmp_path / "b.tar")).manifests)
    assert len(everything()["train"][1]) == 600


def test_a_shard_that_is_lost_is_made_again_by_the_manifests_own_recipe(sides: Sides) -> None:
    """No listing is asked for: what the commit was is known."""
    sides.at(sides.outside)
    next((sides.outside / "shards").rglob("*.arrow")).unlink()
    assert len(everything()["train"][1]) == 600
    assert [record.path for record in sides.hub.log if "/tree/" in record.path] == []
