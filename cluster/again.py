"""Work that is begun again where it was when its process died: what that had brought and made is there. No Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

MOST = 2
"""Processes that may die on one piece of work at one place before it is somebody else's to decide."""

T = TypeVar("T")


def again_here(
    start: Callable[[], Future[T]], crashed: Callable[[BaseException], bool], still_there: Callable[[], bool]
) -> Future[T]:
    """A future that ends as `start()` does, which is called again, at most `MOST` times, where its process died.

    `crashed` says of an error whether it was that; `still_there`, which may take seconds, whether the place can go on.
    Where it cannot, the error stands.
    """
    mine: Future[T] = Future()

    def over(done: Future[T], left: int) -> None:
        error = done.exception()
        if error is None:
            mine.set_result(done.result())
        elif left and crashed(error):
            # elsewhere: this is the thread that told us, and asking may need it
            threading.Thread(target=again, args=(error, left - 1), name="crucible-again", daemon=True).start()
        else:
            mine.set_exception(error)

    def again(error: BaseException, left: int) -> None:
        try:
            if still_there():
                start().add_done_callback(lambda done: over(done, left))
                return
        except BaseException as problem:  # noqa: BLE001 - whoever waits must hear of it
            error = problem
        mine.set_exception(error)

    start().add_done_callback(lambda done: over(done, MOST))
    return mine
