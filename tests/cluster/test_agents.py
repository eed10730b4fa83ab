"""What a coordinator tells and asks the agents, while some of them are slow. Calls are functions; no Ray is running."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray

from crucible.cache.store import Store
from crucible.cluster import agents as stores
from crucible.cluster import answering, greeting
from crucible.cluster import roster as module
from crucible.cluster.agents import Agents
from crucible.cluster.keys import Keys
from crucible.cluster.prepare import Prepared
from crucible.cluster.turns import Turn
from crucible.errors import AgentUnavailable
from crucible.refs import NodeId
from crucible.versions import versions_here
from crucible.workers.fencing import Epoch
from tests.cluster.caring import make_manifest

WAIT_S = 30.0
QUICK_S = 0.3


class Node:
    """One agent's answers."""

    def __init__(self, name: str) -> None:
        self.name, self.kept, self.there = name, b"", threading.Event()
        self.there.set()
        self.asked: list[str] = []
        self.peers: list[str] = []
        self.manifests: dict[str, list[str]] = {}
        self.answers: dict[str, Callable[..., Any]] = {
            "told": lambda: self.kept,
            "hear": self.hear,
            "weight": lambda: 1024.0,
            "set_peers": lambda _: None,
            "names": lambda: self.manifests,
            "keep": lambda *_: None,
            "report": lambda: ({"shard": 10}, []),
        }
        self.obey = SimpleNamespace(remote=self._obeyed)

    def _obeyed(self, _: Epoch, method: str, *said: Any) -> Reply:
        self.asked.append(method)
        if method == "set_peers":
            (self.peers,) = said
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

    def is_there(self) -> bool:
        return self._node.there.is_set()

    def get(self, wait_s: float) -> Any:
        if not self._node.there.wait(wait_s):
            raise ray.exceptions.GetTimeoutError
        return self._answer()


