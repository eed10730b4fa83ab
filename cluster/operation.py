"""Perform a plan of `upkeep`: bounded in bytes and in tasks a node, with progress, to be cancelled at any time. No Ray.

What is done is in the stores, so an operation that dies is not gone on with: the next plan has what is left.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from crucible.cluster.ledger import Order
from crucible.cluster.upkeep import Plan
from crucible.errors import CrucibleError, StaleCoordinator
from crucible.failure import first_line
from crucible.refs import NodeId, ShardInfo, WorkItem

TICK_S = 0.5
GONE_S = 15.0
"""How long a node is gone before what it was given counts as failed: of one that was cut off Ray says so after minutes.
Longer than an agent that died takes to be there again."""
SLOTS = 2
"""Tasks that a node is given at a time: one moves bytes while the other begins."""
BATCH_BYTES = 64 << 20
BATCH_SHARDS = 64
PROBLEMS_KEPT = 20
"""That an operation tells; it counts all."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What makes lost shards again, and what they must turn out to be."""

    item: WorkItem
    order: Order
    promised: Mapping[str, str]
    """Digests by key."""


class Hands(Protocol):
    """What does the work. Each future gives key -> what was wrong, for the shards that went wrong."""

    def reached(self) -> Collection[NodeId]:
        """The nodes that there are now."""
        ...

    def copy(self, node: NodeId, shards: Sequence[ShardInfo]) -> Future[dict[str, str]]: ...

    def remake(self, node: NodeId, recipe: Recipe) -> Future[dict[str, str]]: ...

    def drop(self, node: NodeId, keys: Sequence[str]) -> Future[dict[str, str]]:
        """A copy that is pinned, in use or needed after all stays: it is told of with an empty text."""
        ...


