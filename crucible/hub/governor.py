"""Who may send the next request to a Hub: one budget a rate-limit bucket, one bound on requests in flight, first come
first served. `Ledger` decides and is plain data; `LocalGovernor` is the ledger of this process, for any number of
threads; `crucible.workers.governing` holds one for a whole cluster.

An account is a Hub and the credentials it is asked with, as a hash: that is whose quota is spent. Anonymous callers are
counted by address; those of one cluster share a budget all the same, which can only make them too careful.
A thread must not ask for a second request while it holds one: with one connection it would wait for itself.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from crucible.config import Settings
from crucible.hub.budget import LOOK_AGAIN_S, Budget, hushed, may_send, quiet, replied, sent, why
from crucible.stopping import LOOK_S, check, never

SPOKEN = ("ratelimit", "ratelimit-policy", "retry-after", "date")
"""The headers that say something about waiting."""

Reply = Callable[[int | None, Mapping[str, str]], None]
"""Say what came back: status (None for a broken connection) and headers. Only the first call of a request counts."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A bucket that somebody wants to send to, and that the Hub asked to be quiet."""

    bucket: str
    until: float
    """This process's `time.monotonic()`."""
    reason: str


class Governor(Protocol):
    """Asked before every request to a Hub, its mirrors and its CDN."""

    def request(self, bucket: str) -> AbstractContextManager[Reply]:
        """Wait until one more request may go to the bucket, and hold one of the connections until the `with` ends.

        Call the reply as soon as the headers are here; a `with` that ends without counts as a broken connection.
        """
        ...

    def waiting(self) -> Waiting | None:
        """The longest quiet time that somebody of this account waits for now."""
        ...

    def at(self, settings: Settings) -> Governor:
        """The same keeper for another Hub, or for other credentials."""
        ...


def account_of(settings: Settings) -> str:
    """Whose quota is spent. The token itself is in no name, no log and no argument."""
    if not settings.token:
        return f"{settings.endpoint} anonymous"
    return f"{settings.endpoint} {hashlib.sha256(settings.token.encode()).hexdigest()[:16]}"


def spoken(headers: Mapping[str, str]) -> dict[str, str]:
    """The few headers a budget reads, and no more of each than makes sense."""
    return {name: headers[name][:200] for name in SPOKEN if name in headers}


@dataclass(frozen=True, slots=True)
class Key:
    """One budget."""

    account: str
    bucket: str


@dataclass(slots=True)
class _Ask:
    key: Key
    connections: int
    number: int


@dataclass(slots=True)
class _Held:
    key: Key
    sent_at: float
    replied: bool = False


class Ledger:
    """Budgets, who waits for them, and who holds a connection. Every call is given the time.

    Concurrency: none of its own; who owns it locks. Memory: an entry a request in flight or waiting, one a bucket.
    """

    def __init__(self, jitter: Callable[[], float] = random.random) -> None:
        self._jitter = jitter
        self._budgets: dict[Key, Budget] = {}
        self._queues: dict[Key, OrderedDict[str, _Ask]] = {}
        self._held: dict[str, _Held] = {}
        self._asked = 0

    @property
    def connections_in_use(self) -> int:
        return len(self._held)

    def budget(self, key: Key) -> Budget:
        if key not in self._budgets:
            self._budgets[key] = Budget(spread=self._jitter())
        return self._budgets[key]

    def knows(self, ticket: str) -> bool:
        """Whether the ticket waits or is held."""
        return ticket in self._held or any(ticket in queue for queue in self._queues.values())

    def ask(self, ticket: str, key: Key, connections: int) -> None:
        """Stand in line. `connections` is the asker's own bound on all that is in flight."""
        self._asked += 1
        self._queues.setdefault(key, OrderedDict())[ticket] = _Ask(key, max(1, connections), self._asked)

    def grant(self, now: float) -> tuple[list[str], float]:
        """(tickets that may send now, seconds after which to call again if nothing happens); inf when nobody waits."""
        granted: list[str] = []
        again = math.inf
        quiet_keys: set[Key] = set()
        while True:
            heads = [next(iter(q.items())) for key, q in self._queues.items() if q and key not in quiet_keys]
            if not heads:
                break
            ticket, ask = min(heads, key=lambda head: head[1].number)
            wait = may_send(self.budget(ask.key), now)
            if wait > 0:
                quiet_keys.add(ask.key)
                again = min(again, wait)
            elif len(self._held) >= ask.connections:
                again = min(again, LOOK_AGAIN_S)
                break  # whoever came later waits behind
            else:
                self._dequeue(ticket, ask.key)
                self.hold(ticket, ask.key, now)
                granted.append(ticket)
        return granted, again

    def hold(self, ticket: str, key: Key, now: float) -> None:
        """The ticket is in flight from now on; also for one that another keeper granted before it was lost."""
        self._held[ticket] = _Held(key, now)
        self._budgets[key] = sent(self.budget(key), now)

    def replied(self, ticket: str, status: int | None, headers: Mapping[str, str], now: float) -> None:
        """The first answer to a held ticket. It keeps its connection: the body may still be on the wire."""
        held = self._held.get(ticket)
        if held is None or held.replied:
            return
        held.replied = True
        self._budgets[held.key] = replied(self.budget(held.key), status, headers, now, held.sent_at)

    def end(self, ticket: str, now: float) -> None:
        """Give the connection back, or leave the line."""
        self.replied(ticket, None, {}, now)
        if self._held.pop(ticket, None) is None:
            for key, queue in list(self._queues.items()):
                if ticket in queue:
                    self._dequeue(ticket, key)

    def hush(self, key: Key, until: float) -> None:
        """Somebody else was told to be quiet."""
        self._budgets[key] = hushed(self.budget(key), until)

    def quiets(self, now: float) -> dict[Key, float]:
        """Seconds of quiet of every bucket that has any."""
        found = {key: quiet(budget, now) for key, budget in self._budgets.items()}
        return {key: wait for key, wait in found.items() if wait > 0}

    def waiting(self, account: str | None, now: float) -> Waiting | None:
        """The longest quiet time of an account (None: of any) that somebody waits for; `until` is the ledger's time."""
        found = [
            Waiting(key.bucket, now + wait, why(self.budget(key)))
            for key in self._queues
            if account in (None, key.account) and (wait := quiet(self.budget(key), now)) > 0
        ]
        return max(found, key=lambda one: one.until, default=None)

    def forked(self) -> None:
        """In a child process: what is in flight is the parent's, what the Hub said holds for both."""
        self._queues.clear()
        self._held.clear()
        self._budgets = {key: replace(budget, in_flight=0) for key, budget in self._budgets.items()}

    def _dequeue(self, ticket: str, key: Key) -> None:
        queue = self._queues[key]
        del queue[ticket]
        if not queue:
            del self._queues[key]


