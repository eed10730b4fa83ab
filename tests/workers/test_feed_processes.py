"""Processes of one node that read the same at once: each byte comes once, and what one reads another cannot evict."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from crucible.cache.store import Store
from crucible.config import Settings
from crucible.dataset import IterableDataset
from crucible.errors import ChecksumMismatch
from crucible.feed import Feeder
from crucible.iterate import ShardReader
from crucible.manifest import Manifest
from crucible.workers.fetch import NodeShards
from tests.fakes.feeding import feed_threads, until
from tests.hubserver.faults import FaultyHub
from tests.workers.feeding import ROOT, WAIT_S, agents_of, empty_node, environment, full_node, write_repo

FILES, ROWS = 3, 2000
PROCESSES = 3
READ = """
import json, sys
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.dataset import IterableDataset
from crucible.feed import Feeder
from crucible.iterate import ShardReader
from crucible.workers.fetch import NodeShards
settings = Settings.from_env()
manifest = Store(settings.home).get_manifest(sys.argv[1])
source = NodeShards(settings)
feeder = Feeder(source, most_bytes=settings.ahead_bytes)
reader = ShardReader(manifest, feeder)
print("ready", flush=True)
for order in sys.stdin:
    numbers = json.loads(order)
    starts = [sum(shard.rows for shard in manifest.shards[:n]) for n in range(len(manifest.shards))]
    feeder.want((manifest, manifest.shards[n]) for n in numbers)
    total = 0
    for n in numbers:
        total += sum(reader.slice(starts[n], starts[n] + manifest.shards[n].rows)["id"].to_pylist())
    print(json.dumps([total, source.counts.peer_bytes]), flush=True)