@dataclass
class Operation:
    """One repair, rebalance or drain, as others see it: written by its thread, read by whoever asks."""

    kind: str
    name: str = ""
    deadline: float | None = None
    """`time.monotonic()` after which nothing is waited for."""
    phase: str = "waits"
    """For its turn, or for `waiting_for`. Then `plans`, `works`, and at the end `done`, `cancelled`, or `failed`."""
    remakes: int = 0
    remade: int = 0
    copies: int = 0
    copied: int = 0
    drops: int = 0
    dropped: int = 0
    bytes: int = 0
    bytes_done: int = 0
    problems: list[str] = field(default_factory=list)
    """The first of them."""
    wrong: int = 0
    """How many shards could not be copied, made again or dropped."""
    left: int = 0
    """Shards that are still not held as they should be."""
    waiting_for: str = ""
    """What it waits for, while its phase is `waits`."""
    moved: int = 0
    """Pieces of work that were taken from nodes that are to go: others do them."""
    findings: list[dict[str, Any]] = field(default_factory=list)
    """Of a check: what is wrong where."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.name = self.name or f"{self.kind}-{secrets.token_hex(3)}"

    @property
    def stopped(self) -> bool:
        """True when nothing new should be started."""
        return self.cancelled.is_set() or (self.deadline is not None and time.monotonic() >= self.deadline)

    def planned(self, plan: Plan) -> None:
        """What is to be done, on top of what was."""
        self.remakes = self.remade + sum(len(one.keys) for one in plan.remakes)
        self.copies = self.copied + len(plan.copies)
        self.drops = self.dropped + len(plan.drops)
        self.bytes = self.bytes_done + plan.bytes

    def went_wrong(self, what: str, shards: int = 1) -> None:
        self.wrong += shards
        if len(self.problems) < PROBLEMS_KEPT and what not in self.problems:
            self.problems.append(what)

    def told(self) -> dict[str, Any]:
        """Plain values, the same keys always."""
        seconds = self.seconds if self.ended.is_set() else time.monotonic() - self.began
        names = ("kind", "phase", "remakes", "remade", "copies", "copied", "drops", "dropped", "bytes", "bytes_done")
        told = {"operation": self.name, **{name: getattr(self, name) for name in names}}
        told |= {"findings": len(self.findings), "moved": self.moved}
        told["waiting_for"] = self.waiting_for if self.phase == "waits" else ""
        return {**told, "wrong": self.wrong, "problems": list(self.problems), "left": self.left, "seconds": seconds}


@dataclass(frozen=True, slots=True)
class Job:
    """Something that one node does in one go."""

    node: NodeId
    size: int
    keys: tuple[str, ...]
    start: Callable[[], Future[dict[str, str]]]
    done: Callable[[int, int], None]
    """Told of how many shards and bytes went well."""


def perform(
    plan: Plan,
    operation: Operation,
    hands: Hands,
    shards: Mapping[str, ShardInfo],
    recipes: Mapping[object, Recipe],
    limit_bytes: int,
) -> None:
    """Do what the plan says, as far as it goes. `limit_bytes` may be in flight, unless one job alone has more.

    `shards` knows all that are copied, `recipes` all that are made again; what is not in them is passed over. A shard
    of which anything was passed over or went wrong is not dropped anywhere: what was to be there instead is not.
    """
    operation.phase = "works"

    def remade(count: int, size: int) -> None:
        operation.remade += count
        operation.bytes_done += size

    def copied(count: int, size: int) -> None:
        operation.copied += count
        operation.bytes_done += size

    def dropped(count: int, _: int) -> None:
        operation.dropped += count

    remakes = [
        Job(one.node, one.size, one.keys, lambda one=one, r=recipe: hands.remake(one.node, r), remade)  # type: ignore[misc]
        for one in plan.remakes
        if (recipe := recipes.get(one.item)) is not None
    ]
    kept = {copy.key for copy in plan.copies if copy.key not in shards}
    kept |= {key for one in plan.remakes if one.item not in recipes for key in one.keys}
    failed = flow(remakes, operation, hands, limit_bytes)
    # a drop may count on any shard of an item that was to be made again
    kept |= {key for one in recipes.values() if not failed.isdisjoint(one.promised) for key in one.promised}
    kept |= failed | flow(_batches(plan, shards, hands, copied), operation, hands, limit_bytes)
    flow(_drops(plan, kept, hands, dropped), operation, hands, limit_bytes)


def _batches(
    plan: Plan, shards: Mapping[str, ShardInfo], hands: Hands, copied: Callable[[int, int], None]
) -> list[Job]:
    """The copies of each node in batches, in the order in which their first ones are due."""
    jobs: list[tuple[int, Job]] = []
    open_: dict[NodeId, tuple[int, list[ShardInfo]]] = {}

    def close(node: NodeId) -> None:
        first, batch = open_.pop(node)
        keys = tuple(shard.key for shard in batch)
        size = sum(shard.size for shard in batch)
        jobs.append((first, Job(node, size, keys, lambda: hands.copy(node, batch), copied)))

    for number, copy in enumerate(plan.copies):
        if (shard := shards.get(copy.key)) is None:
            continue
        _, batch = open_.setdefault(copy.node, (number, []))
        batch.append(shard)
        if len(batch) >= BATCH_SHARDS or sum(one.size for one in batch) >= BATCH_BYTES:
            close(copy.node)
    for node in list(open_):
        close(node)
    return [job for _, job in sorted(jobs, key=lambda one: one[0])]


def _drops(plan: Plan, kept: AbstractSet[str], hands: Hands, dropped: Callable[[int, int], None]) -> list[Job]:
    keys: dict[NodeId, list[str]] = {}
    for drop in (one for one in plan.drops if one.key not in kept):
        keys.setdefault(drop.node, []).append(drop.key)
    return [
        Job(node, 0, tuple(some), lambda node=node, some=some: hands.drop(node, some), dropped)  # type: ignore[misc]
        for node, many in keys.items()
        for some in (many[at : at + BATCH_SHARDS] for at in range(0, len(many), BATCH_SHARDS))
    ]


def flow(jobs: Iterable[Job], operation: Operation, hands: Hands, limit_bytes: int) -> set[str]:
    """Start the jobs as there is room, and hear how they end. Gives the keys with which something went wrong.

    Those that were not started, because the operation was stopped, are not among them. Raises StaleCoordinator.
    """
    failed: set[str] = set()
    waiting: dict[NodeId, deque[Job]] = {}
    for job in jobs:
        waiting.setdefault(job.node, deque()).append(job)
    running: dict[Future[dict[str, str]], Job] = {}
    busy: dict[NodeId, int] = dict.fromkeys(waiting, 0)
    gone: dict[NodeId, float] = {}
    inflight = 0
    while True:
        reached, now = hands.reached(), time.monotonic()
        gone = {job.node: gone.get(job.node, now) for job in running.values() if job.node not in reached}
        lost = [future for future, job in running.items() if now - gone.get(job.node, now) > GONE_S]
        over = [job for node in sorted(waiting.keys() - reached) for job in waiting.pop(node)]
        inflight -= sum(running[future].size for future in lost)
        for job in (*over, *(running.pop(future) for future in lost)):
            operation.went_wrong(f"node {job.node[:12]} is gone", len(job.keys))
            failed.update(job.keys)
        for node, queue in waiting.items():
            while queue and busy[node] < SLOTS and not operation.stopped:
                if running and inflight + queue[0].size > limit_bytes:
                    break
                job = queue.popleft()
                running[_begun(job)] = job
                busy[node] += 1
                inflight += job.size
        if not running and (operation.stopped or not any(waiting.values())):
            return failed
        ended, _ = wait(running, timeout=TICK_S, return_when=FIRST_COMPLETED)
        for future in ended:
            job = running.pop(future)
            busy[job.node] -= 1
            inflight -= job.size
            failed |= _hear(job, future, operation)
        if operation.deadline is not None and time.monotonic() >= operation.deadline:
            return failed  # what runs may end by itself; nobody waits for it


def _begun(job: Job) -> Future[dict[str, str]]:
    """The job under way; one that cannot begin, such as on a node that went just now, has failed. Others go on."""
    try:
        return job.start()
    except StaleCoordinator:
        raise
    except Exception as error:  # noqa: BLE001 - said of its node, as what goes wrong later is
        failed: Future[dict[str, str]] = Future()
        failed.set_exception(error)
        return failed


def _hear(job: Job, future: Future[dict[str, str]], operation: Operation) -> set[str]:
    """Count how a job ended. Gives the keys with which something went wrong."""
    error = future.exception()
    if error is not None:
        text = str(error) if isinstance(error, CrucibleError) else first_line(error)
        operation.went_wrong(f"node {job.node[:12]}: {text}", len(job.keys))
        return set(job.keys)
    problems = future.result()
    for problem in filter(None, problems.values()):
        operation.went_wrong(f"node {job.node[:12]}: {problem}")
    good = len(job.keys) - len(problems)
    job.done(good, job.size * good // max(1, len(job.keys)))
    return set(problems)
