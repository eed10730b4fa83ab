"""Work as Ray tasks: what a job's mind commands is sent to the node it named, and what became of it is told."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol, cast

import ray as untyped_ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crucible.cluster.again import again_here
from crucible.cluster.drive import as_crucible_error, may_pass
from crucible.cluster.flights import Flights
from crucible.cluster.given import Given
from crucible.cluster.place import successor
from crucible.cluster.track import CopyShard, RunItem
from crucible.cluster.turns import Turn
from crucible.errors import ClusterError, CrucibleError, StaleCoordinator
from crucible.failpoints import reach
from crucible.failure import first_line
from crucible.refs import NodeId, ShardInfo, WorkItem
from crucible.report import Counts, ItemResult
from crucible.workers.tasks import JobOptions, copy_shard_task, run_item_task

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns

NODES_EVERY_S = 1.0
SLOTS_PER_CPU = 2
"""One at work and one that waits for it to end. More could not be overtaken by what a reader needs now."""


Known = tuple[tuple[ShardInfo, ...], tuple[tuple[str, str], ...]]
"""Of an item what a manifest says: its shards, and their schemas by digest."""
NOTHING: Mapping[str, Known] = {}


class Owner(Protocol):
    """What an executor needs of the coordinator. Any method from any thread."""

    turn: Turn
    """Whose every task is."""

    flights: Flights[ItemResult]
    """The items of all jobs that are under way, by item key."""

    given: Given
    """What is under way, of all jobs, by its node."""

    drained: Collection[NodeId]
    """Nodes that get no new work."""

    def weights(self) -> dict[NodeId, float]: ...

    def locate(self, keys: Sequence[str]) -> dict[str, list[str]]: ...

    def where_done(self, item: WorkItem) -> NodeId | None: ...

    def where_held(self, keys: Sequence[str]) -> NodeId | None: ...

    def agent_url(self, node: NodeId) -> str | None: ...

    def answers(self, node: NodeId) -> bool: ...

    def landed(self, node: NodeId, shards: Mapping[str, int], item: str | None = None) -> None: ...


class RayExecutor:
    """Items and copies as Ray tasks, node-affine and soft: a node that is gone gives its work to another by itself."""

    def __init__(
        self, owner: Owner, options: JobOptions, job: str, limit: int | None, known: Mapping[str, Known] = NOTHING
    ) -> None:
        self._owner, self._job, self._known = owner, job, known
        self._options = replace(options, epoch=owner.turn.epoch)
        self._limit = limit
        self._weights = dict(sorted(owner.weights().items())[:limit])
        self._met = set(self._weights)
        """Nodes that were asked for their weight; one that has none, or is not fit, is not asked every second."""
        if not self._weights:
            raise ClusterError("no node of this Ray cluster has a running agent; see `crucible nodes`")
        self._looked_at = time.monotonic()
        self.slots = SLOTS_PER_CPU * most_cpus()
        """Items that a node is sent at a time."""

    def run(self, command: RunItem) -> Future[ItemResult]:
        """Start the item, or wait for the job that has started it. A node that has it done already is asked first."""

        self._owner.turn.check()
        if (found := self._held(command.item)) is not None:
            there_already: Future[ItemResult] = Future()
            there_already.set_result(found)
            return there_already

        spare = self._owner.agent_url(command.spare) if command.spare is not None else None

        def start() -> Future[ItemResult]:
            sent = Sent()

            def begin(node: NodeId) -> Future[ItemResult]:
                # soft: a node that Ray knows to be dead, or does not know yet, gives its work to another by itself
                there = NodeAffinitySchedulingStrategy(node, soft=True)
                call = run_item_task.options(scheduling_strategy=there, name=f"item {command.item.index}")

                def send() -> Future[ItemResult]:
                    self._owner.turn.check()
                    return sent.away(call.remote(command.item, self._options, self._job, spare))

                def still_there() -> bool:
                    return node not in self._owner.drained and self._owner.answers(node)

                return again_here(send, crashed, still_there)

            what = f"items of {command.item.repo.repo_id}"
            future = self._owner.given.give(what, lambda: self._place(command), begin, self._landed, sent.stop)
            reach("job.dispatched")
            return future

        def share(result: ItemResult) -> ItemResult:  # what it cost is in the report of the job that paid
            return replace(result, index=command.item.index, counts=Counts(), reused=True)

        return self._owner.flights.join(flight_of(command.item, self._options), start, share)

    def _held(self, item: WorkItem) -> ItemResult | None:
        """The item as a manifest has it, if its shards are all held, by whatever nodes: copies have no record of it."""
        shards, schemas = self._known.get(item.key, ((), ()))
        if not shards or (node := self._owner.where_held([shard.key for shard in shards])) is None:
            return None
        own = tuple(replace(shard, item=item.index) for shard in shards)
        return ItemResult(item.index, item.key, node, own, schemas, reused=True)

    def _place(self, command: RunItem) -> NodeId:
        """Where the item is done already; else the command's node, or another where that one is about to go. Its shards
        are counted where they were made."""
        done_at = self._owner.where_done(command.item)
        if done_at is not None and done_at in self._weights:
            return done_at
        drained = self._owner.drained
        if command.node not in drained:
            return command.node
        others = {node: weight for node, weight in self._weights.items() if node not in drained}
        return (successor(command.item, others, command.node) if others else None) or command.node

    def copy(self, command: CopyShard) -> Future[Counts]:
        self._owner.turn.check()
        there = NodeAffinitySchedulingStrategy(command.node, soft=False)
        urls = tuple(self._owner.locate([command.shard.key])[command.shard.key])
        call = copy_shard_task.options(scheduling_strategy=there, name=f"copy {command.shard.key[:12]}")
        sent = Sent()

        def choose() -> NodeId:
            check_stays(command.node, self._owner.drained)
            return command.node

        def begin(_: NodeId) -> Future[Counts]:
            return sent.away(call.remote(command.shard, urls, self._options))

        def landed(_: Counts) -> None:
            self._owner.landed(command.node, {command.shard.key: command.shard.size})

        try:
            future = self._owner.given.give("copies for a job", choose, begin, landed, sent.stop)
        except ClusterError as error:
            refused: Future[Counts] = Future()
            refused.set_exception(error)
            return refused
        reach("job.copying")
        return future

    def nodes(self) -> Mapping[NodeId, float]:
        """The nodes this job began with, less those that have died since, and those that joined and have an agent; of
        these no more than the job was given. Raises StaleCoordinator."""
        self._owner.turn.check()
        if time.monotonic() - self._looked_at >= NODES_EVERY_S:
            alive = alive_nodes()
            self._owner.given.look(alive)
            weights = {node: weight for node, weight in self._weights.items() if node in alive}
            self._met &= alive.keys()
            joined = {node for node in alive.keys() - self._met if self._owner.agent_url(node) is not None}
            if joined and (self._limit is None or len(weights) < self._limit):
                self._met |= joined
                found = sorted((node, weight) for node, weight in self._owner.weights().items() if node in joined)
                weights |= found[: None if self._limit is None else self._limit - len(weights)]
            self._weights = weights
            self._looked_at = time.monotonic()
        return self._weights

    def as_error(self, error: BaseException, what: str) -> tuple[CrucibleError, bool]:
        """A task's own error is judged by its type; a task that Ray lost (worker, node, memory) may pass elsewhere."""
        if isinstance(error, ray.exceptions.RayTaskError):
            typed = as_crucible_error(cast("Any", error).cause, what)
            if isinstance(typed, StaleCoordinator):
                self._owner.turn.end(typed)  # for all jobs, at once
            return typed, may_pass(typed)
        return ClusterError(f"{what}: {reason_of(error)}"), True

    def _landed(self, result: ItemResult) -> None:
        reach("job.done")
        self._owner.landed(result.node, {shard.key: shard.size for shard in result.shards}, result.key)


