"""Work of nodes that are dead, and of which no answer will come."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from crucible.cluster.given import LOST_S, Given
from crucible.errors import ClusterError
from crucible.refs import NodeId

ANN, BEN = NodeId("ann"), NodeId("ben")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_ends_in_time_ends_as_it_does_alive_or_dead() -> None:
    clock = Clock()
    given = Given(clock)
    good: Future[int] = Future()
    bad: Future[int] = Future()
    answers = given.watch(ANN, good), given.watch(ANN, bad)
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
    lost, kept = given.watch(ANN, works[0]), given.watch(BEN, works[1])
    given.look([BEN])
    assert not lost.done()
    clock.now += LOST_S
    given.look([BEN])
    with pytest.raises(ClusterError, match="node ann is dead"):
        lost.result(0)
    assert not kept.done()
    works[0].set_result(1)  # it was alive after all: nobody waits for it any more
    works[1].set_result(2)
    assert kept.result(0) == 2
    assert isinstance(lost.exception(0), ClusterError)


def test_a_node_that_was_dead_for_a_moment_begins_anew() -> None:
    clock = Clock()
    given = Given(clock)
    work: Future[int] = Future()
    mine = given.watch(ANN, work)
    for alive in ([], [ANN], []):
        given.look([NodeId(name) for name in alive])
        clock.now += LOST_S * 0.8
        given.look([NodeId(name) for name in alive])
    assert not mine.done()


def test_what_is_done_already_is_done_at_once() -> None:
    work: Future[int] = Future()
    work.set_result(3)
    assert Given().watch(ANN, work).result(0) == 3
