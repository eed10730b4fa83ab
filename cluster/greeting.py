"""Ask agents who they are, of whatever version they may be, all at once; and what this process makes of the sample to
compare with.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ray as untyped_ray

from crucible.cluster.skew import Clock, Verdict, check_coordinator, judge
from crucible.refs import NodeId
from crucible.versions import Versions, versions_here

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns

SAMPLE_WAIT_S = 60.0
"""For an agent to convert the sample."""
SILENT_S = 5.0
"""An agent that has started answers a greeting within milliseconds, on a machine with far too much to do within a
second or two. One that does not for so long hangs, or is cut off."""
LAST_S = 1.0
"""Somebody who is late is given at least so long before it counts."""
START_S = 20.0
"""For an agent to start, or to be started again, before others do without it: takes about a second here, and a cold
node with a slow disk longer."""


@dataclass(frozen=True, slots=True)
class Said:
    """What an agent answered."""

    agent: Any
    told: Mapping[str, Any]
    clock: Clock


@dataclass(slots=True)
class _Greeting:
    agent: Any
    reply: Any
    sent: float
    """Seconds since 1970."""


class Greetings:
    """Greetings that were sent and are not answered. One a node: who does not answer it gets no second.

    Concurrency: none; its owner uses it from one thread at a time.
    """

    def __init__(self) -> None:
        self._under_way: dict[NodeId, _Greeting] = {}
        self._since: dict[NodeId, float] = {}
        """node -> `time.monotonic()` of the first greeting since it answered last."""
        self._starting: set[NodeId] = set()
        """Those late ones that are given the time to start."""

    def send(self, node: NodeId, agent: Any) -> None:
        """Greet a node's agent, if no greeting is under way to it."""
        if node not in self._under_way:
            self._under_way[node] = _Greeting(agent, hello(agent), time.time())
            self._since.setdefault(node, time.monotonic())

    def under_way(self, node: NodeId) -> bool:
        return node in self._under_way

    def forget(self, node: NodeId) -> None:
        """The node is gone."""
        self._under_way.pop(node, None)
        self._answered(node)

    def hear(self, wait_s: float, hopeless: Collection[NodeId]) -> tuple[dict[NodeId, Said], dict[NodeId, Exception]]:
        """The answers that come within `wait_s` seconds, and what went wrong with other greetings: those are over.

        Ends when all have answered but the `hopeless`, whom nobody waits for. Greetings stay under way else.
        """
        if self.late(hopeless):  # it may be us who were stopped, and its answer is about to come in
            wait_s = max(wait_s, LAST_S)
        asked = {node: one.reply for node, one in self._under_way.items() if one.reply is not None}
        there = [*ready(asked, wait_s, len(asked.keys() - set(hopeless))), *(self._under_way.keys() - asked.keys())]
        answers: dict[NodeId, Said] = {}
        wrong: dict[NodeId, Exception] = {}
        for node in there:
            one = self._under_way.pop(node)
            try:
                told = heard(one.reply, SILENT_S)
            except ray.exceptions.RayError as error:
                wrong[node] = error
                continue
            clock = Clock.compared(one.sent, float(told.get("clock", one.sent)), time.time())
            answers[node] = Said(one.agent, told, clock)
            self._answered(node)
        return answers, wrong

    def late(self, known: Collection[NodeId]) -> list[NodeId]:
        """Nodes, but the `known`, that have not answered for longer than is to be expected, maybe greeted again."""
        found = []
        for node, since in self._since.items():
            if node in known:
                continue
            waited = time.monotonic() - since
            if waited > SILENT_S and node not in self._starting:
                one = self._under_way.get(node)
                if one is None or has_started(one.agent):
                    found.append(node)
                    continue
                self._starting.add(node)
            if waited > START_S:
                found.append(node)
        return found

    def _answered(self, node: NodeId) -> None:
        self._since.pop(node, None)
        self._starting.discard(node)


def has_started(agent: Any) -> bool:
    """False while Ray says that it starts the actor, or starts it again; True where it does not say."""
    with suppress(Exception):  # no public call tells it without Ray's dashboard; without it, nobody is given longer
        from ray._private.state import state

        told = state.actor_table(agent._actor_id.hex())
        return told.get("State") not in ("DEPENDENCIES_UNREADY", "PENDING_CREATION", "RESTARTING")
    return True


def hello(agent: Any) -> Any:
    """Ask an agent who it is; None where it is of a version that cannot say."""
    ask = getattr(agent, "hello", None)
    return None if ask is None else ask.remote()


def heard(reply: Any, wait_s: float) -> Mapping[str, Any]:
    """What it said; nothing from one that cannot say. Raises a RayError."""
    try:
        told = {} if reply is None else ray.get(reply, timeout=wait_s)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AttributeError):
            return {}
        raise
    return told if isinstance(told, Mapping) else {}


def check_versions(coordinator: Any, wait_s: float) -> None:
    """Raise VersionSkew if this process does not understand that coordinator. Raises a RayError."""
    check_coordinator(Versions.heard(heard(hello(coordinator), wait_s)))


def judged(said: Said, same_bytes: bool | None = None) -> Verdict:
    """What an agent that said this may do. `same_bytes`: what came of the sample, None where it was not tried."""
    problem = str(said.told.get("store_problem", ""))
    theirs = Versions.heard(said.told)
    return judge(versions_here(), theirs, clock=said.clock, store_problem=problem, same_bytes=same_bytes)


@cache
def own_sample() -> str:
    """What this process makes of the sample that nodes with another pyarrow are asked to convert."""
    from crucible.workers.sample import sample_digest

    with tempfile.TemporaryDirectory() as folder:
        return sample_digest(Path(folder))


def ready(asked: Mapping[NodeId, Any], wait_s: float, most: int | None = None) -> list[NodeId]:
    """Those of the calls under way that end within `wait_s` seconds. No wait beyond the first `most` of them."""
    if not asked:
        return []
    nodes = {reply: node for node, reply in asked.items()}
    count = len(nodes) if most is None else min(max(1, most), len(nodes))
    return [nodes[reply] for reply in ray.wait(list(nodes), num_returns=count, timeout=max(0.0, wait_s))[0]]
