"""Who there is: every node's agent, started where there is none, greeted, and judged by what it says. No job.

Every call to an agent says this coordinator's epoch; where one is refused, the turn is over, and StaleCoordinator is
raised by whatever is asked of this module.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import ray as untyped_ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crucible.cache.store import Store
from crucible.cluster.answering import CALL_TIMEOUT_S, SILENT, Answering
from crucible.cluster.executor import alive_nodes, reason_of
from crucible.cluster.greeting import (
    SAMPLE_WAIT_S,
    SILENT_S,
    START_S,
    Greetings,
    Said,
    judged,
    own_sample,
)
from crucible.cluster.keys import Keys
from crucible.cluster.skew import Verdict
from crucible.cluster.turns import Turn
from crucible.errors import AgentUnavailable
from crucible.refs import NodeId
from crucible.workers.daemon import Agent
from crucible.workers.tasks import NAMESPACE

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns

AGENT_TIMEOUT_S = 60.0
"""For the first agent of a cluster to answer, without which there is nothing to do; and for long answers."""
GREET_EVERY_S = 20.0
"""Each agent is greeted so often, with a job or without: of a thousand fifty a second."""
NOTICE_S = START_S + SILENT_S
PASSING = (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError, ray.exceptions.GetTimeoutError)
"""What an agent may overcome that could not be greeted."""
RETRY_S = 0.2
_log = logging.getLogger(__name__)


class Roster(Answering):
    """The agents of a cluster, started where there is none.

    `embedded` says that this Ray is this process's own: agents then listen on the loopback address only. `store` is
    this node's. `learn` gets what an agent that is new to us was told by coordinators before this one.

    Concurrency: any method from any thread.
    """

    def __init__(self, store: Store, turn: Turn, learn: Callable[[bytes], None], keys: Keys, *, embedded: bool) -> None:
        super().__init__()
        self._embedded, self._store, self.turn, self._learn, self._keys = embedded, store, turn, learn, keys
        self.woken = threading.Event()
        """Set when an agent says that it has just started."""
        self._unasked: set[NodeId] = set()
        """Nodes whose stores were not asked since we met their agents."""
        self._unheard: set[NodeId] = set()
        """Nodes that have not said what coordinators before this one told them: it must not be written over."""
        self.newcomers = threading.Event()
        """Set when nodes were heard that may not know what must not be forgotten."""
        self.drained: Collection[NodeId] = frozenset()
        """Nodes that get no work: they are about to go."""
        self._verdicts: dict[NodeId, Verdict] = {}
        """Of every node that has answered: one that is refused is in here and not among the agents."""
        self._asking = threading.Lock()
        """Held by whoever starts agents or asks all of them: one at a time, and `_lock` stays free meanwhile."""
        self._greetings = Greetings()
        self._greeted: dict[NodeId, float] = {}
        """`time.monotonic()` when a node's agent was greeted last."""
        self._wrong: dict[NodeId, Exception] = {}
        """What came back from nodes that have not answered since."""
        self._broken: set[NodeId] = set()
        """Silent nodes whose agents do not start, or fail whenever they are greeted: seldom tried by ourselves."""

    # --- who there is

    def ensure(self) -> None:
        """Start an agent on every node that has none, hear from each of them, and tell all of each other.

        Every agent is asked for its url each time: one that Ray restarted listens on another port. Those that do not
        answer are left out until they do. Raises AgentUnavailable if there is none that does.
        """
        deadline = time.monotonic() + AGENT_TIMEOUT_S
        with self._asking:
            known, came = self.urls(), set[NodeId]()
            waiting = due = self._there()
            self._broken.clear()  # it may have been mended since
            while True:
                self._greet(due)
                answered, new = self._hear(RETRY_S)
                came |= new
                waiting = {node: host for node, host in waiting.items() if node not in answered}
                if (self._wrong.keys() - self._silent.keys()) & waiting.keys():
                    time.sleep(RETRY_S)
                    there = self._there()  # one whose node dies is asked until Ray knows it
                    waiting = {node: host for node, host in waiting.items() if node in there}
                someone = self._verdicts.keys() - self._silent.keys()
                if waiting.keys() <= self._silent.keys() and (
                    someone or waiting.keys() <= self._broken or time.monotonic() > deadline
                ):
                    break
                due = {node: host for node, host in waiting.items() if not someone or node not in self._silent}
            self._take_in(came, known)
            if waiting and not someone:
                node = min(waiting, key=lambda one: (one not in self._wrong, one))
                problem = self._wrong.get(node)
                reason = f"no answer within {AGENT_TIMEOUT_S:.0f} s" if problem is None else reason_of(problem)
                raise AgentUnavailable(node[:12], reason) from problem

    def refresh(self) -> None:
        """Notice which nodes came and went, agents that were started again, and who is silent or answers again.

        Costs a call to Ray's head, and a greeting now and then. Raises what `ensure` does.
        """
        hosts = alive_nodes()
        if self.woken.is_set() or self._known() != hosts.keys():
            self.woken.clear()
            self.ensure()
        elif self._asking.acquire(blocking=False):  # else whoever holds it hears the same
            try:
                now, known = time.monotonic(), self.urls()
                self._greet({node: host for node, host in hosts.items() if self._greeting_due(node, now)})
                if came := self._hear(0.0)[1]:
                    self._take_in(came, known)
            finally:
                self._asking.release()

    def notice(self) -> None:
        """Wait until whoever calls `refresh` has heard of every node, or knows that it does not answer. Has a bound."""
        deadline = time.monotonic() + NOTICE_S
        if self._is_up_to_date():
            return
        self.woken.set()
        while not self._is_up_to_date() and time.monotonic() < deadline:
            time.sleep(RETRY_S)

    def _is_up_to_date(self) -> bool:
        return not self.woken.is_set() and self._known() == alive_nodes().keys()

    def _known(self) -> AbstractSet[NodeId]:
        """Nodes of which it is known what is to be thought of them."""
        with self._lock:
            return self._agents.keys() | self._verdicts.keys() | self._silent.keys()

    def _there(self) -> dict[NodeId, str]:
        """node -> address of those that Ray believes to be alive. What was known of others is forgotten."""
        hosts = alive_nodes()
        with self._lock:
            for node in (self._known() | self._greeted.keys()) - hosts.keys():
                self._forget(node)
                self._greetings.forget(node)
                for known in (self._verdicts, self._silent, self._wrong, self._greeted):
                    known.pop(node, None)
                self._broken.discard(node)
        return hosts

    def _greeting_due(self, node: NodeId, now: float) -> bool:
        every = GREET_EVERY_S if node not in self._silent or node in self._broken else 0.0
        return now - self._greeted.get(node, -math.inf) >= every

    def _greet(self, hosts: Mapping[NodeId, str]) -> None:
        for node, host in hosts.items():
            if not self._greetings.under_way(node):
                self._greetings.send(node, self._agent(node, host))
                self._greeted[node] = time.monotonic()

    def _hear(self, wait_s: float) -> tuple[AbstractSet[NodeId], set[NodeId]]:
        """(nodes that answer within `wait_s` seconds, those of them that are new to us or were silent)."""
        answers, wrong = self._greetings.hear(wait_s, self._silent)
        for node, error in wrong.items():
            self.turn.heard(error)
            self._wrong[node] = error
            if getattr(error, "actor_init_failed", False) or not isinstance(error, PASSING):
                self._broken.add(node)
                self._silence(node, f"its agent does not start, and the rest goes on without it: {reason_of(error)}")
            elif not isinstance(error, ray.exceptions.ActorUnavailableError):
                with self._lock:
                    self._forget(node)  # its agent is dead; or so new that the one that was asked has not heard of it
        for node in self._greetings.late(self._silent):
            self._silence(node, SILENT)
        return answers.keys(), self._judge(answers)

    def registered(self, node: NodeId, url: str) -> None:
        """An agent has started. One that we know by another url is another process now, on the same store."""
        with self._lock:
            known = self._agents.get(node)
        if known is None or known[1] != url:
            self.woken.set()

    def tell(self, number: int, lines: bytes) -> None:
        """Have every node keep what must not be forgotten. Nobody waits for it: a later telling has all of it again."""
        if self._embedded:
            return  # one node, whose disk has it already
        agents = [agent for node, agent in self.handles().items() if node not in self._unheard]
        told = ray.put(lines)
        for agent in agents:
            agent.hear.remote(self.turn.epoch.number, number, told)

    def learn_secret(self) -> dict[NodeId, str]:
        """Have every agent ask which secret counts; gives what was wrong where one did not. Those are asked again."""
        missed = self.silent()
        asked = {node: agent.learn_secret.remote() for node, agent in self.handles().items()}
        for node, _, error in self.gather(asked, CALL_TIMEOUT_S):
            if error is not None:
                self.turn.heard(error)
                missed[node] = reason_of(error)
        if missed:
            self.woken.set()
        return missed

    def _judge(self, answers: Mapping[NodeId, Said]) -> set[NodeId]:
        """Take in what agents said; those that are new to us or were silent, and are not refused."""
        verdicts = {node: judged(said) for node, said in answers.items()}
        unsure = [node for node, one in verdicts.items() if not one.works and one.refused is None]
        samples = {node: answers[node].agent.sample.remote() for node in unsure}
        actors = {node: answers[node].agent for node in unsure}
        for node, sample, error in self.gather(samples, SAMPLE_WAIT_S, actors):  # a pyarrow may not even read it
            verdicts[node] = judged(answers[node], error is None and sample == own_sample())
        came: set[NodeId] = set()
        others: dict[NodeId, int] = {}
        for node, verdict in verdicts.items():
            if verdict.reasons != self._verdicts.get(node, Verdict()).reasons:
                _log.warning("node %s: %s", node[:12], "; ".join(verdict.reasons) or "its versions agree again")
            with self._lock:
                self._verdicts[node] = verdict
                self._wrong.pop(node, None)
                self._broken.discard(node)
                if was_silent := self._silent.pop(node, None) is not None:
                    _log.warning("node %s: its agent answers again", node[:12])
                if verdict.refused is not None:
                    self._forget(node)
                    continue
                if node not in self._agents:
                    self._unheard.add(node)
                if was_silent or node in self._unheard:
                    came.add(node)
                self._agents[node] = (self.turn.command(answers[node].agent), str(answers[node].told["url"]))
                if (number := int(answers[node].told.get("secret", 0))) != self._keys.number and number:
                    others[node] = number
        self._meet(came)
        self._settle(others)
        return came

    def _meet(self, nodes: Collection[NodeId]) -> None:
        """Let agents that are new to us hear of this epoch, and hear what those before it told them.

        One that does not answer is told nothing, and is asked again the next time. Raises StaleCoordinator.
        """
        with self._lock:
            self._unasked.update(nodes)
            asked = {node: self._agents[node][0].told.remote() for node in self._unheard.intersection(nodes)}
        if nodes:
            self.newcomers.set()  # who was silent has missed what was told meanwhile
        for node, lines, error in self.gather(asked, AGENT_TIMEOUT_S):
            if error is not None:
                self.turn.heard(error)
                continue
            if lines:
                self._learn(lines)
            with self._lock:
                self._unheard.discard(node)
            self.newcomers.set()

    def _settle(self, numbers: Mapping[NodeId, int]) -> None:
        """With agents that have another secret than we, by its number: they missed a change, or we did."""
        ours, handles = self._keys.number, self.handles()
        asked = {
            node: agent.own_secret.remote() if number > ours else agent.learn_secret.remote()
            for node, number in numbers.items()
            if (agent := handles.get(node)) is not None
        }
        for node, answer, error in self.gather(asked, CALL_TIMEOUT_S):
            if error is not None:
                self.turn.heard(error)
                _log.warning("node %s has another secret than the cluster: %s", node[:12], reason_of(error))
            elif numbers[node] > self._keys.number:
                self._keys.adopt(answer)
                self.woken.set()  # and the others are behind

    def _take_in(self, came: Collection[NodeId], known: Mapping[NodeId, str]) -> None:
        """Tell the agents of each other: all where their urls were others (`known`), else those that came."""
        before, now = set(filter(None, known.values())), sorted(filter(None, self.urls().values()))
        for node, agent in self.handles().items():
            if set(now) != before or node in came:
                agent.set_peers.remote(now)

    def writers(self) -> tuple[str, ...]:
        """Versions of pyarrow that write the bytes that this process's would."""
        with self._lock:
            return tuple(sorted({one.of.pyarrow for one in self._verdicts.values() if one.works}))

    def notes(self) -> tuple[str, ...]:
        """What is wrong with the versions or the clock of a node, or that it does not answer; one line each."""
        with self._lock:
            wrong = [(node, why) for node, one in self._verdicts.items() for why in one.reasons]
            return tuple(f"node {node[:12]}: {why}" for node, why in (*wrong, *self._silent.items()))

    def notes_of(self, node: NodeId) -> list[str]:
        """What is wrong with the versions or the clock of a node."""
        return list(self._verdicts.get(node, Verdict()).reasons)

    def refused(self) -> dict[NodeId, str]:
        """Nodes that are left out, and why."""
        with self._lock:
            return {node: str(one.refused) for node, one in self._verdicts.items() if one.refused is not None}

    def _forget(self, node: NodeId) -> None:
        self._agents.pop(node, None)
        if (verdict := self._verdicts.get(node)) is not None and verdict.refused is None:
            del self._verdicts[node]  # else it is why there is no agent
        self._unasked.discard(node)
        self._unheard.discard(node)

    def _agent(self, node: NodeId, host: str) -> Any:
        if node in self._agents:
            return self._agents[node][0].actor
        return Agent.options(
            name=agent_name(node),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            memory=1,  # see `start_coordinator`
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote("127.0.0.1" if self._embedded else host)


def agent_name(node: NodeId) -> str:
    return f"crucible-agent-{node}"
