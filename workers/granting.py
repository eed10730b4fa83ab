"""The governor of a cluster as an actor: every Hub's budgets and connections, for all processes of the cluster.

Runs in an async Ray actor on one node; what asks it is `crucible.workers.governing`. All of it is soft state: what a
dead process held is free after `EXPIRY_S`. What crosses a call are names, a hash of the credentials, and the few
headers that speak of waiting. No token.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import ray as untyped_ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crucible.hub.budget import quiet
from crucible.hub.governor import Key, Ledger

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns

NAMESPACE = "crucible"
GOVERNOR = "crucible-governor"
BEAT_S = 1.0
EXPIRY_S = 5.0
"""Without a word from a process for so long, what it held is free again."""
TURN_S = 4.0
"""A call for a turn comes back after so long in any case, and is made again: no call of the actor waits for ever."""
TOLD_S = 1.0
"""A process knows a quiet time from the actor a little late; only what is longer by this is news to the actor."""


Told = tuple[int | None, dict[str, str]]
"""Of a reply, its status and the headers that speak of waiting."""


@dataclass(frozen=True, slots=True)
class Permit:
    """What a process holds, as it says again with every beat."""

    ticket: str
    key: Key
    reply: Told | None = None
    """Once it is here."""


Word = tuple[str, bool, Told | None]
"""A ticket, whether its request has ended, and its reply."""


class GovernorCore:
    """What the actor is. Everything runs in its one event loop, so nothing is locked and nothing may block."""

    def __init__(self) -> None:
        self._ledger = Ledger()
        self._turns: dict[str, asyncio.Future[None]] = {}
        self._granted_at: dict[str, float] = {}
        self._heard: dict[str, float] = {}
        """When each process last said anything."""
        self._introduced: set[str] = set()
        """Processes that have said what they held before this actor knew them."""
        self._looked_at = -math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._most = 0

    async def turn(
        self, process: str, ticket: str, key: Key, connections: int, quiet_s: float, words: tuple[Word, ...] = ()
    ) -> bool:
        """True when the ticket may send now; False after `TURN_S`: its place in the line is kept for the next call.

        `quiet_s`: what the process was told while it was alone. `words` are heard first.
        """
        await self.told(process, words)
        now = time.monotonic()
        if quiet_s > quiet(self._ledger.budget(key), now) + TOLD_S:
            self._ledger.hush(key, now + quiet_s)
        if ticket in self._granted_at:
            return True
        if ticket not in self._turns:
            self._turns[ticket] = asyncio.get_running_loop().create_future()
            self._ledger.ask(ticket, key, connections)
            self._wake()
        turn = self._turns.get(ticket)
        if turn is not None:
            await asyncio.wait([turn], timeout=TURN_S)
        return ticket in self._granted_at

    async def told(self, process: str, words: tuple[Word, ...]) -> None:
        """Hear what became of requests. An end says the reply again, as Ray may bring an actor's calls in any order."""
        now = self._hear(process)
        for ticket, ended, reply in words:
            if reply is not None:
                self._ledger.replied(ticket, *reply, now)
            if ended:
                self._end(ticket, now)
        if words:
            self._wake()

    async def beat(self, process: str, permits: tuple[Permit, ...]) -> dict[Key, float]:
        """Say what this process holds, and hear which buckets are quiet for how many seconds.

        What an earlier actor had granted is taken over; what the process no longer holds is free.
        """
        now = self._hear(process)
        held = {permit.ticket for permit in permits}
        for permit in () if process in self._introduced else permits:
            if permit.ticket not in self._granted_at:
                self._ledger.hold(permit.ticket, permit.key, now)
                self._granted_at[permit.ticket] = now
                if permit.reply is not None:
                    self._ledger.replied(permit.ticket, *permit.reply, now)
        self._introduced.add(process)
        for ticket, since in list(self._granted_at.items()):
            if _process_of(ticket) == process and ticket not in held and now - since > EXPIRY_S:
                self._end(ticket, now)  # granted to somebody who had gone away
        self._wake()
        return self._ledger.quiets(now)

    async def waiting(self, account: str) -> tuple[str, float, str] | None:
        """(bucket, seconds left, reason) of the longest quiet time that somebody waits for."""
        now = time.monotonic()
        found = self._ledger.waiting(account, now)
        return None if found is None else (found.bucket, found.until - now, found.reason)

    async def pid(self) -> int:
        return os.getpid()

    async def facts(self) -> dict[str, int]:
        """Requests in flight now, the most there ever were, requests in line, processes."""
        return {
            "in_flight": self._ledger.connections_in_use,
            "most": self._most,
            "in_line": len(self._turns),
            "processes": len(self._heard),
        }

    def _hear(self, process: str) -> float:
        now = self._heard[process] = time.monotonic()
        return now

    def _end(self, ticket: str, now: float) -> None:
        self._granted_at.pop(ticket, None)
        turn = self._turns.pop(ticket, None)
        if turn is not None and not turn.done():
            turn.set_result(None)
        self._ledger.end(ticket, now)

    def _wake(self) -> None:
        """Grant what can be granted, drop the dead, and set the clock for the next look."""
        now = time.monotonic()
        if now - self._looked_at >= BEAT_S / 2:
            self._looked_at = now
            self._bury(now)
        granted, again = self._ledger.grant(now)
        for ticket in granted:
            self._granted_at[ticket] = now
            turn = self._turns.pop(ticket)
            if not turn.done():
                turn.set_result(None)
        self._most = max(self._most, self._ledger.connections_in_use)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._heard:
            again = min(again, BEAT_S)
            self._timer = asyncio.get_running_loop().call_later(again, self._wake)

    def _bury(self, now: float) -> None:
        dead = {process for process, at in self._heard.items() if now - at > EXPIRY_S}
        for ticket in [ticket for ticket in (*self._granted_at, *self._turns) if _process_of(ticket) in dead]:
            self._end(ticket, now)
        for process in dead:
            del self._heard[process]
            self._introduced.discard(process)


Actor: Any = ray.remote(num_cpus=0, max_concurrency=10_000, max_restarts=-1)(GovernorCore)


def ensure_governor() -> Any:
    """The cluster's governor, started on this node if there is none. Ray starts it again where its node dies."""
    return Actor.options(
        name=GOVERNOR,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        enable_task_events=False,  # a call a request, of which nobody wants a list
        memory=1,  # one that asks for nothing is placed by whatever node has room, which may not know this one yet
        scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
    ).remote()


def _process_of(ticket: str) -> str:
    return ticket.rpartition("/")[0]
