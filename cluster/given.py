"""What nodes were given to do, so that it counts as failed when its node has been dead for a while. No Ray.

Of what ran on a node that died Ray mostly tells in a moment. Not where the node was cut off: the connection over which
the answer would come then gives up by itself, which takes minutes (2.60), and a job would wait for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

from crucible.errors import ClusterError
from crucible.refs import NodeId

LOST_S = 5.0
"""How long a node is dead before what it was given is taken from it. Longer than Ray takes to tell, where it can."""

T = TypeVar("T")


class Given:
    """Futures by the node that works on them, until they are done. Any method from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._given: dict[Future[Any], NodeId] = {}
        self._dead_since: dict[NodeId, float] = {}

    def watch(self, node: NodeId, work: Future[T]) -> Future[T]:
        """A future that ends as `work` does, or with ClusterError when `look` finds its node dead for long."""
        mine: Future[T] = Future()
        with self._lock:
            self._given[mine] = node

        def over(done: Future[T]) -> None:
            with self._lock:
                self._given.pop(mine, None)
            error = done.exception()
            with suppress(InvalidStateError):  # it came after all, when nobody waited any more
                if error is None:
                    mine.set_result(done.result())
                else:
                    mine.set_exception(error)

        work.add_done_callback(over)
        return mine

    def look(self, alive: Collection[NodeId]) -> None:
        """Told regularly which nodes are alive."""
        now = self._clock()
        with self._lock:
            dead = {node for node in self._given.values() if node not in alive}
            self._dead_since = {node: self._dead_since.get(node, now) for node in dead}
            lost = {node for node, since in self._dead_since.items() if now - since >= LOST_S}
            given_up = [(work, node) for work, node in self._given.items() if node in lost]
            for work, _ in given_up:
                del self._given[work]
        for work, node in given_up:
            with suppress(InvalidStateError):
                work.set_exception(ClusterError(f"node {node[:12]} is dead"))
