"""`columns` and `filters` of a parquet config, and as arguments: rows, columns and features of `datasets` 5.2."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import crucible
from crucible.errors import CrucibleError, UsageError
from tests.oracle import datasets

ROWS = 40
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "columns": ("columns: [b, a]", {}),
    "one column": ("columns: [when]", {}),
    "all columns in another order": ("columns: [s, when, b, a]", {}),
    "a column that is not there": ("columns: [z]", {}),
    "columns of the call": ("columns: [s]", {"columns": ["b"]}),
    "a filter": ("filters: [[a, '>', 12]]", {}),
    "two filters": ("filters: [[a, '>', 12], [b, '==', x]]", {}),
    "either of two": ("filters: [[[a, '<', 3]], [[b, '=', x], [a, '>=', 30]]]", {}),
    "among some": ("filters: [[b, in, [x, z]]]", {}),
    "not among some": ("filters: [[a, 'not in', [1, 2, 3]]]", {}),
    "of nulls": ("filters: [[s, '!=', 'a5']]", {}),
    "of a fraction": ("filters: [[a, '>', 3.5]]", {}),
    "by a column that is left out": ("columns: [b]\n  filters: [[a, '<', 9]]", {}),
    "no such column": ("filters: [[z, '>', 1]]", {}),
    "no such comparison": ("filters: [[a, '~', 1]]", {}),
    "text and a number": ("filters: [[b, '>', 1]]", {}),
    "no filters at all": ("filters: []", {}),
    "of the call": ("filters: [[a, '>', 12]]", {"filters": [("a", "<", 4)]}),
    "with features": (
        "columns: [b]\n  features:\n  - {name: b, dtype: large_string}\n  - {name: a, dtype: int8}",
        {},
    ),
    "with features of dataset_info": (
        "columns: [b, a]\n  filters: [[s, '==', 'a4']]\ndataset_info:\n  config_name: m\n  features:\n"
        "  - {name: a, dtype: int8}\n  - {name: b, dtype: string}\n  - {name: s, dtype: string}\n"
        "  - {name: when, dtype: 'timestamp[us]'}",
        {},
    ),
}


def lay_out(folder: Path, setting: str) -> None:
    days = [datetime(2020, 1, 1 + n % 28) for n in range(ROWS)]
    texts = [f"a{n}" if n % 3 else None for n in range(ROWS)]
    table = pa.table({"a": range(ROWS), "b": ["x", "y", "z", "x"] * (ROWS // 4), "s": texts, "when": days})
    for number in range(2):
        pq.write_table(table.slice(20 * number, 20), folder / f"train-{number}.parquet", row_group_size=7)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: m\n  data_files: '*.parquet'\n  {setting}\n---\n")


def facts(split: Any) -> Any:
    features = split.features.to_dict() if hasattr(split.features, "to_dict") else dict(split.features)
    return [dict(row) for row in split], list(split.column_names), json.loads(json.dumps(features))


@pytest.mark.parametrize("key", SETTINGS)
def test_columns_and_filters_of_a_card_are_those_of_datasets(key: str, tmp_path: Path) -> None:
    setting, arguments = SETTINGS[key]
    lay_out(tmp_path, setting)
    try:
        wanted = facts(datasets.load_dataset(str(tmp_path), split="train", **arguments))
    except Exception:
        with pytest.raises(CrucibleError):
            crucible.load_dataset(str(tmp_path), split="train", **arguments)
        return
    assert facts(crucible.load_dataset(str(tmp_path), split="train", **arguments)) == wanted
    assert facts(crucible.load_dataset(str(tmp_path), split="train", **arguments, streaming=True)) == wanted


def test_a_filter_of_a_day(tmp_path: Path) -> None:
    """The card's day is text by the time that it is compared; `datasets` cannot load it."""
    lay_out(tmp_path, "filters: [[when, '>', 2020-01-27]]")
    days = crucible.load_dataset(str(tmp_path), split="train")["when"]
    assert [day.day for day in days] == [28]


def test_filters_that_leave_nothing_leave_the_columns(tmp_path: Path) -> None:
    """`datasets` says of such a split that it corresponds to no data."""
    lay_out(tmp_path, "filters: [[a, '>', 1000]]")
    found = crucible.load_dataset(str(tmp_path), split="train")
    assert (len(found), list(found.column_names)) == (0, ["a", "b", "s", "when"])


@pytest.mark.parametrize("filters", ["a > 1", [], [[]], [["a", ">"]], {"a": 1}, [["a", ">", "x"]]])
def test_filters_that_say_nothing_are_told(filters: Any, tmp_path: Path) -> None:
    lay_out(tmp_path, "")
    with pytest.raises(UsageError, match="filters"):
        crucible.load_dataset(str(tmp_path), split="train", filters=filters)


def test_a_plan_does_not_promise_rows_that_filters_leave_out(tmp_path: Path) -> None:
    lay_out(tmp_path, "filters: [[a, '>', 12]]")
    assert crucible.plan(str(tmp_path)).rows is None
    crucible.load_dataset(str(tmp_path))
    assert crucible.plan(str(tmp_path)).rows == 27
