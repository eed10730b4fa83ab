"""The mind of a job, replayed without Ray: what it commands, for what happened."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.cluster.copying import COPY_TRIES
from crucible.cluster.track import (
    TRIES,
    Command,
    CopyDone,
    CopyFailed,
    CopyShard,
    Event,
    Fail,
    Finish,
    ItemDone,
    ItemFailed,
    JobState,
    NodesChanged,
    RunItem,
    Started,
    apply,
)
from crucible.errors import ClusterError, CorruptFile, SourceUnavailable
from crucible.refs import NodeId, ReadOptions, RepoRef, ShardInfo, SourceFile, WorkItem
from crucible.report import ItemResult

REPO = RepoRef("org/data", "0" * 40)
A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
PASSING = SourceUnavailable("x", "hub", "down")


def items_of(sizes: Sequence[int]) -> list[WorkItem]:
    return [
        WorkItem(i, REPO, (SourceFile(f"{i}.parquet", size, f"{i:064x}", True),), ReadOptions("parquet"), 1 << 20)
        for i, size in enumerate(sizes)
    ]


def result(item: WorkItem, node: NodeId) -> ItemResult:
    shard = ShardInfo(item.shard_key(0), 10, 100, "d" * 64, "s" * 64, item.index, 0)
    return ItemResult(item.index, item.key, node, (shard,), (("s" * 64, ""),))


def started(sizes: Sequence[int], nodes: Sequence[NodeId] = (A, B), limit: int = 1 << 40, replicas: int = 1):
    state = JobState(items_of(sizes), dict.fromkeys(nodes, 1.0), limit, replicas)
    return apply(state, Started())


def run_items(commands: Sequence[Command]) -> list[RunItem]:
    return [command for command in commands if isinstance(command, RunItem)]


def test_items_start_in_the_order_they_will_be_read() -> None:
    _, commands = started([5, 5, 5, 5])
    assert [command.item.index for command in run_items(commands)] == [0, 1, 2, 3]


def test_source_bytes_in_flight_stay_under_the_limit() -> None:
    state, commands = started([60, 60, 60], limit=100)
    assert [command.item.index for command in run_items(commands)] == [0]
    state, commands = apply(state, ItemDone(result(state.items[0], A)))
    assert [command.item.index for command in run_items(commands)] == [1]


def test_an_item_bigger_than_the_limit_runs_alone() -> None:
    state, commands = started([500, 1], limit=100)
    assert [command.item.index for command in run_items(commands)] == [0]
    _, commands = apply(state, ItemDone(result(state.items[0], A)))
    assert [command.item.index for command in run_items(commands)] == [1]


def test_a_failure_that_may_pass_is_tried_on_another_node() -> None:
    state, commands = started([10])
    first = run_items(commands)[0].node
    _, commands = apply(state, ItemFailed(0, first, PASSING, True))
    assert run_items(commands)[0].node != first


def with_spares(sizes: Sequence[int], nodes: Sequence[NodeId]):
    state = JobState(items_of(sizes), dict.fromkeys(nodes, 1.0), 1 << 40, part_bytes=100)
    return apply(state, Started())


def test_only_items_with_a_big_file_have_a_spare_and_only_where_there_is_another_node() -> None:
    _, commands = with_spares([100, 101], [A, B, C])
    small, big = run_items(commands)
    assert small.spare is None
    assert big.spare in {A, B, C} - {big.node}
    assert [command.spare for command in run_items(with_spares([101], [A])[1])] == [None]


@pytest.mark.parametrize("seen_first", ["the task", "the node"])
def test_an_item_of_a_lost_node_goes_to_its_spare(seen_first: str) -> None:
    nodes = [NodeId(f"n{number}") for number in range(7)]
    state, commands = with_spares([500] * 40, nodes)
    first = {command.item.index: command for command in run_items(commands)}
    lost = first[0].node
    rest = {node: 1.0 for node in nodes if node != lost}
    fallen = [command for command in first.values() if command.node == lost]
    events: list[Event] = [ItemFailed(c.item.index, lost, PASSING, True) for c in fallen]
    gone = NodesChanged(rest)
    again: list[RunItem] = []
    for event in [*events, gone] if seen_first == "the task" else [gone, *events]:
        state, commands = apply(state, event)
        again += run_items(commands)
    assert {c.item.index: c.node for c in again} == {c.item.index: c.spare for c in fallen}
    known = {node for node in nodes if seen_first == "the task" or node in rest}
    assert all(c.spare in known - {c.node} for c in again), "and has a spare again"
    assert len({c.node for c in again}) > 1, "what one node loses is spread"


def test_when_the_spare_is_gone_too_another_node_takes_the_item() -> None:
    state, commands = with_spares([500], [A, B, C])
    first = run_items(commands)[0]
    (last,) = {A, B, C} - {first.node, first.spare}
    state, _ = apply(state, NodesChanged({last: 1.0}))
    _, commands = apply(state, ItemFailed(0, first.node, PASSING, True))
    assert [(c.node, c.spare) for c in run_items(commands)] == [(last, None)]


def test_an_item_that_keeps_failing_ends_the_job_with_its_error() -> None:
    state, commands = started([10], nodes=[A])
    for _ in range(TRIES - 1):
        state, commands = apply(state, ItemFailed(0, A, PASSING, True))
        assert len(run_items(commands)) == 1
    state, commands = apply(state, ItemFailed(0, A, PASSING, True))
    assert commands == [Fail(PASSING)]


def test_after_an_error_that_will_not_pass_nothing_new_starts_but_what_runs_may_finish() -> None:
    corrupt = CorruptFile("0.parquet", "", "not parquet")
    state, _ = started([60, 60, 60], limit=130)
    state, commands = apply(state, ItemFailed(0, A, corrupt, False))
    assert commands == []
    state, commands = apply(state, ItemDone(result(state.items[1], A)))
    assert commands == [Fail(corrupt)]


def test_a_lost_node_gives_back_only_its_own_unreplicated_items() -> None:
    state, _ = started([10, 10, 10])
    state, _ = apply(state, ItemDone(result(state.items[0], A)))
    state, _ = apply(state, ItemDone(result(state.items[1], B)))
    state, commands = apply(state, NodesChanged({B: 1.0}))
    assert [(command.item.index, command.node) for command in run_items(commands)] == [(0, B)]


def test_a_shard_is_lost_when_its_last_holder_goes_wherever_it_was_born() -> None:
    state, _ = started([10], nodes=[A, B, C], replicas=2)
    state, commands = apply(state, ItemDone(result(state.items[0], A)))
    copy = commands[0]
    assert isinstance(copy, CopyShard)
    state, _ = apply(state, NodesChanged({B: 1.0, C: 1.0}))
    state, commands = apply(state, CopyFailed(copy.shard.key, copy.node, PASSING))
    born = state.homes[0]
    state, commands = apply(state, ItemDone(result(state.items[0], born)))
    copy = commands[0]
    assert isinstance(copy, CopyShard)
    state, commands = apply(state, NodesChanged({copy.node: 1.0}))
    assert [(command.item.index, command.node) for command in run_items(commands)] == [(0, copy.node)]


def test_work_that_a_lost_node_still_reports_is_done_again() -> None:
    state, _ = started([10], nodes=[A, B])
    state, _ = apply(state, NodesChanged({B: 1.0}))
    state, commands = apply(state, ItemDone(result(state.items[0], A)))
    assert [(command.item.index, command.node) for command in run_items(commands)] == [(0, B)]
    _, commands = apply(state, ItemDone(result(state.items[0], B)))
    assert commands == [Finish()]


def test_when_every_node_is_gone_the_job_fails() -> None:
    state, _ = started([10])
    state, commands = apply(state, NodesChanged({}))
    assert commands == []  # Ray will still report the running task
    _, commands = apply(state, ItemFailed(0, A, ClusterError("node died"), True))
    assert isinstance(commands[0], Fail)


def test_replicas_are_copied_to_other_nodes_before_the_job_ends() -> None:
    state, _ = started([10, 10], nodes=[A, B, C], replicas=2)
    state, _ = apply(state, ItemDone(result(state.items[0], A)))
    state, commands = apply(state, ItemDone(result(state.items[1], B)))
    copies = [command for command in commands if isinstance(command, CopyShard)]
    assert len(copies) == 2
    assert all(copy.node not in copy.holders for copy in copies)
    state, commands = apply(state, CopyDone(copies[0].shard.key, copies[0].node))
    assert commands == []
    copy, tried = copies[1], []
    while True:
        tried.append(copy.node)
        state, commands = apply(state, CopyFailed(copy.shard.key, copy.node, PASSING))
        if commands == [Finish()]:
            break
        (copy,) = [command for command in commands if isinstance(command, CopyShard)]
    assert len(tried) == COPY_TRIES
    assert tried[0] != tried[1], "elsewhere, as there is an elsewhere"
    assert state.missed_copies == [PASSING]


def test_an_item_that_a_node_has_done_already_is_sent_there() -> None:
    state = JobState(items_of([10, 10]), {A: 1.0, B: 1.0}, 1 << 40, prefer={0: B, 1: NodeId("gone")})
    _, commands = apply(state, Started())
    homes = {command.item.index: command.node for command in run_items(commands)}
    assert homes[0] == B
    assert homes[1] in (A, B)


def test_no_items_finish_at_once() -> None:
    assert started([])[1] == [Finish()]


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 100), max_size=12),
    choices=st.lists(st.integers(0, 1 << 16), min_size=60, max_size=60),
    limit=st.integers(1, 300),
    replicas=st.integers(1, 3),
)
def test_every_job_ends_and_a_finished_one_has_every_item(
    sizes: list[int], choices: list[int], limit: int, replicas: int
) -> None:
    """Any interleaving of outcomes: the limit holds, nothing runs twice at once, and replaying gives the same."""
    log: list[Event] = [Started()]
    nodes = [A, B, C]
    state = JobState(items_of(sizes), dict.fromkeys(nodes, 1.0), limit, replicas, part_bytes=50)
    open_commands: list[Command] = []
    ended: Command | None = None
    seen: list[Command] = []
    state, commands = apply(state, log[0])
    for choice in choices * 20:
        seen += commands
        for command in commands:
            if isinstance(command, (Finish, Fail)):
                assert ended is None
                ended = command
            else:
                open_commands.append(command)
        assert all(c.spare is None or c.spare in set(state.nodes) - {c.node} for c in run_items(commands))
        assert state.spares.keys() <= state.running.keys()
        running = run_items(open_commands)
        assert len({command.item.index for command in running}) == len(running)
        in_flight = sum(command.item.size for command in running)
        assert in_flight <= limit or len(running) == 1 or in_flight - max(c.item.size for c in running) == 0
        if ended or not open_commands:
            break
        command = open_commands.pop(choice % len(open_commands))
        event: Event
        if isinstance(command, RunItem):
            gone = command.node not in state.nodes
            if gone or choice % 7 == 0:
                event = ItemFailed(command.item.index, command.node, PASSING, True)
            else:
                event = ItemDone(result(command.item, command.node))
        else:
            assert isinstance(command, CopyShard)
            if choice % 5 == 0 or command.node not in state.nodes:
                event = CopyFailed(command.shard.key, command.node, PASSING)
            else:
                event = CopyDone(command.shard.key, command.node)
        if choice % 31 == 0 and len(state.nodes) > 1:
            fewer = dict(list(state.nodes.items())[1:])
            log.append(NodesChanged(fewer))
            state, commands = apply(state, log[-1])
            log.append(event)
            state, more = apply(state, event)
            commands += more
        else:
            log.append(event)
            state, commands = apply(state, event)
    assert ended is not None
    if isinstance(ended, Finish):
        assert sorted(state.done) == list(range(len(sizes)))
        assert all(state.done.holders(i, n) for i, done in state.done.items() for n in range(len(done.shards)))
    again = JobState(items_of(sizes), dict.fromkeys(nodes, 1.0), limit, replicas, part_bytes=50)
    replayed: list[Command] = []
    for event in log:
        again, commands = apply(again, event)
        replayed += commands
    assert replayed == seen


def test_the_mind_stays_quick_when_there_are_many_items() -> None:
    """Linear, not quadratic: ten times the items may take about ten times as long, never a hundred times."""
    import time

    def cost(count: int) -> float:
        began = time.thread_time()
        state, _ = started([1] * count, limit=100)
        for index in range(count):
            state, _ = apply(state, ItemDone(result(state.items[index], A)))
        assert state.phase == "finished"
        return time.thread_time() - began

    cost(100)
    few = min(cost(1_000) for _ in range(3))
    assert min(cost(10_000) for _ in range(3)) < 40 * few  # the best of some: time that was stolen counts as spent


@pytest.mark.parametrize("event", [CopyDone("x" * 64, A), NodesChanged({A: 1.0})])
def test_events_after_the_end_change_nothing(event: Event) -> None:
    state, _ = started([])
    assert apply(state, event)[1] == []
