"""What performs upkeep: Ray tasks on the nodes and calls to their agents. No decision."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import ray as untyped_ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crucible.cluster.agents import Agents
from crucible.cluster.executor import Sent, check_stays, flight_of, reason_of
from crucible.cluster.operation import Recipe
from crucible.cluster.remembered import options_of
from crucible.config import Settings
from crucible.errors import AgentUnavailable
from crucible.refs import NodeId, ShardInfo
from crucible.report import Counts, ItemResult
from crucible.workers.replicas import bring_items_task, copy_shards_task
from crucible.workers.tasks import JobOptions, run_item_task

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns
T = TypeVar("T")
ASK_S = 10.0
OTHER_BYTES = "made again it has other bytes (another pyarrow than the one that made it?)"


class RayHands:
    """See `operation.Hands`. Concurrency: any method from any thread."""

    def __init__(self, agents: Agents, settings: Settings) -> None:
        self._agents, self._settings = agents, settings

    def reached(self) -> Collection[NodeId]:
        return self._agents.handles().keys()

    def copy(self, node: NodeId, shards: Sequence[ShardInfo]) -> Future[dict[str, str]]:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        wanted = [(shard, self._urls(node, shard.key)) for shard in shards]
        call = copy_shards_task.options(scheduling_strategy=there, name=f"copy {len(wanted)} shards")
        options = self._options(JobOptions.of(self._settings))

        def landed(result: tuple[dict[str, str], Counts]) -> None:
            came = {shard.key: shard.size for shard in shards if shard.key not in result[0]}
            self._agents.landed(node, came)

        return _then(self._give(node, lambda: call.remote(wanted, options), landed), lambda result: result[0])

    def bring(self, node: NodeId, items: Sequence[ItemResult]) -> Future[dict[str, str]]:
        """Have a node bring all shards of items that others have done, and the records of these: it has done them
        then."""
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        wanted = [(item, [self._urls(node, shard.key) for shard in item.shards]) for item in items]
        call = bring_items_task.options(scheduling_strategy=there, name=f"bring {len(wanted)} items")
        options = self._options(JobOptions.of(self._settings))

        def landed(result: tuple[dict[str, str], Counts]) -> None:
            for item in items:
                came = {shard.key: shard.size for shard in item.shards if shard.key not in result[0]}
                self._agents.landed(node, came, item.key if len(came) == len(item.shards) else None)

        return _then(self._give(node, lambda: call.remote(wanted, options), landed), lambda result: result[0])

    def remake(self, node: NodeId, recipe: Recipe) -> Future[dict[str, str]]:
        """Have the shards of an item made again; by the job that is at it already, where there is one."""
        if self._agents.where_held(list(recipe.promised)) is not None:  # made since this was planned
            there_already: Future[dict[str, str]] = Future()
            there_already.set_result({})
            return there_already
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        order = recipe.order
        told = {"options": dict(order.options or {})}
        options = self._options(replace(options_of(told, self._settings), pyarrow=self._agents.writers()))
        call = run_item_task.options(scheduling_strategy=there, name=f"again {recipe.item.index}")

        def wrong(result: ItemResult) -> list[str]:
            made = {shard.key: shard.digest for shard in result.shards}
            return [key for key, digest in recipe.promised.items() if made.get(key) != digest]

        def landed(result: ItemResult) -> None:
            bad = wrong(result)
            good = {shard.key: shard.size for shard in result.shards if shard.key not in bad}
            self._agents.landed(result.node, good, None if bad else result.key)
            if spoilt := [shard.key for shard in result.shards if shard.key in bad]:
                # elsewhere: this is the thread of Ray's that told us, and an answer may need it
                aside = partial(self.ask, "set_aside", spoilt, nodes=[result.node])
                threading.Thread(target=aside, name="crucible-aside", daemon=True).start()

        def start() -> Future[ItemResult]:
            def send() -> Any:
                return call.remote(recipe.item, options, order.job, None, dict(recipe.promised))

            return self._give(node, send, landed)

        # what a job made otherwise is right for that job
        made = self._agents.flights.join(flight_of(recipe.item, options), start, lambda result: result)
        return _then(made, lambda result: dict.fromkeys(wrong(result), OTHER_BYTES))

    def _give(self, node: NodeId, send: Callable[[], Any], landed: Callable[[Any], None]) -> Future[Any]:
        """What a task on that node ends with. Raises ClusterError for a node that is about to go."""
        sent = Sent()

        def choose() -> NodeId:
            check_stays(node, self._agents.drained)
            return node

        return self._agents.given.give("upkeep", choose, lambda _: sent.away(send()), landed, sent.stop)

    def _urls(self, node: NodeId, key: str) -> tuple[str, ...]:
        """Where the node may have a shard from."""
        own = self._agents.agent_url(node)
        return tuple(url for url in self._agents.locate([key])[key] if url != own)

    def drop(self, node: NodeId, keys: Sequence[str]) -> Future[dict[str, str]]:
        agent = self._agent(node)

        def dropped(freed: Mapping[str, int]) -> dict[str, str]:
            self._agents.dropped(node, list(freed))
            return {key: "" for key in keys if key not in freed}

        return _then(agent.evict.remote(list(keys), 0, False).future(), dropped)

    def verify(
        self, node: NodeId, keys: Sequence[str] | None, deep: bool, found: Callable[[list[dict[str, Any]]], None]
    ) -> Future[dict[str, str]]:
        """Have a node look at its shards. `found` is told what is wrong, as `scrub` says it."""

        def told(findings: list[dict[str, Any]]) -> dict[str, str]:
            found([{"node": node, **finding} for finding in findings])
            return {}

        asked = None if keys is None else list(keys)
        return _then(self._agent(node).verify.remote(asked, deep).future(), told)

    def ask(
        self, method: str, *arguments: Any, nodes: Collection[NodeId] | None = None, wait_s: float = ASK_S
    ) -> tuple[dict[NodeId, Any], dict[NodeId, str]]:
        """Ask the agents of `nodes`, or all, at once: (answers, why there is none). Waits `wait_s` for all together."""
        there = self._agents.urls()
        return self.ask_each(
            method, {node: arguments for node in there if nodes is None or node in nodes}, wait_s=wait_s
        )

    def ask_each(
        self, method: str, arguments: Mapping[NodeId, Sequence[Any]], *, wait_s: float = ASK_S
    ) -> tuple[dict[NodeId, Any], dict[NodeId, str]]:
        """As `ask`, with arguments for each node that is asked. Of silent ones it is known why there is no answer."""
        asked = {
            node: getattr(agent, method).remote(*arguments[node])
            for node, agent in self._agents.handles().items()
            if node in arguments
        }
        problems = {node: why for node, why in self._agents.silent().items() if node in arguments}
        answers: dict[NodeId, Any] = {}
        for node, answer, error in self._agents.gather(asked, wait_s):
            if error is None:
                answers[node] = answer
                problems.pop(node, None)
            else:
                problems[node] = reason_of(getattr(error, "cause", error))
        return answers, problems

    def labels(self, name: str) -> dict[NodeId, str]:
        """node -> the value of a Ray label (`ray start --labels`), of those that have it."""
        return {
            NodeId(node["NodeID"]): str(value)
            for node in ray.nodes()
            if node["Alive"] and (value := (node.get("Labels") or {}).get(name))
        }

    def draining(self) -> dict[NodeId, float | None]:
        """Nodes that Ray itself is about to take away, and in how many seconds (None: it does not say).

        Its autoscaler's drain, `ray drain-node`, or the preemption of a machine.
        """
        with suppress(Exception):  # no public call tells it; without it, nobody knows
            from ray._private.state import state

            told = state.get_draining_nodes()
            return {NodeId(node): at / 1000 - time.time() if at else None for node, at in told.items()}
        return {}

    def _agent(self, node: NodeId) -> Any:
        """Raises AgentUnavailable for a node that went just now."""
        if (agent := self._agents.handles().get(node)) is None:
            raise AgentUnavailable(node[:12], "it is gone")
        return agent

    def _options(self, options: JobOptions) -> JobOptions:
        return replace(options, epoch=self._agents.turn.epoch)


def _then(future: Any, do: Callable[[Any], T]) -> Future[T]:
    """What `do` makes of what a Ray call gives; its own error where the task raised one of ours."""
    made: Future[T] = Future()

    def done(ended: Future[Any]) -> None:
        error = ended.exception()
        try:
            if isinstance(error, ray.exceptions.RayTaskError):
                raise cast("Any", error).cause
            made.set_result(do(ended.result()))
        except BaseException as problem:  # noqa: BLE001 - told to whoever asks for the result
            made.set_exception(problem)

    future.add_done_callback(done)
    return made
