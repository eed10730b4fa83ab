"""Which shards are wanted next, against what a reader then meets."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible.order import Int64s, OrderSpec, shard_rows
from crucible.share import Share
from crucible.streams import Shuffled, Source, Stream, Sum
from crucible.wants import LOOK_ROWS, shards_wanted
from tests.fakes.shards import number_split


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(0, 40),
    st.booleans(),
)
def test_shards_come_once_in_the_order_in_which_a_reader_meets_them(
    tmp_path: Path, splits: list[list[int]], world: int, unit: int, start: int, shuffled: bool
) -> None:
    manifests, parts, rows = [], [], 0
    for number, lengths in enumerate(splits):
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        manifest, _ = number_split(folder, lengths)
        manifests.append(manifest)
        parts.append(Source(str(number), shard_rows(manifest), rows))
        rows += manifest.rows
    stream: Stream = Sum(tuple(parts))
    if shuffled:
        stream = Shuffled(stream, OrderSpec("lanes", 3, 0, 4, 2))
    stops = np.cumsum(np.concatenate([shard_rows(manifest) for manifest in manifests]))
    every = [(manifest, shard) for manifest in manifests for shard in manifest.shards]
    for rank in range(world):
        share = Share(rank, world, unit=unit, start=min(start, rows), end="pad")
        ids = stream.at(0).rows(share.positions(rows, 0, share.units(rows)) % rows)
        met = dict.fromkeys(np.searchsorted(stops, ids, side="right").tolist())
        wanted = list(shards_wanted(manifests, stream.at(0), share, rows))
        assert [(one.repo, shard.key, shard.rows) for one, shard in wanted] == [
            (every[number][0].repo, every[number][1].key, every[number][1].rows) for number in met
        ]


def test_it_looks_no_further_than_it_is_asked(tmp_path: Path) -> None:
    asked = []

    class Watched:
        def rows(self, positions: Int64s) -> Int64s:
            asked.append(len(positions))
            return positions

        def open_shards(self, rank: int, world_size: int) -> int:
            return rank + world_size

    manifest, _ = number_split(tmp_path, [1_000_000])
    assert len(list(islice(shards_wanted([manifest], Watched(), Share(unit=10), 1_000_000), 1))) == 1
    assert 0 < sum(asked) <= LOOK_ROWS