class Sent:
    """A task that was sent, maybe again, and can be ended where it runs."""

    def __init__(self) -> None:
        self._call: Any = None

    def away(self, call: Any) -> Future[Any]:
        """What the task that was just sent ends with."""
        self._call = call
        return cast("Future[Any]", call.future())

    def stop(self) -> None:
        """Kill the process that it runs in: what that has not finished is nowhere to be seen."""
        if self._call is not None:
            ray.cancel(self._call, force=True)


def flight_of(item: WorkItem, options: JobOptions) -> str:
    """What names work that makes the same: a job that keeps the source files is not helped by one that does not."""
    return f"{item.key} {options.keep_raw}"


def check_stays(node: NodeId, drained: Collection[NodeId]) -> None:
    """Raise ClusterError for a node that is about to go."""
    if node in drained:
        raise ClusterError(f"node {node[:12]} is drained and gets nothing new")


def crashed(error: BaseException) -> bool:
    """True where a task's process died: killed, or by a fault of its own. One that took too much memory says so."""
    return isinstance(error, ray.exceptions.WorkerCrashedError)


def alive_nodes() -> dict[NodeId, str]:
    """node -> its address, for every node Ray knows to be alive."""
    return {NodeId(n["NodeID"]): str(n["NodeManagerAddress"]) for n in ray.nodes() if n["Alive"]}


def most_cpus() -> int:
    """CPUs of the node that has most of them: none then waits for work."""
    return max([1, *(int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"])])


def reason_of(error: BaseException) -> str:
    """The first line of what Ray says; the rest is its own traceback."""
    return first_line(error)


def last_words(error: BaseException) -> str:
    """The last line of what Ray says of a process that could not start: its own error, after Ray's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
