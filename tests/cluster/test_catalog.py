"""The catalog says what a plain dict of sets would say, and its figures are those that counting would give."""

from __future__ import annotations

import hashlib
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.cluster.catalog import Catalog
from crucible.refs import NodeId

KEYS = [hashlib.sha256(bytes([number])).hexdigest() for number in range(6)] + ["short", "g" * 64]
NODES = [NodeId(name) for name in "abcd"]
STEP = st.tuples(
    st.sampled_from(["add", "replace", "remove", "drop"]),
    st.sampled_from(NODES),
    st.lists(st.tuples(st.sampled_from(KEYS), st.integers(1, 1000)), max_size=5, unique_by=lambda pair: pair[0]),
    st.booleans(),
)


@settings(deadline=None)
@given(st.lists(STEP, max_size=30), st.integers(1, 4))
def test_it_says_what_a_dict_of_sets_would_say(steps: list, replicas: int) -> None:
    catalog = Catalog()
    model: dict[NodeId, dict[str, int]] = {}
    for what, node, pairs, sized in steps:
        keys = [key for key, _ in pairs]
        sizes = [size for _, size in pairs] if sized else None
        before = model.get(node, {})
        told = {key: size if sized else before.get(key, 0) for key, size in pairs}
        if what == "add":
            catalog.add(node, keys, sizes)
            model[node] = {**before, **told}
        elif what == "replace":
            catalog.replace(node, keys, sizes)
            model[node] = told
        elif what == "remove":
            catalog.remove(node, keys)
            model[node] = {key: size for key, size in before.items() if key not in keys}
        else:
            catalog.drop(node)
            model.pop(node, None)
    held = {node: shards for node, shards in model.items() if shards}
    holders = {key: {node for node, shards in held.items() if key in shards} for key in KEYS}
    for key in KEYS:
        assert catalog.holders(key) == holders[key]
        assert catalog.size(key) == max([shards[key] for shards in held.values() if key in shards], default=0)
    for node in NODES:
        assert sorted(catalog.keys_of(node)) == sorted(held.get(node, ()))
        assert (catalog.held(node), catalog.bytes(node)) == (len(held.get(node, ())), sum(held.get(node, {}).values()))
    summary = catalog.summary()
    there = {key: found for key, found in holders.items() if found}
    assert len(catalog) == summary.shards == len(there)
    assert sorted(catalog) == sorted(there)
    assert dict(summary.copies) == dict(Counter(len(found) for found in there.values()))
    assert summary.under(replicas) == sum(len(found) < replicas for found in there.values())
    assert summary.over(replicas) == sum(len(found) > replicas for found in there.values())
    assert summary.bytes == sum(sum(shards.values()) for shards in held.values())
    assert {node: pair for node, pair in summary.nodes.items() if pair[0]} == {
        node: (len(shards), sum(shards.values())) for node, shards in held.items()
    }


def test_what_it_gives_out_is_the_callers_own() -> None:
    catalog = Catalog()
    catalog.add(NODES[0], KEYS[:1])
    catalog.holders(KEYS[0]).clear()
    assert catalog.holders(KEYS[0]) == {NODES[0]}


def test_a_node_that_comes_back_starts_empty() -> None:
    catalog = Catalog()
    catalog.add(NODES[0], KEYS[:3], [1, 2, 3])
    catalog.drop(NODES[0])
    assert catalog.nodes() == []
    catalog.add(NODES[0], KEYS[:1])
    assert (catalog.held(NODES[0]), catalog.bytes(NODES[0]), catalog.nodes()) == (1, 0, [NODES[0]])
