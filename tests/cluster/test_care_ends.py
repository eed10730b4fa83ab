"""What an admin does and what comes of it where something is pinned, damaged, slow or much."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from crucible.cluster.admin import Admin
from crucible.cluster.ledger import Choice, Order
from crucible.refs import NodeId
from tests.cluster.caring import CLUSTER, caring, make_manifest
from tests.cluster.test_care import NODES, ended, looked, rest


def test_what_is_pinned_is_not_given_up_by_evicting_it_and_a_drain_saves_it(tmp_path: Path) -> None:
    pinned, other = make_manifest(4), make_manifest(4, repo="org/other")
    care, agents, hands = caring(tmp_path, NODES[:2], [pinned, other])
    keys = [shard.key for shard in pinned.shards]
    agents.catalog.add(NodeId("aaaa"), [*keys, *(shard.key for shard in other.shards)])
    care.learn()
    care.order("pin", pinned.id, {"note": "run 17"})
    hands.answers["evict"] = {NodeId("aaaa"): {shard.key: 100 for shard in other.shards}}
    admin = Admin(care)
    assert admin.do("evict", Choice())["nodes"][0]["kept"] == len(keys)
    assert (care.ledger.replicas(pinned.id), care.ledger.replicas(other.id)) == (1, 0)
    told = ended(care, care.start_drain(["aaaa"]))
    assert (told["copied"], told["left"]) == (len(keys), 0)
    assert all(NodeId("bbbb") in agents.catalog.holders(key) for key in keys)


def test_a_manifest_that_is_damaged_here_is_had_from_another_node_and_else_stops_no_other(tmp_path: Path) -> None:
    found, gone, fine = (make_manifest(4, repo=repo) for repo in ("org/found", "org/gone", "org/fine"))
    care, agents, hands = caring(tmp_path, NODES[:2], [found, gone, fine])
    for one in (found, gone, fine):
        agents.catalog.add(NodeId("aaaa"), [shard.key for shard in one.shards])
    care.learn()
    for one in (found, gone):
        (tmp_path / "manifests" / f"{one.id}.json").write_bytes(b"{}")
    hands.answers["manifest_ids"] = {NodeId("aaaa"): [found.id], NodeId("bbbb"): [found.id, fine.id]}
    hands.answers["manifest"] = {NodeId("aaaa"): (b"damaged", [], None), NodeId("bbbb"): (found.to_json(), [], None)}
    told = care.operation(care.start_drain(["aaaa"])["operation"], 30)
    assert (told["phase"], told["copied"], told["left"]) == ("done", 8, 4)
    assert gone.id[:12] in " ".join(told["problems"])
    assert care._store.get_manifest(found.id) == found, "and it is here again"


def test_a_check_of_hours_holds_up_no_drain(tmp_path: Path) -> None:
    manifest = make_manifest(4)
    care, agents, hands = caring(tmp_path, NODES[:2], [manifest])
    agents.catalog.add(NodeId("aaaa"), [shard.key for shard in manifest.shards])
    looking: list[Future[dict[str, str]]] = []

    def verify(*_: Any) -> Future[dict[str, str]]:
        looking.append(Future())
        return looking[-1]

    hands.verify = verify  # type: ignore[attr-defined]
    check = care.start_verify(deep=True)
    try:
        assert ended(care, care.start_drain(["aaaa"]))["copied"] == 4
        assert care.operation(check["operation"])["phase"] not in ("done", "failed")
    finally:
        care.cancel(check["operation"])
        for future in looking:
            future.set_result({})
    assert care.operation(check["operation"], 30)["phase"] == "cancelled"


def test_a_table_of_many_manifests_looks_at_the_pins_once(tmp_path: Path) -> None:
    manifests = [make_manifest(1, repo=f"org/{number}") for number in range(20)]
    care, _, _ = caring(tmp_path, NODES[:2], manifests)
    care.order("pin", manifests[3].id, {"note": ""})
    asked: list[str] = []
    notes = care._notes.notes

    def counted(kind: str) -> Any:
        asked.append(kind)
        return notes(kind)

    care._notes.notes = counted  # type: ignore[method-assign]
    told = Admin(care).do("summary")["manifests"]
    assert [one["manifest"] for one in told if one["pinned"]] == [manifests[3].id]
    assert asked.count("pin") == 1


def test_a_node_that_does_not_say_how_big_it_is_keeps_what_it_has(tmp_path: Path) -> None:
    manifest = make_manifest(40)
    care, agents, hands = caring(tmp_path, NODES, [manifest])
    keys = [shard.key for shard in manifest.shards]
    agents.catalog.add(NodeId("aaaa"), keys[:20], [100] * 20)
    agents.catalog.add(NodeId("bbbb"), keys[20:], [100] * 20)
    hands.answers["weight"] = {NodeId("bbbb"): 1e6, NodeId("cccc"): 1e6}
    told = ended(care, care.start_rebalance())
    assert told["copied"] == told["dropped"] > 5, "the others share what they have"
    assert agents.catalog.held(NodeId("aaaa")) == 20


def test_what_was_let_go_is_remembered_no_longer_than_its_manifest(tmp_path: Path) -> None:
    """Of data that pass through a cluster for weeks."""
    gone, stays = make_manifest(4), make_manifest(4, repo="org/stays")
    twin = make_manifest(2, repo="org/data", split="twin")  # the same content, so the same keys
    care, _, _ = caring(tmp_path, NODES, [gone, stays, twin])
    care.learn()
    care._source_is_there = lambda *_: True  # type: ignore[method-assign]
    for one in (gone, stays):
        assert len(care.may_drop(NodeId("aaaa"), [shard.key for shard in one.shards])) == 4
    (tmp_path / "manifests" / f"{gone.id}.json").unlink()
    care.learn()
    assert care._let_go == {shard.key for one in (stays, twin) for shard in one.shards}


def test_of_two_nodes_that_drop_a_shard_at_once_both_may_where_its_source_answers(tmp_path: Path) -> None:
    manifest = make_manifest(2)
    care, agents, _ = caring(tmp_path, NODES, [manifest])
    last, both = (shard.key for shard in manifest.shards)
    agents.catalog.add(NodeId("aaaa"), [last, both])
    agents.catalog.add(NodeId("bbbb"), [both])
    care.learn()

    def source(*_: Any) -> bool:
        if care.agents.catalog.holders(both) == {"aaaa", "bbbb"}:  # meanwhile
            assert care.may_drop(NodeId("bbbb"), [both]) == [both]
        return True

    care._source_is_there = source  # type: ignore[method-assign]
    assert care.may_drop(NodeId("aaaa"), [last, both]) == [last, both], "its own copy is the last now"


def test_of_many_who_ask_about_a_source_at_once_one_asks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_manifest(2)
    care, agents, _ = caring(tmp_path, NODES, [manifest])
    keys = [shard.key for shard in manifest.shards]
    agents.catalog.add(NodeId("aaaa"), keys)
    care.learn()
    asked, come = list[Any](), threading.Barrier(9)

    def answers(repo: Any, _: Any) -> bool:
        asked.append(repo)
        time.sleep(0.2)  # time for the others to ask as well
        return True

    def ask() -> list[str]:
        come.wait(30)
        return care.could_drop(NodeId("aaaa"), keys)

    monkeypatch.setattr("crucible.cluster.known.source_answers", answers)
    with ThreadPoolExecutor(8) as pool:
        told = [pool.submit(ask) for _ in range(8)]
        come.wait(30)
        assert [one.result(30) for one in told] == [keys] * 8
    assert len(asked) == 1


def test_what_a_silent_node_holds_is_neither_forgotten_nor_counted_on_for_long(tmp_path: Path) -> None:
    here, there = make_manifest(4), make_manifest(2, repo="org/other")
    care, agents, hands = caring(tmp_path, NODES, [here, there], repair_after_s=0.01)
    care.learn()
    for manifest in (here, there):
        care.promise(manifest.id, Order(1, CLUSTER))
        agents.catalog.add(NodeId("cccc"), [shard.key for shard in manifest.shards])
    agents.catalog.add(NodeId("aaaa"), [shard.key for shard in here.shards])
    care.order("drain", "cccc", {"cluster": CLUSTER})
    looked(care)
    rest(care)
    agents.quiet.add(NodeId("cccc"))
    (tmp_path / "manifests" / f"{there.id}.json").rename(tmp_path / "elsewhere")  # only the silent node may have it
    care.learn()
    assert {entry.manifest for entry in care.ledger.entries()} == {here.id, there.id}
    lines = {line["node"]: line for line in Admin(care).nodes()}
    assert (lines["cccc"]["state"], lines["cccc"]["shards"], lines["cccc"]["problem"]) == ("silent", 6, "it hangs")
    assert care.node_of("cc") == "cccc"
    (tmp_path / "elsewhere").rename(tmp_path / "manifests" / f"{there.id}.json")
    looked(care)
    time.sleep(0.02)
    looked(care)
    rest(care)
    assert len(hands.remade) == 2, "what it alone has is made up for"
    assert "cccc" in care.drained, "an order about it stands"
