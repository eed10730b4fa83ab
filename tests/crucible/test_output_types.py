"""numpy, torch and jax values have the types that `datasets` gives, in rows and in batches."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import warnings
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest

from crucible.decode import decoder
from crucible.errors import UsageError
from crucible.output import Output
from tests.oracle import datasets

DAYS = [datetime.date(2020, 1, day) for day in (1, 2, 3)]
PLAIN = {
    "int32": pa.array([1, 2, 3], pa.int32()),
    "uint8": pa.array([1, 2, 3], pa.uint8()),
    "int with a null": pa.array([1, None, 3], pa.int32()),
    "float64": pa.array([0.5, 1.5, 2.5]),
    "float16": pa.array([0.5, 1.5, 2.5], pa.float16()),
    "float with a null": pa.array([0.5, None, 2.5]),
    "bool": pa.array([True, False, True]),
    "bool with a null": pa.array([True, None, False]),
    "nulls": pa.array([None] * 3, pa.null()),
    "block": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int32())),
    "block of fractions": pa.array([[1, 2], [3, 4], [5, 6]], pa.large_list(pa.float64())),
    "fixed size": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.uint8(), 2)),
    "ragged": pa.array([[1], [], [5, 6]], pa.list_(pa.int32())),
    "ragged fractions": pa.array([[1], [], [5, 6]], pa.list_(pa.float64())),
    "null list": pa.array([[1, 2], None, [5, 6]], pa.list_(pa.int32())),
    "null in a list": pa.array([[1, 2], [3, None], [5, 6]], pa.list_(pa.int32())),
    "null in a ragged list": pa.array([[1, 2], [3, None, 4], [5, 6]], pa.list_(pa.int32())),
    "lists of bools": pa.array([[True, False]] * 3),
    "empty lists": pa.array([[], [], []], pa.list_(pa.int64())),
    "deep": pa.array([[[1, 2]], [[3, 4]], [[5, 6]]], pa.list_(pa.list_(pa.uint8()))),
    "deep and ragged": pa.array([[[1, 2]], [[3]], [[5, 6], [7]]], pa.list_(pa.list_(pa.int32()))),
    "three deep": pa.array([[[[1, 2]], [[3, 4]]]] * 3, pa.list_(pa.list_(pa.list_(pa.uint8())))),
    "lists of text": pa.array([["a", "b"], ["c", "d"], ["e", "f"]]),
    "ragged lists of text": pa.array([["a"], [], ["e", "f"]]),
    "struct": pa.array([{"x": 1, "y": "a", "z": 0.5, "l": [1.0, 2.0]}] * 3),
    "lists of structs": pa.array([[{"x": 1}], [{"x": 2}], [{"x": 3}]]),
    "ragged lists of structs": pa.array([[{"x": 1}], [], [{"x": 3}, {"x": 4}]]),
}
OURS = {
    # wanted differences, in docs/differences.md
    "text": (pa.array(["a", "bb", "c"]), [str] * 3),
    "bytes": (pa.array([b"a", b"b\0", b"c"]), [bytes] * 3),
    "decimals": (pa.array([decimal.Decimal("1.5")] * 3), [decimal.Decimal] * 3),
}


def told(value: Any) -> Any:
    """A value with all its types."""
    if isinstance(value, dict):
        return {name: told(one) for name, one in value.items()}
    if isinstance(value, list):
        return [told(one) for one in value]
    if isinstance(value, np.ndarray) and value.dtype == object:
        return "objects", value.shape, [told(one) for one in value.ravel()]
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return type(value).__name__, str(value.dtype), tuple(value.shape), str(value.tolist())
    return type(value).__name__, str(value)


FORMATS = ["numpy", pytest.param("torch", marks=pytest.mark.torch), "jax"]


@pytest.fixture(params=FORMATS)
def format_(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return str(request.param)


@pytest.mark.parametrize("values", PLAIN.values(), ids=PLAIN)
def test_values_have_the_types_of_datasets(values: pa.Array, format_: str) -> None:
    table = pa.table({"c": values})
    theirs, ours = datasets.Dataset(table).with_format(format_), Output(format_, None)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and jax warn about what `datasets` does with some of these
        assert told(ours.batch(table)["c"]) == told(theirs[:]["c"])
        assert [told(row["c"]) for row in ours.rows(table)] == [told(theirs[row]["c"]) for row in range(3)]
        cut = table.slice(1, 1)  # offsets that do not begin at 0
        assert told(ours.batch(cut)["c"]) == told(theirs[1:2]["c"])


@pytest.mark.parametrize("name", OURS)
def test_text_and_decimals_are_pythons_own(name: str, format_: str) -> None:
    values, kinds = OURS[name]
    table = pa.table({"c": values})
    output = Output(format_, None)  # type: ignore[arg-type]
    batch = output.batch(table)["c"]
    assert isinstance(batch, np.ndarray if format_ == "numpy" else list)
    assert [type(one) for one in batch] == kinds == [type(row["c"]) for row in output.rows(table)]
    assert list(batch) == values.to_pylist()


def test_days_and_times_are_numpys_or_pythons(format_: str) -> None:
    moments = pa.array(DAYS).cast(pa.timestamp("ns"))
    table = pa.table({"day": DAYS, "moment": moments})
    output = Output(format_, None)  # type: ignore[arg-type]
    batch, rows = output.batch(table), list(output.rows(table))
    if format_ == "numpy":
        theirs = datasets.Dataset(table).with_format("numpy")
        assert told(batch) == told(theirs[:])
        assert told(rows[1]) == told(theirs[1])
    else:  # `datasets` stops
        assert batch["day"] == [row["day"] for row in rows] == DAYS
        assert batch["moment"] == [datetime.datetime(2020, 1, day) for day in (1, 2, 3)]


def picture(mode: str, size: tuple[int, int] = (3, 2)) -> dict[str, Any]:
    out = io.BytesIO()
    image = PIL.Image.effect_noise(size, 90)
    image.convert(mode).save(out, "TIFF" if mode in ("I;16", "F", "CMYK") else "PNG")
    return {"bytes": out.getvalue(), "path": None}


@pytest.mark.parametrize("modes", [["RGB"] * 3, ["L"] * 3, ["I;16"] * 3, ["F"] * 3, ["1"] * 3, ["RGB", "L", "RGBA"]])
def test_images_keep_their_type(modes: list[str], format_: str) -> None:
    features = {"image": {"_type": "Image"}}
    media = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array([picture(mode) for mode in modes], media)})
    ours = Output(format_, decoder(json.dumps(features), table.schema))  # type: ignore[arg-type]
    theirs = datasets.Dataset(table, info=datasets.DatasetInfo(features=datasets.Features(image=datasets.Image())))
    theirs = theirs.with_format(format_)
    try:
        expected = told(theirs[:]["image"])
    except (TypeError, ValueError) as error:  # torch has no such type, in ours neither
        with pytest.raises(type(error)):
            ours.batch(table)
        return
    assert told(ours.batch(table)["image"]) == expected
    assert [told(row["image"]) for row in ours.rows(table)] == [told(theirs[row]["image"]) for row in range(3)]


def test_a_format_whose_library_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jax", None)
    with pytest.raises(UsageError, match=r"with_format\('jax'\) needs jax: pip install jax"):
        Output("jax", None)
