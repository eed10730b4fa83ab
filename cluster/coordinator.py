"""One Ray actor a cluster: the door to `agents`, which knows the nodes, and `running`, which does jobs.

It decides nothing itself: `track.apply` does, and `drive.run_job` performs it over a `RayExecutor`. A job runs in a
thread of its own; every method answers while jobs run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import ray as untyped_ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crucible.cache.store import Store
from crucible.cluster.agents import RETRY_S, Agents
from crucible.cluster.executor import reason_of
from crucible.cluster.jobs import Job, Jobs
from crucible.cluster.readers import Answer
from crucible.cluster.running import Runner
from crucible.config import node_settings
from crucible.errors import ClusterError, CrucibleError
from crucible.refs import DataRequest, NodeId, ShardInfo
from crucible.report import JobReport, Progress
from crucible.workers.secret import ensure_secret, take_token
from crucible.workers.tasks import (
    COORDINATOR,
    NAMESPACE,
    JobOptions,
    this_node,
)

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns

COORDINATOR_WAIT_S = 180.0
"""For a coordinator that answers. Ray takes up to half a minute to notice that a node is dead, and as long keeps giving
out the actor that died with it."""


class CoordinatorCore:
    """What the actor is. Soft state only: the nodes' stores are the truth, and a new coordinator asks them.

    `embedded` says that this Ray is this process's own: agents then listen on the loopback address only.
    """

    def __init__(self, embedded: bool) -> None:
        self._store = Store(node_settings().home)
        self._secret = ensure_secret(self._store)
        self._agents = Agents(self._store, embedded=embedded)
        self._runner = Runner(self._store, self._agents)
        self._jobs = Jobs()

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
        self._agents.landed(node, {shard.key: shard.size})
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
        return self._agents.locate(keys)

    def nodes(self) -> list[dict[str, object]]:
        """One entry a node: its agent's status, or why there is none."""
        return self._agents.statuses()

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
        try:
            self._runner.run(job, record, request, options, replicas, nodes)
        finally:
            self._jobs.ended(record)


Coordinator: Any = ray.remote(num_cpus=0, max_concurrency=32)(CoordinatorCore)


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
