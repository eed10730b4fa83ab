"""What a Dataset writes reads back equal, by crucible and by `datasets`, or is refused by name."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.casts import cast_batch
from crucible.dataset import Dataset
from crucible.errors import StoreError, UsageError
from crucible.feature_types import dump_features, features_of, normalise, schema_of
from crucible.formats.read import read_file
from crucible.refs import ReadOptions
from tests.fakes.shards import write_split
from tests.oracle import datasets

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)
WHOLE = st.integers(-(2**63), 2**63 - 1)
FRACTIONS = st.floats(allow_nan=False, allow_infinity=False)
FLAT: list[tuple[str, st.SearchStrategy[Any]]] = [
    ("bool", st.booleans()),
    ("int8", st.integers(-128, 127)),
    ("int64", WHOLE),
    ("float32", st.floats(allow_nan=False, allow_infinity=False, width=32)),
    ("float64", FRACTIONS),
    ("string", TEXT),
    ("large_string", TEXT),
]
ODD: list[tuple[str, st.SearchStrategy[Any]]] = [
    ("uint64", st.integers(0, 2**64 - 1)),
    ("date32", st.dates()),
    ("timestamp[us]", st.datetimes()),
    ("timestamp[us, tz=Europe/Paris]", st.datetimes(timezones=st.just(UTC))),
    ("time64[us]", st.times()),
    ("duration[us]", st.timedeltas(-timedelta(days=10**6), timedelta(days=10**6))),
    ("decimal128(20, 4)", st.decimals(-(10**12), 10**12, places=4)),
]
BYTES: list[tuple[str, st.SearchStrategy[Any]]] = [
    ("binary", st.binary(max_size=4)),
    ("large_binary", st.binary(max_size=4)),
]

Typed = tuple[Any, st.SearchStrategy[Any]]


def value(dtype: str, values: st.SearchStrategy[Any]) -> Typed:
    return {"dtype": dtype, "_type": "Value"}, st.none() | values


def nested(
    leaves: list[tuple[str, st.SearchStrategy[Any]]], depth: int = 2, *, gaps: bool = True
) -> st.SearchStrategy[Typed]:
    """Columns of these leaves in lists and structs; without `gaps` no list holds a null."""

    def wrap(inner: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
        def listed(one: Typed) -> Typed:
            values = one[1] if gaps else one[1].filter(lambda value: value is not None)
            return {"feature": one[0], "_type": "List"}, st.none() | st.lists(values, max_size=3)

        def fields(two: tuple[Typed, Typed]) -> Typed:
            return {"p": two[0][0], "q": two[1][0]}, st.fixed_dictionaries({"p": two[0][1], "q": two[1][1]})

        return inner.map(listed) | st.tuples(inner, inner).map(fields)

    made = st.sampled_from([value(*leaf) for leaf in leaves])
    for _ in range(depth):
        made |= wrap(made)
    return made


@st.composite
def tables(draw: st.DrawFn, columns: st.SearchStrategy[Typed], *, least: int = 1) -> pa.Table:
    typed = draw(st.lists(columns, min_size=1, max_size=3))
    count = draw(st.integers(least, 5))
    schema = schema_of({f"c{number}": normalise(feature) for number, (feature, _) in enumerate(typed)})
    made = {
        field.name: pa.array(draw(st.lists(values, min_size=count, max_size=count)), field.type)
        for field, (_, values) in zip(schema, typed)
    }
    return pa.table(made, schema=schema)


def dataset(folder: Path, table: pa.Table) -> Dataset:
    middle = table.num_rows // 2
    parts = [part for part in (table.slice(0, middle), table.slice(middle)) if part.num_rows]
    return Dataset(*write_split(folder, parts or [table], schema=table.schema))


def read(path: Path, builder: str, schema: pa.Schema, **params: Any) -> list[Any]:
    """What crucible's reader makes of a file, under the features it was written with."""
    told = tuple((name, json.dumps(one)) for name, one in sorted(params.items()))
    options = ReadOptions(builder, told, dump_features(features_of(schema)))
    return [row for batch in read_file(path, path.name, options) for row in cast_batch(batch, schema).to_pylist()]


@pytest.fixture(scope="module")
def room() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def fresh(room: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=room))


EXAMPLES = settings(deadline=None, max_examples=60)


@EXAMPLES
@given(tables(nested(FLAT + ODD + BYTES), least=0), st.sampled_from(["snappy", "zstd", "none"]))
def test_parquet_and_arrow_read_back_equal(room: Path, table: pa.Table, compression: str) -> None:
    folder = fresh(room)
    ds = dataset(folder, table)
    for builder, path in (("parquet", folder / "x.parquet"), ("arrow", folder / "x.arrow")):
        if builder == "parquet":
            assert ds.to_parquet(path, compression=compression, batch_size=2) == path.stat().st_size
        else:
            assert ds.to_arrow(path, compression="zstd" if compression == "zstd" else None) == path.stat().st_size
        assert read(path, builder, table.schema) == table.to_pylist()
        whole = pq.read_table(path) if builder == "parquet" else pa.ipc.open_file(path).read_all()
        assert features_of(whole.schema) == features_of(table.schema)


