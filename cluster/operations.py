"""The operations of a cluster's upkeep: each in a thread of its own, planned and performed until nothing is left."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from crucible.cache.store import Store
from crucible.cluster.agents import Agents
from crucible.cluster.hands import RayHands
from crucible.cluster.known import Known, Notes
from crucible.cluster.operation import TICK_S, Operation, Recipe, perform
from crucible.cluster.upkeep import Plan
from crucible.config import Settings
from crucible.errors import ClusterError, ManifestError
from crucible.refs import ShardInfo

log = logging.getLogger("crucible.care")

ROUNDS = 4
"""Plans that one operation performs at most: a copy may fail because its source died, and the next plan knows."""
REMEMBERED = 32
"""Operations that have ended and can still be asked about."""


class Operations(Known):
    """Those of one cluster that run, and the last that ended. Concurrency: any method from any thread."""

    def __init__(
        self,
        store: Store,
        agents: Agents,
        notes: Notes,
        cluster: str,
        settings: Settings,
        hands: RayHands | None = None,
    ) -> None:
        super().__init__(store, agents, notes, cluster, settings, hands)
        self._working = threading.Lock()
        """Held by the operation that plans and moves shards: one at a time. A check, which may take hours, holds up no
        drain."""
        self._operations: dict[str, Operation] = {}

    def operation(self, name: str, wait_s: float = 0.0) -> dict[str, Any]:
        """How far an operation is; after `wait_s` seconds, or when it has ended."""
        with self._lock:
            found = self._operations.get(name)
        if found is None:
            raise ClusterError(f"no operation {name!r}: its coordinator is gone; give the command again to go on")
        found.ended.wait(wait_s)
        return found.told()

    def operations(self) -> list[dict[str, Any]]:
        """Those that run and the last that ended, oldest first."""
        with self._lock:
            return [one.told() for one in self._operations.values()]

    def cancel(self, name: str) -> None:
        """Start nothing new of an operation. What is done stays done."""
        with self._lock:
            if (found := self._operations.get(name)) is not None:
                found.cancelled.set()

    def _start_plan(
        self, operation: Operation, plan: Callable[[], Plan], after: Callable[[Operation], None] = lambda _: None
    ) -> dict[str, Any]:
        return self._start(operation, lambda one: self._carry_out(one, plan), after)

    def _start(
        self,
        operation: Operation,
        work: Callable[[Operation], None],
        after: Callable[[Operation], None] = lambda _: None,
    ) -> dict[str, Any]:
        with self._lock:
            self._operations[operation.name] = operation
            ended = [name for name, one in self._operations.items() if one.ended.is_set()]
            for name in ended[:-REMEMBERED]:
                del self._operations[name]
        threading.Thread(target=self._run, args=(operation, work, after), name=operation.name, daemon=True).start()
        return operation.told()

    def _run(self, operation: Operation, work: Callable[[Operation], None], after: Callable[[Operation], None]) -> None:
        try:
            work(operation)
            operation.phase = "cancelled" if operation.cancelled.is_set() else "done"
        except Exception as error:  # noqa: BLE001 - whatever ends it must reach the one who waits for it
            log.warning("%s: %s: %s", operation.name, type(error).__name__, error)
            operation.went_wrong(str(error) or type(error).__name__, 0)
            operation.phase = "failed"
        finally:
            operation.seconds = time.monotonic() - operation.began
            operation.ended.set()
            after(operation)

    def _carry_out(self, operation: Operation, make_plan: Callable[[], Plan]) -> None:
        """Plan and perform until nothing is left to do, or nothing more can be done."""
        with self._turn(operation) as mine:
            for _ in range(ROUNDS if mine else 0):
                operation.phase = "plans"
                plan = make_plan()
                operation.planned(plan)
                if not plan or operation.stopped:
                    break
                before = (operation.copied, operation.remade, operation.dropped)
                shards, recipes = self._details(plan, operation)
                perform(plan, operation, self._hands, shards, recipes, self._settings.inflight_bytes)
                if before == (operation.copied, operation.remade, operation.dropped):
                    break
            operation.left = make_plan().left

    @contextmanager
    def _turn(self, operation: Operation) -> Iterator[bool]:
        """Whether it is this operation's turn; it may be stopped while it waits for another to end."""
        mine = self._working.acquire(blocking=False)
        while not mine and not operation.stopped:
            operation.waiting_for, operation.phase = "another operation to end", "waits"
            mine = self._working.acquire(timeout=TICK_S)
        try:
            yield mine
        finally:
            if mine:
                self._working.release()

    def _details(self, plan: Plan, operation: Operation) -> tuple[dict[str, ShardInfo], dict[object, Recipe]]:
        """The shards and recipes that a plan needs, from their manifests: each is read once."""
        wanted = {copy.key for copy in plan.copies} | {key for one in plan.remakes for key in one.keys}
        with self._lock:
            homes = self.ledger.with_keys(wanted)
        items = {one.item for one in plan.remakes}
        shards: dict[str, ShardInfo] = {}
        recipes: dict[object, Recipe] = {}
        for manifest_id in {*homes.values(), *(str(item[0]) for item in items if isinstance(item, tuple))}:
            try:
                manifest = self.manifest(manifest_id)
            except ManifestError as error:  # the others can be looked after
                operation.went_wrong(str(error))
                continue
            shards.update({shard.key: shard for shard in manifest.shards if homes.get(shard.key) == manifest_id})
            promised: dict[int, dict[str, str]] = {}
            for shard in manifest.shards:
                if (manifest_id, shard.item) in items:
                    promised.setdefault(shard.item, {})[shard.key] = shard.digest
            order = self.ledger.order(manifest_id)
            for number, digests in promised.items():
                recipes[manifest_id, number] = Recipe(manifest.items[number], order, digests)
        return shards, recipes
