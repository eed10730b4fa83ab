"""Replicas on real raylets with a store each: a lost node is made up for, one is emptied, a new one is filled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import crucible
from crucible.cache.store import Store
from crucible.cluster.coordinator import reach_coordinator
from crucible.cluster.ledger import Choice
from crucible.hashing import shard_digest
from crucible.workers.serve import read_address
from tests.hubserver.faults import FaultyHub
from tests.ray.jobs import Background, chat_files, file_bytes, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
WAIT_S = 90


def care(what: str, *arguments: Any, **named: Any) -> Any:
    import ray

    return ray.get(reach_coordinator(embedded=False).care.remote(what, *arguments, **named), timeout=WAIT_S)


def ended(operation: Mapping[str, Any]) -> dict[str, Any]:
    """The operation as it is at its end."""
    told: dict[str, Any] = care("operation", operation["operation"], WAIT_S)
    assert told["phase"] == "done", told
    return told


def copies(homes: list[Path], manifest: Any) -> list[int]:
    """Of each shard how many of the stores hold it, with the right bytes."""
    stores = [Store(home) for home in homes]
    return [
        sum(store.has_shard(shard) and shard_digest(store.shard_path(shard.key)) == shard.digest for store in stores)
        for shard in manifest.shards
    ]


@contextmanager
def repaired_after(seconds: float) -> Iterator[None]:
    """The shared cluster's coordinator makes up for losses so soon, and as ever afterwards."""
    before = care("summary")["repair_after"]
    care("set_repair_after", seconds)
    try:
        yield
    finally:
        care("set_repair_after", before)


def test_a_lost_node_is_made_up_for_without_being_asked(hub: FaultyHub, tmp_path: Path, start_nodes: Any) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=9, rows=2000))
    nodes = start_nodes(3, hub.endpoint)
    with repaired_after(0.2):
        report = crucible.prefetch("org/chat", split="train", address=nodes.address, replicas=2)
        manifest = Store(nodes.homes[0]).get_manifest(report.splits[0].manifest)
        assert copies(nodes.homes, manifest) == [2] * 9
        hub.clear_log()
        nodes.kill_node(2)
        until(lambda: copies(nodes.homes[:2], manifest) == [2] * 9, "the replicas of the lost node are back")
        assert file_bytes(hub) == 0, "they came from the other replicas"
        until(lambda: care("summary")["under"] == 0, "the coordinator knows")
        assert care("summary")["lost"] == 0
    # nothing is left to do
    assert not ended(care("start_repair", trim=True))["bytes_done"]


def test_a_coordinator_that_dies_with_a_node_leaves_its_duty_to_the_next(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    import ray

    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=6, rows=2000))
    nodes = start_nodes(3, hub.endpoint)
    with repaired_after(1.0):
        report = crucible.prefetch("org/chat", split="train", address=nodes.address, replicas=2)
        manifest = Store(nodes.homes[0]).get_manifest(report.splits[0].manifest)
        ray.kill(reach_coordinator(embedded=False), no_restart=False)
        nodes.kill_node(2)
        enough = [2] * len(manifest.shards)
        until(lambda: copies(nodes.homes[:2], manifest) == enough, "the next coordinator knows what was promised")


def test_a_prefetch_after_a_loss_brings_only_what_nobody_holds(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=9, rows=2000))
    nodes = start_nodes(3, hub.endpoint)
    report = crucible.prefetch("org/chat", split="train", address=nodes.address, replicas=2)
    manifest = Store(nodes.homes[0]).get_manifest(report.splits[0].manifest)
    nodes.kill_node(2)
    for home in nodes.homes:
        Store(home).shard_path(manifest.shards[0].key).unlink(missing_ok=True)
    hub.clear_log()
    again = crucible.prefetch("org/chat", split="train", address=nodes.address, replicas=2)
    assert again.splits[0].manifest == report.splits[0].manifest
    assert copies(nodes.homes[:2], manifest) == [2] * len(manifest.shards)
    # the items of the lost node have no record anywhere: their shards are copies
    assert file_bytes(hub) == manifest.items[manifest.shards[0].item].size


def test_what_nobody_holds_any_more_is_made_again_from_the_hub(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=4, rows=2000))
    nodes = start_nodes(2, hub.endpoint)
    report = crucible.prefetch("org/chat", split="train", address=nodes.address)
    manifest = Store(nodes.homes[0]).get_manifest(report.splits[0].manifest)
    for home in nodes.homes:
        for number, shard in enumerate(manifest.shards):
            if number % 2:
                Store(home).shard_path(shard.key).unlink(missing_ok=True)
    hub.clear_log()
    planned = care("preview", "repair", Choice())
    assert (planned["remakes"], planned["copies"], planned["left"]) == (2, 0, 2)
    done = ended(care("start_repair", Choice("org/chat"), replicas=2))
    assert (done["remade"], done["left"], done["problems"]) == (2, 0, [])
    assert copies(nodes.homes, manifest) == [2] * 4
    lost = {shard.item for number, shard in enumerate(manifest.shards) if number % 2}
    assert file_bytes(hub) == sum(manifest.items[item].size for item in lost), "once each, and the rest from peers"