"""


@pytest.fixture
def repo_bytes(hub: FaultyHub, tmp_path: Path) -> int:
    write_repo(tmp_path / "repo", FILES, ROWS, 1000)
    hub.import_folder("org/noise", tmp_path / "repo")
    return sum(path.stat().st_size for path in (tmp_path / "repo").iterdir())


@pytest.fixture
def full(hub: FaultyHub, tmp_path: Path) -> Settings:
    return Settings(tmp_path / "full", endpoint=hub.endpoint, shard_bytes=400_000, hub_cache=tmp_path / "none")


@pytest.fixture
def manifest(full: Settings, repo_bytes: int) -> Manifest:
    made = full_node("org/noise", full)
    assert repo_bytes < made.size * 1.2
    return made


class Reader:
    """A process that reads shards in the order that it is told."""

    def __init__(self, settings: Settings, manifest: Manifest) -> None:
        Store(settings.home).put_manifest(manifest)
        self.process = subprocess.Popen(
            [sys.executable, "-c", READ, manifest.id], cwd=ROOT, env=environment(settings),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def read(self, numbers: list[int]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(numbers) + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=WAIT_S)


@pytest.fixture
def readers() -> Iterator[list[Reader]]:
    made: list[Reader] = []
    yield made
    for reader in made:
        reader.kill()


@pytest.mark.parametrize("origin", ["peer", "hub"])
def test_processes_that_want_the_same_at_once_bring_it_once(
    hub: FaultyHub, full: Settings, manifest: Manifest, repo_bytes: int, readers: list[Reader], tmp_path: Path,
    origin: str,
) -> None:  # fmt: skip
    with agents_of(full.home, 1 if origin == "peer" else 0) as agents:
        settings = empty_node(full, tmp_path / "empty", *(agent.url for agent in agents))
        before = hub.bytes_sent()
        readers += [Reader(settings, manifest) for _ in range(PROCESSES)]
        assert [reader.line() for reader in readers] == ["ready"] * PROCESSES
        count = len(manifest.shards)
        for turn, reader in enumerate(readers):  # half of them from the front, half from the back
            reader.read(list(range(count)) if turn % 2 else list(range(count - 1, -1, -1)))
        answers = [json.loads(reader.line()) for reader in readers]
    assert [total for total, _ in answers] == [sum(range(FILES * ROWS))] * PROCESSES
    from_peers = sum(peer_bytes for _, peer_bytes in answers)
    assert from_peers == (manifest.size if origin == "peer" else 0)
    assert hub.bytes_sent() - before == (0 if origin == "peer" else repo_bytes)


def test_what_another_process_has_mapped_stays_and_the_rest_can_go(
    full: Settings, manifest: Manifest, readers: list[Reader]
) -> None:
    store = Store(full.home)
    reader = Reader(full, manifest)
    readers.append(reader)
    assert reader.line() == "ready"
    reader.read([0, 2])
    reader.line()
    read = {manifest.shards[0].key, manifest.shards[2].key}
    assert store.leased() == read
    freed = sum(store.evict(shard.key) for shard in manifest.shards)
    assert freed == manifest.size - sum(manifest.shards[n].size for n in (0, 2))
    assert {key for key, _ in store.shards()} == read
    reader.read([2, 1])  # what it lacks comes again
    assert json.loads(reader.line())[0] > 0
    reader.kill()
    assert store.evict(manifest.shards[0].key) > 0


def test_a_shard_is_read_before_the_rest_of_its_file_is_made(
    full: Settings, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = NodeShards(replace(full, home=tmp_path / "empty"))
    go_on, commit = threading.Event(), Store.commit_shard
    first = manifest.shards[0]

    def slowly(self: Store, draft: Path, key: str, digest: str = "") -> Path:
        assert key == first.key or go_on.wait(WAIT_S)
        return commit(self, draft, key, digest)

    monkeypatch.setattr(Store, "commit_shard", slowly)
    reader = ShardReader(manifest, source)
    assert reader.slice(0, first.rows).num_rows == first.rows
    assert not source.has(manifest.shards[1])
    go_on.set()
    assert reader.slice(0, manifest.rows).num_rows == manifest.rows
    until(lambda: not feed_threads())


def test_closing_while_a_file_is_converted_ends_the_thread_and_what_was_made_is_kept(
    full: Settings, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = NodeShards(replace(full, home=tmp_path / "empty"))
    commit, began = Store.commit_shard, threading.Event()

    def told(self: Store, draft: Path, key: str, digest: str = "") -> Path:
        path = commit(self, draft, key, digest)
        began.set()
        until(lambda: feeder._state is not None and feeder._state.stopped)
        return path

    monkeypatch.setattr(Store, "commit_shard", told)
    feeder = Feeder(source, most_bytes=1 << 30, fetchers=1)
    feeder.want((manifest, shard) for shard in manifest.shards)
    assert began.wait(WAIT_S)
    feeder.close()
    assert feed_threads() == []
    assert source.has(manifest.shards[0])
    assert not source.has(manifest.shards[2])
    assert not list((tmp_path / "empty" / "tmp").iterdir())


def test_a_shard_that_is_re_made_otherwise_than_promised_never_gets_its_name(
    full: Settings, manifest: Manifest, tmp_path: Path
) -> None:
    source = NodeShards(replace(full, home=tmp_path / "empty"))
    shards = tuple(replace(shard, digest="0" * 64) if shard.number == 1 else shard for shard in manifest.shards)
    other = replace(manifest, shards=shards)
    reader = ShardReader(other, source)
    with pytest.raises(ChecksumMismatch, match="another pyarrow"):
        reader.slice(0, shards[0].rows + 1)
    assert not source.has(shards[1])
    assert source.holds is Store(tmp_path / "empty").holds


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_loader_fetch_ahead_by_themselves_and_leave_nothing(
    hub: FaultyHub, full: Settings, manifest: Manifest, tmp_path: Path, method: str
) -> None:
    data = pytest.importorskip("torch.utils.data")
    with agents_of(full.home, 1) as agents:
        settings = empty_node(full, tmp_path / "empty", agents[0].url)
        before = hub.bytes_sent()
        stream = IterableDataset(manifest, NodeShards(settings)).select_columns("id").shuffle(3).batch(50)
        expected = [batch["id"] for batch in IterableDataset(manifest, NodeShards(full)).shuffle(3).batch(50)]
        next(iter(stream))  # so that this process has threads and leases, which no fork may inherit
        loader = data.DataLoader(
            stream, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=WAIT_S
        )  # fmt: skip
        assert [list(batch["id"]) for batch in loader] == expected
        assert hub.bytes_sent() == before
    del loader, stream
    gc.collect()
    until(lambda: not feed_threads())
    until(lambda: not list((settings.home / "leases").iterdir()))
