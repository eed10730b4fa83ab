"""Where parquet is cut into shards: by its footers alone, so that who reads them knows it before the data moves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible.formats.cuts import item_shard_rows, known_from_footers, shard_rows, unpacked_groups
from crucible.formats.footer import ParquetFooter, footer_tail, parse_footer
from crucible.refs import ReadOptions
from tests.workers.converting import run

ROWS = st.lists(st.integers(0, 60), min_size=1, max_size=5)


def footer(path: Path) -> ParquetFooter:
    data = path.read_bytes()
    part = footer_tail(len(data))
    found = parse_footer(path.name, len(data), data[part.start : part.stop])
    assert isinstance(found, ParquetFooter)
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.lists(ROWS, min_size=1, max_size=3), shard_bytes=st.integers(1, 4000), nested=st.booleans())
def test_the_footers_tell_the_rows_of_every_shard(
    files: list[list[int]], shard_bytes: int, nested: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("c")
    paths = []
    for number, groups in enumerate(files):
        paths.append(folder / f"{number}.parquet")
        empty = pa.table({"t": pa.array([], pa.string()), "n": pa.array([], pa.list_(pa.int64()))})
        with pq.ParquetWriter(paths[-1], empty.schema if nested else empty.select(["t"]).schema) as writer:
            for rows in groups:
                table = pa.table(
                    {
                        "t": pa.array([f"{number}/{row}" * (row % 7) for row in range(rows)], pa.string()),
                        "n": pa.array([[row] * (row % 3) for row in range(rows)], pa.list_(pa.int64())),
                    }
                )
                writer.write_table(table if nested else table.select(["t"]))
    told = shard_rows((group for path in paths for group in footer(path).unpacked), shard_bytes)
    made = run(paths, ReadOptions("parquet"), folder / "out", shard_bytes)
    assert [shard.rows for shard in made] == told


GROUPS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**12)), max_size=20)


@given(groups=GROUPS, shard_bytes=st.integers(10**7, 10**9))
def test_cuts_lose_no_row_and_come_close_to_the_size(groups: list[tuple[int, int]], shard_bytes: int) -> None:
    cuts = shard_rows(groups, shard_bytes)
    assert sum(cuts) == sum(rows for rows, _ in groups)
    assert all(rows >= 1 for rows in cuts)
    size = sum(size for rows, size in groups if rows)
    assert len(cuts) <= size // shard_bytes + 1


def test_a_footer_that_claims_the_absurd_does_not_cut_every_row_off() -> None:
    def claims(size: int) -> Any:
        group = SimpleNamespace(num_rows=1000, total_byte_size=size)
        return SimpleNamespace(num_row_groups=1, row_group=lambda _: group)

    schema = pa.schema([("t", pa.string())])
    (group,) = unpacked_groups(claims(1 << 60), schema, size=5000)
    assert len(shard_rows([group], 1 << 20)) == 1
    with pytest.raises(ValueError, match="negative"):
        unpacked_groups(claims(-1), schema, size=5000)


def test_rows_of_fixed_width_count_with_what_they_take_however_little_their_pages_do(tmp_path: Path) -> None:
    flat = pa.table({"n": pa.array([7] * 1_000_000)})
    pq.write_table(flat, tmp_path / "flat.parquet")
    assert sum(size for _, size in footer(tmp_path / "flat.parquet").unpacked) >= flat.nbytes


def test_files_of_different_types_in_one_item_are_cut_by_what_they_decode_to(tmp_path: Path) -> None:
    """Such a shard is held in memory until it is full, so what a footer does not tell must not make it big."""
    text = pa.array(["x" * 100_000] * 200).dictionary_encode()
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, kind in zip(paths, (pa.int32(), pa.int64()), strict=True):
        pq.write_table(pa.table({"t": text, "n": pa.array(range(200), kind)}), path)
    assert sum(path.stat().st_size for path in paths) < 1 << 20
    assert item_shard_rows(paths, ReadOptions("parquet"), 1 << 20) is None
    assert item_shard_rows(paths[:1], ReadOptions("parquet"), 1 << 20) == [200]
    made = run(paths, ReadOptions("parquet"), tmp_path / "out", 1 << 20)
    assert sum(shard.rows for shard in made) == 400
    assert all(shard.size < 3 << 20 for shard in made)


def test_filters_leave_rows_out_that_footers_count() -> None:
    assert known_from_footers(ReadOptions("parquet"))
    assert not known_from_footers(ReadOptions("parquet", (("filters", '[["a",">",1]]'),)))
    assert not known_from_footers(ReadOptions("json"))
