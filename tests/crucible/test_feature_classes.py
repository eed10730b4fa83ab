"""Features with methods: they say, encode and refuse what `datasets`' own objects do."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest

from crucible import features as ours
from crucible.casts import cast_batch
from crucible.dataset import Dataset
from crucible.errors import SchemaConflict, UsageError
from crucible.feature_types import normalise, schema_of
from tests.fakes.shards import write_split
from tests.oracle import datasets

PAIRS = [
    (ours.Value("double"), datasets.Value("double")),
    (ours.ClassLabel(names=["x", "y"]), datasets.ClassLabel(names=["x", "y"])),
    (ours.ClassLabel(num_classes=3), datasets.ClassLabel(num_classes=3)),
    (ours.List(ours.Value("int8"), length=2), datasets.List(datasets.Value("int8"), length=2)),
    (ours.LargeList({"a": ours.Json()}), datasets.LargeList({"a": datasets.Json()})),
    (ours.Sequence({"a": ours.Value("int8")}), datasets.Sequence({"a": datasets.Value("int8")})),
    (ours.Image(mode="L", decode=False), datasets.Image(mode="L", decode=False)),
    (ours.Audio(sampling_rate=16000), datasets.Audio(sampling_rate=16000)),
    (ours.Translation(["en", "fr"]), datasets.Translation(["en", "fr"])),
    (ours.TranslationVariableLanguages(["fr", "en"]), datasets.TranslationVariableLanguages(["fr", "en"])),
    (ours.Array2D((2, 3), "int32"), datasets.Array2D((2, 3), "int32")),
    (ours.Array5D((None, 1, 1, 1, 2), "float32"), datasets.Array5D((None, 1, 1, 1, 2), "float32")),
]


@pytest.mark.parametrize(("mine", "theirs"), PAIRS, ids=lambda one: repr(one)[:40])
def test_a_feature_is_the_dict_that_datasets_writes(mine: Any, theirs: Any) -> None:
    both = ours.Features({"x": mine}), ours.Features(datasets.Features({"x": theirs}))
    assert both[0] == both[1]
    assert datasets.Features.from_dict(json.loads(json.dumps(both[0]))) == datasets.Features({"x": theirs})
    assert pickle.loads(pickle.dumps(both[0])) == both[0]
    assert type(pickle.loads(pickle.dumps(both[0]))["x"]) is type(both[0]["x"])
    if "Array" not in repr(mine):  # those are an extension type of `datasets`' own
        assert both[0].arrow_schema.equals(datasets.Features({"x": theirs}).arrow_schema)


LABELS = ["x", "y", "2x"]


@pytest.mark.parametrize("value", ["x", " y ", "2x", "1", "-1", "z", "3", "-2", ["x", "y"], [], 5])
def test_names_become_the_numbers_that_datasets_gives(value: Any) -> None:
    outcomes = []
    for label in (ours.ClassLabel(names=LABELS), datasets.ClassLabel(names=LABELS)):
        try:
            outcomes.append(label.str2int(value))
        except ValueError:
            outcomes.append("refused")
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("value", [0, 2, 3, -1, [0, 1], np.array([2, 0]), [1, 7], "x"])
def test_numbers_become_the_names_that_datasets_gives(value: Any) -> None:
    outcomes = []
    for label in (ours.ClassLabel(names=LABELS), datasets.ClassLabel(names=LABELS)):
        try:
            outcomes.append(label.int2str(value))
        except (ValueError, TypeError):
            outcomes.append("refused")
    assert outcomes[0] == outcomes[1]


def test_settings_are_attributes_with_the_defaults_of_datasets() -> None:
    label = ours.ClassLabel(names=["x", "y"])
    assert (label.num_classes, label.names, ours.Value("float").dtype) == (2, ["x", "y"], "float32")
    assert (ours.Image().decode, ours.Image().mode, ours.List(ours.Value("int8")).length) == (True, None, -1)
    assert isinstance(ours.List(label).feature, ours.ClassLabel)
    with pytest.raises(AttributeError, match="Value has no 'names'"):
        ours.Value("int8").names  # noqa: B018


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ours.Value("nonsense"),
        lambda: ours.ClassLabel(names=["x", "x"]),
        lambda: ours.ClassLabel(num_classes=3, names=["x"]),
        lambda: ours.ClassLabel(),
        lambda: ours.Array2D((2, None), "int8"),
        lambda: ours.Array3D((2, 2), "int8"),
        lambda: ours.Features({"x": 5}),
        lambda: ours.Features(ours.Value("int8")),
    ],
)
def test_features_that_make_no_sense_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        wrong()


def pixels(mode: str) -> PIL.Image.Image:
    return PIL.Image.new(mode, (3, 2))


def as_read(image: PIL.Image.Image, format_: str) -> PIL.Image.Image:
    out = io.BytesIO()
    image.save(out, format_)
    return PIL.Image.open(io.BytesIO(out.getvalue()))


ENCODED: list[tuple[Any, Any]] = [
    (ours.ClassLabel(names=["x", "y"]), "y"),
    (ours.ClassLabel(names=["x", "y"]), -1),
    (ours.Value("int32"), np.float64(3)),
    (ours.Value("string"), 5),
    (ours.Value("bool"), 2),
    (ours.Json(), {"a": [1, None]}),
    (ours.Json(), "plain"),
    (ours.Json(), "[1]"),
    (ours.List({"l": ours.ClassLabel(names=["x"])}), [{"l": "x"}, None]),
    ({"l": ours.ClassLabel(names=["x"]), "m": ours.Value("int8")}, {"l": "x"}),
    (ours.TranslationVariableLanguages(["en", "fr"]), {"fr": ["b", "a"], "en": "c"}),
    (ours.Image(), b"bytes"),
    (ours.Image(), "a/path.png"),
    (ours.Image(), Path("a/path.png")),
    (ours.Image(), {"path": "x", "bytes": b"1"}),
    *((ours.Image(), pixels(mode)) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F")),
    (ours.Image(), as_read(pixels("RGB"), "JPEG")),
    (ours.Image(), np.zeros((2, 3, 3), np.uint8)),
    *((ours.Image(), np.zeros((2, 3), dtype)) for dtype in ("bool", "uint8", "uint16", "int32", "float32")),
]


@pytest.mark.parametrize(("feature", "value"), ENCODED, ids=lambda one: repr(one)[:40])
def test_a_value_is_stored_as_datasets_stores_it(feature: Any, value: Any) -> None:
    mine = ours.Features({"x": feature})
    theirs = datasets.Features.from_dict(mine.to_dict())
    stored = [pa.array([one.encode_example({"x": value})["x"]]).to_pylist() for one in (mine, theirs)]
    assert stored[0] == stored[1]
    assert mine.encode_batch({"x": [value, None]})["x"][1] is None


@pytest.mark.parametrize(
    ("feature", "value"),
    [
        (ours.ClassLabel(names=["x"]), 1),
        (ours.ClassLabel(names=["x"]), "z"),
        (ours.Value("int8"), 128),
        (ours.Value("uint32"), -1),
        (ours.Value("float32"), "x"),
        (ours.List(ours.Value("int8"), length=2), [1]),
        (ours.Array2D((2, 2), "int8"), [[1, 2]]),
        (ours.Image(), {"path": None}),
        (ours.Image(), np.zeros((2, 2, 3))),
        (ours.Image(), 5),
        (ours.TranslationVariableLanguages(["en"]), {"de": "x"}),
    ],
    ids=lambda one: repr(one)[:40],
)
def test_a_value_that_does_not_fit_names_its_column(feature: Any, value: Any) -> None:
    with pytest.raises(UsageError, match="column 'x'"):
        ours.Features({"x": feature}).encode_example({"x": value})


ARRAYS = {
    "flat": ({"shape": [2, 3], "dtype": "int32", "_type": "Array2D"}, [[[1, 2, 3], [4, 5, 6]]] * 3),
    "open": ({"shape": [None, 2], "dtype": "float32", "_type": "Array2D"}, [[[1.0, 2.0]], [], [[1.0, 2.0]] * 2]),
    "deep": ({"shape": [1, 2, 1, 1, 2], "dtype": "uint8", "_type": "Array5D"}, [[[[[[1, 2]]], [[[3, 4]]]]]] * 3),
}


def test_arrays_of_a_shard_are_those_that_datasets_reads_from_it(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pydict({name: values for name, (_, values) in ARRAYS.items()})
    cast = cast_batch(batch, schema_of({name: normalise(feature) for name, (feature, _) in ARRAYS.items()}))
    mine = Dataset(*write_split(tmp_path, [pa.Table.from_batches([cast])]))
    theirs = datasets.load_dataset("arrow", data_files=str(next(tmp_path.glob("*.arrow"))), split="train")
    assert mine.features == json.loads(json.dumps(theirs.features.to_dict()))
    assert list(mine) == list(theirs)
    for name, column in theirs.with_format("numpy")[:].items():
        got = mine.with_format("numpy")[:][name]
        assert got.dtype == column.dtype
        assert [one.tolist() for one in got] == [one.tolist() for one in column]
        assert mine.with_format("numpy")[0][name].shape == column[0].shape


@pytest.mark.parametrize("values", [[[[1, 2]]], [[1, 2]], [[[1, 2], [3, 4]], [[1, 2], None]], [[[1, 2], [3]]]], ids=str)
def test_an_array_of_another_shape_is_refused_with_its_row(values: list[Any]) -> None:
    feature = {"shape": [2, 2], "dtype": "int32", "_type": "Array2D"}
    with pytest.raises(SchemaConflict, match=r"'x' is .*Array2D"):
        cast_batch(pa.RecordBatch.from_pydict({"x": values}), schema_of({"x": feature}))


def test_a_cast_that_fails_names_the_value_and_its_row() -> None:
    batch = pa.RecordBatch.from_pydict({"x": ["0", "1", "many", "3"]})
    with pytest.raises(SchemaConflict, match=r"'x' is string \(row 2 of the batch, 'many'.*int64"):
        cast_batch(batch, schema_of({"x": {"dtype": "int64", "_type": "Value"}}), "a.csv")
