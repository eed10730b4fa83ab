"""What nodes were given to do: to be waited for, to be taken back, or to fail where no answer will come. No Ray.

Of what ran on a node that died Ray mostly tells in a moment. Not where the node was cut off: the connection over which
the answer would come then gives up by itself, which takes minutes (2.60), and a job would wait for it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from crucible.errors import ClusterError
from crucible.refs import NodeId

LOST_S = 5.0
"""How long a node is dead before what it was given is taken from it. Longer than Ray takes to tell, where it can."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece:
    """Work that a node was given."""

    node: NodeId
    what: str
    """Such as the job that it is for."""
    stop: Callable[[], None]
    """Ends it where it runs; may be called when it has ended."""


class Given:
    """Futures by the node that works on them, until they are done. Any method from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._given: dict[Future[Any], Piece] = {}
        self._dead_since: dict[NodeId, float] = {}

    def give(
        self,
        what: str,
        choose: Callable[[], NodeId],
        start: Callable[[NodeId], Future[T]],
        done: Callable[[T], None],
        stop: Callable[[], None] = lambda: None,
    ) -> Future[T]:
        """A future that ends as the work does that `start` begins on the node that `choose` says, or with ClusterError
        when `look` finds the node dead for long, or when it is taken back.

        `done` is told of a result before anybody else, and before the work counts as ended. Whoever bars a node from
        what `choose` may say, and then asks `at`, hears of all that the node was given. `choose` must be quick.
        """
        mine: Future[T] = Future()
        with self._changed:
            node = choose()
            self._given[mine] = Piece(node, what, stop)

        def over(ended: Future[T]) -> None:
            error = ended.exception()
            try:
                if error is None:
                    done(ended.result())
            except BaseException as problem:  # noqa: BLE001 - whoever waits must hear of it
                error = problem
            with suppress(InvalidStateError):  # it came after all, when nobody waited any more
                if error is None:
                    mine.set_result(ended.result())
                else:
                    mine.set_exception(error)
            self._end(mine)

        try:
            start(node).add_done_callback(over)
        except BaseException:
            self._end(mine)
            raise
        return mine

    def _end(self, work: Future[Any]) -> None:
        with self._changed:
            self._given.pop(work, None)
            self._changed.notify_all()

    def at(self, nodes: Collection[NodeId]) -> Counter[str]:
        """What is under way on these nodes: how many pieces of each."""
        with self._changed:
            return Counter(piece.what for piece in self._given.values() if piece.node in nodes)

    def wait(self, nodes: Collection[NodeId], wait_s: float) -> bool:
        """Whether nothing is under way on these nodes, which is waited for so long."""
        with self._changed:
            return self._changed.wait_for(lambda: not any(p.node in nodes for p in self._given.values()), wait_s)

    def take_back(self, nodes: Collection[NodeId], why: str) -> Counter[str]:
        """End what is under way on these nodes: it has failed, for a reason that passes elsewhere. What it was."""
        taken = self._fail(nodes, why)
        for piece in taken:
            piece.stop()
        return Counter(piece.what for piece in taken)

    def _fail(self, nodes: Collection[NodeId], why: str) -> list[Piece]:
        with self._changed:
            taken = [(work, piece) for work, piece in self._given.items() if piece.node in nodes]
            for work, _ in taken:
                del self._given[work]
            self._changed.notify_all()
        for work, piece in taken:
            with suppress(InvalidStateError):
                work.set_exception(ClusterError(f"node {piece.node[:12]} {why}"))
        return [piece for _, piece in taken]

    def look(self, alive: Collection[NodeId]) -> None:
        """Told regularly which nodes are alive."""
        now = self._clock()
        with self._changed:
            dead = {piece.node for piece in self._given.values() if piece.node not in alive}
            self._dead_since = {node: self._dead_since.get(node, now) for node in dead}
            lost = {node for node, since in self._dead_since.items() if now - since >= LOST_S}
        if lost:
            self._fail(lost, "is dead")
