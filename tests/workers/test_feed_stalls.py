"""A source that stalls: the read moves elsewhere, the bytes are the same, and the log says who was waited for."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from crucible.cache.store import Store
from crucible.config import Settings
from crucible.errors import OfflineMode
from crucible.feed import Feeder
from crucible.iterate import ShardReader
from crucible.manifest import Manifest
from crucible.refs import NodeId
from crucible.workers import fetch
from crucible.workers.fetch import NodeShards
from crucible.workers.serve import AgentAddress, write_address
from tests.fakes.feeding import feed_threads, until
from tests.hubserver.faults import FaultyHub
from tests.workers.feeding import WAIT_S, Agent, agents_of, empty_node, environment, full_node, write_repo

FILES, ROWS = 3, 1500
SMALL, BIG = 300 << 10, 3 << 20
"""Bytes of a shard: below and above what the transfer engine brings in one request."""


@pytest.fixture(scope="module")
def module_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyHub]:
    root = tmp_path_factory.mktemp("hub")
    write_repo(root / "repo", FILES, ROWS, 1000)
    with FaultyHub(root / "hub") as server:
        server.import_folder("org/noise", root / "repo")
        yield server


@pytest.fixture(scope="module", params=[SMALL, BIG], ids=["small", "big"])
def full(module_hub: FaultyHub, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home = tmp_path_factory.mktemp("full")
    settings = Settings(home, endpoint=module_hub.endpoint, shard_bytes=request.param, hub_cache=home / "none")
    return replace(settings, stall_s=1.0, timeout_s=20.0, stall_log_s=0.2, rank=5)


@pytest.fixture(scope="module")
def manifest(full: Settings) -> Manifest:
    return full_node("org/noise", full)


@pytest.fixture(scope="module")
def peers(full: Settings, manifest: Manifest) -> Iterator[list[Agent]]:
    with agents_of(full.home, 2) as agents:
        yield agents


@pytest.fixture(autouse=True)
def _awake(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "peers" in request.fixturenames:
        for agent in request.getfixturevalue("peers"):
            agent.stop(signal.SIGCONT)
    until(lambda: not feed_threads())


def read_all(settings: Settings, manifest: Manifest, *, ahead: int = 1 << 30) -> NodeShards:
    """Read every row in order, and hold it to what the full node has."""
    source = NodeShards(settings)
    feeder = Feeder(source, most_bytes=ahead)
    reader = ShardReader(manifest, feeder)
    feeder.want((manifest, shard) for shard in manifest.shards)
    rows = 0
    while rows < manifest.rows:
        table = reader.slice(rows, min(rows + 500, manifest.rows))
        assert table["id"].to_pylist() == list(range(rows, rows + table.num_rows))
        rows += table.num_rows
    feeder.close()
    reader.close()
    return source


@pytest.mark.parametrize("ahead", [0, 1 << 30], ids=["as-read", "ahead"])
def test_a_stopped_peer_is_left_for_its_replica_once_and_the_log_names_it(
    full: Settings, manifest: Manifest, peers: list[Agent], tmp_path: Path, ahead: int, module_hub: FaultyHub,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    settings = empty_node(full, tmp_path / "empty", peers[0].url, peers[1].url)
    before = module_hub.bytes_sent()
    peers[0].stop(signal.SIGSTOP)
    with caplog.at_level(logging.WARNING, "crucible.feed"):
        source = read_all(settings, manifest, ahead=ahead)
    assert source.note()["peer_shards"] == len(manifest.shards)
    assert module_hub.bytes_sent() == before
    left = [record.getMessage() for record in caplog.records if "is asked last" in record.getMessage()]
    assert left
    assert len(left) <= 2, "the two threads that were there when it stopped, and no later one"
    assert all(f"{peers[0].url} is asked last" in line for line in left)
    assert re.search(r"rank 5: shard [0-9a-f]{12} \(.*org/noise.*, train-0000\d\.parquet\)", left[0])


def test_a_peer_that_stops_in_the_middle_is_left(
    full: Settings, manifest: Manifest, peers: list[Agent], tmp_path: Path
) -> None:
    settings = empty_node(full, tmp_path / "empty", peers[0].url, peers[1].url)
    source = NodeShards(settings)
    reader = ShardReader(manifest, source)
    reader.slice(0, 1)
    peers[0].stop(signal.SIGSTOP)
    assert reader.slice(0, manifest.rows)["id"].to_pylist() == list(range(manifest.rows))
    assert source.note()["peer_shards"] == len(manifest.shards)


def test_without_another_replica_the_read_moves_to_the_hub_and_the_waiting_was_logged(
    full: Settings, manifest: Manifest, peers: list[Agent], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(empty_node(full, tmp_path / "empty", peers[0].url), timeout_s=1.0)
    peers[0].stop(signal.SIGSTOP)
    with caplog.at_level(logging.WARNING, "crucible.feed"):
        source = read_all(settings, manifest)
    assert source.note()["peer_shards"] == 0
    assert re.search(
        rf"rank 5 has waited \d+ s for shard [0-9a-f]{{12}} \(.*org/noise.*, train-00000\.parquet\): "
        rf"waits for peer {peers[0].url}, \d+ s without a byte",
        caplog.text,
    )
    assert "came after" in caplog.text


def test_a_peer_that_did_not_answer_is_asked_after_all_where_nobody_else_has_the_shard(
    full: Settings, manifest: Manifest, peers: list[Agent], tmp_path: Path
) -> None:
    settings = replace(empty_node(full, tmp_path / "empty", peers[0].url), offline=True, timeout_s=2.0)
    source = NodeShards(settings)
    peers[0].stop(signal.SIGSTOP)
    with pytest.raises(OfflineMode):
        source.path(manifest, manifest.shards[0])
    peers[0].stop(signal.SIGCONT)
    assert source.path(manifest, manifest.shards[0]).exists()


def test_an_agent_of_this_node_that_hangs_is_asked_once_and_the_peers_it_knew_are_asked_without_it(
    full: Settings, manifest: Manifest, peers: list[Agent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "LOCATE_TIMEOUT_S", 0.5)
    settings = empty_node(full, tmp_path / "empty")
    write_address(Store(settings.home), AgentAddress(peers[0].url, NodeId("empty"), 0, (peers[1].url,)))
    peers[0].stop(signal.SIGSTOP)
    source = read_all(settings, manifest, ahead=0)
    assert source.note()["peer_shards"] == len(manifest.shards)
    assert len(manifest.shards) < source.counts.peer_requests < 2 * len(manifest.shards)


def test_the_log_counts_down_a_quiet_time_of_the_hub_and_close_does_not_wait_for_its_end(
    full: Settings, manifest: Manifest, tmp_path: Path, hub: FaultyHub, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(full, home=tmp_path / "empty", endpoint=hub.endpoint)  # its quiet time is nobody else's
    hub.add("429", origin="hub", wait=1000)
    source = NodeShards(settings)
    feeder = Feeder(source, most_bytes=1 << 30)
    reader = ShardReader(manifest, feeder)

    def leave() -> None:
        until(lambda: re.search(r"asked to be left alone \(.*\), for [1-9]\d\d s more", caplog.text))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=leave, daemon=True).start()
    with caplog.at_level(logging.WARNING, "crucible.feed"), pytest.raises(KeyboardInterrupt):
        reader.slice(0, 10)
    began = time.monotonic()
    feeder.want((manifest, shard) for shard in manifest.shards)
    feeder.close()
    assert feed_threads() == []
    assert time.monotonic() - began < 100, "and not the 1,000 s that the Hub asked for"


HOLD = """
import sys
from crucible.config import Settings
from crucible.cache.store import Store
settings = Settings.from_env()
with Store(settings.home).lock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_the_log_names_the_process_that_is_bringing_it(
    full: Settings, manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(full, home=tmp_path / "empty")
    shard = manifest.shards[0]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, f"item-{manifest.item_of(shard).key[:32]}"],
        env=environment(settings), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        reader = ShardReader(manifest, NodeShards(settings))
        with caplog.at_level(logging.WARNING, "crucible.feed"):
            thread = threading.Thread(target=lambda: reader.slice(0, 10), daemon=True)
            thread.start()
            said = f"another process of this node (pid {holder.pid}) is bringing it"
            until(lambda: said in caplog.text or not os.path.exists("/proc/locks"))
        holder.communicate("", timeout=WAIT_S)
        thread.join(WAIT_S)
        assert not thread.is_alive()
    finally:
        holder.kill()
        holder.wait(WAIT_S)
