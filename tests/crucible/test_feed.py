"""Shards are fetched in the order in which they will be read, a bounded number of bytes ahead, each once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.cache.holds import holds_of
from crucible.errors import SourceUnavailable
from crucible.feed import Feeder
from crucible.iterate import ShardReader
from crucible.manifest import Manifest
from crucible.refs import ShardInfo
from tests.fakes.feeding import FarSource, feed_threads, until
from tests.fakes.shards import FolderSource, number_split

SHARDS = 12


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    (tmp_path / "far").mkdir()
    return number_split(tmp_path / "far", [20] * SHARDS)[0]


@pytest.fixture
def source(tmp_path: Path, manifest: Manifest) -> Iterator[FarSource]:
    made = FarSource(tmp_path / "far", tmp_path / "store")
    yield made
    made.open.set()
    holds_of(tmp_path / "store").close()
    until(lambda: not feed_threads())


def in_order(manifest: Manifest, *numbers: int) -> Iterator[tuple[Manifest, ShardInfo]]:
    for number in numbers or range(len(manifest.shards)):
        yield manifest, manifest.shards[number]


def keys(manifest: Manifest, *numbers: int) -> list[str]:
    return [manifest.shards[number].key for number in numbers]


def room(manifest: Manifest, shards: int) -> int:
    return shards * max(shard.size for shard in manifest.shards)


def test_shards_are_fetched_in_the_order_they_are_wanted_in_as_far_as_the_budget_goes(
    manifest: Manifest, source: FarSource
) -> None:
    feeder = Feeder(source, most_bytes=room(manifest, 3), fetchers=1)
    order = [5, 0, 7, 2, 9]
    feeder.want(in_order(manifest, *order))
    until(lambda: len(source.came) == 3)
    until(lambda: not feed_threads())
    assert source.fetched == keys(manifest, 5, 0, 7)
    assert feeder.bytes_ahead == sum(manifest.shards[number].size for number in (5, 0, 7))
    for done, number in enumerate(order, 1):
        shard = manifest.shards[number]
        assert feeder.path(manifest, shard).exists()
        feeder.opened(manifest, shard)
        until(lambda done=done: len(source.came) == min(5, 3 + done))  # type: ignore[misc]
    assert source.fetched == keys(manifest, *order)
    until(lambda: feeder.bytes_ahead == 0)
    feeder.close()


def test_what_is_here_already_starts_no_thread(
    manifest: Manifest, source: FarSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in manifest.shards:
        source.path(manifest, shard)
    source.fetched.clear()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda self: pytest.fail(f"{self.name} was started"))
        feeder = Feeder(source, most_bytes=room(manifest, 3))
        feeder.want(in_order(manifest))
        assert ShardReader(manifest, feeder).take(np.arange(manifest.rows)).num_rows == manifest.rows
    assert source.fetched == []


@pytest.mark.parametrize("here", [True, False])
def test_a_million_shards_are_looked_at_a_few_at_a_time(manifest: Manifest, source: FarSource, here: bool) -> None:
    source.open.clear()
    if here:
        source.has = lambda shard: True  # type: ignore[method-assign]
    million = ((manifest, ShardInfo(f"{number:064x}", 1, 1, "", "", 0, number)) for number in range(1_000_000))
    feeder = Feeder(source, most_bytes=3)
    feeder.want(million)
    feeder.close()
    assert next(million)[1].number < 2000


def test_a_reader_waits_for_the_fetch_that_is_under_way_and_starts_no_second_one(
    manifest: Manifest, source: FarSource
) -> None:
    source.open.clear()
    feeder = Feeder(source, most_bytes=room(manifest, 2), fetchers=2)
    feeder.want(in_order(manifest))
    until(lambda: len(source.fetched) == 2)
    got: list[Path] = []
    readers = [
        threading.Thread(target=lambda: got.append(feeder.path(manifest, manifest.shards[0])), daemon=True)
        for _ in range(3)
    ]
    for reader in readers:
        reader.start()
    source.open.set()
    for reader in readers:
        reader.join(60)
    assert len(got) == 3
    assert source.came[manifest.shards[0].key] == 1
    feeder.close()


def test_what_a_reader_waits_for_is_fetched_before_what_is_ahead(manifest: Manifest, source: FarSource) -> None:
    source.open.clear()
    feeder = Feeder(source, most_bytes=room(manifest, 2), fetchers=1)
    feeder.want(in_order(manifest))
    until(lambda: len(source.fetched) == 1)
    reader = threading.Thread(target=feeder.path, args=(manifest, manifest.shards[9]), daemon=True)
    reader.start()
    until(lambda: len(source.fetched) == 2)
    assert source.fetched == keys(manifest, 0, 9)
    source.open.set()
    reader.join(60)
    feeder.close()


def test_an_error_ahead_is_met_by_who_asks_and_only_if_it_is_still_there(manifest: Manifest, source: FarSource) -> None:
    source.failing = set(keys(manifest, 0, 1))
    feeder = Feeder(source, most_bytes=room(manifest, 3), fetchers=1)
    feeder.want(in_order(manifest))
    until(lambda: len(source.came) == 3)
    came = sum(manifest.shards[number].size for number in (2, 3, 4))
    until(lambda: feeder.bytes_ahead == came)  # those that failed hold no room
    source.failing = set(keys(manifest, 1))
    assert feeder.path(manifest, manifest.shards[0]).exists()
    with pytest.raises(SourceUnavailable, match="broken"):
        feeder.path(manifest, manifest.shards[1])
    feeder.close()


def test_a_shard_bigger_than_the_budget_is_left_to_the_reader_and_so_is_all_without_one(
    manifest: Manifest, source: FarSource
) -> None:
    for budget in (0, min(shard.size for shard in manifest.shards) - 1):
        feeder = Feeder(source, most_bytes=budget)
        feeder.want(in_order(manifest))
        assert not feed_threads()
        assert source.fetched == []
    assert feeder.path(manifest, manifest.shards[4]).exists()
    assert source.fetched == keys(manifest, 4)
    feeder.close()


def test_another_sequence_takes_the_place_of_the_one_before(manifest: Manifest, source: FarSource) -> None:
    feeder = Feeder(source, most_bytes=room(manifest, 2), fetchers=1)
    feeder.want(in_order(manifest, 0, 1, 2, 3))
    until(lambda: len(source.came) == 2)
    feeder.want(in_order(manifest, 1, 8, 9, 10))
    until(lambda: len(source.came) == 4)
    assert source.fetched == keys(manifest, 0, 1, 8, 9)
    assert source.store.leased() == set(keys(manifest, 8, 9))
    feeder.close()


def test_what_was_fetched_ahead_is_leased_until_it_was_opened_and_then_by_the_reader(
    manifest: Manifest, source: FarSource
) -> None:
    feeder = Feeder(source, most_bytes=room(manifest, 2), fetchers=1)
    feeder.want(in_order(manifest, 0, 1))
    until(lambda: feeder.bytes_ahead and not feed_threads())
    assert [source.store.evict(key) for key in keys(manifest, 0, 1)] == [0, 0]
    reader = ShardReader(manifest, feeder)
    reader.slice(0, 5)
    assert feeder.bytes_ahead == manifest.shards[1].size
    assert source.store.leased() == set(keys(manifest, 0, 1))
    feeder.close()
    assert source.store.leased() == set(keys(manifest, 0))
    reader.close()
    assert source.store.leased() == set()


def test_a_reader_leases_what_it_has_mapped_and_no_more(manifest: Manifest, source: FarSource) -> None:
    reader = ShardReader(manifest, source, most_open=2)
    for number in range(4):
        reader.slice(20 * number, 20 * number + 3)
    assert source.store.leased() == set(keys(manifest, 2, 3))
    table = reader.slice(40, 60)
    del reader
    assert source.store.leased() == set()
    assert source.store.evict(manifest.shards[2].key) > 0
    assert table["id"].to_pylist() == list(range(40, 60)), "what was taken stays when its file goes"


def test_a_shard_evicted_before_it_was_opened_is_fetched_again(manifest: Manifest, source: FarSource) -> None:
    reader = ShardReader(manifest, source, most_open=1)
    reader.slice(0, 1)
    reader.slice(30, 31)
    assert source.store.evict(manifest.shards[0].key) > 0
    assert reader.slice(0, 3)["id"].to_pylist() == [0, 1, 2]
    assert source.came[manifest.shards[0].key] == 2


def test_a_source_that_cannot_say_what_it_has_is_read_as_it_is(manifest: Manifest, tmp_path: Path) -> None:
    feeder = Feeder(FolderSource(tmp_path / "far"), most_bytes=1 << 30)
    feeder.want(in_order(manifest))
    assert ShardReader(manifest, feeder).slice(0, 2)["id"].to_pylist() == [0, 1]
    assert not feed_threads()


class Wishing(FarSource):
    """Is told what will be needed."""

    wished: list[list[str]]

    def wish(self, shards: Sequence[tuple[Manifest, ShardInfo]]) -> None:
        self.wished.append([shard.key for _, shard in shards])


def test_who_is_making_the_shards_is_told_which_are_needed_next(manifest: Manifest, tmp_path: Path) -> None:
    source = Wishing(tmp_path / "far", tmp_path / "store")
    source.wished = []
    source.path(manifest, manifest.shards[5])
    source.open.clear()
    feeder = Feeder(source, most_bytes=room(manifest, 1), fetchers=1)
    feeder.want(in_order(manifest, 3, 5, 1, 8))
    assert source.wished == [keys(manifest, 3, 1, 8)]
    feeder.close()


def test_a_sequence_that_breaks_is_told_of_and_reading_goes_on(
    manifest: Manifest, source: FarSource, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Iterator[tuple[Manifest, ShardInfo]]:
        yield manifest, manifest.shards[0]
        raise ZeroDivisionError

    feeder = Feeder(source, most_bytes=room(manifest, 2))
    feeder.want(broken())
    until(lambda: source.came)
    assert "fetch ahead" in caplog.text
    assert feeder.path(manifest, manifest.shards[5]).exists()
    feeder.close()


@settings(max_examples=25, deadline=None)
@given(
    order=st.lists(st.integers(0, SHARDS - 1), max_size=30),
    reads=st.lists(st.integers(0, SHARDS - 1), max_size=30),
    budget=st.integers(0, 4),
    fetchers=st.integers(1, 3),
    evict=st.booleans(),
)
def test_whatever_is_wanted_and_read_comes_once_and_the_budget_holds(
    tmp_path_factory: pytest.TempPathFactory,
    order: list[int],
    reads: list[int],
    budget: int,
    fetchers: int,
    evict: bool,
) -> None:
    """Also when the reader reads otherwise than it said."""
    root = tmp_path_factory.mktemp("feed")
    (root / "far").mkdir()
    manifest, _ = number_split(root / "far", [3] * SHARDS)
    source = FarSource(root / "far", root / "store")
    feeder = Feeder(source, most_bytes=room(manifest, budget), fetchers=fetchers)
    reader = ShardReader(manifest, feeder, most_open=3)
    feeder.want(in_order(manifest, *order) if order else iter(()))
    for number in reads:
        assert feeder.bytes_ahead <= room(manifest, budget)
        assert reader.slice(3 * number, 3 * number + 3)["id"].to_pylist() == [3 * number + n for n in range(3)]
        if evict:
            for key in keys(manifest, *range(SHARDS)):
                source.store.evict(key)
    feeder.close()
    assert feeder.bytes_ahead == 0
    if not evict:
        assert all(count == 1 for count in source.came.values())
    reader.close()
    assert source.store.leased() == set()
    assert not feed_threads()