@pytest.mark.parametrize("repair_first", [False, True])
def test_what_a_repair_and_a_prefetch_both_lack_is_brought_once(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any, repair_first: bool
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=4, rows=4000))
    nodes = start_nodes(2, hub.endpoint)
    report = crucible.prefetch("org/chat", split="train", address=nodes.address)
    manifest = Store(nodes.homes[0]).get_manifest(report.splits[0].manifest)
    for home in nodes.homes:
        for shard in manifest.shards:
            Store(home).shard_path(shard.key).unlink(missing_ok=True)
    hub.clear_log()
    hub.add("slow", origin="cdn", piece=4_000, wait=0.02)

    def repair() -> Any:
        return care("start_repair", Choice("org/chat"))

    operation = repair() if repair_first else None
    job = None if repair_first else Background(nodes.address)
    until(lambda: hub.requests(origin="cdn"), "the first is under way")
    job = job or Background(nodes.address)
    done = ended(operation or repair())
    assert (done["left"], done["problems"]) == (0, [])
    assert job.report().splits[0].manifest == manifest.id
    assert copies(nodes.homes, manifest) == [1] * 4
    assert file_bytes(hub) == sum(item.size for item in manifest.items)


def test_a_new_node_gets_its_share_and_is_emptied_before_it_goes(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=12, rows=2000))
    nodes = start_nodes(2, hub.endpoint)
    report = crucible.prefetch("org/chat", split="train", address=nodes.address)
    manifest = Store(nodes.homes[0]).get_manifest(report.splits[0].manifest)
    truth = nodes.ranks("org/chat", split="train", epochs=1)
    rows = sorted(row for rank in truth for row in rank["epochs"][0])
    for number, shard in enumerate(manifest.shards):  # what the ranks fetched from one another
        if copies(nodes.homes, manifest)[number] > 1:
            Store(nodes.homes[number % 2]).shard_path(shard.key).unlink()
    nodes.join(tmp_path / "node-2")
    moved = ended(care("start_rebalance"))
    assert 0 < moved["copied"] == moved["dropped"] <= 5
    assert copies(nodes.homes, manifest) == [1] * 12, "moved, not copied"
    assert copies(nodes.homes[2:], manifest).count(1) == moved["copied"]

    hub.clear_log()
    leaving = read_address(Store(nodes.homes[2]))
    assert leaving is not None
    drained = ended(care("start_drain", [leaving.node[:16]]))
    assert (drained["copied"], drained["left"]) == (moved["copied"], 0)
    assert copies(nodes.homes[:2], manifest) == [1] * 12
    assert copies(nodes.homes[2:], manifest).count(1) == moved["copied"], "it serves until it goes"
    states = {node["node"]: node["state"] for node in care("nodes")}
    assert states[leaving.node] == "drained"
    assert sorted(states.values()) == ["drained", "works", "works"]
    # work that comes now goes elsewhere
    hub.import_folder("org/more", chat_files(tmp_path / "more", files=4, rows=2000))
    more = crucible.prefetch("org/more", split="train", address=nodes.address)
    assert leaving.node not in {node for node, _, _ in more.nodes}
    nodes.kill_node(2)
    del nodes.homes[2]
    again = nodes.ranks("org/chat", split="train", epochs=1)
    assert sorted(row for rank in again for row in rank["epochs"][0]) == rows
    assert sum(rank["note"]["hub_shards"] for rank in again) == 0


def test_an_agent_that_is_told_to_end_sees_its_node_drained_first(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=6, rows=2000))
    nodes = start_nodes(3, hub.endpoint)
    report = crucible.prefetch("org/chat", split="train", address=nodes.address)
    manifest = Store(nodes.homes[0]).get_manifest(report.splits[0].manifest)
    agent = read_address(Store(nodes.homes[2]))
    assert agent is not None
    only = sum(copies(nodes.homes[2:], manifest))
    assert only, "it has shards that nobody else has"
    os.kill(agent.pid, signal.SIGTERM)
    until(lambda: copies(nodes.homes[:2], manifest) == [1] * len(manifest.shards), "the others have them")
    until(lambda: not psutil.pid_exists(agent.pid), "then it ends")
    until(lambda: {n["node"]: n["state"] for n in care("nodes")}.get(agent.node) == "drained", "and is remembered")


