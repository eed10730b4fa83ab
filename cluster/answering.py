"""The agents that were met, and calls to them: all at once, and none waits long for one that does not answer.

An agent that does not answer a greeting is silent: it is asked nothing else and gets no work until it answers. What its
node holds stays known, for it may come back any moment.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ray as untyped_ray

from crucible.cluster.greeting import SILENT_S, hello, ready
from crucible.refs import NodeId

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns

CALL_TIMEOUT_S = 10.0
ANSWER_S = 3.0
PING_S = 1.0
"""An agent whose answer takes longer is asked whether it is there."""
SILENT = (
    "its agent does not answer; the rest goes on without it, and takes it in when it does. If its host and its link "
    "are well, end the agent there (kill -9; its pid is in agent.json of its store), and Ray starts it again"
)
_log = logging.getLogger(__name__)


class Answering:
    """Who answers. Who there is, a subclass finds out.

    Concurrency: any method from any thread.
    """

    def __init__(self) -> None:
        self._agents: dict[NodeId, tuple[Any, str]] = {}
        """With their urls."""
        self._silent: dict[NodeId, str] = {}
        """Nodes whose agents do not answer, and what is wrong. Those that did before are among the agents still."""
        self._lock = threading.RLock()

    def handles(self) -> dict[NodeId, Any]:
        """The agents that there are and that answer; every call to one says this coordinator's epoch."""
        with self._lock:
            return {node: agent for node, (agent, _) in self._agents.items() if node not in self._silent}

    def silent(self) -> dict[NodeId, str]:
        """Nodes whose agents do not answer, and what is wrong. What they held when they did is in the catalog."""
        with self._lock:
            return dict(self._silent)

    def urls(self) -> dict[NodeId, str]:
        """The urls of all agents, silent ones too; empty of those that never answered."""
        with self._lock:
            return dict.fromkeys(self._silent, "") | {node: url for node, (_, url) in self._agents.items()}

    def agent_url(self, node: NodeId) -> str | None:
        """None where there is no agent that answers."""
        with self._lock:
            return self._agents[node][1] if node in self._agents and node not in self._silent else None

    def answers(self, node: NodeId) -> bool:
        """True if the agent of a node answers now, or within a few seconds: then the node is there."""
        agent = self.handles().get(node)
        try:
            return agent is not None and bool(ray.get(agent.address.remote(), timeout=ANSWER_S))
        except ray.exceptions.RayError:
            return False

    def _silence(self, node: NodeId, why: str) -> None:
        """Leave a node out until it answers."""
        with self._lock:
            if node in self._silent:
                return
            self._silent[node] = why
            url = self._agents[node][1] if node in self._agents else "no agent yet"
        _log.warning("node %s (%s): %s", node[:12], url, why)

    def gather(
        self, asked: Mapping[NodeId, Any], wait_s: float, agents: Mapping[NodeId, Any] | None = None
    ) -> Iterator[tuple[NodeId, Any, Exception | None]]:
        """(node, answer, why there is none) of calls that are under way; `wait_s` is for all of them together.

        One that takes long is waited for only while its agent answers greetings; `agents` are those of nodes that we
        have not met.
        """
        deadline = time.monotonic() + wait_s
        left, pings = dict(asked), dict[NodeId, tuple[Any, float]]()
        while left:
            pause = min(PING_S, deadline - time.monotonic())
            for node in ready(left, pause):
                yield node, *_answer(left.pop(node))
            if time.monotonic() >= deadline:
                break
            for node in self._unanswered(left.keys(), pings, agents or {}):
                del left[node]
                yield node, None, ray.exceptions.GetTimeoutError("its agent does not answer")
        for node in left:
            yield node, None, ray.exceptions.GetTimeoutError(f"no answer within {wait_s:.0f} s")

    def _unanswered(
        self, nodes: Collection[NodeId], pings: dict[NodeId, tuple[Any, float]], agents: Mapping[NodeId, Any]
    ) -> list[NodeId]:
        """Those that do not answer a greeting either. `pings` are the greetings under way, with when they were sent."""
        handles, now = self.handles(), time.monotonic()
        lost = [node for node in nodes if node in self._silent]
        late = {node: pings[node][0] for node in nodes if node in pings and now - pings[node][1] > SILENT_S}
        there = ready({node: pings[node][0] for node in nodes if node in pings}, 0.0)
        there += ready({node: reply for node, reply in late.items() if node not in there}, PING_S)
        for node in nodes:
            if node in there:
                del pings[node]
            elif node in late:
                self._silence(node, SILENT)
                lost.append(node)
            elif node not in pings and (agent := agents.get(node) or getattr(handles.get(node), "actor", None)):
                pings[node] = hello(agent), now
        return list(dict.fromkeys(lost))


def _answer(reply: Any) -> tuple[Any, Exception | None]:
    """What a call gave that has ended."""
    try:
        return ray.get(reply, timeout=CALL_TIMEOUT_S), None
    except ray.exceptions.RayError as error:
        return None, error
