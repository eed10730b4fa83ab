"""What goes first, what a quota means, and the books about it: pure, and on disk between processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible.cache.book import RoomBook
from crucible.cache.pins import Pins
from crucible.cache.quota import NEVER, PEER_COST, SOURCE_COST, Held, Quota, Room, choose, reserve_of
from crucible.cache.store import Store
from crucible.cache.usage import Usage, room_of
from crucible.config import Settings
from crucible.errors import ManifestError, UsageError
from crucible.formats.growth import made_bytes, peak_bytes
from crucible.manifest import Manifest
from crucible.refs import ReadOptions, RepoRef, ShardInfo, SourceFile, WorkItem

HELD = st.lists(
    st.builds(
        Held,
        key=st.uuids().map(str),
        size=st.integers(0, 1000),
        age_s=st.floats(0, 1e6),
        cost=st.sampled_from([PEER_COST, SOURCE_COST, NEVER]),
    ),
    unique_by=lambda held: held.key,
    max_size=20,
)


@given(HELD, st.integers(0, 20_000))
def test_what_is_chosen_is_enough_if_anything_is_and_none_of_it_is_needless(held: list[Held], need: int) -> None:
    sizes = {one.key: one.size for one in held}
    chosen = choose(held, need)
    assert len(set(chosen)) == len(chosen)
    lost = [one for one in held if one.cost == NEVER]
    assert not {one.key for one in lost} & set(chosen), "what cannot be had again stays"
    freed, most = sum(sizes[key] for key in chosen), sum(one.size for one in held if one.cost < NEVER)
    assert freed >= need or freed == most
    assert all(freed - sizes[key] < need for key in chosen)
    assert choose(reversed(held), need) == chosen


def test_the_old_the_big_and_the_cheap_to_get_again_go_first() -> None:
    base = Held("base", 100, 100.0, SOURCE_COST)
    for better in (replace(base, age_s=1000.0), replace(base, size=200), replace(base, cost=PEER_COST)):
        assert choose([base, replace(better, key="better")], 1) == ["better"]


def test_a_quota_is_bytes_or_a_share_and_nonsense_is_named(tmp_path: Path) -> None:
    def read(text: str) -> Quota:
        return Settings.from_env({"CRUCIBLE_HOME": str(tmp_path), "CRUCIBLE_QUOTA": text}).quota

    assert read("500G") == Quota(size=500 << 30)
    assert read("80%").limit(1000) == 800
    assert read("").limit(1000) is None
    for bad in ("much", "0", "0%", "101%", "-5G", "%"):
        with pytest.raises(UsageError, match="CRUCIBLE_QUOTA"):
            read(bad)


def test_what_is_left_counts_the_quota_the_disk_its_reserve_and_what_is_promised() -> None:
    disk = 1000 << 20
    free = Room(disk, free=600 << 20, used=0, reserved=100 << 20)
    assert free.left == (500 << 20) - reserve_of(disk)
    bound = replace(free, used=300 << 20, limit=450 << 20)
    assert bound.left == 50 << 20
    assert "CRUCIBLE_QUOTA" in bound.bound
    assert "disk" in free.bound
    assert replace(bound, used=500 << 20).left < 0


def test_an_item_asks_for_its_files_what_is_unpacked_of_them_and_its_shards() -> None:
    def item(builder: str, *paths: str) -> WorkItem:
        files = tuple(SourceFile(path, 1000, "f" * 40, False) for path in paths)
        return WorkItem(0, RepoRef("org/data", "c" * 40), files, ReadOptions(builder), 1 << 20)

    assert made_bytes(item("json", "a.jsonl")) < made_bytes(item("json", "a.jsonl.gz"))
    assert peak_bytes(item("json", "a.jsonl")) == 1000 + made_bytes(item("json", "a.jsonl"))
    assert peak_bytes(item("json", "a.zip")) > 1000 + made_bytes(item("json", "a.zip"))
    assert peak_bytes(item("text", "a.txt", "b.txt")) == 2 * peak_bytes(item("text", "a.txt"))


def test_a_promise_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from crucible.cache.book import RoomBook\n"
        "held = RoomBook(Path(sys.argv[1])).reserve(1000, 'theirs'); held.set(700)\n"
        "print('ready', flush=True); sys.stdin.readline()"
    )
    book = RoomBook(tmp_path)
    mine = book.reserve(50, "mine")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert book.reserved() == 750
        assert {(one.what, one.size, one.pid) for one in book.promises()} == {
            ("mine", 50, os.getpid()),
            ("theirs", 700, process.pid),
        }
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
    assert book.reserved() == 50
    mine.close()
    mine.close()
    assert book.reserved() == 0
    assert list((tmp_path / "room").iterdir()) == []


def test_a_file_that_is_no_promise_counts_for_nothing(tmp_path: Path) -> None:
    book = RoomBook(tmp_path)
    with book.alone():
        held = book.reserve(5, "x" * 10_000)
    (tmp_path / "room" / "junk.room").write_bytes(b"\xff\xfe nonsense")
    (tmp_path / "room" / "torn.room").write_bytes(b"00000000000000000007\n{")
    assert book.reserved() == 5
    held.close()


def test_the_bytes_of_a_store_are_known_again_after_every_change(tmp_path: Path) -> None:
    store, usage = Store(tmp_path), Usage(tmp_path)
    assert usage.bytes() == 0
    keys = [f"{number:02x}" * 32 for number in range(5)]
    for number, key in enumerate(keys):
        path = store.shard_path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (number + 1))
        assert usage.shards() == (sum(range(number + 2)), number + 1)
    for key in keys[:3]:
        store.evict(key)
    assert usage.shards() == (9, 2)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "file").write_bytes(b"y" * 100_000)
    assert 9 + 100_000 <= usage.bytes() < 9 + 200_000
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "source-0").hardlink_to(tmp_path / "raw" / "file")
    assert usage.bytes() < 9 + 200_000, "one file, whatever its names"
    assert room_of(tmp_path, Quota(size=10**6)).left <= 10**6 - 100_009
    assert room_of(tmp_path, Quota()).used == 0, "without a quota nobody counts"


def test_a_pin_names_the_shards_of_its_manifest_and_outlives_the_process(tmp_path: Path) -> None:
    shard = ShardInfo("ab" * 32, 2, 5, "d" * 64, "s" * 64, 0, 0)
    item = WorkItem(0, RepoRef("org/data", "c" * 40), (), ReadOptions("json"), 1 << 20)
    manifest = Manifest(item.repo, "main", "train", None, "s" * 64, (), (item,), (shard,))
    store, pins = Store(tmp_path), Pins(tmp_path)
    with pytest.raises(ManifestError, match="cannot be pinned"):
        pins.pin(manifest.id)
    with pytest.raises(ManifestError, match="not a manifest id"):
        pins.pin("../../etc/passwd")
    store.put_manifest(manifest)
    pins.pin(manifest.id, "for the eval")
    again = Pins(tmp_path)
    assert again.keys() == {shard.key}
    (pin,) = again.listing()
    assert (pin.manifest, pin.note) == (manifest.id, "for the eval")
    (tmp_path / "pins" / f"{manifest.id}.json").write_text("{")
    assert Pins(tmp_path).keys() == {shard.key}, "a record that cannot be read is still a pin"
    assert (again.unpin(manifest.id), again.unpin(manifest.id), again.unpin("../x")) == (True, False, False)
    assert Pins(tmp_path).keys() == set()
    (tmp_path / "manifests" / f"{'ef' * 32}.json").write_text("{}")
    with pytest.raises(ManifestError, match="altered"):
        pins.pin("ef" * 32)
