"""A dataset has the shards that it will read fetched ahead of it, and leaves nothing running when it is done."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

import crucible
from crucible.cache.holds import holds_of
from crucible.dataset import IterableDataset
from crucible.manifest import Manifest
from crucible.share import Share
from crucible.wants import shards_wanted
from tests.fakes.feeding import FarSource, feed_threads, until
from tests.fakes.shards import number_split

ROWS = [600] * 10
TOTAL = sum(ROWS)


@pytest.fixture
def far(tmp_path: Path) -> Iterator[tuple[Manifest, FarSource]]:
    (tmp_path / "far").mkdir()
    manifest, _ = number_split(tmp_path / "far", ROWS)
    source = FarSource(tmp_path / "far", tmp_path / "store")
    source.ahead_bytes = 3 * max(shard.size for shard in manifest.shards)  # type: ignore[attr-defined]
    yield manifest, source
    source.open.set()
    holds_of(tmp_path / "store").close()
    until(lambda: not feed_threads())


def ids(rows: object) -> list[int]:
    return [row["id"] for row in rows]  # type: ignore[attr-defined]


def test_while_a_row_is_handled_the_next_shards_come(far: tuple[Manifest, FarSource]) -> None:
    manifest, source = far
    iterator = iter(IterableDataset(manifest, source))
    assert next(iterator)["id"] == 0
    until(lambda: len(source.came) >= 4)  # the one that is read, and three that nobody has asked for
    assert len(source.came) <= 5
    assert [row["id"] for row in iterator] == list(range(1, TOTAL))
    assert set(source.came.values()) == {1}
    assert source.fetched[:4] == [shard.key for shard in manifest.shards[:4]] or sorted(source.fetched[:4]) == sorted(
        shard.key for shard in manifest.shards[:4]
    )
    until(lambda: not feed_threads())


def test_a_rank_fetches_the_shards_under_its_lanes_and_no_others(far: tuple[Manifest, FarSource]) -> None:
    manifest, source = far
    mine = IterableDataset(manifest, source).shuffle(3, mode="lanes", lanes=4, window=2).shard(1, 4)
    read = ids(mine)
    wanted = {shard.key for _, shard in shards_wanted([manifest], mine.walk, Share(1, 4), TOTAL)}
    assert set(source.came) == wanted
    assert len(wanted) < len(ROWS)
    assert len(read) == TOTAL // 4


def test_a_loop_that_is_left_leaves_no_threads(far: tuple[Manifest, FarSource]) -> None:
    manifest, source = far
    for _ in IterableDataset(manifest, source):
        break
    gc.collect()
    until(lambda: not feed_threads())
    came = len(source.came)
    assert ids(IterableDataset(manifest, source)) == list(range(TOTAL))
    assert came < len(ROWS)


def test_nothing_runs_when_all_shards_are_here(far: tuple[Manifest, FarSource]) -> None:
    manifest, source = far
    list(IterableDataset(manifest, source))
    until(lambda: not feed_threads())
    for number, _ in enumerate(IterableDataset(manifest, source).shuffle(1)):
        if number % 1000 == 0:
            assert feed_threads() == []


def test_the_first_row_of_many_shards_that_are_all_here_waits_for_a_look_at_few(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    manifest, _ = number_split(tmp_path / "far", [5] * 300)
    source = FarSource(tmp_path / "far", tmp_path / "store")
    source.ahead_bytes = 1 << 30  # type: ignore[attr-defined]
    for shard in manifest.shards:
        source.path(manifest, shard)
    for rows in (IterableDataset(manifest, source), IterableDataset(manifest, source).shuffle(1, mode="exact")):
        source.looks = 0
        iterator = iter(rows)
        next(iterator)
        assert source.looks < 200
        assert len(list(iterator)) == 1499
    holds_of(tmp_path / "store").close()


def test_a_mix_of_two_sources_is_fed_from_both(far: tuple[Manifest, FarSource], tmp_path: Path) -> None:
    manifest, source = far
    other = FarSource(tmp_path / "far", tmp_path / "other")
    other.ahead_bytes = source.ahead_bytes  # type: ignore[attr-defined]
    parts = [IterableDataset(manifest, one) for one in (source, other)]
    mix = crucible.interleave_datasets(parts)
    iterator = iter(mix)
    begun = [next(iterator), next(iterator)]  # a row of each
    until(lambda: len(source.came) >= 2 and len(other.came) >= 2)
    assert len(begun) + len(list(iterator)) == mix.num_rows
    assert set(source.came.values()) == set(other.came.values()) == {1}
    holds_of(tmp_path / "other").close()