def test_a_node_that_ray_takes_away_is_emptied_first(hub: FaultyHub, tmp_path: Path, start_nodes: Any) -> None:
    from ray._raylet import GcsClient

    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=6, rows=2000))
    nodes = start_nodes(3, hub.endpoint)
    report = crucible.prefetch("org/chat", split="train", address=nodes.address)
    manifest = Store(nodes.homes[0]).get_manifest(report.splits[0].manifest)
    assert sum(copies(nodes.homes[2:], manifest)), "it has shards that nobody else has"
    agent = read_address(Store(nodes.homes[2]))
    assert agent is not None
    preempted, deadline_ms = 2, int(time.time() * 1000) + WAIT_S * 1000
    accepted, why = GcsClient(address=nodes.address).drain_node(agent.node, preempted, "a test", deadline_ms)
    assert accepted, why
    until(lambda: copies(nodes.homes[:2], manifest) == [1] * len(manifest.shards), "the others have them")


def test_replicas_stand_on_different_racks(hub: FaultyHub, tmp_path: Path, start_nodes: Any) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=8, rows=2000))
    nodes = start_nodes(2, hub.endpoint)
    nodes.join(tmp_path / "node-2", labels={"rack": "r2"})
    report = crucible.prefetch("org/chat", split="train", address=nodes.address, replicas=2)
    manifest = Store(nodes.homes[0]).get_manifest(report.splits[0].manifest)
    assert copies(nodes.homes[2:], manifest) == [1] * len(manifest.shards), "the only one on another rack has all"
    assert {node["rack"] for node in care("nodes")} == {"", "r2"}
    assert not care("preview", "repair")["bytes"]


_RANK = """
import sys
import crucible
# in the order of the source, because a shuffle of so little needs all of it before the first row
dataset = crucible.load_dataset("org/chat", split="train", streaming=True).shard()
for number, batch in enumerate(dataset.with_format("arrow").batch(100)):
    print(*batch["id"].to_pylist(), flush=True)
    if number == 0:
        sys.stdin.readline()
"""


def read(nodes: Any, between: Any = lambda: None) -> list[list[str]]:
    """What the ranks of the first two nodes deliver; `between` is done when each has had its first batch."""
    ranks = []
    for rank, home in enumerate(nodes.homes[:2]):
        own = {**os.environ, **nodes.environment, "CRUCIBLE_HOME": str(home), "CRUCIBLE_AHEAD": "0"}
        own.update(RANK=str(rank), WORLD_SIZE="2", PYTHONPATH=os.getcwd())
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        ranks.append(subprocess.Popen([sys.executable, "-c", _RANK], env=own, text=True, **pipes))
    try:
        firsts = [rank.stdout.readline() for rank in ranks if rank.stdout is not None]
        between()
        found = []
        for rank, first in zip(ranks, firsts, strict=True):
            out, problem = rank.communicate("\n", timeout=WAIT_S)
            assert rank.returncode == 0, problem
            found.append([*first.split(), *out.split()])
        return found
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(10)


@pytest.mark.parametrize(
    ("replicas", "drained"), [pytest.param(1, False, marks=pytest.mark.slow), (2, False), (1, True)]
)
def test_ranks_read_on_in_the_same_order_when_a_node_dies_under_them_or_is_drained(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any, replicas: int, drained: bool
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=9, rows=2000))
    nodes = start_nodes(3, hub.endpoint)
    report = crucible.prefetch("org/chat", split="train", address=nodes.address, replicas=replicas)
    manifest = Store(nodes.homes[0]).get_manifest(report.splits[0].manifest)
    born = [set((home / "shards").rglob("*.arrow")) for home in nodes.homes]
    truth = read(nodes)
    assert sorted(int(row) for rank in truth for row in rank) == list(range(18_000))
    for home, kept in zip(nodes.homes, born, strict=True):
        for path in set((home / "shards").rglob("*.arrow")) - kept:
            path.unlink()
    leaving = read_address(Store(nodes.homes[2]))
    assert leaving is not None
    hub.clear_log()

    def lose() -> None:
        if drained:
            assert ended(care("start_drain", [leaving.node]))["left"] == 0
        nodes.kill_node(2)

    assert read(nodes, between=lose) == truth
    assert 0 not in copies(nodes.homes[:2], manifest), "what was read from elsewhere is kept"
    lost = replicas == 1 and not drained
    assert bool(file_bytes(hub)) == lost, "made again from the source where nobody else had it, and only there"
