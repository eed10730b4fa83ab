"""One Ray actor a cluster: the door to `agents`, which knows the nodes, and `running`, which does jobs.

It decides nothing itself: `track.apply` does, and `drive.run_job` performs it over a `RayExecutor`. A job runs in a
thread of its own; every method answers while jobs run.

It may be killed at any moment. What was asked of it is in its journal (`logbook`), and with every agent; what is done
is in the stores. Ray starts it again, or the next driver does, and it goes on with what had not ended. Each life has an
epoch (`turns`): one that has been replaced is refused everywhere, and stops.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray as untyped_ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crucible.cache.store import Store
from crucible.cluster.admin import Admin
from crucible.cluster.agents import Agents
from crucible.cluster.care import Care
from crucible.cluster.executor import last_words, reason_of
from crucible.cluster.greeting import check_versions
from crucible.cluster.jobs import Jobs
from crucible.cluster.keys import Keys
from crucible.cluster.known import Orders
from crucible.cluster.logbook import Logbook
from crucible.cluster.prepare import Prepared
from crucible.cluster.readers import Answer
from crucible.cluster.remembering import Memory
from crucible.cluster.roster import RETRY_S
from crucible.cluster.running import Runner
from crucible.cluster.turns import Turn, is_first, take_epoch
from crucible.config import node_settings
from crucible.errors import ClusterError, CrucibleError, DiskFull, StaleCoordinator
from crucible.failpoints import reach
from crucible.manifest import manifest_from_json
from crucible.refs import DataRequest, NodeId, ShardInfo
from crucible.report import JobReport, Progress
from crucible.versions import versions_here
from crucible.workers.secret import News, take_token
from crucible.workers.tasks import (
    COORDINATOR,
    NAMESPACE,
    JobOptions,
    session_name,
    this_node,
)
from crucible.workers.tls import offer

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns
log = logging.getLogger("crucible.coordinator")

COORDINATOR_WAIT_S = 180.0
"""For a coordinator that answers. Ray takes up to half a minute to notice that a node is dead, and as long keeps giving
out the actor that died with it."""
KNOWN_WAIT_S = 60.0
"""For a coordinator that has just begun to hear what the agents know: as long as agents have to start."""
WATCH_S = 2.0
"""How long it may take until a node that came or went is noticed, beyond what Ray takes."""
FAREWELL_S = 3.0
"""Time for drivers to hear that they have to ask another coordinator."""


class CoordinatorCore:
    """What the actor is. The nodes' stores are the truth, and a new coordinator asks them.

    `embedded` says that this Ray is this process's own: agents then listen on the loopback address only.
    """

    def __init__(self, embedded: bool) -> None:
        self._embedded = embedded
        self._store = Store(node_settings().home)
        self._keys = Keys(self._store)
        self._logbook = Logbook(self._store, session_name(), embedded=embedded)
        epoch = take_epoch(self._logbook.highest + 1)
        try:
            self._logbook.begin(epoch)
        except DiskFull as error:  # who makes room asks a coordinator
            log.warning("no journal, so no new jobs, until there is room: %s", error)
        reach("coordinator.claimed")
        self._agents = Agents(self._store, Turn(epoch), self._learn, self._keys, embedded=embedded)
        self._jobs = Jobs()
        self._memory = Memory(self._logbook, self._agents, self._jobs, embedded=embedded)
        orders = Orders(self._logbook, self._memory.tell)
        self._care = Care(self._store, self._agents, orders, epoch.cluster, node_settings(), first=is_first(epoch))
        self._admin = Admin(self._care)
        self._memory.runner = Runner(self._store, self._agents, self._memory.note, self._care)
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        threading.Thread(target=self._listen, name="listen", daemon=True).start()

    # --- what agents and tasks ask

    def hello(self) -> dict[str, Any]:
        """This process's versions, plain: whoever asks may be of another one."""
        return versions_here().told()

    def answers(self) -> bool:
        """True, from a coordinator that is there. Raises StaleCoordinator from one that has been replaced."""
        self._agents.turn.check()
        return True

    def secret(self) -> News:
        """For agents: the secret that counts now, and one that is about to."""
        return self._keys.news()

    def rotate_secret(self, overlap_s: float) -> dict[str, Any]:
        """Change the cluster's secret; the old one is accepted for `overlap_s` seconds more. See `Keys.turn`."""
        self._agents.turn.check()
        return self._keys.turn(overlap_s, self._agents.learn_secret)

    def authority(self) -> dict[str, bytes] | None:
        """For agents: whose certificates this cluster believes; None where it speaks plain HTTP. See `workers.tls`."""
        return offer(node_settings())

    def credential(self, job: str) -> str | None:
        """The Hub token of one job, for a node that has none of its own. Another job, to another Hub, never sees it."""
        token = record.token if (record := self._jobs.get(job)) is not None else None
        return str(token) if token else None

    def arrived(self, job: str, size: int) -> None:
        self._jobs.arrived(job, size)

    def made(self, job: str, node: NodeId, item: str, shard: ShardInfo) -> None:
        """A shard is visible on a node, though its item is not done."""
        self._agents.landed(node, {shard.key: shard.size})
        if (record := self._jobs.get(job)) is not None:
            record.readers.made(item, shard)

    def opening(self, request: DataRequest, endpoint: str) -> Answer:
        """What a reader of `request` may begin with; see `readers`."""
        if self._agents.turn.cut_off():
            return {"state": "none"}
        return self._jobs.opening(request, endpoint)

    def wish(self, job: str, keys: Sequence[str]) -> Answer:
        """Items that a reader of `job` needs next, and what is made of them; see `readers`."""
        record = self._jobs.get(job)
        lost = record is None or self._agents.turn.cut_off()  # what was promised may never come
        return {"state": "unknown"} if lost or record is None else record.readers.wish(keys)

    def locate(self, keys: Sequence[str]) -> dict[str, list[str]]:
        """shard key -> urls of agents that hold it."""
        return self._agents.locate(keys)

    def nodes(self) -> list[dict[str, Any]]:
        """One entry a node: its agent's status, or why there is none."""
        return self._admin.nodes()

    def may_drop(self, node: NodeId, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that the node may remove from its store: see `promises`. It has two minutes to do so."""
        self._agents.turn.check()
        return self._care.may_drop(node, keys)

    def care(self, what: str, *arguments: Any, **named: Any) -> Any:
        """Do or tell what the upkeep of the cluster needs: a method of `Care` or `Admin`."""
        self._agents.turn.check()
        return self._admin.do(what, *arguments, **named)

    def adopt(self, request: DataRequest, survey: dict[str, Any], manifests: Sequence[bytes]) -> None:
        """Let every node know what an import brought into the store of one of them."""
        made = tuple(manifest_from_json(data) for data in manifests)
        self._agents.ensure()
        self._agents.share(Prepared(request, made[0].repo, made[0].config, (), (), made, survey), made)
        self._agents.rebuild()

    def registered(self, node: NodeId, url: str) -> None:
        """An agent has started, maybe again: on another port."""
        self._agents.registered(node, url)

    # --- jobs

    def submit(
        self,
        job: str,
        request: DataRequest,
        options: JobOptions,
        replicas: int,
        nodes: int | None,
        token_file: str | None,
        again: bool = False,
    ) -> None:
        """Start a job, if it is not known. Ask `progress` how far it is, and `result` how it ended.

        `again` says that another coordinator may have known it: then this one first hears all that those were asked.
        Raises StaleCoordinator, and a StoreError where the journal cannot be written: nothing is begun then.
        """
        token = take_token(token_file) or options.on_this_node().token
        if again:
            self._memory.known.wait(KNOWN_WAIT_S)
        self._agents.turn.check()
        self._memory.accept(job, request, options, replicas, nodes, token)

    def progress(self, job: str) -> Progress:
        """How far a job is, and how much longer the Hub wants it to wait."""
        return self._jobs.progress(job)

    def result(self, job: str, wait_s: float) -> JobReport | CrucibleError | None:
        """The report, the error it failed with (returned, so that its type survives), or None while it runs."""
        return self._memory.outcome(job, wait_s)

    def jobs(self) -> list[dict[str, Any]]:
        """Every job that is remembered, also those of coordinators before this one, oldest first: see `remembered`."""
        return self._memory.history()

    def _learn(self, lines: bytes) -> None:
        self._memory.learn(lines)

    def _watch(self) -> None:
        """Hear what was told to the agents, go on with it, and then notice what comes and goes, with a job or without.

        Ends when another coordinator has taken over.
        """
        turn = self._agents.turn
        while not turn.over.is_set():
            seen = self._try(turn.look) and self._try(self._agents.refresh)
            if not self._memory.known.is_set() and not turn.over.is_set():
                reach("coordinator.recovering")  # also where a node does not answer: what it knows is learned later
                self._try(self._memory.resume)
            if self._agents.newcomers.is_set():
                self._agents.newcomers.clear()
                self._try(self._memory.tell)
            self._try(lambda: self._care.look(alone=self._embedded))
            if not seen:
                turn.over.wait(WATCH_S)
                self._agents.woken.set()
            self._agents.woken.wait(WATCH_S)
        turn.over.wait()
        time.sleep(FAREWELL_S)
        leave()

    def _listen(self) -> None:
        """Know how long ago Ray's head answered, while `_watch` may wait for a node: see `Turn.cut_off`."""
        turn = self._agents.turn
        while not turn.over.is_set():
            with suppress(Exception):
                turn.look()
            turn.over.wait(WATCH_S)

    def _try(self, what: Callable[[], None]) -> bool:
        """Do it, and say whether it went well: whoever watches goes on, whatever happens."""
        try:
            what()
        except StaleCoordinator as error:
            log.warning("%s", error)
            return False
        except Exception:
            log.warning("could not look after the nodes; trying again", exc_info=True)
            return False
        return True


Coordinator: Any = ray.remote(num_cpus=0, max_concurrency=32, max_restarts=-1)(CoordinatorCore)


def leave() -> None:
    """End this actor, for good: its name is then free for the one that has taken over."""
    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def start_coordinator(*, embedded: bool) -> Any:
    """The cluster's coordinator, started on this node if there is none. It may have died with a node: see `reach`."""
    return Coordinator.options(
        name=COORDINATOR,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        # a byte, because Ray lets this node place an actor that needs anything, and a random one any other. Just after
        # the start a random node may not have heard of this one, and keeps the actor, to die with it (Ray 2.60)
        memory=1,
        scheduling_strategy=NodeAffinitySchedulingStrategy(this_node(), soft=True),
    ).remote(embedded)


def reach_coordinator(*, embedded: bool, wait_s: float = COORDINATOR_WAIT_S) -> Any:
    """A coordinator that answers. Waits until Ray has noticed the death of one that does not, and starts another.

    Ray starts one that died where it was; if it cannot live there any more, the next is started on this node. Raises
    ClusterError when that one cannot either, or none answers for `wait_s` seconds.
    """
    deadline = time.monotonic() + wait_s
    stillborn: set[Any] = set()
    while True:
        coordinator = start_coordinator(embedded=embedded)
        try:
            ray.get(coordinator.answers.remote(), timeout=max(1.0, deadline - time.monotonic()))
            check_versions(coordinator, max(1.0, deadline - time.monotonic()))
            return coordinator
        except (
            ray.exceptions.RayActorError,
            ray.exceptions.ActorUnschedulableError,
            ray.exceptions.GetTimeoutError,
            StaleCoordinator,
        ) as error:
            if getattr(error, "actor_init_failed", False):
                stillborn.add(coordinator._actor_id)
            if len(stillborn) > 1 or time.monotonic() > deadline:
                reason = last_words(error) if stillborn else reason_of(error)
                raise ClusterError(f"no coordinator answers on this Ray cluster: {reason}") from error
            time.sleep(RETRY_S)
