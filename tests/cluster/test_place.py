"""Placement: even, weighted, stable, and the same wherever it is asked."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.cluster.place import SLACK, assign, replica_targets, successor
from crucible.cluster.plan import file_requests, item_requests, plan_items
from crucible.cluster.resolve import ResolvedSplit
from crucible.refs import NodeId, ReadOptions, RepoRef, ShardInfo, SourceFile, WorkItem

REPO = RepoRef("org/data", "0" * 40)


def make_items(sizes: list[int]) -> list[WorkItem]:
    return [
        WorkItem(i, REPO, (SourceFile(f"{i}", size, f"{i:064x}", True),), ReadOptions("parquet"), 1)
        for i, size in enumerate(sizes)
    ]


def cluster_of(count: int) -> dict[NodeId, float]:
    return {NodeId(f"node-{number}"): 1.0 for number in range(count)}


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 10_000), max_size=60), nodes=st.integers(1, 9))
def test_no_node_gets_more_than_its_share_and_one_item(sizes: list[int], nodes: int) -> None:
    items = make_items(sizes)
    homes = assign(items, cluster_of(nodes))
    assert sorted(homes) == list(range(len(items)))
    loads = dict.fromkeys(cluster_of(nodes), 0)
    for item in items:
        loads[homes[item.index]] += item.size + 1
    fair = sum(item.size + 1 for item in items) / nodes
    assert max(loads.values()) <= SLACK * fair + max([item.size + 1 for item in items], default=0)


def test_what_one_node_loses_is_spread_over_the_others_as_if_it_had_never_been_there() -> None:
    nodes = cluster_of(8)
    lost = NodeId("node-3")
    rest = {node: weight for node, weight in nodes.items() if node != lost}
    items = make_items([100] * 400)
    heirs = [successor(item, nodes, lost) for item in items]
    assert set(heirs) == set(rest)
    assert max(heirs.count(node) for node in rest) < 3 * len(items) / len(rest)
    nobody = NodeId("nobody")
    assert heirs == [successor(item, rest, nobody) for item in items]
    assert successor(items[0], {lost: 1.0}, lost) is None


def test_placement_does_not_depend_on_the_order_of_items_or_nodes() -> None:
    items = make_items([100 + i for i in range(50)])
    nodes = cluster_of(5)
    assert assign(items, nodes) == assign(items[::-1], dict(reversed(nodes.items())))


def test_when_a_node_goes_little_but_its_own_share_moves() -> None:
    items = make_items([1000] * 400)
    nodes = cluster_of(8)
    before = assign(items, nodes)
    del nodes[NodeId("node-3")]
    after = assign(items, nodes)
    own = sum(home == "node-3" for home in before.values())
    moved = sum(before[index] != after[index] for index in before)
    assert own <= moved <= own + 0.25 * len(items)


def test_a_node_with_more_free_disk_gets_more() -> None:
    items = make_items([10] * 300)
    homes = assign(items, {NodeId("big"): 4.0, NodeId("small"): 1.0})
    big = sum(home == "big" for home in homes.values())
    assert 200 <= big <= 270


def test_replicas_go_to_nodes_that_do_not_hold_the_shard_yet() -> None:
    shard = ShardInfo("ab" * 32, 1, 1, "0" * 64, "0" * 64, 0, 0)
    nodes = cluster_of(4)
    targets = replica_targets(shard, {NodeId("node-1")}, nodes, 3)
    assert len(targets) == len(set(targets)) == 2
    assert NodeId("node-1") not in targets
    assert replica_targets(shard, set(targets), nodes, 2) == []
    assert len(replica_targets(shard, set(), nodes, 99)) == 4
    assert replica_targets(shard, {NodeId("dead")}, nodes, 1)  # a copy on a lost node does not count


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 3 << 20), max_size=200))
def test_items_cover_the_files_in_order(sizes: list[int]) -> None:
    files = tuple(SourceFile(f"{i}.jsonl", size, f"{i:040x}", False) for i, size in enumerate(sizes))
    items = list(plan_items(REPO, ResolvedSplit("train", files, ReadOptions("json"), None), shard_bytes=1))
    assert tuple(file for item in items for file in item.files) == files
    assert [item.index for item in items] == list(range(len(items)))
    limit = max(256 << 10, sum(sizes) // 64)
    assert all(len(item.files) == 1 or item.size <= limit for item in items)


def test_thousands_of_tiny_files_are_neither_thousands_of_tasks_nor_one() -> None:
    files = tuple(SourceFile(f"{i}.jsonl", 10, f"{i:040x}", False) for i in range(3000))
    items = list(plan_items(REPO, ResolvedSplit("train", files, ReadOptions("json"), None), shard_bytes=1))
    assert len(items) == 12
    assert max(len(item.files) for item in items) == 256


def test_the_same_content_has_the_same_key_under_another_path_and_commit() -> None:
    file = SourceFile("a.parquet", 5, "f" * 64, True)
    moved = SourceFile("b/c.parquet", 5, "f" * 64, True)
    options = ReadOptions("parquet")
    first = WorkItem(0, REPO, (file,), options, 100)
    second = WorkItem(7, RepoRef("else/where", "1" * 40), (moved,), options, 100)
    assert first.key == second.key
    assert first.shard_key(0) != first.shard_key(1)
    assert WorkItem(0, REPO, (file,), options, 101).key != first.key
    assert WorkItem(0, REPO, (file,), ReadOptions("parquet", columns=("x",)), 100).key != first.key


def test_requests_are_one_resolve_and_a_get_a_part() -> None:
    assert file_requests(SourceFile("a", 3 << 20, "0" * 64, True), part_bytes=1 << 20, streams=8) == (1, 3)
    assert file_requests(SourceFile("a", 100, "0" * 64, True), part_bytes=40, streams=8) == (1, 1)
    assert file_requests(SourceFile("a", 100, "0" * 40, False), part_bytes=1000, streams=8) == (1, 0)
    assert file_requests(SourceFile("a", 0, "0" * 40, False), part_bytes=1000, streams=8) == (0, 0)


def test_many_small_lfs_files_of_an_item_are_one_request_each_and_a_few_for_their_links() -> None:
    small = [SourceFile(f"{n}", 100, f"{n:064x}", True) for n in range(150)]
    big, regular = SourceFile("b", 3 << 20, "f" * 64, True), SourceFile("r", 100, "0" * 40, False)
    assert item_requests([*small, big, regular], part_bytes=1 << 20, streams=8) == 2 + 150 + (1 + 3) + 1
    assert item_requests([*small[:15], big, regular], part_bytes=1 << 20, streams=8) == 15 * 2 + (1 + 3) + 1
