"""Few bytes that stand for many: a text that all rows repeat, long lists of one number. They are decoded in steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crucible.formats.read import read_file
from crucible.refs import ReadOptions
from tests.workers.test_bounds import MIB, converted

ROWS = 12_000


def repeated(rows: int, length: int) -> pa.DictionaryArray:
    """Texts of `length` characters, of which there are thirty."""
    texts = [f"{n:03}" + "v" * (length - 3) for n in range(30)]
    return pa.DictionaryArray.from_arrays(pa.array([n % 30 for n in range(rows)], pa.int32()), pa.array(texts))


def as_texts(path: Path) -> int:
    table = pa.table({"n": range(ROWS), "t": repeated(ROWS, 30_000)})
    pq.write_table(table, path, row_group_size=ROWS, store_schema=False)
    return ROWS


def as_dictionary(path: Path) -> int:
    pq.write_table(pa.table({"n": range(ROWS), "t": repeated(ROWS, 30_000)}), path, row_group_size=ROWS)
    return ROWS


def as_arrow(path: Path) -> int:
    table = pa.table({"n": range(ROWS), "t": repeated(ROWS, 30_000)})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    return ROWS


def short_then_long(path: Path) -> int:
    """A hundred thousand letters, then the one long text, which the first steps could not know of."""
    places = pa.array([0] * 100_000 + [1] * 400, pa.int32())
    column = pa.DictionaryArray.from_arrays(places, pa.array(["s", "a" * 900_000]))
    pq.write_table(pa.table({"t": column}), path, store_schema=False, row_group_size=1 << 20)
    return 100_400


def lists_of_zeros(path: Path) -> int:
    zeros = pa.array(np.zeros(1_000_000, np.int64))
    lists = pa.ListArray.from_arrays(np.arange(0, 1_000_001, 1000, dtype=np.int32), zeros)
    pq.write_table(pa.table({"l": pa.concat_arrays([lists] * 45)}), path, row_group_size=1 << 20)
    return 45_000


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.parquet", as_texts),
        ("b.parquet", as_dictionary),
        ("c.parquet", short_then_long),
        ("d.parquet", lists_of_zeros),
        ("a.arrow", as_arrow),
    ],
)
def test_what_is_written_once_and_repeated_is_not_held_as_often(
    name: str, make: Callable[[Path], int], tmp_path: Path
) -> None:
    rows = make(tmp_path / name)
    assert (tmp_path / name).stat().st_size < 4 * MIB
    said = converted(tmp_path / name, name.partition(".")[2], 320 * MIB)
    assert said["rows"] == rows, said


@pytest.mark.parametrize("threads", [1, 3])
def test_steps_are_as_long_as_they_may_be(threads: int, tmp_path: Path) -> None:
    """Many short rows are few steps; the batches are those of one thread, and hold what pyarrow reads."""
    table = pa.table(
        {"n": range(100_000), "t": [f"{n % 700}" for n in range(100_000)], "l": [[n] for n in range(100_000)]}
    )
    for number, columns in enumerate((["n", "t"], ["n", "t", "l"], ["n"])):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(table.select(columns), path, row_group_size=50_000)
        batches = list(read_file(path, path.name, ReadOptions("parquet"), threads))
        assert pa.Table.from_batches(batches).select(columns).to_pylist() == table.select(columns).to_pylist()
        assert len(batches) < 30
        if threads > 1:
            alone = read_file(path, path.name, ReadOptions("parquet"))
            assert [batch.num_rows for batch in batches] == [batch.num_rows for batch in alone]


def test_a_page_bigger_than_a_row_may_be_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.parquet", [f"{n:07}" + "p" * 993 for n in range(40_000)]
    pq.write_table(pa.table({"t": texts}), path, use_dictionary=False, data_page_size=1 << 30, write_batch_size=1 << 20)
    assert converted(path, "parquet", 320 * MIB)["rows"] == 40_000
    said = converted(path, "parquet", 320 * MIB, row_bytes=12 * MIB)
    assert said["error"] == "CorruptFile"
    assert "a.parquet at row group 0, a page of column 't': " in said["says"]
    assert "set CRUCIBLE_ROW_BYTES higher" in said["says"]
    assert said["peak"] < 12 * MIB
    pq.write_table(pa.table({"t": texts}), path, use_dictionary=False)
    assert converted(path, "parquet", 320 * MIB, row_bytes=12 * MIB)["rows"] == 40_000, "in pages of a mebibyte"
