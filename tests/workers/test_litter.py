"""What nobody needs in a store is listed with its reason, and goes; what somebody may need stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crucible.cache.book import RoomBook
from crucible.cache.pins import Pins
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.dataset import IterableDataset
from crucible.manifest import Manifest
from crucible.refs import NodeId
from crucible.workers import litter as module
from crucible.workers.evict import job_began
from crucible.workers.fetch import NodeShards
from crucible.workers.keeping import Keeping
from crucible.workers.litter import litter, sweep
from tests.workers.keeping_cases import ROWS, lay_out, make

OLD = 40 * 86_400
FILES = 2
KILLED = """
import os, signal, sys
from pathlib import Path
from crucible.cache.book import RoomBook
from crucible.cache.store import Store
store = Store(Path(sys.argv[1]))
held = RoomBook(store.home).reserve(10**15, "never")
with store.workspace() as folder:
    (folder / "half").write_bytes(b"x" * 100_000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def made(tmp_path: Path) -> tuple[Settings, Manifest]:
    return make(lay_out(tmp_path / "repo", files=FILES), tmp_path / "home")


def age(path: Path, seconds: float = OLD) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def kinds(store: Store) -> list[str]:
    return sorted(one.kind for one in litter(store))


def test_a_store_in_use_has_no_litter(made: tuple[Settings, Manifest]) -> None:
    store = Store(made[0].home)
    assert litter(Store(made[0].home / "nothing here")) == []
    job_began(store, "running")
    with store.lock("item-x"):
        age(store.home / "locks" / "item-x.lock")
        assert litter(store) == [], "somebody has it"
    (store.home / "locks" / "item-x.lock").unlink(missing_ok=True)
    with store.workspace() as folder, RoomBook(store.home).alone():
        (folder / "x").write_bytes(b"x")
        held = RoomBook(store.home).reserve(5, "it")
        assert litter(store) == []
        held.close()
    assert [row["id"] for row in IterableDataset(made[1], NodeShards(made[0]))] == list(range(FILES * ROWS))
    assert litter(store) == []


def test_what_a_killed_process_leaves_is_litter_and_its_promise_counts_no_more(
    made: tuple[Settings, Manifest],
) -> None:
    store = Store(made[0].home)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(store.home)], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    found = litter(store)
    assert sorted(one.kind for one in found) == ["dead promise", "dead workspace"]
    assert next(one.bytes for one in found if one.kind == "dead workspace") >= 100_000
    assert len(sweep(found)) == 2
    assert litter(store) == []


def test_each_kind_is_named_goes_when_it_is_swept_and_takes_nothing_with_it(
    made: tuple[Settings, Manifest],
) -> None:
    settings, manifest = made
    store, home = Store(settings.home), settings.home
    expected = []

    def old(name: str, kind: str, data: bytes = b"x") -> None:
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        age(path)
        expected.append(kind)

    old("early/abc.json", "stale early manifest")
    old(f"raw/{'a' * 40}", "old source file")
    old(f"raw/{'b' * 64}.00000001.incomplete", "old source file")
    old("locks/item-x.lock", "old lock")
    old("manifests/.half.json.1.ab", "half-written record")
    old("jobs/long%2Eago", "ended job", b"1.0\n")
    Pins(home).pin(manifest.id)
    (home / "pins" / f"{'cd' * 32}.json").write_text("{}")
    expected.append("pin without manifest")
    (home / "items" / "ef").mkdir(exist_ok=True)
    (home / "items" / "ef" / f"{'ef' * 32}.json").write_text("{")
    expected.append("record without shards")
    young = store.shard_path("12" * 32)
    young.parent.mkdir(exist_ok=True)
    young.write_bytes(b"a shard that a running job has just made")
    assert kinds(store) == sorted(expected)
    told = Keeping()
    told._store, told._node = store, NodeId("n")
    assert sorted(one["kind"] for one in told.litter(dry_run=True)) == sorted(expected)
    assert kinds(store) == sorted(expected), "a dry run removes nothing"
    assert sorted(one["kind"] for one in told.litter(dry_run=False)) == sorted(expected)
    assert litter(store) == []
    assert young.exists()
    assert Pins(home).keys() == {shard.key for shard in manifest.shards}
    assert [row["id"] for row in IterableDataset(manifest, NodeShards(settings))] == list(range(FILES * ROWS))


def test_shards_that_no_manifest_names_are_litter_unless_a_job_or_a_reader_may_need_them(
    made: tuple[Settings, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, manifest = made
    store = Store(settings.home)
    (settings.home / "manifests" / f"{manifest.id}.json").unlink()
    assert litter(store) == [], "not for an hour"
    monkeypatch.setattr(module, "UNREFERENCED_KEEP_S", -1.0)
    assert kinds(store) == ["unreferenced shard"] * FILES
    store.holds.hold(manifest.shards[0].key)
    assert kinds(store) == ["unreferenced shard"] * (FILES - 1)
    found = litter(store)
    store.holds.hold(manifest.shards[1].key)
    assert sweep(found) == [], "leased since it was listed"
    for shard in manifest.shards:
        store.holds.release(shard.key)
    (settings.home / "jobs").mkdir(exist_ok=True)
    (settings.home / "jobs" / "running").write_text("1.0")
    assert litter(store) == [], "a job that began before they were made names them when it ends"
    (settings.home / "jobs" / "running").unlink()
    early = [{**manifest.to_dict()}]
    (settings.home / "early").mkdir(exist_ok=True)
    (settings.home / "early" / "x.json").write_text(json.dumps(early))
    assert litter(store) == [], "an early manifest names them"
    (settings.home / "early" / "x.json").unlink()
    assert len(sweep(litter(store))) == FILES
    assert kinds(store) == ["record without shards"] * FILES
