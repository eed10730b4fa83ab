"""Room on a node's disk: what is asked for before it is taken, what makes room, and what is never given up for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crucible.cache.book import RoomBook
from crucible.cache.pins import Pins
from crucible.cache.quota import Quota
from crucible.cache.store import Store
from crucible.cache.usage import Usage
from crucible.config import Settings
from crucible.dataset import IterableDataset
from crucible.errors import NoRoom
from crucible.manifest import Manifest
from crucible.refs import NodeId
from crucible.workers import room
from crucible.workers.evict import Alone, evict, job_began, usages
from crucible.workers.fetch import NodeShards
from crucible.workers.keeping import Keeping, usage
from crucible.workers.room import Need, admitted
from crucible.workers.secret import ensure_secret
from crucible.workers.serve import AgentAddress, AgentServer, write_address
from tests.hubserver.faults import FaultyHub
from tests.workers.keeping_cases import FILES, ROWS, lay_out, make, wrong

IDS = list(range(FILES * ROWS))
WAIT_S = 60


def ids(dataset: Any) -> list[int]:
    return [row["id"] for row in dataset]


def sizes(home: Path) -> int:
    return Usage(home).bytes()


def age(store: Store, seconds: float, keys: Sequence[str] | None = None) -> None:
    """As if these shards had last been used so long ago."""
    for key, _, _ in usages(store):
        if keys is None or key in keys:
            path = store.shard_path(key)
            then = path.stat().st_mtime - seconds
            os.utime(path, (then, then))


@pytest.fixture
def first(tmp_path: Path) -> tuple[Settings, Manifest]:
    settings, manifest = make(lay_out(tmp_path / "first"), tmp_path / "home")
    age(Store(settings.home), 5000)
    return settings, manifest


def quota_for(settings: Settings, more: float) -> Settings:
    """Room for what is there, and for `more` of it."""
    return replace(settings, quota=Quota(size=int(sizes(settings.home) * (1 + more))))


def held(store: Store, manifest: Manifest) -> int:
    return sum(store.has_shard(shard) for shard in manifest.shards)


def test_what_was_not_used_for_longest_makes_room_and_can_be_read_again(
    first: tuple[Settings, Manifest], tmp_path: Path
) -> None:
    settings, manifest = first
    store = Store(settings.home)
    age(store, 9000, [manifest.shards[2].key])
    tight = quota_for(settings, 0.5)
    _, second = make(lay_out(tmp_path / "second", files=2), settings.home, quota=tight.quota)
    assert held(store, second) == len(second.shards)
    assert not store.has_shard(manifest.shards[2]), "the one that was idle for longest"
    assert tight.quota.size is not None
    assert sizes(settings.home) <= tight.quota.size
    assert ids(IterableDataset(manifest, NodeShards(tight))) == IDS
    assert sizes(settings.home) <= tight.quota.size


@pytest.mark.parametrize("why", ["pinned", "leased", "its source is gone"])
def test_what_may_not_go_stays_and_the_refusal_says_where_how_much_and_what_would_help(
    first: tuple[Settings, Manifest], tmp_path: Path, why: str
) -> None:
    settings, manifest = first
    store = Store(settings.home)
    tight = quota_for(settings, 0.2)
    if why == "pinned":
        Pins(settings.home).pin(manifest.id)
    elif why == "leased":
        for shard in manifest.shards:
            store.holds.hold(shard.key)
    else:
        (tmp_path / "first").rename(tmp_path / "gone")
    try:
        with pytest.raises(NoRoom) as caught:
            make(lay_out(tmp_path / "second"), settings.home, quota=tight.quota)
    finally:
        for shard in manifest.shards:
            store.holds.release(shard.key)
    told = str(caught.value)
    assert str(settings.home) in told
    assert os.uname().nodename in told
    assert "CRUCIBLE_QUOTA" in told
    assert "crucible evict" in told
    assert caught.value.need > caught.value.left >= 0
    assert held(store, manifest) == len(manifest.shards)
    assert wrong(store, manifest) == []
    assert list((settings.home / "tmp").iterdir()) == []
    assert RoomBook(settings.home).reserved() == 0
    Pins(settings.home).unpin(manifest.id)
    if why != "its source is gone":
        age(store, 5000)  # `wrong` has just read them: in the tick of the disk's clock in which the job begins
        make(tmp_path / "second", settings.home, quota=tight.quota)


def test_a_job_does_not_push_out_what_it_made_itself(tmp_path: Path) -> None:
    lay_out(tmp_path / "big", files=6)
    with pytest.raises(NoRoom):
        make(tmp_path / "big", tmp_path / "home", quota=Quota(size=900_000))
    store = Store(tmp_path / "home")
    made = dict(store.shards())
    assert made
    assert sum(made.values()) <= 900_000
    _settings, manifest = make(tmp_path / "big", tmp_path / "home", quota=Quota(size=9_000_000))
    assert held(store, manifest) == 6
    assert made.items() <= dict(store.shards()).items()


@pytest.mark.parametrize("order", ["source", "shuffled", "fetched ahead"])
def test_a_reader_of_more_than_fits_reads_every_row_within_the_quota(tmp_path: Path, order: str) -> None:
    """A shuffle draws on all shards at once, and a reader keeps what it has open: it makes do with fewer."""
    settings, manifest = make(lay_out(tmp_path / "big", files=8), tmp_path / "home")
    store = Store(settings.home)
    evict(store, 1 << 40, Alone(store, settings), whole=False)
    assert held(store, manifest) == 0
    tight = replace(settings, quota=Quota(size=4 * manifest.shards[0].size))
    if order != "fetched ahead":
        tight = replace(tight, ahead_bytes=0)
    most = 0
    found = []
    stream = IterableDataset(manifest, NodeShards(tight))
    for row in stream if order == "source" else stream.shuffle(seed=5):
        found.append(row["id"])
        if len(found) % ROWS == 1:
            most = max(most, sizes(settings.home))
    assert sorted(found) == list(range(8 * ROWS))
    assert tight.quota.size is not None
    assert most <= tight.quota.size
    assert RoomBook(settings.home).reserved() == 0


def test_the_agent_of_a_node_makes_room_for_its_processes(first: tuple[Settings, Manifest], tmp_path: Path) -> None:
    settings, manifest = first
    store = Store(settings.home)
    agent, asked = Keeping(), []

    class Others(Alone):
        def elsewhere(self, keys: Sequence[str]) -> set[str]:
            return set(keys[:1])

        def could_drop(self, keys: Sequence[str]) -> set[str]:
            return {key for key in keys if key == manifest.shards[3].key}

        def may_drop(self, keys: Sequence[str]) -> set[str]:
            asked.append(list(keys))
            return set(keys)

    agent._store, agent._node = store, NodeId("n")
    agent._neighbours = lambda: Others(store, settings)  # type: ignore[method-assign]
    (tmp_path / "first").rename(tmp_path / "gone")  # alone it could let nothing go
    server = AgentServer(
        store, ensure_secret(store), NodeId("n"), "127.0.0.1", 0, lambda _: [], lambda what, told: agent._room(told)
    )
    try:
        write_address(store, AgentAddress(server.url, NodeId("n"), os.getpid()))
        assert room.make_room(store, settings, 1000, None)
        assert [held(store, manifest), store.has_shard(manifest.shards[3])] == [3, False]
        assert asked == [[manifest.shards[3].key]], "only what goes is asked for"
        assert not room.make_room(store, settings, 1000, None)
        assert held(store, manifest) == 3
    finally:
        server.close()
    assert not room.make_room(store, settings, 1000, None), "its agent is gone: nobody says that anything may go"


def test_without_a_cluster_a_shard_goes_only_while_the_hub_answers(hub: FaultyHub, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "repo")
    hub.import_folder("org/data", folder)
    from crucible.session import data_request, local_job

    settings = Settings(tmp_path / "home", endpoint=hub.endpoint, shard_bytes=4 << 20, backoff_cap_s=0.05, tries=2)
    manifests, _ = local_job(data_request("org/data", None, split="train", revision=None, columns=None), settings)
    store = Store(settings.home)
    hub.add("status", origin="hub", status=503)
    assert evict(store, 1000, Alone(store, settings)) == {}
    assert evict(store, 1000, Alone(store, replace(settings, offline=True))) == {}
    hub.clear_faults()
    alone = Alone(store, settings)
    before = len(hub.requests())
    assert len(evict(store, 1000, alone, dry_run=True)) == 1
    assert len(evict(store, 1000, alone)) == 1
    assert len(hub.requests()) == before + 1, "a commit is asked about once"
    assert held(store, manifests[0]) == FILES - 1


def test_work_waits_for_what_others_were_promised_and_did_not_take(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "home", quota=Quota(size=10_000_000))
    store, entered = Store(settings.home), threading.Event()
    with admitted(store, settings, Need("first", 9_000_000, lambda: 1)) as claim:

        def second() -> None:
            with admitted(store, settings, Need("second", 8_000_000, lambda: 5_000_000)):
                entered.set()

        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.3)
        claim.expect(1_000_000)
        assert entered.wait(WAIT_S)
        thread.join(WAIT_S)
        claim.expect(9_000_000)
        assert claim.left == 1_000_000, "what is expected only becomes less"
    assert RoomBook(settings.home).reserved() == 0


def test_what_could_not_be_evicted_beside_other_work_is_evicted_when_that_has_ended(
    first: tuple[Settings, Manifest],
) -> None:
    settings, manifest = first
    store, used = Store(settings.home), sizes(settings.home)
    tight = quota_for(settings, 0.25)
    others = RoomBook(settings.home).reserve(int(used * 1.2), "others")  # more than all that could go
    ended = threading.Event()

    def second() -> None:
        with admitted(store, tight, Need("second", int(used * 0.4), lambda: int(used * 0.35))):
            ended.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert not ended.wait(0.3)
    assert held(store, manifest) == FILES, "what would not be enough stays"
    others.close()
    assert ended.wait(WAIT_S)
    thread.join(WAIT_S)
    assert held(store, manifest) == FILES - 1


def test_what_takes_more_than_it_was_promised_stops_at_the_quota(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "home", quota=Quota(size=1_000_000))
    store = Store(settings.home)
    with store.workspace() as folder, admitted(store, settings, Need("it", 600_000, lambda: 1)) as claim:
        (folder / "a").write_bytes(b"x" * 500_000)
        claim.landed(500_000)
        (folder / "b").write_bytes(b"x" * 400_000)
        claim.landed(400_000)  # more than was promised, and it fits
        (folder / "c").write_bytes(b"x" * 400_000)
        with pytest.raises(NoRoom, match="more than was expected"):
            claim.landed(400_000)


EVICT = """
import sys
from pathlib import Path
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.workers.evict import Alone, evict
settings = Settings(Path(sys.argv[1]))
store = Store(settings.home)
print("ready", flush=True); sys.stdin.readline()
freed = 0
for _ in range(6):
    freed += sum(evict(store, 1, Alone(store, settings)).values())
