"""The coordinator: one Ray actor a cluster. Resolves, drives jobs, keeps the catalog, knows the agents. The room's I/O.

It decides nothing itself: `track.apply` does, and `drive.run_job` performs it over a `RayExecutor`. A job runs in a
thread of its own; every method answers while jobs run.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray as untyped_ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crucible.cache.store import Store
from crucible.cluster.catalog import Catalog
from crucible.cluster.drive import as_crucible_error, cached_report, run_job
from crucible.cluster.early import early_manifests
from crucible.cluster.executor import RayExecutor, alive_nodes, reason_of
from crucible.cluster.flights import Flights
from crucible.cluster.jobs import Job, Jobs
from crucible.cluster.prepare import Prepared, prepare, remember
from crucible.cluster.readers import Answer
from crucible.config import Settings, node_settings
from crucible.errors import AgentUnavailable, ClusterError, CrucibleError
from crucible.manifest import Manifest
from crucible.refs import DataRequest, NodeId, ShardInfo, WorkItem
from crucible.report import ItemResult, JobReport, Progress, Tally
from crucible.workers.daemon import Agent
from crucible.workers.governing import cluster_governor
from crucible.workers.secret import ensure_secret, take_token
from crucible.workers.tasks import (
    COORDINATOR,
    NAMESPACE,
    JobOptions,
    this_node,
)

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns

AGENT_TIMEOUT_S = 60.0
"""For an agent to start: an actor takes about a second here, a cold node with a slow disk much longer."""
CALL_TIMEOUT_S = 10.0
RETRY_S = 0.2
COORDINATOR_WAIT_S = 180.0
"""For a coordinator that answers. Ray takes up to half a minute to notice that a node is dead, and as long keeps giving
out the actor that died with it."""


class CoordinatorCore:
    """What the actor is. Soft state only: the nodes' stores are the truth, and a new coordinator asks them.

    `embedded` says that this Ray is this process's own: agents then listen on the loopback address only.
    """

    def __init__(self, embedded: bool) -> None:
        self._embedded = embedded
        self._store = Store(node_settings().home)
        self._secret = ensure_secret(self._store)
        self._catalog = Catalog()
        self._items = Catalog()
        self._agents: dict[NodeId, tuple[Any, str]] = {}
        self._jobs = Jobs()
        self._lock = threading.RLock()
        self._asking = threading.Lock()
        """Held by whoever starts agents or asks all of them: one at a time, and `_lock` stays free meanwhile."""
        self._news: list[tuple[NodeId, Sequence[str], str | None]] | None = None
        """What landed while the stores were being asked; None when nobody asks."""
        self.flights: Flights[ItemResult] = Flights()

    # --- what agents and tasks ask

    def answers(self) -> bool:
        """True, from a coordinator that is there."""
        return True

    def secret(self) -> str:
        return self._secret

    def credential(self, job: str) -> str | None:
        """The Hub token of one job, for a node that has none of its own. Another job, to another Hub, never sees it."""
        token = record.token if (record := self._jobs.get(job)) is not None else None
        return str(token) if token else None

    def arrived(self, job: str, size: int) -> None:
        self._jobs.arrived(job, size)

    def made(self, job: str, node: NodeId, item: str, shard: ShardInfo) -> None:
        """A shard is visible on a node, though its item is not done."""
        self.landed(node, [shard.key])
        if (record := self._jobs.get(job)) is not None:
            record.readers.made(item, shard)

    def opening(self, request: DataRequest, endpoint: str) -> Answer:
        """What a reader of `request` may begin with; see `readers`."""
        return self._jobs.opening(request, endpoint)

    def wish(self, job: str, keys: Sequence[str]) -> Answer:
        """Items that a reader of `job` needs next, and what is made of them; see `readers`."""
        record = self._jobs.get(job)
        return {"state": "unknown"} if record is None else record.readers.wish(keys)

    def locate(self, keys: Sequence[str]) -> dict[str, list[str]]:
        """shard key -> urls of agents that hold it."""
        with self._lock:
            return {
                key: [self._agents[node][1] for node in sorted(self._catalog.holders(key)) if node in self._agents]
                for key in keys
            }

    # --- agents

    def ensure_agents(self) -> None:
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
        asked = [(node, agent, agent.address.remote()) for node in nodes for agent in [self._agent(node, nodes[node])]]
        for node, agent, reply in asked:
            try:
                url = ray.get(reply, timeout=max(1.0, deadline - time.monotonic()))
            except (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError) as error:
                if getattr(error, "actor_init_failed", False):
                    raise AgentUnavailable(node[:12], reason_of(error)) from error
                problems[node] = error  # its node is dead, or so new that the one that was asked has not heard of it
                with self._lock:
                    self._forget(node)
                continue
            except ray.exceptions.RayError as error:
                raise AgentUnavailable(node[:12], reason_of(error)) from error
            with self._lock:
                self._agents[node] = (agent, url)
        return problems

    def _forget(self, node: NodeId) -> None:
        self._agents.pop(node, None)
        self._catalog.drop(node)
        self._items.drop(node)

    def rebuild_catalog(self) -> None:
        """Ask every store what it holds. A node that does not answer in time keeps what was believed of it."""
        with self._asking:
            with self._lock:
                asked = [(node, agent.report.remote()) for node, (agent, _) in self._agents.items()]
                self._news = []
            reports = {}
            for node, reply in asked:
                with suppress(ray.exceptions.RayError):
                    reports[node] = ray.get(reply, timeout=AGENT_TIMEOUT_S)
            with self._lock:
                for node, (shards, items) in reports.items():
                    self._catalog.replace(node, shards)
                    self._items.replace(node, items)
                news, self._news = self._news, None
                for node, keys, item in news:  # a store that was asked before it landed did not know of it
                    self.landed(node, keys, item)

    def _agent(self, node: NodeId, host: str) -> Any:
        if node in self._agents:
            return self._agents[node][0]
        return Agent.options(
            name=agent_name(node),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            memory=1,  # see `start_coordinator`
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote("127.0.0.1" if self._embedded else host)

    def nodes(self) -> list[dict[str, object]]:
        """One entry a node: its agent's status, or why there is none."""
        self.ensure_agents()
        asked = [(node, agent.status.remote()) for node, (agent, _) in sorted(self._agents.items())]
        found = []
        for node, reply in asked:
            try:
                found.append({**ray.get(reply, timeout=CALL_TIMEOUT_S), "alive": True})
            except ray.exceptions.RayError as error:
                found.append({"node": node, "alive": False, "problem": reason_of(error)})
        return found

    # --- jobs

    def submit(
        self,
        job: str,
        request: DataRequest,
        options: JobOptions,
        replicas: int,
        nodes: int | None,
        token_file: str | None,
    ) -> None:
        """Start a job, if it is not known. Ask `progress` how far it is, and `result` how it ended."""
        token = take_token(token_file) or options.on_this_node().token
        record = self._jobs.add(job, request, options.endpoint, token)
        if record is None:
            return
        work = threading.Thread(
            target=self._run, args=(job, record, request, options, replicas, nodes), name=f"job-{job}", daemon=True
        )
        work.start()

    def progress(self, job: str) -> Progress:
        """How far a job is, and how much longer the Hub wants it to wait."""
        return self._jobs.progress(job)

    def result(self, job: str, wait_s: float) -> JobReport | CrucibleError | None:
        """The report, the error it failed with (returned, so that its type survives), or None while it runs."""
        record = self._jobs[job]
        if not record.ended.wait(wait_s):
            return None
        return record.report or record.error

    def jobs(self) -> list[tuple[DataRequest, Progress, str]]:
        """(request, progress, error text) of every job of this coordinator, oldest first."""
        return self._jobs.listing()

    def _run(
        self, job: str, record: Job, request: DataRequest, options: JobOptions, replicas: int, nodes: int | None
    ) -> None:
        began = time.monotonic()
        try:
            settings = replace(options.on_this_node(), token=record.token)
            governor = record.governor = cluster_governor(settings)
            tally = Tally()
            prepared = prepare(request, settings, self._store, tally, governor=governor)
            self._begin_readers(record, prepared, settings)
            self.ensure_agents()
            self.rebuild_catalog()
            if prepared.cached and self._all_held(prepared.manifests, replicas):
                self._share(prepared, prepared.manifests)
                record.readers.finish(prepared.manifests)
                record.report = cached_report(job, prepared, tally.counts, time.monotonic() - began)
                record.progress = Progress(job, "finished")
                return
            if prepared.cached:  # the manifest is known but shards of it are gone: make them again
                prepared = prepare(request, settings, self._store, tally, again=True, governor=governor)
                self._begin_readers(record, prepared, settings)
            executor = RayExecutor(self, options, job, nodes)
            manifests, report = run_job(
                job,
                prepared,
                executor,
                limit_bytes=options.inflight_bytes,
                replicas=replicas,
                # source files that stay in a Hub cache do not pass through the store, where a spare keeps its ranges
                part_bytes=None if options.keep_raw else options.part_bytes,
                prefer=self.where_done,
                observe=lambda progress: setattr(record, "progress", progress),
                arrived=lambda: record.arrived,
                slots=executor.slots,
                wishes=record.readers.wishes,
                done=record.readers.done,
                offset_s=time.monotonic() - began,
                metadata=tally.counts,
            )
            self._share(prepared, manifests)
            record.readers.finish(manifests)
            record.report = report
        except Exception as error:  # noqa: BLE001 - whatever ends a job must reach the one who waits for it
            record.error = as_crucible_error(error, f"job {job}")
            if record.error is not error:
                traceback.print_exc()
            record.progress = replace(record.progress, phase="failed")
        finally:
            self._jobs.ended(record)

    def _begin_readers(self, record: Job, prepared: Prepared, settings: Settings) -> None:
        record.readers.begin(
            prepared, lambda: early_manifests(prepared, settings, self._store, Tally(), governor=record.governor)
        )

    def _all_held(self, manifests: Sequence[Manifest], replicas: int) -> bool:
        with self._lock:
            wanted = min(replicas, len(self._agents))
            return all(len(self._catalog.holders(s.key)) >= wanted for m in manifests for s in m.shards)

    def _share(self, prepared: Prepared, manifests: Sequence[Manifest]) -> None:
        """Give every node the manifests. A node that cannot take them now asks its agent, or the Hub, later."""
        remember(prepared, tuple(manifests), self._store)
        data = [manifest.to_json() for manifest in manifests]
        with self._lock:
            agents = [agent for agent, _ in self._agents.values()]
        calls = [agent.keep.remote(data, prepared.revisions, dict(prepared.survey)) for agent in agents]
        ray.wait(calls, num_returns=len(calls), timeout=AGENT_TIMEOUT_S)

    def where_done(self, item: WorkItem) -> NodeId | None:
        """A node whose store has this item in full: doing it there moves nothing."""
        with self._lock:
            return min(self._items.holders(item.key) & self._agents.keys(), default=None)

    def landed(self, node: NodeId, shards: Sequence[str], item: str | None = None) -> None:
        """Shards that have just become visible on a node, and the item that they complete."""
        with self._lock:
            if self._news is not None:
                self._news.append((node, shards, item))
            self._catalog.add(node, shards)
            if item is not None:
                self._items.add(node, [item])

    def agent_url(self, node: NodeId) -> str | None:
        with self._lock:
            return self._agents[node][1] if node in self._agents else None

    def weights(self) -> dict[NodeId, float]:
        """node -> free bytes of its store, to a power of two: so coarse that placement does not flutter."""
        with self._lock:
            asked = [(node, agent.weight.remote()) for node, (agent, _) in self._agents.items()]
        weights: dict[NodeId, float] = {}
        for node, reply in asked:
            try:
                free = float(ray.get(reply, timeout=CALL_TIMEOUT_S))
                weights[node] = 2.0 ** math.floor(math.log2(max(free, 1.0)))
            except ray.exceptions.RayError:
                continue  # no agent, no store: nothing can be born there
        return weights


Coordinator: Any = ray.remote(num_cpus=0, max_concurrency=32)(CoordinatorCore)


def agent_name(node: NodeId) -> str:
    return f"crucible-agent-{node}"


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

    Raises ClusterError when none answers for `wait_s` seconds.
    """
    deadline = time.monotonic() + wait_s
    while True:
        coordinator = start_coordinator(embedded=embedded)
        try:
            ray.get(coordinator.answers.remote(), timeout=max(1.0, deadline - time.monotonic()))
            return coordinator
        except (
            ray.exceptions.RayActorError,
            ray.exceptions.ActorUnschedulableError,
            ray.exceptions.GetTimeoutError,
        ) as error:
            if getattr(error, "actor_init_failed", False) or time.monotonic() > deadline:
                raise ClusterError(f"no coordinator answers on this Ray cluster: {reason_of(error)}") from error
            time.sleep(RETRY_S)
