"""Who there is: every node's agent, started where there is none, greeted, and judged by what it says. No job.

Every call to an agent says this coordinator's epoch; where one is refused, the turn is over, and StaleCoordinator is
raised by whatever is asked of this module.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ray as untyped_ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crucible.cache.store import Store
from crucible.cluster.executor import alive_nodes, reason_of, replies
from crucible.cluster.greeting import heard, hello, judged
from crucible.cluster.keys import Keys
from crucible.cluster.skew import Clock, Verdict
from crucible.cluster.turns import Turn
from crucible.errors import AgentUnavailable
from crucible.refs import NodeId
from crucible.workers.daemon import Agent
from crucible.workers.tasks import NAMESPACE

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns

AGENT_TIMEOUT_S = 60.0
"""For an agent to start: an actor takes about a second here, a cold node with a slow disk much longer."""
CALL_TIMEOUT_S = 10.0
ANSWER_S = 3.0
RETRY_S = 0.2
_log = logging.getLogger(__name__)


class Roster:
    """The agents of a cluster, started where there is none.

    `embedded` says that this Ray is this process's own: agents then listen on the loopback address only. `store` is
    this node's. `learn` gets what an agent that is new to us was told by coordinators before this one.

    Concurrency: any method from any thread.
    """

    def __init__(self, store: Store, turn: Turn, learn: Callable[[bytes], None], keys: Keys, *, embedded: bool) -> None:
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
        self._agents: dict[NodeId, tuple[Any, str]] = {}
        self._verdicts: dict[NodeId, Verdict] = {}
        """Of every node that has answered: one that is refused is in here and not among the agents."""
        self._lock = threading.RLock()
        self._asking = threading.Lock()
        """Held by whoever starts agents or asks all of them: one at a time, and `_lock` stays free meanwhile."""

    # --- who there is

    def ensure(self) -> None:
        """Start an agent on every node that has none, and tell all of them of each other.

        Every agent is asked for its url each time: one that Ray restarted listens on another port. A node that is dying
        is asked until Ray knows it. Raises AgentUnavailable.
        """
        deadline = time.monotonic() + AGENT_TIMEOUT_S
        with self._asking:
            missing = alive_nodes()
            with self._lock:
                known = {node: url for node, (_, url) in self._agents.items()}
                for node in self._agents.keys() - missing.keys():
                    self._forget(node)
                self._verdicts = {node: one for node, one in self._verdicts.items() if node in missing}
            while problems := self._ask_agents(missing, deadline):
                if time.monotonic() > deadline:
                    node, problem = next(iter(problems.items()))
                    raise AgentUnavailable(node[:12], reason_of(problem)) from problem
                time.sleep(RETRY_S)
                missing = {node: host for node, host in alive_nodes().items() if node in problems}
            with self._lock:
                agents = dict(self._agents)
            if known != (now := {node: url for node, (_, url) in agents.items()}):
                for agent, _ in agents.values():
                    agent.set_peers.remote(list(now.values()))
                self._introduce([agents[node][0] for node in now.keys() - known.keys()])

    def refresh(self) -> None:
        """Notice which nodes came and went, and agents that were started again.

        Costs a call to Ray's head while nothing changes. Raises what `ensure` does.
        """
        with self._lock:
            known = self._agents.keys() | self._verdicts.keys()
        if self.woken.is_set() or known != alive_nodes().keys():
            self.woken.clear()
            self.ensure()

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
        with self._lock:
            agents = [agent for node, (agent, _) in self._agents.items() if node not in self._unheard]
        told = ray.put(lines)
        for agent in agents:
            agent.hear.remote(self.turn.epoch.number, number, told)

    def learn_secret(self) -> dict[NodeId, str]:
        """Have every agent ask which secret counts; gives what was wrong where one did not. Those are asked again."""
        with self._lock:
            asked = [(node, agent.learn_secret.remote()) for node, (agent, _) in self._agents.items()]
        missed = {}
        for node, _, error in replies(asked, CALL_TIMEOUT_S):
            if error is not None:
                self.turn.heard(error)
                missed[node] = reason_of(error)
        if missed:
            self.woken.set()
        return missed

    def _settle(self, node: NodeId, number: int) -> None:
        """An agent that has another secret than we: it missed a change, or we did."""
        agent = self._agents[node][0]
        try:
            if number > self._keys.number:
                self._keys.adopt(ray.get(agent.own_secret.remote(), timeout=CALL_TIMEOUT_S))
                self.woken.set()  # and the others are behind
            else:
                ray.get(agent.learn_secret.remote(), timeout=CALL_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            self.turn.heard(error)
            _log.warning("node %s has another secret than the cluster: %s", node[:12], reason_of(error))

    def _introduce(self, agents: Sequence[Any]) -> None:
        """Tell agents of nodes that are new to us what was prefetched before they came. Nobody waits for it."""
        names = self._store.names()
        for manifest in self._store.manifests():
            if (survey := self._store.get_survey(manifest.repo, manifest.variant)) is not None:
                told = ray.put([manifest.to_json()])
                for agent in agents:
                    agent.keep.remote(told, sorted(names.get(manifest.id, ())), survey)

    def _ask_agents(self, nodes: Mapping[NodeId, str], deadline: float) -> dict[NodeId, Exception]:
        """Note the agents of `nodes`, started where there was none; those that may yet come, with what was wrong."""
        problems: dict[NodeId, Exception] = {}
        began = time.time()
        met: list[NodeId] = []
        others: list[tuple[NodeId, int]] = []
        asked = [(node, agent, hello(agent)) for node in nodes for agent in [self._agent(node, nodes[node])]]
        for node, agent, reply in asked:
            try:
                told = heard(reply, max(1.0, deadline - time.monotonic()))
            except (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError) as error:
                if getattr(error, "actor_init_failed", False):
                    raise AgentUnavailable(node[:12], reason_of(error)) from error
                problems[node] = error  # its node is dead, or so new that the one that was asked has not heard of it
                with self._lock:
                    self._forget(node)
                continue
            except ray.exceptions.RayError as error:
                self.turn.heard(error)
                raise AgentUnavailable(node[:12], reason_of(error)) from error
            verdict = judged(agent, told, Clock.compared(began, float(told.get("clock", began)), time.time()))
            if verdict.reasons != self._verdicts.get(node, Verdict()).reasons:
                _log.warning("node %s: %s", node[:12], "; ".join(verdict.reasons) or "its versions agree again")
            with self._lock:
                self._verdicts[node] = verdict
                if verdict.refused is None:
                    if node not in self._agents:
                        self._unheard.add(node)
                    if node in self._unheard:
                        met.append(node)
                    self._agents[node] = (self.turn.command(agent), str(told["url"]))
                    if (number := int(told.get("secret", 0))) != self._keys.number and number:
                        others.append((node, number))
                else:
                    self._forget(node)
        self._meet(met)
        for node, number in others:
            self._settle(node, number)
        return problems

    def _meet(self, nodes: Sequence[NodeId]) -> None:
        """Let agents that are new to us hear of this epoch, and hear what those before it told them.

        One that does not answer is told nothing, and is asked again the next time. Raises StaleCoordinator.
        """
        with self._lock:
            self._unasked.update(nodes)
            asked = [(node, self._agents[node][0].told.remote()) for node in nodes]
        for node, lines, error in replies(asked, AGENT_TIMEOUT_S):
            if error is not None:
                self.turn.heard(error)
                continue
            if lines:
                self._learn(lines)
            with self._lock:
                self._unheard.discard(node)
            self.newcomers.set()

    def writers(self) -> tuple[str, ...]:
        """Versions of pyarrow that write the bytes that this process's would."""
        with self._lock:
            return tuple(sorted({one.of.pyarrow for one in self._verdicts.values() if one.works}))

    def notes(self) -> tuple[str, ...]:
        """What is wrong with the versions or the clock of a node, one line each."""
        with self._lock:
            return tuple(f"node {node[:12]}: {why}" for node, one in self._verdicts.items() for why in one.reasons)

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

    def handles(self) -> dict[NodeId, Any]:
        """The agents that there are; every call to one says this coordinator's epoch."""
        with self._lock:
            return {node: agent for node, (agent, _) in self._agents.items()}

    def answers(self, node: NodeId) -> bool:
        """True if the agent of a node answers now, or within a few seconds: then the node is there."""
        agent = self.handles().get(node)
        try:
            return agent is not None and bool(ray.get(agent.address.remote(), timeout=ANSWER_S))
        except ray.exceptions.RayError:
            return False

    def agent_url(self, node: NodeId) -> str | None:
        with self._lock:
            return self._agents[node][1] if node in self._agents else None


def agent_name(node: NodeId) -> str:
    return f"crucible-agent-{node}"
