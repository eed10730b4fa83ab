"""Plans of repair, drain and rebalance: performed, every shard is as it should be, nothing moved that need not."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crucible.cluster.place import replica_targets
from crucible.cluster.upkeep import Place, Plan, Wanted, rebalance, repair
from crucible.refs import NodeId, ShardInfo

Held = dict[str, set[NodeId]]


def node(number: int) -> NodeId:
    return NodeId(f"node-{number}")


def shard(number: int, *, size: int = 10, replicas: int = 1, item: int | None = None) -> Wanted:
    return Wanted(f"{number:064x}", size, replicas, number if item is None else item)


def perform(plan: Plan, shards: list[Wanted], held: Held, nodes: Mapping[NodeId, Place]) -> Held:
    """What is held when everything went well. Checks that nothing was done that cannot be."""
    after = {key: set(there) for key, there in held.items()}
    for remake in plan.remakes:
        assert remake.keys, "made again for nothing"
        assert not nodes[remake.node].drained
        for one in shards:
            if one.item == remake.item:
                after.setdefault(one.key, set()).add(remake.node)
    for copy in plan.copies:
        assert after.get(copy.key, set()) & nodes.keys(), "copied from nobody"
        assert copy.node not in after[copy.key], "copied to where it is"
        assert not nodes[copy.node].drained, "copied to a node that goes"
        after[copy.key].add(copy.node)
    for drop in plan.drops:
        after[drop.key].remove(drop.node)
        assert after[drop.key] & nodes.keys(), "the last copy was dropped"
    return after


def racks_of(there: set[NodeId], nodes: Mapping[NodeId, Place]) -> set[str]:
    return {nodes[one].rack for one in there}


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[Wanted], Held, dict[NodeId, Place]]:
    """Shards held anywhere or nowhere; nodes with racks or without, some drained, some that hold but are gone."""
    count = draw(st.integers(1, 7))
    racks = draw(st.sampled_from([[""], ["", "r1"], ["r1", "r2"], ["r1", "r2", "r3"]]))
    nodes = {
        node(n): Place(draw(st.sampled_from([1.0, 1.0, 3.0])), draw(st.sampled_from(racks)), draw(st.booleans()))
        for n in range(count)
    }
    everyone = [node(n) for n in range(count + 2)]  # the last two are gone
    shards, held = [], {}
    for number in range(draw(st.integers(0, 25))):
        replicas = draw(st.integers(1, 4))
        one = shard(number, size=draw(st.integers(0, 50)), replicas=replicas, item=draw(st.integers(0, 12)))
        shards.append(one)
        held[one.key] = set(draw(st.lists(st.sampled_from(everyone), max_size=5)))
    return shards, held, nodes


@settings(max_examples=300, deadline=None)
@given(there=clusters(), trim=st.booleans(), data=st.data())
def test_after_a_repair_every_shard_is_held_by_enough_nodes_on_enough_racks(
    there: tuple[list[Wanted], Held, dict[NodeId, Place]], trim: bool, data: st.DataObject
) -> None:
    shards, held, nodes = there
    keep = {key: {one for one in sorted(them) if data.draw(st.booleans())} for key, them in held.items()}
    plan = repair(shards, lambda key: held[key], nodes, trim=trim, pinned=lambda key: keep[key])
    staying = {one for one, place in nodes.items() if not place.drained}
    if not staying:
        assert not plan
        assert set(plan.hopeless) == {one.key for one in shards}, "nobody stays that could take them"
        return
    after = perform(plan, shards, held, nodes)
    for one in shards:
        good = after[one.key] & staying
        wanted = min(one.replicas, len(staying))
        assert len(good) >= wanted
        assert len(racks_of(good, nodes)) >= min(wanted, len(racks_of(staying, nodes)))
        pins = keep[one.key] & staying
        assert pins <= good, "a pinned copy was dropped"
        if trim and not pins:
            assert len(good) == wanted
        if not trim:
            assert held[one.key] <= after[one.key]
    assert not repair(shards, lambda key: after[key], nodes, trim=trim, pinned=lambda key: keep[key])


@settings(max_examples=100, deadline=None)
@given(there=clusters())
def test_a_repair_copies_only_what_is_missing_and_makes_again_only_what_nobody_has(
    there: tuple[list[Wanted], Held, dict[NodeId, Place]],
) -> None:
    shards, held, nodes = there
    staying = {one for one, place in nodes.items() if not place.drained}
    if not staying:
        return
    plan = repair(shards, lambda key: held[key], nodes)
    lost = {one.key for one in shards if not held[one.key] & nodes.keys()}
    assert {key for remake in plan.remakes for key in remake.keys} == lost
    everywhere = racks_of(staying, nodes)
    families = {remake.item: remake.node for remake in plan.remakes}
    for one in shards:
        born = {families[one.item]} if one.item in families else set()
        good = (held[one.key] | born) & staying
        wanted = min(one.replicas, len(staying))
        spare_racks = min(wanted, len(everywhere)) - len(racks_of(good, nodes))
        copies = [copy for copy in plan.copies if copy.key == one.key]
        assert len(copies) == max(0, wanted - len(good), spare_racks)
    assert [copy.living for copy in plan.copies] == sorted(copy.living for copy in plan.copies)
    assert plan.bytes == sum(copy.size for copy in plan.copies) + sum(s.size for s in shards if s.key in lost)


def test_what_is_let_go_on_purpose_is_not_made_again() -> None:
    shards = [shard(0), shard(1)]
    plan = repair(shards, lambda _: set(), {node(0): Place(1)}, remake=lambda key: key == shards[1].key)
    assert [remake.keys for remake in plan.remakes] == [(shards[1].key,)]


def test_a_drained_node_is_copied_last_copies_first_and_gets_nothing() -> None:
    nodes = {node(n): Place(1, drained=n == 0) for n in range(3)}
    shards = [shard(0, replicas=2), shard(1), shard(2, replicas=2)]
    held = {
        shards[0].key: {node(0), node(1)},
        shards[1].key: {node(0)},
        shards[2].key: {node(1), node(2)},
    }
    plan = repair(shards, lambda key: held[key], nodes)
    assert [(copy.key, copy.living) for copy in plan.copies] == [(shards[1].key, 0), (shards[0].key, 1)]
    assert plan.copies[1].node == node(2)
    assert not plan.drops, "its own copies stay until it goes"


@settings(max_examples=200, deadline=None)
@given(there=clusters(), data=st.data())
@example(there=([shard(n) for n in range(3)], {shard(n).key: {node(0)} for n in range(3)}, {}), data=None)
def test_a_rebalance_keeps_what_repair_promised_and_ends(
    there: tuple[list[Wanted], Held, dict[NodeId, Place]], data: st.DataObject | None
) -> None:
    shards, held, nodes = there
    nodes = nodes or {node(n): Place(1) for n in range(3)}
    keep = {key: {one for one in sorted(them) if data and data.draw(st.booleans())} for key, them in held.items()}
    plan = rebalance(shards, lambda key: held[key], nodes, pinned=lambda key: keep[key])
    after = perform(plan, shards, held, nodes)
    staying = {one for one, place in nodes.items() if not place.drained}
    for one in shards:
        before, now = held[one.key] & staying, after[one.key] & staying
        assert len(before) == len(now)
        assert len(racks_of(now, nodes)) >= len(racks_of(before, nodes))
        assert keep[one.key] & staying <= now
    assert len(plan.copies) == len(plan.drops)
    assert not rebalance(shards, lambda key: after[key], nodes, pinned=lambda key: keep[key])


def loads(held: Held, shards: list[Wanted]) -> Iterator[int]:
    everyone = sorted({one for them in held.values() for one in them})
    for one in everyone:
        yield sum(s.size for s in shards if one in held[s.key])


def test_a_node_that_joins_gets_its_share_and_nothing_else_moves() -> None:
    shards = [shard(number) for number in range(400)]
    held = {one.key: {node(number % 4)} for number, one in enumerate(shards)}
    nodes = {node(number): Place(1) for number in range(5)}
    plan = rebalance(shards, lambda key: held[key], nodes)
    assert {copy.node for copy in plan.copies} == {node(4)}
    assert 400 / 5 / 1.1 - 1 <= len(plan.copies) <= 400 / 5
    after = perform(plan, shards, held, nodes)
    assert all(800 / 1.1 - 10 <= load <= 800 * 1.1 for load in loads(after, shards))
    assert not rebalance(shards, lambda key: after[key], nodes)


@pytest.mark.parametrize("seed", range(20))
def test_where_there_are_few_shards_of_about_one_size_those_who_were_there_keep_theirs(seed: int) -> None:
    """Each has a shard more or less than its share, and it does not help to have others do so."""
    dice = random.Random(seed)
    shards = [
        Wanted(f"{dice.getrandbits(256):064x}", dice.randrange(690_000, 691_000), 1, n) for n in range(12 + seed % 2)
    ]
    there = [NodeId(f"{dice.getrandbits(64):016x}") for _ in range(3)]
    held = {one.key: {there[number % 2]} for number, one in enumerate(shards)}
    plan = rebalance(shards, lambda key: held[key], {one: Place(1) for one in there})
    assert [copy.node for copy in plan.copies] == [there[2]] * 4


def test_what_is_about_even_is_left_alone() -> None:
    shards = [shard(number) for number in range(205)]
    held = {one.key: {node(number % 2 if number < 200 else 0)} for number, one in enumerate(shards)}
    assert not rebalance(shards, lambda key: held[key], {node(0): Place(1), node(1): Place(1)})


def test_a_bigger_node_gets_more() -> None:
    shards = [shard(number) for number in range(300)]
    held = {one.key: {node(0)} for one in shards}
    plan = rebalance(shards, lambda key: held[key], {node(0): Place(1), node(1): Place(3)})
    assert 190 <= len(plan.copies) <= 230


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_replicas_of_a_job_are_on_as_many_racks_as_there_are(replicas: int) -> None:
    nodes = {node(n): 1.0 for n in range(6)}
    racks = {node(n): f"r{n // 3}" for n in range(6)}
    for number in range(60):
        info = ShardInfo(f"{number:064x}", 1, 1, "0" * 64, "0" * 64, 0, 0)
        first = node(number % 6)
        found = {first, *replica_targets(info, {first}, nodes, replicas, racks)}
        assert len(found) == replicas
        assert len({racks[one] for one in found}) == min(replicas, 2)
        # where there is room on the same rack only, that is taken
        assert len({first, *replica_targets(info, {first}, nodes, replicas, {})}) == replicas
    assert replica_targets(ShardInfo("0" * 64, 1, 1, "", "", 0, 0), set(), {}, replicas) == []


def test_planning_is_linear_in_shards_and_hardly_looks_at_those_that_are_fine() -> None:
    nodes = {node(n): Place(1, rack=f"r{n % 8}") for n in range(64)}
    asked = 0

    def holders(key: str) -> set[NodeId]:
        nonlocal asked
        asked += 1
        number = int(key, 16)
        return {node(number % 64), node((number + 1) % 64)}

    shards = [shard(number, replicas=2) for number in range(5000)]
    assert not repair(shards, holders, nodes)
    assert asked == len(shards)
