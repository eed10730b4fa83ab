"""Whose turn it is: what readers wait for comes before the rest, and no node is given more than its share at a time."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.cluster.track import (
    Event,
    Finish,
    ItemDone,
    ItemFailed,
    JobState,
    NodesChanged,
    Started,
    Wished,
    apply,
)
from crucible.refs import NodeId
from tests.cluster.test_track import PASSING, A, items_of, result, run_items

NODES = [NodeId(f"n{number}") for number in range(4)]


def job(count: int, nodes: list[NodeId], slots: int | None, limit: int = 1 << 40) -> JobState:
    return JobState(items_of([1] * count), dict.fromkeys(nodes, 1.0), limit, slots=slots)


def order_of(state: JobState, *events: Event) -> list[int]:
    """The items in the order in which they start, one at a time, after these events."""
    started: list[int] = []
    for event in events:
        state, commands = apply(state, event)
        started += [command.item.index for command in run_items(commands)]
    while state.running:
        state, commands = apply(state, ItemDone(result(state.items[next(iter(state.running))], A)))
        started += [command.item.index for command in run_items(commands)]
    return started


def test_what_a_reader_waits_for_starts_next_in_the_order_of_its_list() -> None:
    assert order_of(job(8, [A], 1), Started(), Wished((6, 3))) == [0, 6, 3, 1, 2, 4, 5, 7]
    assert order_of(job(8, [A], None, limit=1), Started(), Wished((6, 3))) == [0, 6, 3, 1, 2, 4, 5, 7]


def test_of_two_readers_each_gets_its_first_before_one_gets_its_second() -> None:
    wishes = Wished((5, 6, 7)), Wished((3, 2))
    assert order_of(job(8, [A], 1), Started(), *wishes) == [0, 5, 3, 6, 2, 7, 1, 4]


def test_a_wish_can_only_make_an_item_come_sooner() -> None:
    wishes = Wished((5, 4)), Wished((1, 2, 5))
    assert order_of(job(6, [A], 1), Started(), *wishes)[:3] == [0, 5, 1]


def test_who_waits_for_a_late_item_is_not_passed_by_one_that_goes_from_item_to_item() -> None:
    state, commands = apply(job(12, [A], 1), Started())
    state, _ = apply(state, Wished((11,)))
    started = []
    for _ in range(3):
        (running,) = state.running
        state, more = apply(state, Wished((running + 1, running + 2)))  # what the other reads now is being made
        assert not more
        state, commands = apply(state, ItemDone(result(state.items[running], A)))
        started += [command.item.index for command in run_items(commands)]
    assert started == [11, 1, 2]


def test_wishes_for_what_runs_or_is_done_or_does_not_exist_change_nothing() -> None:
    state, _ = apply(job(3, [A], 1), Started())
    state, commands = apply(state, Wished((0, 99)))
    assert commands == []
    state, commands = apply(state, ItemDone(result(state.items[0], A)))
    state, more = apply(state, Wished((0,)))
    assert ([c.item.index for c in run_items(commands)], more) == ([1], [])


def test_what_failed_is_tried_again_before_any_wish() -> None:
    state, _ = apply(job(4, [A], 1), Started())
    state, _ = apply(state, Wished((3,)))
    _, commands = apply(state, ItemFailed(0, A, PASSING, True))
    assert [c.item.index for c in run_items(commands)] == [0]


def test_a_node_that_is_full_holds_nobody_else_up() -> None:
    state, commands = apply(job(200, NODES, 2), Started())
    sent = Counter(command.node for command in run_items(commands))
    assert sent == dict.fromkeys(NODES, 2)
    first = run_items(commands)[0]
    state, commands = apply(state, ItemDone(result(first.item, first.node)))
    assert [command.node for command in run_items(commands)] == [first.node]
    began = run_items(commands)[0].item.index
    assert began == min(index for index in {*state.waiting, began} if state.homes[index] == first.node)


@settings(deadline=None)
@given(
    count=st.integers(0, 30),
    slots=st.one_of(st.none(), st.integers(1, 3)),
    limit=st.integers(1, 12),
    choices=st.lists(st.integers(0, 1 << 16), min_size=20, max_size=60),
)
def test_whatever_is_wished_for_every_item_runs_once_and_no_node_has_too_many(
    count: int, slots: int | None, limit: int, choices: list[int]
) -> None:
    state, commands = apply(job(count, NODES, slots, limit), Started())
    running = run_items(commands)
    started = [command.item.index for command in running]
    turn = 0
    while running:
        choice = choices[turn % len(choices)]
        turn += 1
        if choice % 3 == 0:
            wished = tuple((choice * step) % max(1, count) for step in range(1, 5))
            state, commands = apply(state, Wished(wished))
        else:
            command = running.pop(choice % len(running))
            state, commands = apply(state, ItemDone(result(command.item, command.node)))
        running += run_items(commands)
        started += [command.item.index for command in run_items(commands)]
        at_work = Counter(command.node for command in running)
        assert slots is None or all(number <= slots for number in at_work.values())
        room = {node for node in NODES if slots is None or at_work[node] == 0}  # a slow node gets fewer than its slots
        blocked = len(running) >= limit
        assert blocked or not any(state.homes[index] in room for index in state.waiting), "room is used"
        if turn > 1000:  # only wishes in `choices`
            return
    assert sorted(started) == list(range(count))
    assert commands[-1:] == [Finish()]


def test_a_node_that_joins_takes_from_the_longest_line_at_once() -> None:
    state, commands = apply(job(60, NODES[:2], 2), Started())
    state, commands = apply(state, NodesChanged(dict.fromkeys(NODES[:3], 1.0)))
    assert [command.node for command in run_items(commands)] == [NODES[2]] * 2
    taken = {command.item.index for command in run_items(commands)}
    assert taken.isdisjoint(state.waiting)
    assert all(state.homes[index] in NODES[:2] for index in state.waiting), "nothing else moves"


def test_a_node_that_ends_little_is_given_one_item_at_a_time_and_its_line_goes_to_others() -> None:
    slow = NODES[0]
    state, commands = apply(job(400, NODES, 4), Started())
    running = run_items(commands)
    while any(command.node != slow for command in running):
        for command in [command for command in running if command.node != slow]:
            running.remove(command)
            state, commands = apply(state, ItemDone(result(command.item, command.node)))
            running += run_items(commands)
    assert [command.node for command in running] == [slow] * 4
    assert not state.waiting, "all but what it was sent is done"

    state, commands = apply(job(400, NODES, 4), Started())
    running, turn = run_items(commands), 0
    most = 0
    while running:
        turn += 1
        for command in [command for command in running if command.node != slow or turn % 20 == 0]:
            running.remove(command)
            state, commands = apply(state, ItemDone(result(command.item, command.node)))
            running += run_items(commands)
            if command.node == slow and turn > 40:
                most = max(most, sum(command.node == slow for command in running))
    assert most < 4
    assert commands[-1:] == [Finish()]


def test_what_failed_is_not_taken_from_the_node_that_was_sent_its_ranges() -> None:
    state, commands = apply(job(9, NODES[:2], 1), Started())
    first, other = run_items(commands)
    while len(state.waiting):
        state, commands = apply(state, ItemDone(result(other.item, other.node)))
        (other,) = run_items(commands)
    state, commands = apply(state, ItemFailed(first.item.index, first.node, PASSING, True))
    assert (run_items(commands), state.homes[first.item.index]) == ([], other.node), "it waits for its heir"
    state, commands = apply(state, ItemDone(result(other.item, other.node)))
    assert [(c.item.index, c.node) for c in run_items(commands)] == [(first.item.index, other.node)]


def test_the_same_news_twice_changes_nothing() -> None:
    state, commands = apply(job(6, NODES[:2], 1), Started())
    one = run_items(commands)[0]
    done, failed = ItemDone(result(one.item, one.node)), ItemFailed(one.item.index, one.node, PASSING, True)
    state, commands = apply(state, done)
    assert len(commands) == 1
    for event in (done, failed):
        state, commands = apply(state, event)
        assert commands == []
    assert one.item.index in state.done
