"""The nodes that a running job may use: those it began with, less the dead, and those that join. No cluster needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from crucible.cluster import executor as module
from crucible.cluster.executor import RayExecutor
from crucible.cluster.flights import Flights
from crucible.cluster.given import Given
from crucible.config import Settings
from crucible.refs import NodeId
from crucible.workers.tasks import JobOptions

A, B, C, D = (NodeId(name) for name in "abcd")


class Owner:
    """A coordinator whose nodes the test says."""

    def __init__(self, *nodes: NodeId) -> None:
        self.turn = SimpleNamespace(epoch=1, check=lambda: None)
        self.flights: Flights[Any] = Flights()
        self.given = Given()
        self.there = dict.fromkeys(nodes, 2.0)
        self.agents = set(nodes)
        self.asked = 0

    def weights(self) -> dict[NodeId, float]:
        self.asked += 1
        return {node: weight for node, weight in self.there.items() if node in self.agents}

    def agent_url(self, node: NodeId) -> str | None:
        return f"http://{node}" if node in self.agents else None


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Owner:
    owner = Owner(A, B)
    monkeypatch.setattr(module, "alive_nodes", lambda: dict.fromkeys(owner.there, "address"))
    monkeypatch.setattr(module, "most_cpus", lambda: 1)
    monkeypatch.setattr(module, "NODES_EVERY_S", 0.0)
    return owner


def executor_of(owner: Any, limit: int | None = None) -> RayExecutor:
    return RayExecutor(owner, JobOptions.of(Settings.from_env()), "job", limit)


def test_a_node_that_joins_is_used_as_soon_as_it_has_an_agent(owner: Owner) -> None:
    executor = executor_of(owner)
    assert set(executor.nodes()) == {A, B}
    owner.there[C] = 4.0
    assert set(executor.nodes()) == {A, B}, "it has no agent yet"
    owner.agents.add(C)
    assert executor.nodes() == {A: 2.0, B: 2.0, C: 4.0}
    asked = owner.asked
    for _ in range(5):
        executor.nodes()
    assert owner.asked == asked, "nobody is asked while nobody joins"
    del owner.there[A]
    assert set(executor.nodes()) == {B, C}


def test_a_job_gets_no_more_nodes_than_it_was_given_and_others_for_those_that_die(owner: Owner) -> None:
    executor = executor_of(owner, limit=2)
    for node in (C, D):
        owner.there[node] = 1.0
        owner.agents.add(node)
    assert set(executor.nodes()) == {A, B}
    del owner.there[B]
    assert set(executor.nodes()) == {A, C}
