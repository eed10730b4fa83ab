"""Do a file's work on several threads and give the results in the file's order, in bounded memory. Pure of any format.

Arrow lets go of the interpreter's lock while it decodes, so threads of one process are enough. What comes out does not
depend on the number of threads, nor on which of them was faster: one thread gives the same items in the same order.
An error is raised where its item would have come; a consumer that leaves early ends all threads before it goes on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

LANE_BYTES = 16 << 20
"""What one thread may have ready before somebody takes it: one batch of the biggest usual size."""


class _Left(Exception):
    """Nobody wants the items any more."""


class _Lane(Generic[Item]):
    """Items on their way from the thread that makes them to the one that takes them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ready: deque[tuple[Item, int]] = deque()
        self._bytes = 0
        self._ended = self._left = False
        self._error: BaseException | None = None

    def fill(self, work: Callable[[], Iterator[Item]], size_of: Callable[[Item], int]) -> None:
        try:
            for item in work():
                size = size_of(item)
                with self._changed:
                    self._changed.wait_for(lambda: self._left or not self._ready or self._bytes < LANE_BYTES)
                    if self._left:
                        return
                    self._ready.append((item, size))
                    self._bytes += size
                    self._changed.notify_all()
                del item  # or it would be held until the next one is made
        except BaseException as error:  # noqa: BLE001 - it is raised again by the thread that takes
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def items(self) -> Iterator[Item]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._ended)
                if not self._ready:
                    if self._error is not None:
                        raise self._error
                    return
                item, size = self._ready.popleft()
                self._bytes -= size
                self._changed.notify_all()
            yield item
            del item

    def leave(self) -> None:
        with self._changed:
            self._left = True
            self._ready.clear()
            self._changed.notify_all()


def streams_in_order(
    works: Iterable[Callable[[], Iterator[Item]]], threads: int, size_of: Callable[[Item], int]
) -> Iterator[Item]:
    """All items of all `works`, one work after the other; `threads` of them run at once.

    Holds about `LANE_BYTES` of ready items a thread, and what each thread has in its hands.
    """
    if threads <= 1:
        for work in works:
            yield from work()
        return
    lanes: deque[_Lane[Item]] = deque()
    rest = iter(works)
    with ThreadPoolExecutor(threads, thread_name_prefix="crucible-decode") as pool:
        try:
            while True:
                while len(lanes) < threads and (following := next(rest, None)) is not None:
                    lanes.append(_Lane())
                    pool.submit(lanes[-1].fill, following, size_of)
                if not lanes:
                    return
                yield from lanes[0].items()
                lanes.popleft()
        finally:
            for lane in lanes:
                lane.leave()


def made_in_order(
    items: Iterable[Item], make: Callable[[Item], Made], threads: int
) -> Iterator[tuple[Item, Callable[[], Made]]]:
    """Each item with a way to get `make(item)`, which `threads` threads have begun before it is asked for.

    `items` is read by a thread of its own when `threads` is above 1. At most `threads + 2` items exist at once.
    """
    if threads <= 1:
        for item in items:
            yield item, lambda item=item: make(item)  # type: ignore[misc]
        return
    lane: _Lane[Item] = _Lane()
    begun: deque[tuple[Item, Future[Made]]] = deque()
    error: Exception | None = None
    with ThreadPoolExecutor(threads + 1, thread_name_prefix="crucible-decode") as pool:
        try:
            pool.submit(lane.fill, lambda: iter(items), lambda _: LANE_BYTES)
            stream = lane.items()
            while True:
                try:
                    item = next(stream)
                except StopIteration:
                    break
                except Exception as problem:  # noqa: BLE001 - it comes after the items that were before it
                    error = problem
                    break
                begun.append((item, pool.submit(make, item)))
                del item
                if len(begun) >= threads:
                    yield _taken(begun)
            while begun:
                yield _taken(begun)
            if error is not None:
                raise error
        finally:
            lane.leave()
            for _, future in begun:
                future.cancel()


def _taken(begun: deque[tuple[Any, Future[Made]]]) -> tuple[Any, Callable[[], Made]]:
    item, future = begun.popleft()
    return item, future.result
