"""A plan is performed within bounds, tells how far it is, outlives what goes wrong, and stops when it is told to."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from crucible.cluster.ledger import Order
from crucible.cluster.operation import BATCH_SHARDS, SLOTS, Operation, Recipe, perform
from crucible.cluster.upkeep import Copy, Drop, Plan, Remake
from crucible.errors import ClusterError
from crucible.refs import NodeId, ReadOptions, RepoRef, ShardInfo, WorkItem

A, B, C = (NodeId(name) for name in "abc")


@dataclass
class Fake:
    """Hands that end what they began when `end` is called, in the order of `started`."""

    nodes: set[NodeId] = field(default_factory=lambda: {A, B, C})
    started: list[tuple[str, NodeId, tuple[str, ...], Future[dict[str, str]]]] = field(default_factory=list)
    at_once: bool = True
    problems: dict[str, str] = field(default_factory=dict)
    most_bytes: int = 0
    most_tasks: int = 0
    sizes: dict[str, int] = field(default_factory=dict)

    def reached(self) -> Collection[NodeId]:
        return self.nodes

    def _begin(self, what: str, node: NodeId, keys: Sequence[str]) -> Future[dict[str, str]]:
        future: Future[dict[str, str]] = Future()
        self.started.append((what, node, tuple(keys), future))
        open_ = [one for one in self.started if not one[3].done()]
        self.most_bytes = max(self.most_bytes, sum(self.sizes.get(key, 0) for one in open_ for key in one[2]))
        self.most_tasks = max(self.most_tasks, *Counter(one[1] for one in open_).values())
        if self.at_once:
            threading.Timer(0.001, self.end, (future, keys)).start()
        return future

    def end(self, future: Future[dict[str, str]], keys: Sequence[str]) -> None:
        future.set_result({key: self.problems[key] for key in keys if key in self.problems})

    def copy(self, node: NodeId, shards: Sequence[ShardInfo]) -> Future[dict[str, str]]:
        return self._begin("copy", node, [shard.key for shard in shards])

    def remake(self, node: NodeId, recipe: Recipe) -> Future[dict[str, str]]:
        return self._begin("remake", node, list(recipe.promised))

    def drop(self, node: NodeId, keys: Sequence[str]) -> Future[dict[str, str]]:
        return self._begin("drop", node, keys)


def shard(key: str, size: int) -> ShardInfo:
    return ShardInfo(key, 1, size, "d", "s", 0, 0)


def copies(count: int, size: int, nodes: Sequence[NodeId] = (A, B, C)) -> tuple[Plan, dict[str, ShardInfo]]:
    shards = {f"k{number}": shard(f"k{number}", size) for number in range(count)}
    plan = Plan(copies=tuple(Copy(key, size, nodes[n % len(nodes)], 1) for n, key in enumerate(shards)))
    return plan, shards


def test_bytes_and_tasks_in_flight_are_bounded_and_all_is_done_once() -> None:
    plan, shards = copies(30, 40 << 20)  # two of them are a batch
    hands = Fake(sizes={key: one.size for key, one in shards.items()})
    operation = Operation("repair")
    operation.planned(plan)
    perform(plan, operation, hands, shards, {}, limit_bytes=170 << 20)
    assert Counter(key for _, _, keys, _ in hands.started for key in keys) == Counter(shards.keys())
    assert hands.most_bytes <= 170 << 20
    assert hands.most_tasks <= SLOTS
    told = operation.told()
    assert (told["copied"], told["copies"], told["bytes_done"]) == (30, 30, plan.bytes)
    assert (told["wrong"], told["problems"]) == (0, [])


def test_one_that_is_bigger_than_the_bound_goes_alone() -> None:
    plan, shards = copies(2, 100)
    hands = Fake(sizes={key: one.size for key, one in shards.items()})
    perform(plan, operation := Operation("repair"), hands, shards, {}, limit_bytes=50)
    assert operation.copied == 2
    assert hands.most_bytes == 100


def test_small_shards_go_many_at_a_time_the_most_endangered_first() -> None:
    plan, shards = copies(3 * BATCH_SHARDS, 1, nodes=[A])
    hands = Fake()
    perform(plan, Operation("repair"), hands, shards, {}, limit_bytes=1 << 30)
    assert [len(keys) for _, _, keys, _ in hands.started] == [BATCH_SHARDS] * 3
    assert [key for _, _, keys, _ in hands.started for key in keys] == list(shards)


def test_what_goes_wrong_is_counted_and_said_and_stops_nothing_else() -> None:
    plan, shards = copies(6, 10)
    hands = Fake(nodes={A, B}, problems={"k0": "no peer has it"})
    perform(plan, operation := Operation("repair"), hands, shards, {}, limit_bytes=1 << 30)
    assert operation.copied == 3
    assert operation.wrong == 3
    assert operation.problems == ["node c is gone", "node a: no peer has it"]


def test_a_task_that_fails_whole_is_as_many_wrong_shards() -> None:
    plan, shards = copies(4, 10, nodes=[A])
    hands = Fake(at_once=False)
    operation = Operation("repair")
    work = threading.Thread(target=perform, args=(plan, operation, hands, shards, {}, 1 << 30))
    work.start()
    while not hands.started:
        time.sleep(0.001)
    hands.started[0][3].set_exception(ClusterError("its disk is full"))
    work.join(30)
    assert not work.is_alive()
    assert (operation.copied, operation.wrong, operation.problems) == (0, 4, ["node a: its disk is full"])


def test_lost_shards_are_made_before_copies_and_dropped_after_them() -> None:
    item = WorkItem(0, RepoRef("org/x", "0" * 40), (), ReadOptions("json"), 1)
    recipe = Recipe(item, Order(), {"k1": "d"})
    plan = Plan((Remake("i", A, ("k1",), 5),), (Copy("k0", 7, B, 1),), (Drop("k2", 3, C), Drop("k3", 3, C)))
    hands = Fake(problems={"k3": ""})
    operation = Operation("repair")
    operation.planned(plan)
    perform(plan, operation, hands, {"k0": shard("k0", 7)}, {"i": recipe}, limit_bytes=1)
    assert [what for what, *_ in hands.started] == ["remake", "copy", "drop"]
    told = operation.told()
    assert (told["remade"], told["copied"], told["dropped"], told["drops"]) == (1, 1, 1, 2)
    assert told["wrong"] == 0, "a copy that is in use stays, and nothing is wrong with that"
    assert told["bytes_done"] == told["bytes"] == 12


def test_a_copy_goes_only_if_what_was_to_be_there_instead_is_there() -> None:
    """A move whose copy failed must not end with nothing: the source may still answer, so that nobody else objects."""
    item = WorkItem(0, RepoRef("org/x", "0" * 40), (), ReadOptions("json"), 1)
    recipes = {"made": Recipe(item, Order(), {"k6": "d", "k7": "d"}), "fine": Recipe(item, Order(), {"k8": "d"})}
    plan = Plan(
        (Remake("made", A, ("k6",), 1), Remake("fine", A, ("k8",), 1), Remake("unknown", A, ("k9",), 1)),
        tuple(Copy(f"k{n}", 10, B if n == 3 else A, 1) for n in (1, 2, 3, 4)),
        tuple(Drop(f"k{n}", 10, C) for n in range(1, 10)),
    )
    hands = Fake(nodes={A, C}, problems={"k2": "its disk is full", "k6": "it has other bytes"})
    shards = {key: shard(key, 10) for key in ("k1", "k2", "k3")}  # k4 is in a manifest that could not be read
    perform(plan, Operation("rebalance"), hands, shards, recipes, limit_bytes=1 << 30)
    dropped = [key for what, _, keys, _ in hands.started if what == "drop" for key in keys]
    assert dropped == ["k1", "k5", "k8"]


def test_what_cannot_even_begin_on_a_node_that_went_just_now_stops_nothing_else() -> None:
    class Gone(Fake):
        def drop(self, node: NodeId, keys: Sequence[str]) -> Future[dict[str, str]]:
            if node == A:
                raise ClusterError("it is gone")
            return super().drop(node, keys)

    hands = Gone()
    operation = Operation("rebalance")
    perform(Plan(drops=(Drop("k1", 1, A), Drop("k2", 1, B))), operation, hands, {}, {}, limit_bytes=1)
    assert (operation.dropped, operation.wrong, operation.problems) == (1, 1, ["node a: it is gone"])


def test_what_a_node_had_that_was_cut_off_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crucible.cluster.operation.GONE_S", 0.0)
    plan, shards = copies(4, 10, nodes=[A, B])
    hands = Fake(at_once=False)
    operation = Operation("repair")
    work = threading.Thread(target=perform, args=(plan, operation, hands, shards, {}, 1 << 30))
    work.start()
    while len(hands.started) < 2:
        time.sleep(0.001)
    hands.nodes = {B, C}
    hands.end(*next((future, keys) for _, node, keys, future in hands.started if node == B))
    work.join(30)
    assert not work.is_alive()
    assert (operation.copied, operation.wrong, operation.problems) == (2, 2, ["node a is gone"])


def test_what_is_cancelled_or_out_of_time_starts_nothing_new() -> None:
    for stop in (lambda one: one.cancelled.set(), lambda one: setattr(one, "deadline", time.monotonic())):
        plan, shards = copies(20, 64 << 20, nodes=[A])
        hands = Fake(at_once=False)
        operation = Operation("drain")
        work = threading.Thread(target=perform, args=(plan, operation, hands, shards, {}, 1 << 40))
        work.start()
        while len(hands.started) < SLOTS:
            time.sleep(0.001)
        stop(operation)
        for _, _, keys, future in list(hands.started):
            hands.end(future, keys)
        work.join(30)
        assert not work.is_alive()
        assert len(hands.started) == SLOTS
        assert operation.copied <= SLOTS
