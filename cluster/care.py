"""The upkeep of a cluster: replicas are repaired, nodes drained, shares moved; by itself after a loss, or when asked.

Plans are `upkeep`'s, made from what the stores hold and never kept; `operation` performs them over `hands`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from crucible.cache.store import Store
from crucible.cluster.agents import Agents
from crucible.cluster.draining import Draining
from crucible.cluster.hands import RayHands
from crucible.cluster.known import Notes
from crucible.cluster.ledger import EVERYTHING, Choice
from crucible.cluster.operation import Job, Operation, flow
from crucible.cluster.promises import KEPT_S, Promises
from crucible.cluster.upkeep import Plan
from crucible.config import Settings
from crucible.errors import CrucibleError, StoreError, UsageError
from crucible.refs import NodeId

log = logging.getLogger("crucible.care")

RETRY_MOST_S = 3600.0
"""Between two tries of a repair that nobody asked for and that did not succeed."""
CHECKED_AT_ONCE = 4096
"""Shards of a node: each lot reads its manifests anew."""
MENDING = "crucible-mending"
"""Name of the thread that looks whether something was lost."""


class Care(Draining):
    """One cluster's upkeep. `cluster` is Ray's name for it, `store` this node's; `first` says that no coordinator was
    before this one, which could have promised something.

    Concurrency: any method from any thread.
    """

    def __init__(
        self,
        store: Store,
        agents: Agents,
        notes: Notes,
        cluster: str,
        settings: Settings,
        hands: RayHands | None = None,
        *,
        first: bool = True,
    ) -> None:
        super().__init__(store, agents, notes, cluster, settings, hands)
        self._promises = Promises() if first else Promises(time.monotonic() + KEPT_S)
        self._seen: set[NodeId] | None = None
        self._lost_at: float | None = None
        """`time.monotonic()` when a node was lost for which nothing was done yet."""
        self._hopeless = False
        """When we last looked, shards were lost that no node there could make again."""
        self._to_pin: dict[NodeId, set[str]] = {}
        """Pins that nodes which came have not taken yet."""
        self._mending: threading.Thread | None = None
        """Looks after a loss that nobody has asked about."""
        self._wait_s = 0.0
        """How long the next try waits beyond the usual, after one that did not succeed."""

    # --- what happens by itself

    @property
    def repair_after_s(self) -> float | None:
        """Seconds after a loss until a repair begins by itself; None: never. A person's order, else the setting."""
        order = self._notes.notes("upkeep").get("repair_after")
        return self._settings.repair_after_s if order is None else order["seconds"]

    def set_repair_after(self, seconds: float | None) -> None:
        self._notes.note("upkeep", "repair_after", {"seconds": seconds})

    def look(self, *, alone: bool) -> None:
        """Notice what came and went since the last look; begin a repair when the time has come. Called every second.

        A node that comes tells what it has and is told what is so. `alone`: there is one node, and nothing to repair.
        """
        nodes = set(self.agents.handles())
        came = nodes - (self._seen or set())
        if self._seen is None:  # those of before us may have lost nodes, and had no time to do anything
            self._lost_at = time.monotonic()
            # of a Ray cluster that is gone: its nodes have other names now
            self._forget_drains(lambda _, told: told.get("cluster") != self._cluster)
        elif self._seen - nodes:
            self._lost_at, self._wait_s = time.monotonic(), 0.0
        elif came and self._lost_at is None and self._too_few(self._seen):
            self._lost_at = time.monotonic()
        if came:
            try:
                self.learn()
            except CrucibleError as error:  # such as a full disk here; what is known already is looked after
                log.warning("what the nodes know could not be taken in: %s", error)
            self._to_pin.update({node: set(self.pins()) for node in came})
        self.pin_on(self._to_pin)
        self._seen = nodes
        self.agents.drained = self.drained
        self._save_what_ray_takes(nodes)
        after = self.repair_after_s
        if alone or self._lost_at is None or after is None or (self._mending is not None and self._mending.is_alive()):
            return
        if time.monotonic() >= self._lost_at + after + self._wait_s:
            self._lost_at = None
            there = self.agents.urls()  # with those that do not answer just now
            self._forget_drains(lambda node, _: node not in there)  # one that comes back has another name
            # elsewhere: to ask all nodes and to plan for a million shards takes seconds, in which others come and go
            self._mending = threading.Thread(target=self._mend, name=MENDING, daemon=True)
            self._mending.start()

    def _forget_drains(self, over: Callable[[str, Mapping[str, Any]], bool]) -> None:
        """Take back orders about nodes that are not there."""
        with suppress(StoreError):  # such an order drains nobody; it is taken back the next time
            for node, told in self._notes.notes("drain").items():
                if over(node, told):
                    self.order("drain", node, None)

    def _too_few(self, nodes: AbstractSet[NodeId]) -> bool:
        """Whether these nodes were too few for what this cluster's jobs were promised."""
        with self._lock:
            most = max((one.replicas for one in self.ledger.orders.values() if one.cluster == self._cluster), default=0)
        return self._hopeless or most > len(nodes - self.drained)

    def _mend(self) -> None:
        try:
            self._repair_by_itself()
        except Exception:  # a loss is not over because nobody could look after it just now
            log.warning("could not look after what was lost; trying again", exc_info=True)
            self._later()

    def _repair_by_itself(self) -> None:
        """Make up for what was lost of the jobs of this cluster. What an earlier one had is left to whoever asks."""
        self.learn()  # what somebody has taken out of all stores meanwhile was not lost
        with self._lock:
            orders = dict(self.ledger.orders)
        ids = [key for key, order in orders.items() if order.cluster == self._cluster and order.replicas]

        def plan() -> Plan:
            return self.plan_repair(ids, trim=False, on_purpose=False)

        first = plan() if ids else Plan()
        self._hopeless = bool(first.hopeless)
        if not first:
            self._wait_s = 0.0
            return
        operation = Operation("repair")
        log.warning("%s: a node was lost; bringing back what it held", operation.name)
        self._start_plan(operation, plan, self._try_again)

    def _try_again(self, operation: Operation) -> None:
        if (operation.left or operation.phase == "failed") and not operation.cancelled.is_set():
            self._later()

    def _later(self) -> None:
        """Look after what was lost once more, after a while that grows."""
        self._wait_s = min(RETRY_MOST_S, 2 * self._wait_s + 10.0)
        self._lost_at = time.monotonic()

    def could_drop(self, node: NodeId, keys: Collection[str]) -> list[str]:
        """Those of `keys` that the node might remove, if it asked now. Promises nothing."""
        return self._droppable(node, keys)[0]

    def may_drop(self, node: NodeId, keys: Collection[str]) -> list[str]:
        """Those of `keys` that the node may remove; see `promises`. Its copies of them count as gone from now on."""
        allowed, again = self._droppable(node, keys, promise=True)
        with self._lock:
            self._let_go.update(again.intersection(allowed))
        self.agents.dropped(node, allowed)
        return allowed

    def _droppable(self, node: NodeId, keys: Collection[str], promise: bool = False) -> tuple[list[str], set[str]]:
        holders, again, asked = self.agents.catalog.holders, set[str](), set[str]()
        while True:
            staying = self.agents.handles().keys() - self.drained
            with self._lock:  # of two that ask at once, the second sees what the first was promised
                now = time.monotonic()
                allowed = self._promises.could(node, keys, holders, staying, again.__contains__, now)
                last = set(keys).difference(allowed, asked)
                if not last:
                    if promise:
                        self._promises.give(node, allowed, now)
                    return allowed, again
            again |= self.sources_of(last)  # may take a while, so nothing is held meanwhile
            asked |= last

    # --- operations

    def start_repair(
        self, choice: Choice = EVERYTHING, *, trim: bool = False, replicas: int | None = None
    ) -> dict[str, Any]:
        """Begin a repair; `operation` tells how far it is."""
        self.ready()
        ids = self.meant(choice) if choice or replicas is not None else None
        if ids is not None and replicas is not None:
            self.want(ids, replicas)
        return self._start_plan(Operation("repair"), lambda: self.plan_repair(ids, trim=trim))

    def start_rebalance(self) -> dict[str, Any]:
        self.ready()
        return self._start_plan(Operation("rebalance"), self.plan_rebalance)

    def start_verify(self, choice: Choice = EVERYTHING, *, deep: bool = False, mend: bool = False) -> dict[str, Any]:
        """Begin to look at the shards of these manifests, or at the stores whole; `findings` has what was found.

        `deep` reads every shard. What turns out wrong is in quarantine then. `mend` brings back what lacks afterwards.
        """
        self.ready()
        ids = self.meant(choice) if choice else None

        def work(operation: Operation) -> None:
            self._check(operation, ids, deep)
            if mend and not operation.stopped:
                self._carry_out(operation, lambda: self.plan_repair(ids, trim=False))
            else:
                operation.left = self.plan_repair(ids, trim=False).left

        return self._start(Operation("verify"), work)

    def findings(self, name: str) -> list[dict[str, Any]]:
        """What a check has found so far: `scrub`'s findings, with their nodes."""
        with self._lock:
            return list(self._operations[name].findings) if name in self._operations else []

    def _check(self, operation: Operation, ids: Collection[str] | None, deep: bool) -> None:
        wanted = None if ids is None else set(self.ledger.keys_of(ids))
        jobs: list[Job] = []
        with self._lock:
            operation.phase, first = "works", len(operation.findings)

        def checked(count: int, size: int) -> None:
            operation.copied += count
            operation.bytes_done += size

        for node in sorted(self.agents.handles()):
            if wanted is None and not deep:  # one look at all of a store also finds what nobody has heard of
                size = self.agents.catalog.bytes(node)
                keys = ("",) * max(1, self.agents.catalog.held(node))
                jobs.append(Job(node, size, keys, partial(self._look_at, operation, node, None, deep), checked))
                continue
            held = self.agents.held_by(node)
            mine = held if wanted is None else [key for key in held if key in wanted]
            for some in (mine[at : at + CHECKED_AT_ONCE] for at in range(0, len(mine), CHECKED_AT_ONCE)):
                size = sum(map(self.agents.catalog.size, some))
                jobs.append(Job(node, size, tuple(some), partial(self._look_at, operation, node, some, deep), checked))
        operation.copies, operation.bytes = sum(len(job.keys) for job in jobs), sum(job.size for job in jobs)
        flow(jobs, operation, self._hands, 1 << 62)
        if bad := {NodeId(one["node"]) for one in operation.findings[first:]}:
            self.agents.rebuild(bad)

    def _look_at(
        self, operation: Operation, node: NodeId, keys: list[str] | None, deep: bool
    ) -> Future[dict[str, str]]:
        return self._hands.verify(node, keys, deep, operation.findings.extend)

    def preview(self, kind: str, choice: Choice = EVERYTHING, **asked: Any) -> dict[str, Any]:
        """What an operation would do: the figures of its plan, and the first of its steps."""
        self.ready()
        match kind:
            case "repair":
                ids = self.meant(choice) if choice else None
                plan = self.plan_repair(ids, trim=bool(asked.get("trim")), replicas=asked.get("replicas"))
            case "rebalance":
                plan = self.plan_rebalance()
            case "drain":
                plan = self.plan_drain([self.node_of(name) for name in asked["nodes"]])
            case _:
                raise UsageError(f"{kind!r} is not an operation")
        operation = Operation(kind, phase="planned", left=plan.left)
        operation.planned(plan)
        return operation.told()