JSON_KINDS = [
    *FLAT,
    *((name, values) for name, values in ODD if name != "uint64"),
    ("uint64", st.integers(0, 2**63 - 1)),
]


@EXAMPLES
@given(tables(nested(JSON_KINDS)))
def test_json_reads_back_equal_with_its_features(room: Path, table: pa.Table) -> None:
    folder = fresh(room)
    ds = dataset(folder, table)
    ds.to_json(folder / "x.jsonl", batch_size=2)
    ds.to_json(folder / "x.json", lines=False)
    ds.to_json(folder / "columns.json", lines=False, orient="columns")
    lines = [json.loads(line) for line in (folder / "x.jsonl").read_text().split("\n")[:-1]]
    assert json.loads((folder / "x.json").read_text()) == lines
    assert json.loads((folder / "columns.json").read_text()) == {
        name: [row[name] for row in lines] for name in table.column_names
    }
    for name in ("x.jsonl", "x.json"):
        assert read(folder / name, "json", table.schema) == table.to_pylist()


@EXAMPLES
@given(tables(st.sampled_from([value(*leaf) for leaf in FLAT + ODD])), st.sampled_from([",", "\t", ";"]))
def test_csv_of_flat_columns_reads_back_equal(room: Path, table: pa.Table, sep: str) -> None:
    folder = fresh(room)
    dataset(folder, table).to_csv(folder / "x.csv", sep=sep, na_rep="<null>", batch_size=2)
    params = {"sep": sep, "keep_default_na": False, "na_values": ["<null>"]}
    assert read(folder / "x.csv", "csv", table.schema, **params) == table.to_pylist()


@EXAMPLES
@given(st.lists(TEXT.filter(lambda text: not set(text) & set("\r\n")), max_size=6))
def test_text_reads_back_equal(room: Path, lines: list[str]) -> None:
    folder = fresh(room)
    table = pa.table({"text": pa.array(lines, pa.string())})
    dataset(folder, table).to_text(folder / "x.txt", batch_size=2)
    assert read(folder / "x.txt", "text", table.schema) == table.to_pylist()


def same_to_datasets(folder: Path, table: pa.Table, builder: str, features: Any = None) -> None:
    ds = dataset(folder, table)
    getattr(ds, f"to_{builder}")(folder / "x")
    told = {"features": features, "cache_dir": str(folder / "cache"), "split": "train"}
    theirs = datasets.load_dataset(builder, data_files=str(folder / "x"), **told)
    assert theirs.features == datasets.Features.from_dict(ds.features.to_dict())
    assert list(theirs) == list(ds)


@settings(deadline=None, max_examples=8)
@given(tables(nested(FLAT + ODD + BYTES)), st.sampled_from(["parquet", "arrow"]))
def test_datasets_reads_nested_tables_equal(room: Path, table: pa.Table, builder: str) -> None:
    same_to_datasets(fresh(room), table, builder)


# where a list begins with a null `datasets` reads JSON by way of pandas, which rounds fractions and may fail
EXACT = [(name, values) for name, values in FLAT if not name.startswith("float")]


@settings(deadline=None, max_examples=8)
@given(tables(nested(EXACT, gaps=False)))
def test_datasets_reads_nested_json_equal(room: Path, table: pa.Table) -> None:
    features = datasets.Features.from_dict(json.loads(dump_features(features_of(table.schema))))
    same_to_datasets(fresh(room), table, "json", features)


PLAIN = schema_of(
    {
        "n": {"dtype": "int64", "_type": "Value"},
        "label": {"names": ["x", "y"], "_type": "ClassLabel"},
        "text": {"dtype": "string", "_type": "Value"},
        "list": {"feature": {"a": {"dtype": "float64", "_type": "Value"}}, "_type": "List"},
        "any": {"_type": "Json"},
        "block": {"shape": [2, 2], "dtype": "int32", "_type": "Array2D"},
        "image": {"_type": "Image", "decode": False},
    }
)
ROWS = [
    {
        "n": number,
        "label": number % 2,
        "text": f'"{number}", and\nmore',
        "list": [{"a": 0.5}, None],
        "any": json.dumps({"k": [number]}),
        "block": [[1, 2], [3, number]],
        "image": {"bytes": b"\x00\xff", "path": "x"},
    }
    for number in range(5)
]


@pytest.fixture
def mixed(tmp_path: Path) -> Dataset:
    columns = [pa.array([row[name] for row in ROWS], type_) for name, type_ in zip(PLAIN.names, PLAIN.types)]
    (tmp_path / "shards").mkdir()
    return dataset(tmp_path / "shards", pa.table(columns, schema=PLAIN))


@pytest.mark.parametrize("builder", ["parquet", "arrow"])
def test_datasets_reads_the_same_rows_and_features(mixed: Dataset, tmp_path: Path, builder: str) -> None:
    path = tmp_path / f"x.{builder}"
    getattr(mixed, f"to_{builder}")(path)
    theirs = datasets.load_dataset(builder, data_files=str(path), split="train")
    assert mixed.features == json.loads(json.dumps(theirs.features.to_dict()))
    assert list(theirs) == list(mixed)


