"""What the cluster is to hold: manifests by their names, shards once, and how they are held."""

from __future__ import annotations

from dataclasses import replace

import pytest

from crucible.cluster.catalog import Catalog
from crucible.cluster.ledger import Choice, Entry, Ledger, Order, held
from crucible.manifest import Manifest
from crucible.refs import NodeId, RepoRef, ShardInfo


def make(repo: str, keys: range, *, config: str = "main", split: str = "train", commit: str = "a") -> Manifest:
    shards = tuple(ShardInfo(f"{key:064x}", 5, 100 + key, "d" * 64, "", key // 2, key % 2) for key in keys)
    return Manifest(RepoRef(repo, commit * 40), config, split, None, "", (), (), shards)


def test_a_shard_of_several_manifests_is_wanted_once_as_often_as_by_the_one_that_wants_it_most() -> None:
    ledger = Ledger()
    first, second = make("org/a", range(6)), make("org/b", range(4, 9))
    ledger.add(first)
    ledger.add(second)
    ledger.orders[second.id] = Order(replicas=3)
    shards = ledger.shards()
    wanted = {one.key: one.replicas for one in shards}
    assert wanted == {f"{key:064x}": 3 if key >= 4 else 1 for key in range(9)}
    assert [one.key for one in shards] == [one.key for one in shards], "it can be gone over again"
    assert len(list(shards)) == 9
    assert {one.key for one in ledger.shards({first.id})} == {f"{key:064x}" for key in range(6)}
    assert {one.item for one in ledger.shards({first.id})} == {(first.id, item) for item in range(3)}


def test_what_was_given_up_is_wanted_no_more_and_can_still_be_found() -> None:
    ledger = Ledger()
    manifest = make("org/a", range(3))
    ledger.add(manifest)
    asked = [f"{0:064x}", f"{99:064x}"]
    assert ledger.with_keys(asked) == {asked[0]: manifest.id}
    ledger.orders[manifest.id] = Order(replicas=0)
    assert list(ledger.shards()) == []
    assert ledger.with_keys(asked) == {asked[0]: manifest.id}, "so that its last copies may go"
    assert {one.replicas for one in ledger.shards(replicas=2)} == {2}
    ledger.forget(manifest.id)
    assert manifest.id not in ledger
    assert ledger.replicas(manifest.id) == 1


@pytest.mark.parametrize(
    ("choice", "means"),
    [
        (Choice(), "abcd"),
        (Choice("org/x"), "abc"),
        (Choice("org/x", split="test"), "b"),
        (Choice("org/x", config="other"), "c"),
        (Choice(revision="bbbbb"), "d"),
        (Choice("org/nothing"), ""),
    ],
)
def test_manifests_are_found_by_any_part_of_their_names(choice: Choice, means: str) -> None:
    ledger = Ledger()
    all_of = {
        "a": make("org/x", range(1)),
        "b": make("org/x", range(2), split="test"),
        "c": make("org/x", range(3), config="other"),
        "d": make("org/y", range(4), commit="b"),
    }
    for manifest in all_of.values():
        ledger.add(manifest)
    found = {entry.manifest for entry in ledger.entries(choice)}
    assert found == {all_of[name].id for name in means}
    one = all_of["b"].id
    assert [entry.manifest for entry in ledger.entries(Choice(one[:12]))] == [one]
    assert ledger.entries(Choice(one[:3])) == [], "too short to be meant"


def test_an_incomplete_manifest_is_not_known() -> None:
    manifest = make("org/a", range(2))
    early = replace(manifest, shards=tuple(replace(shard, digest="") for shard in manifest.shards))
    ledger = Ledger()
    ledger.add(early)
    assert early.id not in ledger


def test_how_a_manifest_is_held_is_counted_in_the_catalog() -> None:
    catalog = Catalog()
    entry = Entry.of(make("org/a", range(5)))
    keys = [f"{key:064x}" for key in range(5)]
    catalog.add(NodeId("a"), keys[:4])
    catalog.add(NodeId("b"), keys[1:3])
    catalog.add(NodeId("c"), keys[2:3])
    found = held(entry, 2, 3, catalog.counts)
    assert (found.lost, found.under, found.over, found.copies) == (1, 2, 1, 7)
    assert held(entry, 9, 1, catalog.counts).under == 0, "there are no more nodes than one"


def test_an_order_is_remembered_as_plain_values() -> None:
    order = Order(2, "session", "job", {"endpoint": "http://hub"})
    assert Order.heard(order.told()) == order
    assert Order.heard({}) == Order()
