"""Copies of a job: bounded, tried again elsewhere, and made for what comes late. What the simulation found is here."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from crucible.cluster.copying import COPY_TRIES, Copy, Copying
from crucible.cluster.track import (
    STEP,
    CopyDone,
    CopyFailed,
    CopyShard,
    Event,
    Finish,
    ItemDone,
    JobState,
    NodesChanged,
    Proceed,
    Started,
    apply,
)
from crucible.refs import NodeId
from tests.cluster.test_track import PASSING, items_of, result, run_items

NODES = [NodeId(f"n{number}") for number in range(6)]


def copies_of(commands: list) -> list[CopyShard]:
    return [command for command in commands if isinstance(command, CopyShard)]


def all_done(
    count: int, replicas: int, nodes: list[NodeId], slots: int | None = None, limit: int = 1 << 40, twin=False
):
    """A job whose items are all done, and the copies that it begins with."""
    items = [replace(items_of([10])[0], index=index) for index in range(count)] if twin else items_of([10] * count)
    state = JobState(items, dict.fromkeys(nodes, 1.0), limit, replicas, slots=slots)
    state, commands = apply(state, Started())
    running = run_items(commands)
    while running:
        one = running.pop()
        state, commands = apply(state, ItemDone(result(one.item, one.node)))
        running += run_items(commands)
    return state, copies_of(commands)


def finish(state: JobState, copies: list[CopyShard]) -> JobState:
    while copies:
        one = copies.pop(0)
        state, commands = apply(state, CopyDone(one.shard.key, one.node))
        copies += copies_of(commands)
    assert state.phase == "finished"
    return state


def test_copies_keep_to_the_slots_of_nodes_and_to_the_limit_of_bytes() -> None:
    state, copies = all_done(60, 3, NODES, slots=2)
    assert set(Counter(copy.node for copy in copies).values()) == {2}
    state = finish(state, copies)
    assert all(len(state.done.holders(index, 0)) == 3 for index in range(60))
    state, copies = all_done(60, 3, NODES, limit=250)
    assert len(copies) == 2, "a shard of 100 bytes each"
    finish(state, copies)


def test_a_step_gives_no_more_commands_than_it_may_and_goes_on() -> None:
    state = JobState(items_of([1] * (2 * STEP + 5)), dict.fromkeys(NODES, 1.0), 1 << 40)
    state, commands = apply(state, Started())
    sent = [len(commands)]
    while state.more:
        state, commands = apply(state, Proceed())
        sent.append(len(commands))
    assert sent == [STEP, STEP, 5]


def test_an_item_that_waits_for_a_node_is_looked_at_once_when_the_node_has_room() -> None:
    copying = Copying()
    copying.begin(3, 1)
    assert copying.start(Copy(0, 0, 1), "a", NODES[0])
    for _ in range(50):  # each look at it parked it once more, and each of these parked it again when it was woken
        copying.first(1)
        assert copying.next() == 1
        assert not copying.start(Copy(1, 0, 1), "b", NODES[0])
    copying.ended("a", NODES[0])
    copying.upto = 3
    assert [copying.next(), copying.next()] == [1, None]


def test_nodes_that_join_while_copies_are_made_get_what_was_too_much_for_the_others() -> None:
    state, copies = all_done(8, 3, NODES[:2])
    assert len(copies) == 8
    state, commands = apply(state, NodesChanged(dict.fromkeys(NODES[:3], 1.0)))
    state = finish(state, copies + copies_of(commands))
    assert all(len(state.done.holders(index, 0)) == 3 for index in range(8))


def test_a_holder_that_dies_while_copies_are_made_is_made_up_for() -> None:
    state, copies = all_done(30, 2, NODES)
    one = copies[0]
    state, commands = apply(state, CopyDone(one.shard.key, one.node))
    more = copies_of(commands)
    dead = one.node
    state, commands = apply(state, NodesChanged({node: 1.0 for node in NODES if node != dead}))
    more += copies_of(commands)
    open_copies, again = [*copies[1:], *more], run_items(commands)
    while open_copies or again:
        event: Event
        if again:
            item = again.pop()
            event = ItemDone(result(item.item, item.node))
        else:
            copy = open_copies.pop()
            gone = copy.node == dead
            event = CopyFailed(copy.shard.key, dead, PASSING) if gone else CopyDone(copy.shard.key, copy.node)
        state, commands = apply(state, event)
        open_copies += copies_of(commands)
        again += run_items(commands)
    assert commands[-1:] == [Finish()]
    assert all(len(state.done.holders(index, 0)) == 2 for index in range(30))
    assert state.missed_copies == []
    assert state.inflight == 0


def test_twins_share_their_copies() -> None:
    state, copies = all_done(4, 2, NODES, twin=True)
    assert len({(copy.shard.key, copy.node) for copy in copies}) == len(copies)
    state = finish(state, copies)
    assert all(len(state.done.holders(index, 0)) >= 2 for index in range(4))


def test_copies_that_fail_everywhere_are_given_up_after_some_tries() -> None:
    state, copies = all_done(5, 2, NODES)
    tried: Counter[str] = Counter()
    while copies:
        one = copies.pop()
        tried[one.shard.key] += 1
        state, commands = apply(state, CopyFailed(one.shard.key, one.node, PASSING))
        copies += copies_of(commands)
    assert state.phase == "finished"
    assert set(tried.values()) == {COPY_TRIES}
    assert len(state.missed_copies) == 5