def test_datasets_reads_the_same_json_and_csv(mixed: Dataset, tmp_path: Path) -> None:
    told = mixed.remove_columns(["image", "block"])
    told.to_json(tmp_path / "x.jsonl")
    features = datasets.Features.from_dict(told.features.to_dict())
    theirs = datasets.load_dataset("json", data_files=str(tmp_path / "x.jsonl"), split="train", features=features)
    assert list(theirs) == list(told)
    flat = told.select_columns(["n", "label", "text"])
    flat.to_csv(tmp_path / "x.csv")
    theirs = datasets.load_dataset("csv", data_files=str(tmp_path / "x.csv"), split="train")
    assert list(theirs) == list(flat)


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_our_shards_are_what_an_arrow_file_is(mixed: Dataset, tmp_path: Path, compression: Any) -> None:
    mixed.to_arrow(tmp_path / "x.arrow", compression=compression)
    theirs = datasets.load_dataset("arrow", data_files=str(tmp_path / "x.arrow"), split="train")
    assert list(theirs) == list(mixed)
    shards = sorted((tmp_path / "shards").glob("*.arrow"), key=lambda path: path.stat().st_size)
    theirs = datasets.load_dataset("arrow", data_files=[str(path) for path in shards], split="train")
    assert theirs.features == datasets.Features.from_dict(mixed.features.to_dict())


def test_bytes_and_what_is_no_number_are_refused_or_told_as_asked(tmp_path: Path) -> None:
    table = pa.table({"n": [1, 2], "b": [b"ok", b"\xff\x00"], "f": [0.5, math.nan], "l": [[math.inf], [b"x"][:0]]})
    ds = dataset(tmp_path, table)
    for write in (ds.to_json, ds.to_csv):
        with pytest.raises(UsageError, match=r"column 'b', row 0: .*binary='base64'"):
            write(tmp_path / "out")
        with pytest.raises(UsageError, match=r"column 'f', row 1: nan .*nan='null'"):
            write.__self__.select_columns("f").__getattribute__(write.__name__)(tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    ds.to_json(tmp_path / "out", binary="base64", nan="null")
    assert [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()] == [
        {"n": 1, "b": "base64:b2s=", "f": 0.5, "l": [None]},
        {"n": 2, "b": "base64:/wA=", "f": None, "l": []},
    ]


def test_whole_numbers_that_json_readers_round_are_refused(tmp_path: Path) -> None:
    ds = dataset(tmp_path, pa.table({"u": pa.array([2**63 - 1, 2**63], pa.uint64())}))
    with pytest.raises(UsageError, match=r"'u', row 1: .*cast the column to string"):
        ds.to_json(tmp_path / "out")
    ds.to_csv(tmp_path / "x.csv")
    assert read(tmp_path / "x.csv", "csv", ds.features.arrow_schema) == list(ds)


def test_what_a_format_cannot_tell_apart_is_refused(tmp_path: Path) -> None:
    ds = dataset(tmp_path, pa.table({"t": ["", None, "NA"], "s": ["one", "two\nlines", "x"]}))
    with pytest.raises(UsageError, match=r"'t' has nulls and the text ''"):
        ds.to_csv(tmp_path / "out")
    with pytest.raises(UsageError, match="one column of text"):
        ds.to_text(tmp_path / "out")
    with pytest.raises(UsageError, match="'t', row 1: null"):
        ds.select_columns("t").to_text(tmp_path / "out")
    with pytest.raises(UsageError, match="'s', row 1: text of several lines"):
        ds.select_columns("s").to_text(tmp_path / "out")
    for wrong in (
        lambda: ds.to_csv(tmp_path / "out", sep="::"),
        lambda: ds.to_arrow(tmp_path / "out", compression="gzip"),  # type: ignore[arg-type]
        lambda: ds.to_parquet(tmp_path / "out", compression="nonsense"),
        lambda: ds.to_json(tmp_path / "out", orient="columns"),
        lambda: ds.to_json(tmp_path / "out", batch_size=0),
    ):
        with pytest.raises(UsageError):
            wrong()
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    ds = dataset(tmp_path, pa.table({"s": ["one", "two\nlines"]}))
    (tmp_path / "x.txt").write_text("before")
    with pytest.raises(UsageError):
        ds.to_text(tmp_path / "x.txt")
    assert (tmp_path / "x.txt").read_text() == "before"
    with pytest.raises(StoreError, match="nowhere"):
        ds.to_json(tmp_path / "nowhere" / "x.jsonl")
    assert [path.name for path in tmp_path.iterdir() if "incomplete" in path.name] == []


def test_a_csv_of_one_column_keeps_its_empty_texts(tmp_path: Path) -> None:
    ds = dataset(tmp_path, pa.table({"t": ["", "a", ""]}))
    ds.to_csv(tmp_path / "x.csv")
    params = {"keep_default_na": False}
    assert read(tmp_path / "x.csv", "csv", ds.features.arrow_schema, **params) == list(ds)
    assert os.stat(tmp_path / "x.csv").st_size == len('t\n""\na\n""\n')
