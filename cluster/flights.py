"""Work under way, by what it makes: whoever asks for the same while it is under way waits for it and starts nothing.

Knows neither Ray nor items. Two jobs for one repo are two askers, and the bytes come once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Flights(Generic[T]):
    """Futures by key, for as long as they are not done. Any method from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a future that is done already calls back at once, in the same thread
        self._flying: dict[str, Future[T]] = {}

    def join(self, key: str, start: Callable[[], Future[T]], share: Callable[[T], T]) -> Future[T]:
        """The future of `start()`; or, while one for `key` is under way, one that ends with `share(its result)`.

        A failure is the business of who started it: of those who waited one then starts its own, for the others too.
        What another job may not, or cannot reach, says nothing about this one.
        """
        with self._lock:
            leader = self._flying.get(key)
            if leader is None:
                mine = self._flying[key] = start()
                mine.add_done_callback(lambda _: self._landed(key))
                return mine
        waiting: Future[T] = Future()
        leader.add_done_callback(lambda done: self._follow(key, start, share, done, waiting))
        return waiting

    def _landed(self, key: str) -> None:
        with self._lock:
            self._flying.pop(key, None)

    def _follow(
        self, key: str, start: Callable[[], Future[T]], share: Callable[[T], T], done: Future[T], waiting: Future[T]
    ) -> None:
        if done.exception() is None:
            waiting.set_result(share(done.result()))
            return

        # elsewhere: this is the thread that told us of the failure, and starting work may need it
        def again() -> None:
            try:
                self.join(key, start, share).add_done_callback(lambda own: _copy(own, waiting))
            except BaseException as error:  # noqa: BLE001 - whoever waits must hear of it
                waiting.set_exception(error)

        threading.Thread(target=again, name="crucible-flight", daemon=True).start()


def _copy(done: Future[T], waiting: Future[T]) -> None:
    error = done.exception()
    if error is None:
        waiting.set_result(done.result())
    else:
        waiting.set_exception(error)
