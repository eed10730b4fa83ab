"""`crucible data schema` and `data stats`, and that `data head` shows what is not decoded; over a folder of parquet."""

from __future__ import annotations

import io
import json
import math
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.cli.app import cli
from crucible.feature_types import features_of, schema_of
from crucible.stats import column_stats

FEATURES = {
    "n": {"dtype": "int32", "_type": "Value"},
    "f": {"dtype": "float64", "_type": "Value"},
    "day": {"dtype": "date32", "_type": "Value"},
    "text": {"dtype": "string", "_type": "Value"},
    "list": {"feature": {"dtype": "int64", "_type": "Value"}, "_type": "List"},
    "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    "image": {"_type": "Image"},
    "sound": {"_type": "Audio"},
    "any": {"_type": "Json"},
}


def picture() -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", (4, 3)).save(out, "png")
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repo")
    media = {"bytes": picture(), "path": None}
    columns: dict[str, list[Any]] = {
        "n": [3, None, -1],
        "f": [0.5, math.nan, 1.5],
        "day": [date(2020, 1, 1), date(2021, 1, 1), None],
        "text": ["", "äöü", "a"],
        "list": [[1, 2], [], None],
        "label": [1, 1, -1],
        "image": [media, None, media],
        "sound": [{"bytes": b"RIFF", "path": "a.wav"}] * 3,
        "any": ["{}", "[1, 2]", None],
    }
    schema = schema_of(FEATURES)
    arrays = [
        pa.ExtensionArray.from_storage(field.type, pa.array(columns[field.name], pa.string()))
        if isinstance(field.type, pa.JsonType)
        else pa.array(columns[field.name], field.type)
        for field in schema
    ]
    table = pa.table(arrays, schema=schema)
    pq.write_table(table, folder / "train.parquet")
    pq.write_table(table.slice(0, 1), folder / "test.parquet")
    return folder


def run(folder: Path, home: Path, *args: str) -> Result:
    env = {"COLUMNS": "160", "CRUCIBLE_HOME": str(home)}
    return CliRunner().invoke(cli, ["data", args[0], str(folder), "-q", *args[1:]], prog_name="crucible", env=env)


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_schema_shows_columns_features_and_types(folder: Path, tmp_path: Path) -> None:
    told = lines(run(folder, tmp_path, "schema", "--json"))
    assert [(one["split"], one["rows"], one["config"]) for one in told] == [
        ("train", 3, "default"),
        ("test", 1, "default"),
    ]
    assert told[0]["features"] == FEATURES
    assert told[0]["types"]["list"] == "list<item: int64>"
    assert len(told[0]["commit"]) == 40
    shown = run(folder, tmp_path, "schema", "--split", "train", "--columns", "label,n").stdout
    assert "default, train: 3 rows" in shown
    assert "ClassLabel(names=['cat', 'dog'])" in shown
    assert "text" not in shown


def test_stats_say_what_is_in_the_columns(folder: Path, tmp_path: Path) -> None:
    told = {one["column"]: one for one in lines(run(folder, tmp_path, "stats", "--split", "train", "--json"))}
    assert list(told) == list(FEATURES)
    assert {(one["rows"], one["split"]) for one in told.values()} == {(3, "train")}
    assert [told[name]["nulls"] for name in FEATURES] == [1, 0, 1, 0, 1, 0, 1, 0, 1]
    assert (told["n"]["min"], told["n"]["max"], told["n"]["mean"]) == (-1, 3, 1.0)
    assert (told["f"]["min"], told["f"]["max"], told["f"]["mean"], told["f"]["not_finite"]) == (0.5, 1.5, 1.0, 1)
    assert (told["day"]["min"], told["day"]["max"], told["day"]["mean"]) == ("2020-01-01", "2021-01-01", None)
    lengths = {name: (one["min_length"], one["max_length"]) for name, one in told.items()}
    assert lengths["text"] == (0, 3)
    assert lengths["list"] == (0, 2)
    assert lengths["image"] == (len(picture()),) * 2
    assert lengths["sound"] == (4, 4)
    assert lengths["any"] == (2, 6)
    assert told["label"]["labels"] == {"-1": 1, "dog": 2}
    shown = run(folder, tmp_path, "stats", "--split", "train").stdout
    assert "dog 2, -1 1" in shown
    assert "0.5 to 1.5, 1 not finite" in shown


def test_head_shows_audio_as_the_bytes_it_is(folder: Path, tmp_path: Path) -> None:
    row = lines(run(folder, tmp_path, "head", "-n", "1", "--json"))[0]
    assert row["sound"] == {"bytes": {"bytes": 4}, "path": "a.wav"}
    assert row["image"] == {"width": 4, "height": 3, "mode": "RGB"}


COLUMNS = st.lists(st.none() | st.integers(-5, 5), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(COLUMNS, st.data())
def test_stats_do_not_depend_on_how_the_rows_are_cut(numbers: list[int | None], data: st.DataObject) -> None:
    table = pa.table(
        {"n": pa.array(numbers, pa.int16()), "t": ["x" * (n or 0) if n and n > 0 else None for n in numbers]}
    )
    table = table.cast(pa.schema([("n", pa.int16()), ("t", pa.string())]))
    cut = data.draw(st.integers(0, len(numbers)))
    whole, parts = (
        column_stats(tables, features_of(table.schema)) for tables in ([table], [table.slice(0, cut), table.slice(cut)])
    )
    there = [number for number in numbers if number is not None]
    assert (whole[0].min, whole[0].max) == ((min(there), max(there)) if there else (None, None))
    assert whole[0].mean == (pytest.approx(np.mean(there)) if there else None)
    for one, other in zip(whole, parts, strict=True):
        one.bytes = other.bytes = 0  # a slice may hold a byte of a bitmap more
        assert one == other
