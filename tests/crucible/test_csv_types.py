"""Columns of a CSV file whose first rows are too many bytes to hold get the types that they would have got."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.formats import csv
from crucible.refs import ReadOptions
from tests.workers.test_bounds import MIB, converted

VALUES = (
    "1",
    "-7",
    "+3",
    "0",
    "1.5",
    "1e3",
    " 2",
    "",
    "NA",
    "true",
    "False",
    "x",
    "18446744073709551615",
    "9" * 30,
    ".5",
)


def read(path: Path) -> pa.Table:
    batches = list(csv.read_csv(path, path.name, ReadOptions("csv")))
    return pa.Table.from_batches([batch.cast(batches[0].schema) for batch in batches])


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from(VALUES), st.sampled_from(VALUES)), min_size=1, max_size=12),
    ragged=st.booleans(),
)
def test_types_are_those_of_all_first_rows_however_many_are_held(rows: list[tuple[str, str]], ragged: bool) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder, "a.csv")
        lines = [f"{a},{b},z" for a, b in rows] + (["1"] if ragged else [])
        path.write_text("\n".join(["a,b,c", *lines]) + "\n")
        patch.setattr(csv, "_BLOCK", 16)  # several batches of so few rows
        whole = read(path)
        patch.setattr(csv, "HELD_BYTES", 1)
        assert read(path).equals(whole)


def test_ten_thousand_long_rows_are_not_held(tmp_path: Path) -> None:
    text = "y" * 15_000
    with (tmp_path / "a.csv").open("w") as file:
        file.write("n,t,late\n")
        for n in range(10_500):
            file.write(f"{n},{text},{'' if n == 9_999 else n if n < 10_000 else 0.5}\n")
    said = converted(tmp_path / "a.csv", "csv", 320 * MIB)
    assert said["rows"] == 10_500, said
    columns = csv.read_csv(tmp_path / "a.csv", "a.csv", ReadOptions("csv"))
    assert next(columns).schema.types == [pa.int64(), pa.large_string(), pa.float64()], "as 10,000 rows say"
