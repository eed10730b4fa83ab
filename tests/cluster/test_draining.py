"""A node that is to go while jobs work on it; over hands that do everything at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from crucible.cluster import draining as module
from crucible.cluster.care import Care
from crucible.errors import ClusterError
from crucible.refs import NodeId
from crucible.report import ItemResult
from tests.cluster.caring import FakeAgents, FakeHands, caring, make_manifest
from tests.cluster.test_care import NODES, ended

A, B, C = (NodeId(name) for name in NODES)


class Working:
    """A node that jobs gave items to, which end when the test says."""

    def __init__(self, agents: FakeAgents, hands: FakeHands, node: NodeId, count: int) -> None:
        self.agents, self.node = agents, node
        self.made = make_manifest(2 * count, repo="org/running")
        self.stopped: list[int] = []
        self.tasks: list[Future[int]] = [Future() for _ in range(count)]
        self.heard = [self.give(number) for number in range(count)]
        self.records: list[ItemResult] = []
        hands.ask = self.ask  # type: ignore[method-assign, assignment]

    def give(self, number: int) -> Future[int]:
        return self.agents.given.give(
            "items of org/running",
            lambda: self.node,
            lambda _: self.tasks[number],
            self.landed,
            lambda: self.stopped.append(number),
        )

    def landed(self, number: int) -> None:
        item, shards = self.made.items[number], self.made.shards[2 * number : 2 * number + 2]
        self.records.append(ItemResult(0, item.key, self.node, shards, (), reused=True))
        self.agents.catalog.add(self.node, [shard.key for shard in shards], [shard.size for shard in shards])
        self.agents.items.add(self.node, [item.key])

    def end(self, number: int) -> None:
        self.tasks[number].set_result(number)

    def ask(self, method: str, *said: Any, nodes: Any = None, **_: Any) -> tuple[dict[NodeId, Any], dict[NodeId, str]]:
        if method != "records" or self.node not in nodes:
            return {}, {}
        keys = set(said[0])
        return {self.node: [one for one in self.records if any(shard.key in keys for shard in one.shards)]}, {}


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def waits(care: Care, told: dict[str, Any]) -> str:
    """What the operation waits for, once it does."""
    until(lambda: care.operation(told["operation"])["waiting_for"])
    return str(care.operation(told["operation"])["waiting_for"])


def test_a_drain_ends_when_what_its_node_was_given_has_ended_and_is_held_elsewhere(tmp_path: Path) -> None:
    care, agents, hands = caring(tmp_path, NODES, [manifest := make_manifest(4)])
    agents.catalog.add(A, [shard.key for shard in manifest.shards], [100] * 4)
    work = Working(agents, hands, A, 3)
    work.end(0)
    told = care.start_drain([A])
    assert "items of org/running on node aaaa" in waits(care, told)
    until(lambda: len(agents.items.holders(work.made.items[0].key)) == 2)
    for number in (1, 2):
        assert care.operation(told["operation"])["phase"] != "done"
        work.end(number)
    done = ended(care, told)
    assert (done["copied"], done["left"], done["moved"], done["waiting_for"]) == (4 + 6, 0, 0, "")
    assert done["bytes_done"] == 1000
    for item in work.made.items:
        assert len(agents.items.holders(item.key)) == 2, "another node counts as having done it"
    for shard in (*manifest.shards, *work.made.shards):
        assert agents.catalog.holders(shard.key) - {A}
    again = ended(care, care.start_drain([A]))
    assert (again["copied"], again["left"]) == (0, 0)


def test_what_still_runs_when_the_grace_is_over_is_ended_there_and_done_by_others(tmp_path: Path) -> None:
    care, agents, hands = caring(tmp_path, NODES)
    work = Working(agents, hands, A, 3)
    work.end(0)
    done = ended(care, care.start_drain([A], 0.3))
    assert (done["moved"], work.stopped) == (2, [1, 2])
    assert done["left"] in (0, 2), "what had ended, if there was no time to bring it elsewhere"
    for heard in work.heard[1:]:
        with pytest.raises(ClusterError, match="node aaaa is drained, and its grace is over"):
            heard.result(0)
    assert not agents.given.at({A})


def test_an_order_that_is_taken_back_ends_its_drain_and_nothing_that_runs(tmp_path: Path) -> None:
    care, agents, hands = caring(tmp_path, NODES)
    work = Working(agents, hands, A, 1)
    told = care.start_drain([A], 60.0)
    waits(care, told)
    assert care.undrain([A]) == [A]
    assert care.operation(told["operation"], 30)["phase"] == "cancelled"
    assert (work.stopped, work.heard[0].done()) == ([], False)


def test_a_drain_waits_for_another_operation_no_longer_than_its_grace(tmp_path: Path) -> None:
    care, agents, _ = caring(tmp_path, NODES, [manifest := make_manifest(4)])
    agents.catalog.add(A, [shard.key for shard in manifest.shards])
    with care._working:
        done = ended(care, care.start_drain([A], 0.3))
        assert (done["copied"], done["left"]) == (0, 4)
        told = care.start_drain([A])
        assert waits(care, told) == "another operation to end"
    assert ended(care, told)["left"] == 0


def test_a_node_that_goes_before_it_is_empty_is_not_said_to_be_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GONE_S", 0.1)
    care, agents, hands = caring(tmp_path, NODES, [manifest := make_manifest(4)])
    agents.catalog.add(A, [shard.key for shard in manifest.shards])
    work = Working(agents, hands, A, 1)
    told = care.start_drain([A])
    waits(care, told)
    agents.lose(A)
    work.tasks[0].set_exception(ClusterError("its worker died"))
    done = care.operation(told["operation"], 30)
    assert done["phase"] == "failed"
    assert "node aaaa went, or stopped answering, before it was empty" in done["problems"][0]


def test_what_jobs_made_is_brought_only_from_nodes_that_go_and_only_if_nobody_who_stays_has_it(tmp_path: Path) -> None:
    care, agents, hands = caring(tmp_path, NODES)
    work = Working(agents, hands, A, 3)
    for number in range(3):
        work.end(number)
    first, second, _ = work.made.items
    agents.items.add(B, [first.key, second.key])
    agents.catalog.add(B, [shard.key for shard in work.made.shards[:3]])  # of the second a shard was evicted there
    care.order("drain", C, {"cluster": "session-1"})
    done = ended(care, care.start_drain([A]))
    assert (done["copied"], done["left"]) == (4, 0)
    assert agents.catalog.held(B) == 6
    assert agents.catalog.held(C) == 0
    none = ended(care, care.start_drain([A, B, C]))
    assert (none["copied"], none["left"]) == (0, 6), "whoever stops these nodes now loses all"