@dataclass
class Cluster:
    """Two nodes to begin with."""

    agents: Agents
    nodes: dict[str, Node]
    learned: list[bytes] = field(default_factory=list)
    """What nodes were told by coordinators before this one."""
    starting: set[str] = field(default_factory=set)
    """Nodes whose agents Ray is about to start."""

    def silent(self) -> set[str]:
        return {str(node) for node in self.agents.silent()}

    def until(self, true: Callable[[], Any]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not true():
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    nodes = {name: Node(name) for name in ("a", "b")}
    learned: list[bytes] = []
    agents = Agents(
        Store(tmp_path),
        Turn(Epoch("session", 2, "me")),
        learned.append,
        cast("Keys", SimpleNamespace(number=1)),
        embedded=False,
    )
    agents._agent = lambda node, _: nodes[node]  # type: ignore[method-assign]
    made = Cluster(agents, nodes, learned)

    def wait(replies: list[Reply], num_returns: int, timeout: float) -> tuple[list[Reply], list[Reply]]:
        deadline = time.monotonic() + timeout
        while sum(one.is_there() for one in replies) < num_returns and time.monotonic() < deadline:
            time.sleep(0.001)
        there = [one for one in replies if one.is_there()]
        return there, [one for one in replies if one not in there]

    fake = SimpleNamespace(
        get=lambda reply, timeout: reply.get(timeout), wait=wait, put=lambda lines: lines, exceptions=ray.exceptions
    )
    for each in (stores, module, greeting, answering):
        monkeypatch.setattr(each, "ray", fake)
    for each in (greeting, answering):
        monkeypatch.setattr(each, "SILENT_S", QUICK_S)
        monkeypatch.setattr(each, "hello", lambda node: Reply(node, node.hello))
    monkeypatch.setattr(greeting, "LAST_S", 0.0)
    monkeypatch.setattr(greeting, "has_started", lambda node: node.name not in made.starting)
    monkeypatch.setattr(answering, "PING_S", QUICK_S / 10)
    monkeypatch.setattr(module, "alive_nodes", lambda: {NodeId(name): "127.0.0.1" for name in nodes})
    return made


def test_what_a_node_was_told_before_is_heard_before_it_is_told_anything_else(cluster: Cluster) -> None:
    """A coordinator that comes up on a new node has no journal: what the first agents know, while it waits for
    others to start, is all that there is."""
    agents, nodes = cluster.agents, cluster.nodes
    nodes["a"].kept = nodes["b"].kept = b"jobs of before"
    nodes["b"].there.clear()
    cluster.starting.add("b")
    meeting = threading.Thread(target=agents.ensure)
    meeting.start()
    cluster.until(lambda: b"jobs of before" in cluster.learned)
    agents.tell(1, b"a job of now")
    assert nodes["b"].kept == b"jobs of before"
    nodes["b"].there.set()
    meeting.join(WAIT_S)
    assert not meeting.is_alive()
    assert cluster.learned == [b"jobs of before"] * 2
    assert agents.newcomers.is_set(), "they are told what they missed"
    agents.tell(2, b"all of them")
    assert [node.kept for node in nodes.values()] == [b"all of them"] * 2


def test_one_that_does_not_say_what_it_was_told_is_asked_again(cluster: Cluster) -> None:
    agents, nodes = cluster.agents, cluster.nodes

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
    assert cluster.learned == [b"jobs of before"]


def test_nodes_that_do_not_answer_are_waited_for_together_once_and_then_no_more(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents, nodes = cluster.agents, cluster.nodes
    nodes.update({name: Node(name) for name in "cdefgh"})
    agents.ensure()
    for name in "abcdefg":
        nodes[name].there.clear()
    began = time.monotonic()
    assert agents.weights() == {"h": 1024.0}
    assert cluster.silent() == set("abcdefg")
    first = time.monotonic() - began
    for node in nodes.values():
        node.asked.clear()
    began = time.monotonic()
    for _ in range(20):
        assert agents.weights() == {"h": 1024.0}
        agents.ensure()
    assert time.monotonic() - began < 20 * first, "each of forty questions would have waited as long"
    assert not any(nodes[name].asked for name in "abcdefg"), "nothing piles up where nobody answers"
    assert all(any(f"node {name}: " in note for note in agents.notes()) for name in "abcdefg")


def test_a_silent_node_is_left_out_and_taken_in_when_it_answers(cluster: Cluster) -> None:
    agents, nodes = cluster.agents, cluster.nodes
    agents.ensure()
    agents.rebuild()
    nodes["b"].there.clear()
    agents.ensure()
    assert (agents.handles().keys(), cluster.silent()) == ({"a"}, {"b"})
    assert agents.agent_url(NodeId("b")) is None
    assert agents.urls() == {"a": "http://a", "b": "http://b"}
    # it may come back any moment, and what it holds is not lost
    assert agents.locate(["shard"]) == {"shard": ["http://a", "http://b"]}
    agents.newcomers.clear()
    nodes["b"].asked.clear()
    nodes["b"].there.set()
    cluster.until(lambda: agents.refresh() or not cluster.silent())
    assert agents.handles().keys() == {"a", "b"}
    assert agents.newcomers.is_set(), "it is told what it missed"
    cluster.until(lambda: {"set_peers", "report"} <= set(nodes["b"].asked))


def test_one_that_hangs_is_noticed_without_a_job(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    agents, nodes = cluster.agents, cluster.nodes
    monkeypatch.setattr(module, "GREET_EVERY_S", 0.01)
    agents.ensure()
    nodes["a"].there.clear()
    cluster.until(lambda: agents.refresh() or cluster.silent() == {"a"})
    assert agents.handles().keys() == {"b"}


def test_an_agent_that_starts_is_given_longer_than_one_that_has_started(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greeting, "START_S", WAIT_S)
    agents, nodes = cluster.agents, cluster.nodes
    nodes["b"].there.clear()
    cluster.starting.add("b")
    threading.Timer(3 * QUICK_S, nodes["b"].there.set).start()
    agents.ensure()
    assert agents.handles().keys() == {"a", "b"}


def test_where_no_agent_at_all_answers_there_is_nothing_to_begin_with(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGENT_TIMEOUT_S", 2 * QUICK_S)
    for node in cluster.nodes.values():
        node.there.clear()
    with pytest.raises(AgentUnavailable, match="no answer"):
        cluster.agents.ensure()
    cluster.nodes["a"].there.set()
    cluster.agents.ensure()
    assert cluster.agents.handles().keys() == {"a"}
    assert cluster.nodes["a"].peers == ["http://a"], "nobody is sent to one that never said where it listens"


def test_an_agent_that_cannot_start_holds_up_nobody(cluster: Cluster) -> None:
    agents, nodes = cluster.agents, cluster.nodes

    def fails() -> dict[str, Any]:
        raise ray.exceptions.RayTaskError("hello", "no such library", ImportError("no such library"))

    fine, nodes["b"].hello = nodes["b"].hello, fails  # type: ignore[method-assign]
    agents.ensure()
    assert agents.handles().keys() == {"a"}
    assert "does not start" in agents.silent()[NodeId("b")]
    nodes["b"].hello = fine  # type: ignore[method-assign]
    agents.ensure()
    assert agents.handles().keys() == {"a", "b"}


def test_what_takes_long_is_waited_for_while_the_agent_answers_greetings(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of a million shards takes its time to tell of them, and its agent does not hang."""
    agents = cluster.agents
    agents.ensure()
    slow = Node("slow")
    slow.there.clear()
    threading.Timer(4 * QUICK_S, slow.there.set).start()
    told = {node: answer for node, answer, _ in agents.gather({NodeId("a"): Reply(slow, lambda: 7)}, WAIT_S)}
    assert (told, cluster.silent()) == ({"a": 7}, set())


def test_a_manifest_is_sent_to_those_who_lack_it_only(cluster: Cluster, tmp_path: Path) -> None:
    """A manifest may have tens of megabytes, and a coordinator that starts finds a thousand nodes that have it."""
    agents, nodes = cluster.agents, cluster.nodes
    store = Store(tmp_path)
    has, lacks = make_manifest(2, split="train"), make_manifest(2, split="test")
    for manifest in (has, lacks):
        store.put_manifest(manifest, ("main",))
        store.put_survey(manifest.repo, {"commit": manifest.repo.revision})
    names = [has.repo.revision, "main"]
    kept: dict[str, list[Any]] = {"a": [], "b": []}
    for name, node in nodes.items():
        node.manifests = {has.id: names, lacks.id: names[: 2 if name == "a" else 1]}
        node.answers["keep"] = lambda *said, mine=kept[name]: mine.append(said)
    agents.ensure()
    cluster.until(lambda: kept["b"])
    ((data, revisions, survey),) = kept["b"]
    assert (data, sorted(revisions)) == ([lacks.to_json()], sorted(names)), "a name of it is new there"
    assert survey["commit"] == lacks.repo.revision
    assert kept["a"] == []


def test_the_coordinators_own_node_puts_aside_what_a_new_manifest_means_otherwise(
    cluster: Cluster, tmp_path: Path
) -> None:
    store, old = Store(tmp_path), make_manifest(2)
    store.put_manifest(old)
    replaced, kept = old.shards
    for shard in old.shards:
        store.shard_path(shard.key).parent.mkdir(parents=True, exist_ok=True)
        store.shard_path(shard.key).write_bytes(bytes(shard.size))
    new = replace(old, shards=(replace(replaced, digest="f" * 64), kept))
    prepared = SimpleNamespace(repo=new.repo, revisions=("main",), survey={"commit": new.repo.revision})
    cluster.agents.share(cast("Prepared", prepared), (new,))
    assert {key for key, _ in store.shards()} == {kept.key}
    assert new.id in store.names()
