"""A byte that changes on disk is named, put aside and healed, and reaches no reader."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible.cache import check
from crucible.cache.check import is_sound
from crucible.cache.seen import Seen, Stamp, stamp_of
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.dataset import IterableDataset
from crucible.errors import SourceUnavailable
from crucible.hashing import shard_digest
from crucible.manifest import Manifest
from crucible.mapped import Dataset
from crucible.refs import NodeId
from crucible.stopping import Stopped
from crucible.workers import keeping
from crucible.workers import scrub as module
from crucible.workers.fetch import NodeShards
from crucible.workers.keeping import Keeping, scrub_once
from crucible.workers.scrub import Finding, heal, scrub
from crucible.workers.secret import ensure_secret, keep_secret
from crucible.workers.serve import AgentAddress, AgentServer, write_address
from tests.workers.keeping_cases import FILES, ROWS, flip, lay_out, make, wrong

Made = tuple[Settings, Manifest]
IDS = list(range(FILES * ROWS))


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(lay_out(tmp_path / "repo"), tmp_path / "home")


def ids(dataset: Any) -> list[int]:
    return [row["id"] for row in dataset]


def files_of(made: Made) -> list[Path]:
    return [Store(made[0].home).shard_path(shard.key) for shard in made[1].shards]


def keep_times(path: Path, change: Callable[[], object]) -> None:
    """As some tools do: the file looks as old as it was."""
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rot(made: Made, path: Path, seed: int) -> None:
    """What a disk does by itself: other bytes, and no write that the file system knows of."""
    digest = shard_digest(path)
    flip(path, seed)
    Store(made[0].home).seen.note(path.stem, digest, stamp_of(path.stat()))


@pytest.mark.parametrize("seed", range(6))
def test_a_byte_flipped_before_the_first_row_reaches_no_reader(
    made: Made, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    settings, manifest = made
    path = files_of(made)[seed % len(manifest.shards)]
    if seed % 2:
        flip(path, seed)
    else:
        keep_times(path, lambda: flip(path, seed))
    with caplog.at_level(logging.WARNING, "crucible.integrity"):
        assert ids(IterableDataset(manifest, NodeShards(settings))) == IDS
    assert path.stem[:12] in caplog.text
    assert str(settings.home / "quarantine") in caplog.text
    assert wrong(Store(settings.home), manifest) == []
    assert [one["key"] for one in keeping.quarantined(Store(settings.home))] == [path.stem]


def test_a_byte_flipped_between_epochs_under_an_open_map_reaches_no_reader(made: Made) -> None:
    settings, manifest = made
    stream = IterableDataset(manifest, NodeShards(settings)).shuffle(seed=3)
    mapped = Dataset(manifest, NodeShards(settings))
    assert sorted(ids(stream)) == ids(mapped) == IDS
    for seed, path in enumerate(files_of(made)):
        flip(path, seed)
        stream.set_epoch(seed + 1)
        assert sorted(ids(stream)) == IDS, seed
        assert wrong(Store(settings.home), manifest) == []
        flip(path, seed)
        assert ids(mapped) == IDS, seed
    assert wrong(Store(settings.home), manifest) == []


def test_an_open_shard_that_others_put_aside_is_read_anew(made: Made) -> None:
    """Scrubbing finds what no reader can see; one that has the wrong bytes mapped must not go on with them."""
    settings, manifest = made
    stream = IterableDataset(manifest, NodeShards(settings))
    assert ids(stream) == IDS
    rot(made, files_of(made)[1], 5)
    finding = next(iter(scrub(Store(settings.home), deep=True)))
    assert (finding.kind, finding.key, finding.quarantined) == ("wrong bytes", manifest.shards[1].key, True)
    assert ids(stream) == IDS


def test_a_shard_that_was_seen_is_not_hashed_again_until_it_changes_or_the_machine_restarts(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = check.hash_shard
    monkeypatch.setattr(check, "hash_shard", lambda store, key: hashed.append(key) or real(store, key))
    settings, manifest = made
    store, shard = Store(settings.home), manifest.shards[0]
    assert ids(IterableDataset(manifest, NodeShards(settings))) == IDS
    assert hashed == [], "what was made here was verified as it was made"
    os.link(store.shard_path(shard.key), settings.home / "copy")  # a backup: the file system notes a change
    assert is_sound(store, shard)
    assert is_sound(store, shard)
    assert hashed == [shard.key]
    pages = list((settings.home / "seen").iterdir())
    for page in pages:
        lines = [line.split() for line in page.read_text().splitlines()]
        page.write_text("".join(" ".join([*line[:2], "00000000", *line[3:]]) + "\n" for line in lines))
    fresh = Seen(settings.home / "seen")
    monkeypatch.setattr(Store, "seen", property(lambda _: fresh))
    assert fresh.expected(shard.key) == shard.digest
    assert is_sound(store, shard)
    assert is_sound(store, shard)
    assert hashed == [shard.key] * 2, "once after a restart"


def test_a_store_that_no_note_can_be_written_to_is_read_all_the_same(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, manifest = made
    for page in (settings.home / "seen").iterdir():
        page.unlink()
    (settings.home / "seen").rmdir()
    (settings.home / "seen").write_text("in the way")
    fresh = Seen(settings.home / "seen")
    monkeypatch.setattr(Store, "seen", property(lambda _: fresh))
    assert ids(IterableDataset(manifest, NodeShards(settings))) == IDS


def test_a_shard_that_the_disk_does_not_give_back_is_put_aside_and_made_anew(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, manifest = made
    path = files_of(made)[2]
    os.utime(path)  # so that it is looked at
    real = check.open_shard_digest
    failing = iter([True])

    def digest(file: Any) -> str:
        if next(failing, False):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file)

    monkeypatch.setattr(check, "open_shard_digest", digest)
    assert ids(IterableDataset(manifest, NodeShards(settings))) == IDS
    assert [one["key"] for one in keeping.quarantined(Store(settings.home))] == [path.stem]


def test_an_agent_does_not_serve_a_shard_that_was_written_to(made: Made, tmp_path: Path) -> None:
    settings, manifest = made
    store = Store(settings.home)
    secret, path = ensure_secret(store), files_of(made)[0]
    server = AgentServer(store, secret, NodeId("full"), "127.0.0.1", 0, lambda _: [])
    try:
        head = {"authorization": f"Bearer {secret}"}
        url = f"{server.url}/v1/shards/{path.stem}"
        then = time.time() - 5000
        os.utime(path, (then, then))
        assert httpx.get(url, headers=head, timeout=20).status_code == 200
        assert httpx.get(url, headers=head, timeout=20).status_code == 200
        assert path.stat().st_atime > then + 1000, "to serve it is to use it"
        flip(path, 11)
        assert httpx.get(url, headers=head, timeout=20).status_code == 404
        assert not path.exists()
        assert len(keeping.quarantined(store)) == 1
        reader = Store(tmp_path / "reader")
        keep_secret(reader, secret)
        write_address(reader, AgentAddress(server.url, NodeId("reader"), os.getpid(), (server.url,)))
        source = NodeShards(replace(settings, home=reader.home))
        assert ids(IterableDataset(manifest, source)) == IDS
        assert source.note()["peer_shards"] == len(manifest.shards) - 1, "all but the one that was wrong"
        assert wrong(reader, manifest) == []
    finally:
        server.close()


def test_scrubbing_names_all_that_is_wrong_and_healing_makes_the_same_bytes(made: Made) -> None:
    settings, manifest = made
    store, paths = Store(settings.home), files_of(made)
    assert list(scrub(store, deep=True)) == []
    rot(made, paths[0], 1)
    with paths[1].open("ab") as file:
        file.write(b"more")
    paths[2].unlink()
    (store.home / "shards" / "ab").mkdir(exist_ok=True)
    (store.home / "shards" / "ab" / "stray").write_text("x")
    unknown = store.shard_path("ab" * 32)
    unknown.write_bytes(b"nobody's")
    (store.home / "manifests" / f"{'cd' * 32}.json").write_text("{")
    shallow = {(one.kind, one.key) for one in scrub(store)}
    assert shallow == {
        ("wrong size", paths[1].stem),
        ("record without shard", manifest.items[2].key),
        ("unreferenced", "ab" * 32),
        ("unreadable manifest", "cd" * 32),
        ("not a shard", ""),
    }
    deep = list(scrub(store, [shard.key for shard in manifest.shards], deep=True))
    assert {(one.kind, one.key) for one in deep} == {
        ("wrong bytes", paths[0].stem),
        ("missing", paths[1].stem),
        ("missing", paths[2].stem),
    }
    (rotten,) = [one for one in deep if one.kind == "wrong bytes"]
    assert (rotten.expected, rotten.manifest) == (manifest.shards[0].digest, manifest.id)
    assert rotten.found != rotten.expected
    assert paths[0].name in str(rotten)
    assert heal(store, settings, deep) == dict.fromkeys((paths[0].stem, paths[1].stem, paths[2].stem), "")
    assert list(scrub(store, [shard.key for shard in manifest.shards], deep=True)) == []
    assert [shard_digest(path) for path in paths] == [shard.digest for shard in manifest.shards]


def test_what_cannot_be_healed_says_why_and_never_shows(made: Made, tmp_path: Path) -> None:
    settings, manifest = made
    flip(files_of(made)[0], 9)
    (tmp_path / "repo").rename(tmp_path / "gone")
    with pytest.raises(SourceUnavailable, match="train-"):
        ids(IterableDataset(manifest, NodeShards(settings)))
    finding = Finding("missing", manifest.shards[0].key, "")
    assert "train-" in heal(Store(settings.home), settings, [finding])[finding.key]
    assert list(heal(Store(settings.home), settings, [Finding("missing", "ef" * 32, "")]).values()) != [""]


def test_an_agent_looks_for_rot_by_itself_and_heals_it(made: Made) -> None:
    settings, manifest = made
    for seed, path in enumerate(files_of(made)):
        rot(made, path, seed)
    healed = scrub_once(Store(settings.home), replace(settings, scrub_rate=1 << 30))
    assert healed == {shard.key: "" for shard in manifest.shards}
    assert wrong(Store(settings.home), manifest) == []


def test_what_an_agent_tells_of_its_store_is_plain(made: Made) -> None:
    agent = Keeping()
    agent._store, agent._node = Store(made[0].home), NodeId("n")
    flip(files_of(made)[0], 2)
    os.utime(files_of(made)[0])
    (finding,) = agent.verify([made[1].shards[0].key], deep=True)
    assert finding["kind"] == "wrong bytes"
    assert finding["quarantined"] is True
    (aside,) = agent.quarantined()
    assert aside["key"] == finding["key"]
    assert aside["bytes"] == made[1].shards[0].size
    assert agent.verify(None)[0]["kind"] == "record without shard"


LOOKS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["note", "other", "tear", "drop"]), st.integers(1, 4)), max_size=30
)


@given(LOOKS)
def test_a_note_counts_for_the_very_file_it_was_made_of_whatever_becomes_of_the_page(
    tmp_path_factory: pytest.TempPathFactory, looks: list[tuple[int, str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("seen")
    mine, theirs = Seen(folder), Seen(folder)
    keys = [f"ab{number:062x}" for number in range(4)]
    noted: dict[str, tuple[str, Stamp]] = {}
    for number, what, version in looks:
        key, stamp = keys[number], (number, version, version, version)
        if what in ("note", "other"):
            (mine if what == "note" else theirs).note(key, f"{version:064x}", stamp)
            noted[key] = (f"{version:064x}", stamp)
        elif what == "tear" and (folder / "ab").exists():
            with (folder / "ab").open("ab") as file:
                file.write(b"torn"[:version])
        elif what == "drop":
            (folder / "ab").unlink(missing_ok=True)
        for seen in (mine, theirs, Seen(folder)):
            for one in keys:
                for tried in range(5):
                    stamp = (int(one, 16) % 256 % 4, tried, tried, tried)
                    found = seen.digest(one, stamp)
                    assert found in (None, f"{tried:064x}"), "never another file's"


def test_scrubbing_keeps_to_its_rate_and_ends_when_it_is_told_to(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, manifest = made
    waits: list[float] = []
    monkeypatch.setattr(module, "rest", lambda seconds, _: waits.append(seconds))
    rate = 1000
    assert list(scrub(Store(settings.home), deep=True, rate=rate)) == []
    promised = sum(sorted(shard.size for shard in manifest.shards)[:-1]) / rate
    assert 0.9 * promised < max(waits) < 1.2 * promised, "nobody slept, so the last file would wait for all before it"
    monkeypatch.undo()
    with pytest.raises(Stopped):
        list(scrub(Store(settings.home), deep=True, stopped=lambda: True))
