"""What another version made is never mixed with what this one makes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import crucible
from crucible import refs
from crucible.cache.replaced import put_aside_replaced
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.errors import ManifestError, VersionSkew
from crucible.hashing import shard_hasher
from crucible.manifest import Manifest
from crucible.refs import NodeId
from crucible.workers.work import Workplace, run_item
from tests.crucible.bundle_cases import Sides, everything
from tests.crucible.bundle_cases import sides as sides


def train(store: Store) -> Manifest:
    return next(manifest for manifest in store.manifests() if manifest.split == "train")


def digest(data: bytes) -> str:
    hasher = shard_hasher()
    hasher.update(data)
    return hasher.hexdigest()


def test_shards_that_a_new_manifest_means_otherwise_are_put_aside_and_the_others_stay(sides: Sides) -> None:
    store = Store(sides.outside)
    old = train(store)
    kept, made_again, stale = old.shards[:3]
    other = store.shard_path(made_again.key).read_bytes()[:-1] + b"\x00"
    store.shard_path(made_again.key).unlink()
    store.shard_path(made_again.key).write_bytes(other)
    new = (kept, replace(made_again, digest=digest(other)), replace(stale, digest="f" * 64))
    assert put_aside_replaced(store, replace(old, shards=(*new, *old.shards[3:]))) == 1
    here = {key for key, _ in store.shards()}
    assert {kept.key, made_again.key} <= here
    assert stale.key not in here
    assert put_aside_replaced(store, old) == 0


def test_a_recipe_of_another_conversion_is_not_followed(sides: Sides) -> None:
    """Its shards would get the names, and not the bytes, of what the other version made."""
    item = replace(train(Store(sides.outside)).items[0], key="e" * 64)
    place = Workplace(Store(sides.inside), Settings.from_env(), NodeId("local"))
    with pytest.raises(VersionSkew, match=r"data/a\.jsonl.*another conversion"):
        run_item(item, place)
    assert sides.hub.log == []


def test_what_an_older_conversion_made_is_made_again_and_not_trusted_offline(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {manifest.id for manifest in Store(sides.outside).manifests()}
    shards = {key for key, _ in Store(sides.outside).shards()}
    monkeypatch.setattr(refs, "CONVERSION_VERSION", refs.CONVERSION_VERSION + 1)
    refs.key_end.cache_clear()
    try:
        sides.at(sides.outside, offline=True)
        with pytest.raises(ManifestError, match=r"another version of crucible.*prefetch it anew"):
            everything()
        sides.at(sides.outside)
        assert len(everything()["train"][1]) == 600
        assert {key for key, _ in Store(sides.outside).shards()} > shards
        assert {manifest.id for manifest in Store(sides.outside).manifests()} > before
        sides.at(sides.outside, offline=True)
        assert len(everything()["train"][1]) == 600
    finally:
        refs.key_end.cache_clear()


@pytest.mark.parametrize("format_", [1, 99, None])
def test_a_manifest_of_another_format_is_asked_for_again(sides: Sides, format_: Any) -> None:
    sides.at(sides.outside)
    expected = everything()
    for path in (sides.outside / "manifests").glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "format": format_}))
    sides.at(sides.outside, offline=True)
    with pytest.raises(ManifestError, match=f"is of format {format_}"):
        everything()
    sides.at(sides.outside)
    assert everything() == expected
    sides.at(sides.outside, offline=True)
    assert everything() == expected
    assert {Path(record.path).name for record in sides.hub.log if record.path.endswith(".jsonl")} == set()


def test_the_same_dataset_of_both_sides_is_what_it_was(sides: Sides) -> None:
    sides.at(sides.outside)
    assert crucible.load_dataset("org/data", split="test").num_rows == 50  # type: ignore[union-attr]
