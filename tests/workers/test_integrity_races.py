"""What two do to one shard at the same time leaves no note, no finding and no removal that is wrong."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crucible.cache import seen as seen_module
from crucible.cache.check import is_sound, mark_used
from crucible.cache.seen import Seen
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.hashing import shard_digest
from crucible.manifest import Manifest
from crucible.refs import NodeId
from crucible.workers import keeping
from crucible.workers import litter as litter_module
from crucible.workers.keeping import Keeping
from crucible.workers.litter import litter, sweep
from crucible.workers.scrub import heal, scrub
from tests.workers.keeping_cases import FILES, flip, lay_out, make, wrong

Made = tuple[Settings, Manifest]
YEAR_S = 365 * 86_400.0


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(lay_out(tmp_path / "repo"), tmp_path / "home")


def test_a_shard_that_another_process_replaced_in_the_moment_of_its_name_is_not_noted_as_ours(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of different pyarrow share a store: what the one wrote must not count as verified by the other."""
    store, shard = Store(made[0].home), made[1].shards[0]
    draft, theirs = made[0].home / "tmp" / "ours", made[0].home / "tmp" / "theirs"
    right = store.shard_path(shard.key).read_bytes()
    draft.write_bytes(right)
    theirs.write_bytes(right)
    flip(theirs, 3)
    rename = os.replace

    def both(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(source) == draft:
            rename(theirs, target)

    monkeypatch.setattr(os, "replace", both)
    store.commit_shard(draft, shard.key, shard.digest)
    monkeypatch.undo()
    assert not is_sound(store, shard), "its bytes are another's"


def test_a_shard_that_is_replaced_while_it_is_marked_as_used_is_not_noted_as_the_one_before(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, shard = Store(made[0].home), made[1].shards[0]
    path, other = store.shard_path(shard.key), made[0].home / "tmp" / "other"
    assert is_sound(store, shard)
    os.utime(path, (1.0, 1.0))
    assert is_sound(store, shard), "hashed and noted with its new times"
    other.write_bytes(path.read_bytes())
    flip(other, 4)
    touch: Any = os.utime

    def meanwhile(*given: object, **named: object) -> None:
        touch(*given, **named)
        monkeypatch.undo()
        os.replace(other, path)

    monkeypatch.setattr(os, "utime", meanwhile)
    mark_used(store, shard.key, since=path.stat().st_mtime + YEAR_S * 100)
    assert not other.exists()
    assert not is_sound(store, shard)


def test_a_shard_is_right_if_any_manifest_here_means_it_so(made: Made) -> None:
    """Where another pyarrow made a shard anew, the manifest from before stays for those who have its id."""
    settings, manifest = made
    store, shard = Store(settings.home), manifest.shards[1]
    for number in range(8):  # ids are hashes: of some the one comes first, of some the other
        other = replace(shard, digest=f"{number:064x}", size=shard.size + number % 2)
        shards = tuple(other if one is shard else one for one in manifest.shards)
        store.put_manifest(replace(manifest, shards=shards))
    assert list(scrub(store, deep=True)) == []
    flip(store.shard_path(shard.key), 7)
    (finding,) = scrub(store, deep=True)
    assert (finding.kind, finding.key, finding.quarantined) == ("wrong bytes", shard.key, True)
    assert heal(store, settings, [finding]) == {shard.key: ""}, "from the manifest whose bytes can be had"
    assert wrong(store, manifest) == []


def test_a_store_full_of_what_is_only_untidy_is_looked_through_to_its_end(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(made[0].home)
    monkeypatch.setattr(keeping, "MOST_FINDINGS", 3)
    source = store.shard_path(made[1].shards[0].key)
    for number in range(8):
        path = store.shard_path(f"{number:064x}")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(source.read_bytes())
    for shard in made[1].shards:
        flip(store.shard_path(shard.key), 1)
    told = Keeping()
    told._store, told._node = store, NodeId("n")
    found = told.verify(None, deep=True)
    assert [one["kind"] for one in found] == ["wrong bytes"] * 3 + ["unreferenced"] * 3
    assert not any(store.shard_path(shard.key).exists() for shard in made[1].shards), "all were put aside"


def test_what_is_used_after_it_was_listed_as_litter_stays(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, manifest = made
    store = Store(settings.home)
    (settings.home / "manifests" / f"{manifest.id}.json").unlink()
    monkeypatch.setattr(litter_module, "UNREFERENCED_KEEP_S", -1.0)
    found = litter(store)
    assert len(found) == FILES
    used, *others = [shard.key for shard in manifest.shards]
    mark_used(store, used, since=store.shard_path(used).stat().st_mtime + YEAR_S)  # as a job does that finds it here
    assert sorted(Path(one.path).stem for one in sweep(found)) == sorted(others)
    assert [key for key, _ in store.shards()] == [used]


def test_notes_of_shards_that_are_gone_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_module, "LEAST_BYTES", 1000)
    shards, folder = tmp_path / "shards", tmp_path / "seen"
    (shards / "ab").mkdir(parents=True)
    stays = f"ab{'1' * 62}"
    (shards / "ab" / f"{stays}.arrow").write_bytes(b"x")
    first = Seen(folder, shards)
    first.note(stays, "d" * 64, (1, 1, 1, 1))
    sizes = []
    for number in range(300):  # as processes come and go, each with some shards that are evicted later
        Seen(folder, shards).note(f"ab{number:062x}", "e" * 64, (2, 2, 2, 2))
        sizes.append((folder / "ab").stat().st_size)
    assert max(sizes) < 3000
    assert Seen(folder, shards).digest(stays, (1, 1, 1, 1)) == "d" * 64
    assert shard_digest(shards / "ab" / f"{stays}.arrow")
