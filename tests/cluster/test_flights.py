"""The same work, wanted twice at once, is done once."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from crucible.cluster.flights import Flights

WAIT_S = 60


class Starts:
    """Futures in the order in which they were asked for; the test ends them."""

    def __init__(self) -> None:
        self.made: list[Future[int]] = []
        self.flights: Flights[int] = Flights()

    def join(self, key: str) -> Future[int]:
        return self.flights.join(key, self._start, lambda result: -result)

    def _start(self) -> Future[int]:
        self.made.append(Future())
        return self.made[-1]

    def wait_for(self, count: int) -> None:
        import time

        deadline = time.monotonic() + WAIT_S
        while len(self.made) < count and time.monotonic() < deadline:
            time.sleep(0.005)
        assert len(self.made) == count


def test_who_comes_while_it_is_under_way_waits_and_starts_nothing() -> None:
    work = Starts()
    first, second, other = work.join("a"), work.join("a"), work.join("b")
    assert len(work.made) == 2
    work.made[0].set_result(5)
    assert (first.result(WAIT_S), second.result(WAIT_S)) == (5, -5)
    assert not other.done()


def test_who_comes_afterwards_starts_anew() -> None:
    work = Starts()
    work.join("a")
    work.made[0].set_result(1)
    assert not work.join("a").done()
    assert len(work.made) == 2


def test_after_a_failure_one_of_those_who_waited_tries_for_all() -> None:
    work = Starts()
    first, second, third = work.join("a"), work.join("a"), work.join("a")
    work.made[0].set_exception(OSError("the first one's"))
    with pytest.raises(OSError, match="first"):
        first.result(WAIT_S)
    work.wait_for(2)
    work.made[1].set_result(7)
    assert sorted([second.result(WAIT_S), third.result(WAIT_S)]) in ([-7, 7], [-7, -7])
    assert len(work.made) == 2


def test_a_failure_of_ones_own_try_is_ones_own() -> None:
    work = Starts()
    work.join("a")
    second = work.join("a")
    work.made[0].set_exception(OSError("the first one's"))
    work.wait_for(2)
    work.made[1].set_exception(ValueError("the second one's"))
    with pytest.raises(ValueError, match="second"):
        second.result(WAIT_S)


def test_what_is_done_at_once_is_not_kept() -> None:
    flights: Flights[int] = Flights()
    done: Future[int] = Future()
    done.set_result(3)
    assert flights.join("a", lambda: done, lambda result: -result).result(WAIT_S) == 3
    assert not flights.join("a", Future, lambda result: -result).done()
