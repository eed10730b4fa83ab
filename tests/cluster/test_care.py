"""What a coordinator does by itself when nodes go, and what it answers; over hands that do everything at once."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from crucible.cluster.admin import Admin
from crucible.cluster.care import MENDING, Care
from crucible.cluster.ledger import Choice, Order
from crucible.errors import ClusterError, DiskFull, UsageError
from crucible.refs import NodeId
from tests.cluster.caring import CLUSTER, caring, make_manifest

NODES = ("aaaa", "bbbb", "cccc")


def ended(care: Care, told: dict[str, Any]) -> dict[str, Any]:
    found = care.operation(told["operation"], 30)
    assert found["phase"] == "done", found
    return found


def rest(care: Care) -> None:
    """Until nobody looks for a loss, and no operation is at work."""
    deadline = time.monotonic() + 30
    while any(thread.name == MENDING for thread in threading.enumerate()) or any(
        one["phase"] not in ("done", "failed", "cancelled") for one in care.operations()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def looked(care: Care) -> None:
    care.look(alone=False)
    rest(care)


def test_a_loss_is_made_up_for_after_a_while_once_and_only_what_this_cluster_made(tmp_path: Path) -> None:
    mine, other = make_manifest(6), make_manifest(4, repo="org/old")
    care, agents, hands = caring(tmp_path, NODES, [mine, other], repair_after_s=0.05)
    for number, shard in enumerate(mine.shards):
        agents.catalog.add(NodeId(NODES[number % 3]), [shard.key])
        agents.catalog.add(NodeId(NODES[(number + 1) % 3]), [shard.key])
    care.learn()
    care.promise(mine.id, Order(2, CLUSTER))
    care.promise(other.id, Order(1, "a cluster before"))
    looked(care)
    time.sleep(0.06)
    looked(care)
    rest(care)
    assert care.operations() == [], "nothing was lost; what an earlier cluster had is not fetched unasked"
    agents.lose("bbbb")
    looked(care)
    assert care.operations() == [], "it may come back"
    time.sleep(0.06)
    looked(care)
    rest(care)
    (done,) = care.operations()
    assert (done["copied"], done["left"], hands.remade) == (4, 0, [])
    time.sleep(0.06)
    looked(care)
    assert len(care.operations()) == 1, "once is enough"
    assert ended(care, care.start_repair())["remade"] == 4, "who asks gets the rest, too"
    assert len(hands.remade) == 4


def test_what_was_evicted_on_purpose_is_not_brought_back_by_itself(tmp_path: Path) -> None:
    manifest = make_manifest(4)
    care, agents, hands = caring(tmp_path, NODES, [manifest], repair_after_s=0.01)
    keys = [shard.key for shard in manifest.shards]
    agents.catalog.add(NodeId("aaaa"), keys)
    care.learn()
    care.promise(manifest.id, Order(1, CLUSTER))
    care._source_is_there = lambda *_: True  # type: ignore[method-assign]
    assert care.could_drop(NodeId("aaaa"), keys) == keys
    assert care.may_drop(NodeId("aaaa"), keys[:2]) == keys[:2]
    looked(care)
    agents.lose("cccc")
    looked(care)
    time.sleep(0.02)
    looked(care)
    rest(care)
    assert hands.remade == []
    assert ended(care, care.start_repair(Choice("org/data")))["remade"] == 2
    assert set(hands.remade) == set(keys[:2])


def test_the_last_copy_goes_only_while_its_source_answers(tmp_path: Path) -> None:
    manifest = make_manifest(2)
    care, agents, _ = caring(tmp_path, NODES, [manifest])
    first, second = (shard.key for shard in manifest.shards)
    agents.catalog.add(NodeId("aaaa"), [first, second])
    agents.catalog.add(NodeId("bbbb"), [first])
    care.learn()
    care._source_is_there = lambda *_: False  # type: ignore[method-assign]
    assert care.may_drop(NodeId("aaaa"), [first, second]) == [first]
    assert care.may_drop(NodeId("bbbb"), [first]) == [], "the other has just been allowed to drop it"
    care.order("drain", "bbbb", {"cluster": CLUSTER})
    agents.catalog.add(NodeId("cccc"), [first])
    assert care.may_drop(NodeId("cccc"), [first]) == [], "a node that goes is no place to keep it"


def test_a_drained_node_stays_drained_for_this_cluster_and_ray_may_drain_too(tmp_path: Path) -> None:
    manifest = make_manifest(4)
    care, agents, hands = caring(tmp_path, NODES, [manifest])
    agents.catalog.add(NodeId("aaaa"), [shard.key for shard in manifest.shards])
    told = ended(care, care.start_drain(["10.0.0.0"]))
    assert (told["copied"], told["left"]) == (4, 0)
    assert set(agents.drained) == {"aaaa"}
    agents.catalog.remove(NodeId("aaaa"), [manifest.shards[0].key])
    hands.answers["weight"] = {NodeId(name): 1e6 for name in NODES}
    ended(care, care.start_rebalance())
    assert agents.catalog.held(NodeId("aaaa")) == 3, "nothing comes to it"
    assert care.undrain(["aaaa", "bbbb"]) == ["aaaa"]
    assert set(agents.drained) == set()
    hands.leaving = {NodeId("cccc"): 60.0}
    care.order("drain", "zzzz", {"cluster": "a cluster before"})
    looked(care)
    assert set(agents.drained) == {"cccc"}, "the order about a node of another cluster is void"
    with pytest.raises(UsageError, match="no node"):
        care.start_drain(["dddd"])
    with pytest.raises(UsageError, match="more than one"):
        care.start_drain(["10.0.0"])


def test_drained_nodes_with_nobody_left_to_take_what_they_hold_say_so(tmp_path: Path) -> None:
    manifest = make_manifest(4)
    care, agents, _ = caring(tmp_path, NODES[:2], [manifest])
    agents.catalog.add(NodeId("aaaa"), [shard.key for shard in manifest.shards])
    told = ended(care, care.start_drain(["aaaa", "bbbb"]))
    assert (told["copied"], told["left"]) == (0, 4), "whoever stops these nodes now loses all"


def test_what_no_store_has_any_more_is_forgotten(tmp_path: Path) -> None:
    manifest = make_manifest(2)
    care, _, _ = caring(tmp_path, NODES, [manifest])
    care.learn()
    care.promise(manifest.id, Order(2, CLUSTER))
    assert care.meant(Choice("org/data")) == [manifest.id]
    (tmp_path / "manifests" / f"{manifest.id}.json").unlink()
    care.learn()
    assert manifest.id not in care.ledger
    with pytest.raises(UsageError, match="org/data"):
        care.meant(Choice("org/data"))


def test_a_repair_that_nobody_asked_for_and_that_failed_is_tried_again_later(tmp_path: Path) -> None:
    manifest = make_manifest(4)
    care, agents, hands = caring(tmp_path, NODES[:2], [manifest], repair_after_s=0.01)
    agents.catalog.add(NodeId("aaaa"), [shard.key for shard in manifest.shards])
    agents.catalog.add(NodeId("bbbb"), [shard.key for shard in manifest.shards])
    care.learn()
    care.promise(manifest.id, Order(2, CLUSTER))
    looked(care)
    agents.lose("bbbb")
    agents.nodes[NodeId("cccc")] = "http://10.0.0.9:1"
    hands.reached = lambda: []  # type: ignore[method-assign]
    looked(care)
    time.sleep(0.02)
    looked(care)
    rest(care)
    assert care.operations()[-1]["left"] == 4
    assert care._wait_s >= 10
    assert care._lost_at is not None, "it will be tried again"


def test_a_loss_is_not_forgotten_where_nobody_could_look_after_it_just_now(tmp_path: Path) -> None:
    """Neither a disk that takes no order, nor an answer that does not come, nor an operation that fails is its end."""
    manifest = make_manifest(4)
    care, agents, hands = caring(tmp_path, NODES, [manifest], repair_after_s=0.01)
    keys = [shard.key for shard in manifest.shards]
    for name in NODES[:2]:
        agents.catalog.add(NodeId(name), keys)
    care.learn()
    care.promise(manifest.id, Order(2, CLUSTER))
    care.order("drain", "zzzz", {"cluster": "a cluster before"})
    care.order("wanted", "m" * 64, {"replicas": 1})

    def full(*_: Any) -> None:
        raise DiskFull(str(tmp_path), "1 byte", "here")

    note, ask, details = care._notes.note, hands.ask, care._details
    care._notes.note = full  # type: ignore[method-assign]
    looked(care)
    agents.lose("bbbb")
    looked(care)
    time.sleep(0.02)
    hands.ask = full  # type: ignore[method-assign]
    looked(care)
    assert (care._lost_at is not None, care.operations()) == (True, [])
    hands.ask, care._wait_s = ask, 0.0  # type: ignore[method-assign]
    care._details = full  # type: ignore[method-assign]
    time.sleep(0.02)
    looked(care)
    rest(care)
    assert care.operations()[-1]["phase"] == "failed"
    assert care._lost_at is not None, "it will be tried again"
    care._details, care._wait_s = details, 0.0  # type: ignore[method-assign]
    time.sleep(0.02)
    looked(care)
    rest(care)
    assert (care.operations()[-1]["phase"], agents.catalog.held(NodeId("cccc"))) == ("done", 4)
    care._notes.note = note  # type: ignore[method-assign]


def test_while_a_loss_is_looked_after_others_are_seen_to_come_and_go(tmp_path: Path) -> None:
    """All nodes are asked then, and a plan for a million shards takes seconds."""
    manifest = make_manifest(4)
    care, agents, hands = caring(tmp_path, NODES, [manifest], repair_after_s=0.01)
    for name in NODES[:2]:
        agents.catalog.add(NodeId(name), [shard.key for shard in manifest.shards])
    care.learn()
    care.promise(manifest.id, Order(2, CLUSTER))
    looked(care)
    agents.lose("bbbb")
    looked(care)
    asked, answer, ask = threading.Event(), threading.Event(), hands.ask

    def late(method: str, *said: Any, **how: Any) -> tuple[dict[NodeId, Any], dict[NodeId, str]]:
        if threading.current_thread().name == MENDING:
            asked.set()
            assert answer.wait(30)
        return ask(method, *said, **how)

    hands.ask = late  # type: ignore[method-assign]
    time.sleep(0.02)
    try:
        care.look(alone=False)
        assert asked.wait(30)
        hands.leaving = {NodeId("cccc"): None}
        for _ in range(3):
            care.look(alone=False)
        assert [one["kind"] for one in care.operations()] == ["drain"]
    finally:
        answer.set()
    rest(care)
    assert [one["kind"] for one in care.operations()] == ["drain"], "nobody is left to copy to"


def test_a_node_that_replaces_a_lost_one_gets_the_copies_that_there_were_too_few_nodes_for(tmp_path: Path) -> None:
    manifest = make_manifest(4)
    care, agents, _ = caring(tmp_path, NODES[:2], [manifest], repair_after_s=0.01)
    for name in NODES[:2]:
        agents.catalog.add(NodeId(name), [shard.key for shard in manifest.shards])
    care.learn()
    care.promise(manifest.id, Order(2, CLUSTER))
    looked(care)
    agents.lose("bbbb")
    for _ in range(3):
        looked(care)
        time.sleep(0.02)
    assert care.operations() == [], "one node cannot hold two copies"
    agents.nodes[NodeId("cccc")] = "http://10.0.0.9:1"
    for _ in range(2):
        looked(care)
        time.sleep(0.02)
    looked(care)
    rest(care)
    assert agents.catalog.held(NodeId("cccc")) == 4
    agents.nodes[NodeId("dddd")] = "http://10.0.0.8:1"
    for _ in range(3):
        looked(care)
        time.sleep(0.02)
    assert len(care.operations()) == 1, "there were enough nodes already"


def test_admin_does_what_it_knows_and_nothing_that_is_private(tmp_path: Path) -> None:
    admin = Admin(caring(tmp_path, NODES)[0])
    for what in ("_run", "nonsense", "ledger"):
        with pytest.raises(UsageError):
            admin.do(what)
    with pytest.raises(ClusterError, match="no operation"):
        admin.do("operation", "repair-000000")


def test_figures_of_a_big_cluster_look_at_each_shard_once_and_a_page_only_at_its_own(tmp_path: Path) -> None:
    manifest = make_manifest(3000)
    care, agents, _ = caring(tmp_path, [f"{number:04x}" for number in range(50)], [manifest])
    for number, name in enumerate(agents.nodes):
        agents.catalog.add(name, [shard.key for shard in manifest.shards[number::50]], [100] * 60)
    admin = Admin(care)
    counted, looked = 0, 0
    holders, counts = agents.catalog.holders, agents.catalog.counts

    def one(key: str) -> set[NodeId]:
        nonlocal looked
        looked += 1
        return holders(key)

    def many(keys: Any) -> dict[int, int]:
        nonlocal counted
        counted += len(keys)
        return counts(keys)

    agents.catalog.holders, agents.catalog.counts = one, many  # type: ignore[method-assign]
    told = admin.do("summary")
    assert (told["nodes"], told["shards"], told["bytes"], told["lost"], told["under"]) == (50, 3000, 300_000, 0, 0)
    assert (counted, looked) == (3000, 0)
    assert [line["shards"] for line in admin.do("nodes")] == [60] * 50
    assert (counted, looked) == (3000, 0), "nodes are counted as shards come and go"
    assert admin.do("summary") == told
    assert counted == 3000, "not again while nothing changes"
    agents.catalog.add(NodeId("0000"), [manifest.shards[1].key])
    assert admin.do("summary")["manifests"][0]["copies"] == 3001
    page = admin.do("locate", [manifest.id], 2990, 20)
    assert [shard["shard"] for shard in page["shards"]] == list(range(2990, 3000))
    assert looked == 10
    assert all(len(shard["urls"]) == 1 for shard in page["shards"])


def test_a_node_that_comes_is_told_of_pins_until_it_has_the_manifest(tmp_path: Path) -> None:
    manifest = make_manifest(2)
    care, agents, hands = caring(tmp_path, NODES[:1], [manifest])
    looked(care)
    care.order("pin", manifest.id, {"note": "run 17"})
    asked: list[NodeId] = []

    def ask(method: str, *_: Any, nodes: Any = None, **__: Any) -> tuple[dict[NodeId, Any], dict[NodeId, str]]:
        if method != "pin":
            return {}, {}
        asked.extend(nodes)
        return {node: [manifest.id] if len(asked) == 3 else [] for node in nodes}, {}

    hands.ask = ask  # type: ignore[method-assign, assignment]
    agents.nodes[NodeId("bbbb")] = "http://10.0.0.9:1"
    for _ in range(6):
        looked(care)
    assert asked == ["bbbb"] * 3


def test_many_nodes_that_come_are_told_of_many_pins_at_once(tmp_path: Path) -> None:
    """A coordinator that starts meets all nodes: a question for each node and pin would keep it from all else."""
    manifests = [make_manifest(1, repo=f"org/{number}") for number in range(5)]
    care, agents, hands = caring(tmp_path, [f"{number:04x}" for number in range(30)], manifests)
    for one in manifests:
        care.order("pin", one.id, {"note": "run 17"})
    pinned: dict[NodeId, set[str]] = {}
    asked = 0

    def ask(method: str, *said: Any, nodes: Any = None, **_: Any) -> tuple[dict[NodeId, Any], dict[NodeId, str]]:
        nonlocal asked
        if method != "pin":
            return {}, {}
        asked += 1
        for node in nodes:
            pinned.setdefault(node, set()).update(said[0])
        return {node: list(said[0]) for node in nodes}, {}

    hands.ask = ask  # type: ignore[method-assign, assignment]
    for _ in range(3):
        looked(care)
    assert asked == 1
    assert pinned == {node: {one.id for one in manifests} for node in agents.nodes}
