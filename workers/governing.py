"""The governor of a cluster: one actor keeps every Hub's budgets and connections, and every process asks it.

Runs in an async Ray actor on one node (`GovernorCore`) and in every process that sends to a Hub (`ClusterGovernor`).
All of it is soft state: what a dead process held is free after `EXPIRY_S`, and while there is no actor each process
goes on with its own small budget, keeps the quiet times it was told, and tells them to the next actor.
What crosses a call are names, a hash of the credentials, and the few headers that speak of waiting. No token.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray as untyped_ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crucible.config import Settings
from crucible.hub.budget import quiet
from crucible.hub.governor import DESK, Key, Ledger, LocalGovernor, Reply, Waiting, account_of, spoken

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns

NAMESPACE = "crucible"
GOVERNOR = "crucible-governor"
BEAT_S = 1.0
EXPIRY_S = 5.0
"""Without a word from a process for so long, what it held is free again."""
TURN_S = 4.0
"""A call for a turn comes back after so long in any case, and is made again: no call of the actor waits for ever."""
ANSWER_S = 5.0
"""Longer than any answer should take: the actor's node is gone or cut off."""
RETURN_S = 1.0
"""How long a process that found no actor goes on alone before it looks again."""
IDLE_S = 10.0
ASKING = 4
"""Threads of one process that ask for the same bucket at once; the others wait behind them in their own process."""
TOLD_S = 1.0
"""A process knows a quiet time from the actor a little late; only what is longer by this is news to the actor."""
ALONE = 2
"""Connections of one process while there is no actor: few, because all the others do the same."""


@dataclass(frozen=True, slots=True)
class Permit:
    """What a process holds, as it says again with every beat."""

    ticket: str
    key: Key
    reply: tuple[int | None, dict[str, str]] | None = None
    """Status and the headers that speak of waiting, once they are here."""


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

    async def turn(self, process: str, ticket: str, key: Key, connections: int, quiet_s: float) -> bool:
        """True when the ticket may send now; False after `TURN_S`: its place in the line is kept for the next call.

        `quiet_s`: what the process was told while it was alone.
        """
        now = self._hear(process)
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

    async def replied(self, process: str, ticket: str, status: int | None, headers: Mapping[str, str]) -> None:
        self._ledger.replied(ticket, status, headers, self._hear(process))
        self._wake()

    async def end(self, process: str, ticket: str, reply: tuple[int | None, Mapping[str, str]] | None) -> None:
        """Give the connection back. Says the reply again: Ray keeps no order among the calls of an async actor."""
        now = self._hear(process)
        if reply is not None:
            self._ledger.replied(ticket, *reply, now)
        self._end(ticket, now)
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
        memory=1,  # one that asks for nothing is placed by whatever node has room, which may not know this one yet
        scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
    ).remote()


def _process_of(ticket: str) -> str:
    return ticket.rpartition("/")[0]


