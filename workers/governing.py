"""The governor of a cluster as each process sees it: one actor keeps every Hub's budgets, and every process asks it.

Runs in every process that sends to a Hub; the actor is `crucible.workers.granting`. While there is no actor each
process goes on with its own small budget, keeps the quiet times it was told, and tells them to the next actor.
"""

from __future__ import annotations

import atexit
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import ray as untyped_ray

from crucible.config import Settings
from crucible.hub.governor import DESK, Key, LocalGovernor, Reply, Waiting, account_of, spoken
from crucible.workers.granting import BEAT_S, TURN_S, Permit, Told, Word, ensure_governor
from crucible.workers.granting import NAMESPACE as NAMESPACE

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns

ANSWER_S = 5.0
"""Longer than any answer should take: the actor's node is gone or cut off."""
RETURN_S = 1.0
"""How long a process that found no actor goes on alone before it looks again."""
IDLE_S = 10.0
ASKING = 4
"""Threads of one process that ask for the same bucket at once; the others wait behind them in their own process."""
LATE_S = 0.05
"""How long word of a reply or an end may wait for the next question to go with: a call of an actor costs both sides a
millisecond or two, and a process that brings big files has the next question right after an end."""
ALONE = 2
"""Connections of one process while there is no actor: few, because all the others do the same."""


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
        self._words: list[Word] = []
        self._late_at = math.inf
        """When the oldest of the words has to go, alone if need be."""
        self._spoken = threading.Condition(self._lock)
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
                    self._say(ticket, True, None)
        return ticket if granted else None

    def replied(self, ticket: str, status: int | None, headers: Mapping[str, str]) -> None:
        with self._lock:
            permit = self._held.get(ticket)
            if permit is not None and permit.reply is None:
                reply = (status, spoken(headers))
                self._held[ticket] = Permit(ticket, permit.key, reply)
                # of a refusal everybody wants to know
                self._say(ticket, False, reply, at_once=status is None or status >= 400)

    def leave(self, ticket: str) -> None:
        with self._lock:
            permit = self._held.pop(ticket, None)
            self._say(ticket, True, permit.reply if permit else None)

    def close(self) -> None:
        """Say what has not been said yet."""
        with self._lock:
            self._speak()

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
            with self._lock:
                words = self._taken() if self._actor is not None else ()
            granted = self.ask("turn", self.process, ticket, key, connections, DESK.quiet(key), words)
        return bool(granted)

    def _say(self, ticket: str, ended: bool, reply: Told | None, *, at_once: bool = False) -> None:
        """Wait for no answer; what is lost on the way, a beat repairs. Called with the lock held.

        It goes with the next question, within `LATE_S`; at once where others of this process wait in line, as it may be
        what they wait for.
        """
        self._words.append((ticket, ended, reply))
        if at_once or self._in_line:
            self._speak()
        elif self._late_at == math.inf:
            self._late_at = time.monotonic() + LATE_S
            self._beat()
            self._spoken.notify_all()

    def _taken(self) -> tuple[Word, ...]:
        """The words there are, which whoever asks has to pass on. Called with the lock held."""
        words, self._words, self._late_at = tuple(self._words), [], math.inf
        return words

    def _speak(self) -> None:
        """Called with the lock held."""
        words, actor = self._taken(), self._actor
        if not words or actor is None or not ray.is_initialized():
            return
        try:
            actor.told.remote(self.process, words)
        except Exception:  # noqa: BLE001 - as in `_answer`
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
        beat_at = idle_since + BEAT_S
        while True:
            with self._lock:
                now = time.monotonic()
                if now >= self._late_at:
                    self._speak()
                if now < beat_at:
                    self._spoken.wait(max(0.0, min(beat_at, self._late_at) - now))
                    continue
                beat_at = now + BEAT_S
                if self._held or self._in_line or self._words:
                    idle_since = now
                elif now - idle_since > IDLE_S:
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
            atexit.register(_LINE.close)  # before Ray's own, which was registered when it was imported
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
