"""Raylets and the head die on hosts with stores of their own, and come back on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.netns.fleet import Fleet, result
from tests.netns.hosts import eventually
from tests.ray.jobs import file_bytes

pytestmark = pytest.mark.timeout(400)
ROWS = 36_000
EXACT = list(range(ROWS))


def test_a_raylet_that_was_killed_and_comes_back_on_its_store_brings_its_shards_along(
    fleet: Fleet, chat: Callable[..., int]
) -> None:
    size = chat()
    beta, gamma = fleet.others
    assert result(fleet.prefetch(fleet.head, "org/chat"))["rows"] == ROWS
    held = fleet.shards()["gamma"]
    assert held
    before = fleet.alive[gamma.address]
    fleet.stop_ray(gamma)
    fleet.wait_for(fleet.head, beta)
    fleet.start()
    assert fleet.alive[gamma.address] != before
    again = result(fleet.prefetch(beta, "org/chat"))
    assert (again["rows"], again["counts"]["hub_bytes"]) == (ROWS, 0)
    agent = next(node for node in fleet.nodes() if f"//{gamma.address}:" in str(node["url"]))
    assert agent["shards"] == len(fleet.shards()["gamma"]) >= len(held)
    told = result(fleet.rank(beta, "org/chat", seed=None))
    assert told["ids"] == EXACT
    assert (told["note"]["hub_shards"], file_bytes(fleet.hub)) == (0, size)


def test_ranks_read_on_when_the_head_dies_and_a_new_cluster_finds_all_done(
    fleet: Fleet, chat: Callable[..., int], tmp_path: Path
) -> None:
    chat()
    beta, gamma = fleet.others
    result(fleet.prefetch(fleet.head, "org/chat", "--replicas", "2"))
    truth = result(fleet.rank(beta, "org/chat"))
    for path in (gamma.store / "shards").rglob("*.arrow"):
        path.unlink()  # the reader there has all to ask of others: one that lives, and one that died
    patience = {"CRUCIBLE_AHEAD": "0", "CRUCIBLE_STALL_LOG": "1"}
    reader = fleet.rank(gamma, "org/chat", seed=None, stop_at=10, gate=tmp_path, **patience)
    eventually("the reader has come to its gate", lambda: (tmp_path / "at").exists() or not reader.running())
    fleet.stop_ray(fleet.head)
    (tmp_path / "go").touch()
    assert result(reader)["ids"] == EXACT
    waits = [line for line in reader.errors.splitlines() if "waits for the agent of this node" in line]
    assert len(waits) <= 3, "not every shard waits for the head that died"
    alone = result(fleet.rank(beta, "org/chat"))
    assert (alone["ids"], alone["content"]) == (truth["ids"], truth["content"])
    code, _, said = gamma.crucible("nodes", "--address", fleet.address).end()
    assert code == 1
    assert said.splitlines()[-1].startswith(f"Error: no Ray cluster at '{fleet.address}'")

    fleet.start()
    fleet.hub.clear_log()
    again = result(fleet.prefetch(gamma, "org/chat", "--replicas", "2"))
    assert (again["rows"], again["counts"]["hub_bytes"]) == (ROWS, 0)
    assert file_bytes(fleet.hub) == 0
    shards = fleet.shards()
    everything = set().union(*shards.values())
    assert len(everything) == 9
    assert result(fleet.rank(gamma, "org/chat"))["content"] == truth["content"]