print(freed)
"""


def test_two_processes_that_evict_count_each_shard_once_and_a_reader_beside_them_loses_nothing(
    first: tuple[Settings, Manifest],
) -> None:
    settings, manifest = first
    store = Store(settings.home)
    before = sum(size for _, size in store.shards())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", EVICT, str(settings.home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        store.holds.hold(manifest.shards[1].key)
        outs = [process.communicate("\n", timeout=WAIT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    left = sum(size for _, size in store.shards())
    assert sum(map(int, outs)) == before - left
    assert [key for key, _ in store.shards()] == [manifest.shards[1].key], "all but the one in use"
    store.holds.release(manifest.shards[1].key)


READ = """
import sys
from pathlib import Path
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.dataset import IterableDataset
from crucible.workers.fetch import NodeShards
settings = Settings(Path(sys.argv[1]), shard_bytes=4 << 20)
manifest = Store(settings.home).get_manifest(sys.argv[2])
print("ready", flush=True); sys.stdin.readline()
for epoch in range(3):
    stream = IterableDataset(manifest, NodeShards(settings)).shuffle(seed=1)
    stream.set_epoch(epoch)
    print(sorted(row["id"] for row in stream) == list(range(int(sys.argv[3]))), flush=True)
"""


def test_a_reader_that_leases_in_the_moment_of_an_eviction_reads_every_row(first: tuple[Settings, Manifest]) -> None:
    settings, manifest = first
    store = Store(settings.home)
    reader = subprocess.Popen(
        [sys.executable, "-c", READ, str(settings.home), manifest.id, str(len(IDS))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    evicted = 0
    try:
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        reader.stdin.write("\n")
        reader.stdin.flush()
        while reader.poll() is None:
            evicted += len(evict(store, 1 << 40, Alone(store, settings), whole=False))
        assert reader.stdout.read().split() == ["True"] * 3
    finally:
        reader.kill()
        reader.communicate(timeout=10)
    assert evicted > 0


def test_what_a_node_tells_of_its_room_is_plain(first: tuple[Settings, Manifest]) -> None:
    settings, manifest = first
    store = Store(settings.home)
    agent = Keeping()
    agent._store, agent._node = store, NodeId("n")
    assert agent.pin([manifest.id, "ab" * 32], "why") == [manifest.id], "of another manifest there is nothing here"
    store.holds.hold(manifest.shards[0].key)
    told = usage(store, quota_for(settings, 1.0))
    assert json.loads(json.dumps(told)) == told
    assert told["pinned"] == sum(shard.size for shard in manifest.shards)
    assert told["leased"] == manifest.shards[0].size
    assert told["used"]
    assert told["left"]
    assert told["left"] <= told["used"]
    assert agent.evict(None, 1 << 40) == {}
    assert agent.unpin([manifest.id, "ab" * 32]) == [manifest.id]
    keys = [shard.key for shard in manifest.shards]
    assert agent.evict(keys, dry_run=True).keys() == set(keys[1:])
    assert held(store, manifest) == FILES
    assert agent.evict(keys).keys() == set(keys[1:])
    store.holds.release(keys[0])


def test_a_run_of_a_job_has_begun_once_on_a_node_and_another_one_later(tmp_path: Path) -> None:
    store = Store(tmp_path)
    began = job_began(store, "../odd name 1")
    time.sleep(0.02)
    assert job_began(store, "../odd name 1") == began < job_began(store, "../odd name 2")
    assert len(list((tmp_path / "jobs").iterdir())) == 2
