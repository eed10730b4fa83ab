"""The rows under a field of a JSON object: those of json.loads, however the file is cut into reads, and never held."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible.errors import CorruptFile
from crucible.formats import fields
from crucible.formats.limits import Limits
from crucible.formats.read import read_file
from crucible.refs import ReadOptions
from tests.workers.test_bounds import MIB

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def rows(content: bytes, read: int = 1 << 20, row_bytes: int = 1 << 20) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fields, "_READ", read)
        file = io.BufferedReader(io.BytesIO(content))  # type: ignore[arg-type]
        return list(fields.field_values(file, "a.json", "data", Limits(row_bytes)))


@given(
    before=st.dictionaries(st.text(max_size=4).filter(lambda key: key != "data"), VALUES, max_size=3),
    items=st.lists(VALUES, max_size=5),
    after=st.dictionaries(st.text(max_size=4).map(lambda key: "_" + key), VALUES, max_size=2),
    indent=st.sampled_from((None, 1)),
    ascii_only=st.booleans(),
    read=st.integers(1, 9),
)
def test_items_are_those_of_the_array(
    before: dict[str, Any], items: list[Any], after: dict[str, Any], indent: int | None, ascii_only: bool, read: int
) -> None:
    whole = {**{key: one for key, one in before.items() if key not in after}, "data": items, **after}
    content = json.dumps(whole, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert rows(content, read) == json.loads(content)["data"]
    for cut in range(0, len(content), max(1, len(content) // 12)):
        with pytest.raises(CorruptFile, match=r"^a\.json"):
            rows(content[:cut], read)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[1]", "not one JSON object"),
        (b'{"x": [1]}', "field 'data': is not there"),
        (b'{"data": [1,]}', "neither a comma and a value"),
        (b'{"data": [1 2]}', "neither a comma and a value"),
        (b'{"data": [1],}', "neither a comma and a value"),
        (b'{"data": [1]} {}', "something comes after its end"),
        (b'{"data" [1]}', "a colon comes after it"),
        (b'{1: 2, "data": [1]}', "an object's key is text"),
        (b'{"data": [1], "data": [2]}', "is there twice"),
        (b'{"data": ["\xff"]}', "not UTF-8"),
        (b'{"data": [' + b"[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_object_with_the_field_is_told(content: bytes, says: str) -> None:
    with pytest.raises(CorruptFile, match=r"^a\.json") as error:
        rows(content)
    assert says in str(error.value)


def test_columns_and_single_values_are_rows_too() -> None:
    assert rows(b'{"data": {"a": [1, 2], "b": ["x", "y"]}}') == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert rows(b'{"data": {"a": 1}}') == [{"a": 1}]
    assert rows(b'{"data": []}') == []
    assert rows(b'{"data": 7}') == [7]


def test_an_array_of_any_size_is_read_within_the_bound_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("w") as file:
        file.write('{"version": 1, "data": [')
        file.write(",".join(json.dumps({"n": n, "t": "x" * 1000}) for n in range(4_000)))
        file.write('], "more": {}}')
    options = ReadOptions("json", (("field", '"data"'),))
    limits = Limits(row_bytes=2 * MIB)  # the first read alone is half of that
    assert sum(batch.num_rows for batch in read_file(path, "a.json", options, limits=limits)) == 4_000
    path.write_text(json.dumps({"data": [{"t": "x" * 5_000_000}]}))
    with pytest.raises(CorruptFile, match="set CRUCIBLE_ROW_BYTES higher"):
        list(read_file(path, "a.json", options, limits=limits))


def test_a_number_that_a_read_cuts_in_two_is_one_number(tmp_path: Path) -> None:
    """Of an array too: its reads are a mebibyte, which ends here behind `10.`."""
    (tmp_path / "a.json").write_text("[" + ",".join(["10.25"] * 180_000) + "]")
    batches = list(read_file(tmp_path / "a.json", "a.json", ReadOptions("json")))
    assert sum(batch.num_rows for batch in batches) == 180_000
    assert all(set(batch.column("text").unique().to_pylist()) == {10.25} for batch in batches)