class Desk:
    """A ledger for the threads of this process. One for all Hubs: `connections` bounds the whole process."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = random.random
    ) -> None:
        self._clock, self._ledger = clock, Ledger(jitter)
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Event] = {}
        self._tickets = 0

    def enter(self, key: Key, connections: int, stopped: Callable[[], bool] = never) -> str:
        """Wait for one's turn; the ticket is to be given to `leave`. Raises Stopped if nobody waits for it any more."""
        turn = threading.Event()
        with self._lock:
            self._tickets += 1
            ticket = str(self._tickets)
            self._turns[ticket] = turn
            self._ledger.ask(ticket, key, connections)
            wait = self._wake()
        try:
            while not turn.wait(min(wait, threading.TIMEOUT_MAX if stopped is never else LOOK_S)):
                check(stopped)
                with self._lock:
                    wait = self._wake()
        except BaseException:  # Ctrl-C while waiting: nobody may wait behind one who went away
            self.leave(ticket)
            raise
        return ticket

    def replied(self, ticket: str, status: int | None, headers: Mapping[str, str]) -> None:
        with self._lock:
            self._ledger.replied(ticket, status, headers, self._clock())
            self._wake()

    def leave(self, ticket: str) -> None:
        with self._lock:
            self._turns.pop(ticket, None)
            self._ledger.end(ticket, self._clock())
            self._wake()

    def hush(self, key: Key, seconds: float) -> None:
        with self._lock:
            self._ledger.hush(key, self._clock() + seconds)

    def quiet(self, key: Key) -> float:
        with self._lock:
            return quiet(self._ledger.budget(key), self._clock())

    def waiting(self, account: str | None = None) -> Waiting | None:
        """The longest quiet time that a thread of this process waits for."""
        with self._lock:
            return self._ledger.waiting(account, self._clock())

    def forked(self) -> None:
        self._lock = threading.Lock()
        self._turns.clear()
        self._ledger.forked()

    def _wake(self) -> float:
        granted, again = self._ledger.grant(self._clock())
        for ticket in granted:
            self._turns.pop(ticket).set()
        return again


DESK = Desk()
"""This process's own."""
os.register_at_fork(after_in_child=DESK.forked)


class LocalGovernor:
    """The governor of one process. All of a process share one desk, so they share budgets and connections.

    Concurrency: any thread, and a forked child, which starts with what the Hub had said and nothing in flight.
    """

    def __init__(self, account: str, connections: int, desk: Desk = DESK, stopped: Callable[[], bool] = never) -> None:
        self.account, self.connections = account, connections
        self._desk, self._stopped = desk, stopped

    @contextmanager
    def request(self, bucket: str) -> Iterator[Reply]:
        ticket = self._desk.enter(Key(self.account, bucket), self.connections, self._stopped)
        try:
            yield lambda status, headers: self._desk.replied(ticket, status, headers)
        finally:
            self._desk.leave(ticket)

    def waiting(self) -> Waiting | None:
        return self._desk.waiting(self.account)

    def at(self, settings: Settings) -> LocalGovernor:
        return LocalGovernor(account_of(settings), settings.connections, self._desk, self._stopped)


def local_governor(settings: Settings, stopped: Callable[[], bool] = never) -> LocalGovernor:
    """This process's governor for a Hub and its credentials. Once `stopped` says so, whoever waits raises Stopped."""
    return LocalGovernor(account_of(settings), settings.connections, stopped=stopped)
