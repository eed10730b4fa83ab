"""What a coordinator tells and asks the agents, while some of them are slow. Calls are functions; no Ray is running."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray

from crucible.cache.store import Store
from crucible.cluster import agents as stores
from crucible.cluster import executor
from crucible.cluster import roster as module
from crucible.cluster.agents import Agents
from crucible.cluster.keys import Keys
from crucible.cluster.turns import Turn
from crucible.refs import NodeId
from crucible.versions import versions_here
from crucible.workers.fencing import Epoch

WAIT_S = 30.0


class Node:
    """One agent's answers."""

    def __init__(self, name: str) -> None:
        self.name, self.kept, self.there = name, b"", threading.Event()
        self.there.set()
        self.answers: dict[str, Callable[..., Any]] = {
            "told": lambda: self.kept,
            "hear": self.hear,
            "weight": lambda: 1024.0,
            "set_peers": lambda _: None,
        }
        self.obey = SimpleNamespace(remote=self._obeyed)

    def _obeyed(self, _: Epoch, method: str, *said: Any) -> Reply:
        if method == "hear":  # nobody waits for it
            self.answers[method](*said)
        return Reply(self, lambda: self.answers[method](*said))

    def hear(self, _: int, __: int, lines: bytes) -> None:
        self.kept = lines

    def hello(self) -> dict[str, Any]:
        return {**versions_here().told(), "url": f"http://{self.name}", "clock": time.time(), "secret": 1}


class Reply:
    """Of a call that is under way."""

    def __init__(self, node: Node, answer: Callable[[], Any]) -> None:
        self._node, self._answer = node, answer

    def get(self, wait_s: float) -> Any:
        if not self._node.there.wait(wait_s):
            raise ray.exceptions.GetTimeoutError
        return self._answer()


@pytest.fixture
def cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Agents, dict[str, Node], list[bytes], list[float]]:
    """Two agents, what was learned of them, and the waits for their answers, in seconds."""
    nodes = {name: Node(name) for name in ("a", "b")}
    learned: list[bytes] = []
    waits: list[float] = []

    def get(reply: Reply, timeout: float) -> Any:
        began = time.monotonic()
        try:
            return reply.get(timeout)
        finally:
            waits.append(time.monotonic() - began)

    fake = SimpleNamespace(get=get, put=lambda lines: lines, exceptions=ray.exceptions)
    monkeypatch.setattr(module, "ray", fake)
    monkeypatch.setattr(executor, "ray", fake)
    monkeypatch.setattr(module, "alive_nodes", lambda: {NodeId(name): "127.0.0.1" for name in nodes})
    monkeypatch.setattr(module, "hello", lambda node: Reply(node, node.hello))
    monkeypatch.setattr(module, "heard", lambda reply, wait_s: reply.get(wait_s))
    agents = Agents(
        Store(tmp_path),
        Turn(Epoch("session", 2, "me")),
        learned.append,
        cast("Keys", SimpleNamespace(number=1)),
        embedded=False,
    )
    agents._agent = lambda node, _: nodes[node]  # type: ignore[method-assign]
    return agents, nodes, learned, waits


def test_what_a_node_was_told_before_is_heard_before_it_is_told_anything_else(
    cluster: tuple[Agents, dict[str, Node], list[bytes], list[float]],
) -> None:
    """A coordinator that comes up on a new node has no journal: what the first agents know, while it waits for
    others to start, is all that there is."""
    agents, nodes, learned, _ = cluster
    nodes["a"].kept = nodes["b"].kept = b"jobs of before"
    nodes["b"].there.clear()
    meeting = threading.Thread(target=agents.ensure)
    meeting.start()
    deadline = time.monotonic() + WAIT_S
    while "a" not in agents.handles():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    agents.tell(1, b"a job of now")
    assert nodes["a"].kept == b"jobs of before"
    nodes["b"].there.set()
    meeting.join(WAIT_S)
    assert not meeting.is_alive()
    assert learned == [b"jobs of before"] * 2
    assert agents.newcomers.is_set(), "they are told what they missed"
    agents.tell(2, b"all of them")
    assert [node.kept for node in nodes.values()] == [b"all of them"] * 2


def test_one_that_does_not_say_what_it_was_told_is_asked_again(
    cluster: tuple[Agents, dict[str, Node], list[bytes], list[float]],
) -> None:
    agents, nodes, learned, _ = cluster

    def fails() -> bytes:
        raise ray.exceptions.RayError

    nodes["a"].kept = b"jobs of before"
    fine = nodes["a"].answers["told"]
    nodes["a"].answers["told"] = fails
    agents.ensure()
    agents.tell(1, b"a job of now")
    assert (nodes["a"].kept, nodes["b"].kept) == (b"jobs of before", b"a job of now")
    nodes["a"].answers["told"] = fine
    agents.ensure()
    assert learned == [b"jobs of before"]


def test_nodes_that_do_not_answer_are_waited_for_together_and_not_one_after_the_other(
    cluster: tuple[Agents, dict[str, Node], list[bytes], list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    agents, nodes, _, waits = cluster
    nodes.update({name: Node(name) for name in "cdefgh"})
    agents.ensure()
    for name in "abcdefg":
        nodes[name].there.clear()
    waits.clear()
    monkeypatch.setattr(stores, "CALL_TIMEOUT_S", 0.4)
    assert agents.weights() == {"h": 1024.0}
    assert sum(waits) < 4 * 0.4, "and not seven times as long"
