"""Whose turn it is to act: a coordinator takes an epoch, says it with every call, and stops when a later one is known.

Epochs are given out by the GCS, Ray's head, which gives a number once; the agents' stores have the last word
(`fencing`). A head that has forgotten its numbers begins with those that the stores remember.
"""

from __future__ import annotations

import secrets
import threading
import time
from typing import Any

from ray.experimental import internal_kv

from crucible.errors import StaleCoordinator
from crucible.workers.fencing import Epoch
from crucible.workers.tasks import session_name

KV = b"crucible"
"""Namespace of our keys in the GCS."""
PREFIX = b"epoch/"
EPOCHS_KEPT = 64
CUT_OFF_S = 30.0
"""Without a word from Ray's head for so long, a coordinator may have been replaced without hearing of it."""


def take_epoch(least: int) -> Epoch:
    """A turn of our own, with a number that nobody has had: `least` or a higher one."""
    mine = secrets.token_hex(6)
    number = max(least, newest_epoch() + 1)
    # this call stores nothing where there is a value, and returns whether there was one
    while internal_kv._internal_kv_put(_key(number), mine.encode(), overwrite=False, namespace=KV):
        number += 1
    internal_kv._internal_kv_del(_key(number - EPOCHS_KEPT), namespace=KV)
    return Epoch(session_name(), number, mine)


def newest_epoch() -> int:
    """The latest number that was given out in this cluster; 0 when none was."""
    return max(_given(), default=0)


def is_first(epoch: Epoch) -> bool:
    """True if no number was given out in this cluster before that of `epoch`."""
    return min(_given(), default=epoch.number) == epoch.number


def _given() -> list[int]:
    keys = internal_kv._internal_kv_list(PREFIX, namespace=KV) or []
    return [int(key.removeprefix(PREFIX)) for key in keys]


def _key(number: int) -> bytes:
    return PREFIX + b"%020d" % number


class Turn:
    """This coordinator's turn, as its threads see it.

    Concurrency: any method from any thread.
    """

    def __init__(self, epoch: Epoch) -> None:
        self.epoch = epoch
        self.over = threading.Event()
        self._error: StaleCoordinator | None = None
        self._heard_at = time.monotonic()

    def cut_off(self) -> bool:
        """Whether the last look at Ray's head that had an answer was long ago: nobody should rely on this turn now."""
        return time.monotonic() - self._heard_at > CUT_OFF_S

    def check(self) -> None:
        """Raises StaleCoordinator once the turn is over."""
        if self._error is not None:
            raise self._error

    def end(self, error: StaleCoordinator) -> None:
        """Somebody has heard of a later epoch."""
        self._error = self._error or error
        self.over.set()

    def heard(self, error: BaseException) -> None:
        """Judge what came back from a call: raises StaleCoordinator if it was refused for its epoch, else nothing."""
        cause = getattr(error, "cause", error)  # Ray wraps what a call raised
        if isinstance(cause, StaleCoordinator):
            self.end(cause)
            raise cause from error

    def look(self) -> None:
        """Ask the GCS whether a later number was given out. Raises StaleCoordinator."""
        newest = newest_epoch()
        self._heard_at = time.monotonic()
        if newest > self.epoch.number:
            self.end(StaleCoordinator("Ray's head", self.epoch.number, newest))
        self.check()

    def command(self, agent: Any) -> Any:
        """The agent, whose every method then says this turn's epoch; called as an actor's: `agent.keep.remote(...)`.

        `actor` is the agent without that.
        """
        return _Commanded(agent, self)


class _Commanded:
    def __init__(self, agent: Any, turn: Turn) -> None:
        self.actor, self._turn = agent, turn

    def __getattr__(self, method: str) -> _Method:
        return _Method(self.actor, self._turn, method)


class _Method:
    def __init__(self, agent: Any, turn: Turn, name: str) -> None:
        self._agent, self._turn, self._name = agent, turn, name

    def remote(self, *arguments: Any, **named: Any) -> Any:
        self._turn.check()
        return self._agent.obey.remote(self._turn.epoch, self._name, *arguments, **named)