class _Line:
    """This process's line to the actor: one handle, one heartbeat, the permits that are held.

    Concurrency: any thread. No answer is waited for with `ray.get`, which would tell Ray that this task needs no CPU.
    """

    def __init__(self) -> None:
        self.process = f"{os.getpid()}-{secrets.token_hex(6)}"
        self._lock = threading.Lock()
        self._actor: Any = None
        self._alone_until = -math.inf
        self._tickets = 0
        self._held: dict[str, Permit] = {}
        self._asking: dict[Key, threading.Semaphore] = {}
        self._in_line = 0
        self._beating = False

    def enter(self, key: Key, connections: int) -> str | None:
        """Wait for a turn: the ticket to give to `leave`; None when there is no actor now."""
        with self._lock:
            self._tickets += 1
            ticket = f"{self.process}/{self._tickets}"
            asking = self._asking.setdefault(key, threading.Semaphore(ASKING))
            self._in_line += 1
            self._beat()
        granted = False
        try:
            with asking:
                granted = self._turn(ticket, key, connections)
        finally:
            with self._lock:
                self._in_line -= 1
                if granted:
                    self._held[ticket] = Permit(ticket, key)
                else:  # no actor, or Ctrl-C while waiting
                    self._tell("end", ticket, None)
        return ticket if granted else None

    def replied(self, ticket: str, status: int | None, headers: Mapping[str, str]) -> None:
        with self._lock:
            permit = self._held.get(ticket)
            if permit is not None and permit.reply is None:
                self._held[ticket] = Permit(ticket, permit.key, (status, spoken(headers)))
                self._tell("replied", ticket, status, spoken(headers))

    def leave(self, ticket: str) -> None:
        with self._lock:
            permit = self._held.pop(ticket, None)
            self._tell("end", ticket, permit.reply if permit else None)

    def ask(self, method: str, *arguments: Any) -> Any:
        """The actor's answer, or None when there is none: the process is then alone for a while."""
        actor = self._find()
        return None if actor is None else self._answer(actor, lambda: getattr(actor, method).remote(*arguments))

    def _answer(self, actor: Any, call: Callable[[], Any]) -> Any:
        try:
            return call().future().result(TURN_S + ANSWER_S)
        except Exception:  # noqa: BLE001 - for a cluster that has ended Ray raises plain Exceptions too
            with self._lock:
                self._lost(actor)
            return None

    def _say_beat(self, actor: Any) -> Any:
        with self._lock:  # the list is as old as the call
            return actor.beat.remote(self.process, tuple(self._held.values()))

    def _turn(self, ticket: str, key: Key, connections: int) -> bool:
        granted = False
        while granted is False:
            granted = self.ask("turn", self.process, ticket, key, connections, DESK.quiet(key))
        return bool(granted)

    def _tell(self, method: str, ticket: str, *arguments: Any) -> None:
        """Say it and wait for no answer; what is lost on the way, a beat repairs. Called with the lock held."""
        actor = self._actor
        if actor is None or not ray.is_initialized():
            return
        try:
            getattr(actor, method).remote(self.process, ticket, *arguments)
        except Exception:  # noqa: BLE001 - as above
            self._lost(actor)

    def _find(self) -> Any:
        with self._lock:
            if not ray.is_initialized():  # a call would start Ray anew
                self._actor = None
                return None
            if self._actor is not None or time.monotonic() < self._alone_until:
                return self._actor
        actor = None
        with suppress(Exception):
            actor = ensure_governor()
        with self._lock:
            if actor is None:
                self._lost(None)
            self._actor = actor
        return actor

    def _lost(self, actor: Any) -> None:
        if self._actor is actor:
            self._actor, self._alone_until = None, time.monotonic() + RETURN_S

    def _beat(self) -> None:
        """See to it that somebody beats. Called with the lock held."""
        if not self._beating:
            self._beating = True
            threading.Thread(target=self._keep_beating, name="crucible-governor-beat", daemon=True).start()

    def _keep_beating(self) -> None:
        idle_since = time.monotonic()
        while True:
            time.sleep(BEAT_S)
            with self._lock:
                if self._held or self._in_line:
                    idle_since = time.monotonic()
                elif time.monotonic() - idle_since > IDLE_S:
                    self._beating = False
                    return
                else:
                    continue
            actor = self._find()
            if actor is None:
                continue
            for key, seconds in (self._answer(actor, partial(self._say_beat, actor)) or {}).items():
                if seconds > DESK.quiet(key):
                    DESK.hush(key, seconds)  # should the actor be lost, this process still knows


_LINE: _Line | None = None
_LINE_LOCK = threading.Lock()


def _line() -> _Line:
    global _LINE
    with _LINE_LOCK:
        if _LINE is None:
            _LINE = _Line()
        return _LINE


class ClusterGovernor:
    """The cluster's governor as one process sees it, for one Hub and its credentials. Concurrency: any thread."""

    def __init__(self, account: str, connections: int) -> None:
        self.account, self.connections = account, connections
        self._alone = LocalGovernor(account, min(ALONE, connections))

    @contextmanager
    def request(self, bucket: str) -> Iterator[Reply]:
        line = _line()
        ticket = line.enter(Key(self.account, bucket), self.connections)
        if ticket is None:
            with self._alone.request(bucket) as reply:
                yield reply
            return
        try:
            yield lambda status, headers: line.replied(ticket, status, headers)
        finally:
            line.leave(ticket)

    def waiting(self) -> Waiting | None:
        found = _line().ask("waiting", self.account)
        if found is None:  # a thread that began to wait when there was no actor still does
            return self._alone.waiting()
        bucket, seconds, reason = found
        return Waiting(bucket, time.monotonic() + seconds, reason)

    def at(self, settings: Settings) -> ClusterGovernor:
        return cluster_governor(settings)


def cluster_governor(settings: Settings) -> ClusterGovernor:
    """The cluster's governor for a Hub and its credentials."""
    return ClusterGovernor(account_of(settings), settings.connections)
