"""Lists of a JSON file have the values that stand in it, nulls at their front included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.feature_types import features_of
from crucible.formats.mixed import json_paths, mixed_paths
from crucible.formats.nulls import whole_lists
from crucible.formats.read import read_file
from crucible.refs import ReadOptions


def listed(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | st.lists(values, max_size=4)


LEAVES = [st.none(), st.none() | st.booleans(), st.none() | st.integers(-5, 5), st.none() | st.sampled_from(["", "ab"])]
DEEP = st.sampled_from(LEAVES).map(listed)
DEEP |= DEEP.map(listed)
DEEP |= st.tuples(DEEP, DEEP).map(lambda two: listed(st.none() | st.fixed_dictionaries({"p": two[0], "q": two[1]})))


def as_told(got: Any, wanted: Any) -> bool:
    if isinstance(got, dict) and isinstance(wanted, dict):
        return all(as_told(got.get(name), wanted.get(name)) for name in {*got, *wanted})
    if isinstance(got, list) and isinstance(wanted, list):
        return len(got) == len(wanted) and all(map(as_told, got, wanted))
    return bool(got == wanted)


@settings(deadline=None, max_examples=200)
@given(DEEP.flatmap(lambda values: st.lists(values, min_size=1, max_size=5)))
def test_lists_that_begin_with_nulls_are_whole(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "lists.jsonl"
    path.write_text("".join(json.dumps({"x": row}) + "\n" for row in rows))
    batches = list(read_file(path, path.name, ReadOptions("json", (("on_mixed_types", '"error"'),))))
    assert as_told([row["x"] for batch in batches for row in batch.to_pylist()], rows)


def test_what_is_whole_is_left_alone(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"a": [[1], [None]], "b": [{"c": ["x"]}, None]})
    assert whole_lists(table) is table


INNER = st.none() | st.integers(-5, 5)
STRUCTS = st.none() | st.dictionaries(st.sampled_from("pq"), INNER, max_size=2)
NESTED = st.one_of(
    STRUCTS, st.none() | st.lists(STRUCTS, max_size=3), st.none() | st.dictionaries(st.just("s"), STRUCTS)
)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.dictionaries(st.sampled_from("xy"), NESTED, max_size=2), min_size=1, max_size=4))
def test_structs_become_text_where_their_keys_differ_in_the_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "structs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    schemas = [batch.schema for batch in read_file(path, path.name, ReadOptions("json"))]
    told = json_paths(features_of(schemas[0])) if schemas else set()
    assert told == mixed_paths(rows)
