"""Work that nodes were given: of dead ones, of which no answer will come, and of those that are to go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest
from hypothesis import given as generated
from hypothesis import strategies as st

from crucible.cluster.given import LOST_S, Given
from crucible.errors import ClusterError
from crucible.refs import NodeId

ANN, BEN = NodeId("ann"), NodeId("ben")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def give(
    given: Given,
    node: NodeId,
    work: Future[int],
    what: str = "work",
    done: Callable[[int], None] = lambda _: None,
    stop: Callable[[], None] = lambda: None,
) -> Future[int]:
    return given.give(what, lambda: node, lambda _: work, done, stop)


def test_what_ends_in_time_ends_as_it_does_alive_or_dead() -> None:
    clock = Clock()
    given = Given(clock)
    good: Future[int] = Future()
    bad: Future[int] = Future()
    answers = give(given, ANN, good), give(given, ANN, bad)
    given.look([BEN])
    clock.now += LOST_S / 2
    given.look([BEN])
    good.set_result(7)
    bad.set_exception(ValueError("as Ray says it"))
    assert answers[0].result(0) == 7
    with pytest.raises(ValueError, match="as Ray says it"):
        answers[1].result(0)
    clock.now += LOST_S
    given.look([BEN])
    assert answers[0].result(0) == 7


def test_what_a_dead_node_was_given_fails_after_a_while_and_what_others_were_does_not() -> None:
    clock = Clock()
    given = Given(clock)
    works: list[Future[int]] = [Future(), Future()]
    stopped: list[str] = []
    lost = give(given, ANN, works[0], stop=lambda: stopped.append("ann"))
    kept = give(given, BEN, works[1])
    given.look([BEN])
    assert not lost.done()
    clock.now += LOST_S
    given.look([BEN])
    with pytest.raises(ClusterError, match="node ann is dead"):
        lost.result(0)
    assert not kept.done()
    assert stopped == [], "who is cut off is not asked for anything"
    works[0].set_result(1)  # it was alive after all: nobody waits for it any more
    works[1].set_result(2)
    assert kept.result(0) == 2
    assert isinstance(lost.exception(0), ClusterError)


def test_a_node_that_was_dead_for_a_moment_begins_anew() -> None:
    clock = Clock()
    given = Given(clock)
    work: Future[int] = Future()
    mine = give(given, ANN, work)
    for alive in ([], [ANN], []):
        given.look([NodeId(name) for name in alive])
        clock.now += LOST_S * 0.8
        given.look([NodeId(name) for name in alive])
    assert not mine.done()


def test_what_is_done_already_is_done_at_once() -> None:
    work: Future[int] = Future()
    work.set_result(3)
    given = Given()
    assert give(given, ANN, work).result(0) == 3
    assert not given.at({ANN})


def test_what_is_under_way_is_told_until_what_came_of_it_is_known() -> None:
    given, work = Given(), Future[int]()
    seen: list[object] = []

    def landed(_: int) -> None:
        seen.append(dict(given.at({ANN})))

    mine = give(given, ANN, work, "items of org/data", done=landed)
    mine.add_done_callback(lambda _: seen.append("heard"))
    assert given.at({ANN, BEN}) == {"items of org/data": 1}
    assert not given.at({BEN})
    assert not given.wait({ANN}, 0)
    waiter = threading.Thread(target=lambda: seen.append(given.wait({ANN}, 30)), daemon=True)
    waiter.start()
    work.set_result(1)
    waiter.join(30)
    assert seen == [{"items of org/data": 1}, "heard", True], "in this order"


def test_what_is_taken_back_is_ended_where_it_runs_and_fails_for_who_waits() -> None:
    given = Given()
    works: list[Future[int]] = [Future(), Future(), Future()]
    stopped: list[int] = []
    mine = [
        give(given, node, work, "items", stop=lambda number=number: stopped.append(number))  # type: ignore[misc]
        for number, (node, work) in enumerate(zip((ANN, BEN, ANN), works, strict=True))
    ]
    works[2].set_result(1)
    assert given.take_back({ANN}, "is drained") == {"items": 1}
    assert stopped == [0]
    with pytest.raises(ClusterError, match="node ann is drained"):
        mine[0].result(0)
    assert (mine[1].done(), mine[2].result(0)) == (False, 1)
    assert not given.at({ANN})
    works[0].set_exception(OSError("killed"))
    assert isinstance(mine[0].exception(0), ClusterError)


def test_work_that_cannot_begin_is_not_under_way() -> None:
    given = Given()

    def fails(_: NodeId) -> Future[int]:
        raise ClusterError("another coordinator has taken over")

    with pytest.raises(ClusterError):
        given.give("items", lambda: ANN, fails, lambda _: None)
    assert not given.at({ANN})


def test_a_result_that_cannot_be_taken_in_fails() -> None:
    given, work = Given(), Future[int]()

    def full(_: int) -> None:
        raise OSError("no room")

    mine = give(given, ANN, work, done=full)
    work.set_result(1)
    with pytest.raises(OSError, match="no room"):
        mine.result(0)
    assert not given.at({ANN})


@generated(st.lists(st.booleans(), max_size=12), st.integers(0, 12))
def test_who_bars_a_node_and_then_asks_hears_of_all_that_it_was_given(answered: list[bool], barred_at: int) -> None:
    given, drained = Given(), set[NodeId]()
    works: list[Future[int]] = []

    def start(node: NodeId) -> Future[int]:
        works.append(Future())
        if node == ANN:
            assert given.at({ANN})
        return works[-1]

    for number, ends in enumerate(answered):
        if number == barred_at:
            drained.add(ANN)
        given.give("items", lambda: BEN if ANN in drained else ANN, start, lambda _: None)
        if ends:
            works[-1].set_result(number)
    open_at_ann = sum(not ends for ends in answered[:barred_at])
    assert given.at({ANN}).total() == open_at_ann
    assert given.at({BEN}).total() == sum(not ends for ends in answered[barred_at:])
