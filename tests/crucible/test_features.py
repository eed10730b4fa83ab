"""Feature dicts, schemas and casts mean what they mean to `datasets` 5.2."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.casts import cast_batch, join_features, unify
from crucible.decode import decoder
from crucible.dtypes import dtype_of_type, type_of_dtype
from crucible.errors import CorruptFile, SchemaConflict
from crucible.feature_types import (
    dump_features,
    features_from_yaml,
    features_of,
    normalise,
    parse_features,
    schema_for,
    schema_of,
    select_features,
)
from crucible.images import decode_image
from tests.oracle import datasets

_DTYPES = (
    "null bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 date32 date64 binary "
    "large_binary string large_string string_view binary_view time32[ms] time64[ns] duration[ms] timestamp[s] "
    "timestamp[us,tz=Europe/Paris] decimal128(10,2) decimal256(40,-3) fixed_size_binary[7]"
).replace(",", ", ")
DTYPES = re.findall(r"\S+?[\[(][^\])]*[\])]|\S+", _DTYPES)

VALUES = st.sampled_from(DTYPES).map(lambda dtype: {"dtype": dtype, "_type": "Value"})
NAMES = st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=1, max_size=4)
LEAVES = (
    VALUES
    | st.just({"_type": "Image"})
    | st.just({"_type": "Json"})
    | st.just({"sampling_rate": 16000, "_type": "Audio"})
    | st.lists(NAMES, min_size=1, max_size=3, unique=True).map(lambda names: {"names": names, "_type": "ClassLabel"})
    | st.just({"languages": ["en", "fr"], "_type": "Translation"})
)
FEATURES = st.recursive(
    LEAVES,
    lambda inner: (
        inner.map(lambda one: {"feature": one, "_type": "List"})
        | inner.map(lambda one: {"feature": one, "_type": "LargeList"})
        | inner.map(lambda one: {"feature": one, "length": 3, "_type": "List"})
        | st.dictionaries(NAMES, inner, min_size=1, max_size=3)
    ),
    max_leaves=4,
)
COLUMNS = st.dictionaries(NAMES, FEATURES, min_size=1, max_size=3)


def plain(features: Any) -> Any:
    return json.loads(json.dumps(features.to_dict()))


@settings(deadline=None)
@given(COLUMNS)
def test_features_and_their_schema_are_those_of_datasets(features: dict[str, Any]) -> None:
    theirs = datasets.Features.from_dict(features)
    schema = schema_for(json.dumps(features), pa.schema([]))
    assert schema.equals(theirs.arrow_schema)
    assert datasets.Features.from_arrow_schema(schema) == theirs
    assert features_of(theirs.arrow_schema) == plain(theirs) == parse_features(json.dumps(features))


@settings(deadline=None)
@given(COLUMNS)
def test_types_without_metadata_mean_the_features_datasets_infers(features: dict[str, Any]) -> None:
    schema = schema_of(normalise(features)).remove_metadata()
    assert features_of(schema) == plain(datasets.Features.from_arrow_schema(schema))


@settings(deadline=None)
@given(COLUMNS)
def test_the_yaml_of_a_card_reads_as_datasets_reads_it(features: dict[str, Any]) -> None:
    listed = yaml.safe_load(yaml.safe_dump(datasets.Features.from_dict(features)._to_yaml_list(), sort_keys=False))
    assert features_from_yaml(listed) == plain(datasets.Features._from_yaml_list(listed))


OLD_YAML = [
    [{"name": "a", "sequence": "int32"}],
    [{"name": "a", "sequence": [{"name": "b", "dtype": "string"}, {"name": "c", "dtype": "float"}]}],
    [{"name": "a", "list": [{"name": "b", "dtype": "string"}]}],
    [{"name": "a", "list": {"struct": [{"name": "b", "dtype": "string"}]}}],
    [{"name": "a", "list": "int8", "length": 3}],
    [{"name": "a", "struct": [{"name": "b", "struct": [{"name": "c", "dtype": "bool"}]}]}],
    [{"name": "a", "dtype": {"class_label": {"names": {"1": "y", "0": "x"}}}}],
    [{"name": "a", "dtype": {"class_label": {"names": ["x", "y"]}}}],
    [{"name": "a", "dtype": {"audio": {"sampling_rate": 16000}}}],
    [{"name": "a", "dtype": {"image": {"mode": "RGB", "decode": False}}}],
    [{"name": "a", "dtype": "image"}, {"name": "b", "dtype": "audio"}, {"name": "c", "dtype": "json"}],
    [{"name": "a", "dtype": {"translation": {"languages": ["fr", "en"]}}}],
    [{"name": "a", "dtype": "double"}, {"name": "b", "dtype": "float"}],
    [{"name": "a", "sequence": {"dtype": {"class_label": {"names": {"0": "x"}}}}}],
]


@pytest.mark.parametrize("listed", OLD_YAML, ids=json.dumps)
def test_forms_of_older_cards_are_understood(listed: list[Any]) -> None:
    assert features_from_yaml(listed) == plain(datasets.Features._from_yaml_list(listed))


OLD_JSON = [
    {"a": {"dtype": "int64", "id": None, "_type": "Value"}},
    {"a": [{"dtype": "int64", "_type": "Value"}]},
    {"a": {"feature": {"dtype": "int64", "_type": "Value"}, "length": -1, "id": None, "_type": "Sequence"}},
    {"a": {"feature": {"b": {"dtype": "string", "_type": "Value"}}, "_type": "Sequence"}},
    {"a": {"num_classes": 2, "names": ["x", "y"], "names_file": None, "id": None, "_type": "ClassLabel"}},
    {"a": {"decode": True, "id": None, "mode": None, "_type": "Image"}},
    {"a": {"sampling_rate": None, "decode": True, "_type": "Audio"}},
]


@pytest.mark.parametrize("features", OLD_JSON, ids=json.dumps)
def test_forms_of_older_metadata_are_understood(features: dict[str, Any]) -> None:
    assert normalise(features) == plain(datasets.Features.from_dict(features))


@pytest.mark.parametrize(
    "listed",
    [
        [{"name": "a", "dtype": {"class_label": {"names": {"0": "x", "2": "y"}}}}],
        [{"name": "a", "dtype": "nonsense"}],
        [{"dtype": "int8"}],
        "int8",
        [{"name": "a", "dtype": {"class_label": {"names": ["x", "x"]}}}],
    ],
    ids=json.dumps,
)
def test_features_that_make_no_sense_are_refused(listed: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        features_from_yaml(listed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_and_its_arrow_type_name_each_other(dtype: str) -> None:
    assert dtype_of_type(type_of_dtype(dtype)) == dtype
    assert datasets.Value(dtype)() == type_of_dtype(dtype)


def test_metadata_counts_only_where_it_fits_the_column() -> None:
    metadata = {"huggingface": json.dumps({"info": {"features": {"a": {"_type": "Image"}, "b": {"_type": "Image"}}}})}
    media = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema([("a", media), ("b", pa.int64())], metadata)
    assert features_of(schema) == {"a": {"_type": "Image"}, "b": {"dtype": "int64", "_type": "Value"}}


@pytest.mark.parametrize(
    "packed", ["", "not json", "[]", '{"info": 5}', '{"info": {"features": {"a": {"_type": "Evil"}}}}']
)
def test_metadata_that_cannot_be_read_says_nothing(packed: str) -> None:
    schema = pa.schema([("a", pa.int64())], {"huggingface": packed})
    assert features_of(schema) == {"a": {"dtype": "int64", "_type": "Value"}}


def test_chosen_columns_keep_their_features_in_the_order_of_the_choice() -> None:
    declared = dump_features({name: {"dtype": "int8", "_type": "Value"} for name in "abc"})
    assert list(parse_features(select_features(declared, ("c", "a")) or "")) == ["c", "a"]


CASTS: list[tuple[list[Any], dict[str, Any]]] = [
    ([1, None, 3], {"dtype": "float64", "_type": "Value"}),
    ([1, None, 3], {"dtype": "string", "_type": "Value"}),
    ([1.0, 2.0], {"dtype": "int32", "_type": "Value"}),
    ([True, None], {"dtype": "string", "_type": "Value"}),
    (["1", "2"], {"dtype": "int64", "_type": "Value"}),
    (["x", None, " y ", "1"], {"names": ["x", "y"], "_type": "ClassLabel"}),
    ([0, 1, None, -1], {"names": ["x", "y"], "_type": "ClassLabel"}),
    (["a.png", None], {"_type": "Image", "decode": False}),
    ([b"\x00", None], {"_type": "Image", "decode": False}),
    ([{"path": "p", "bytes": b"x"}, None], {"_type": "Image", "decode": False}),
    ([{"bytes": b"x"}], {"_type": "Image", "decode": False}),
    ([[1, 2], None, []], {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"}),
    ([[1, 2], None, []], {"feature": {"dtype": "int64", "_type": "Value"}, "_type": "LargeList"}),
    ([[1, 2], [3, 4]], {"feature": {"dtype": "int8", "_type": "Value"}, "length": 2, "_type": "List"}),
    ([{"a": 1}, None], {"a": {"dtype": "int8", "_type": "Value"}, "b": {"dtype": "string", "_type": "Value"}}),
    ([{"b": 1, "a": "x"}], {"a": {"dtype": "string", "_type": "Value"}, "b": {"dtype": "int8", "_type": "Value"}}),
    ([[{"a": 1}], None], {"feature": {"a": {"dtype": "float32", "_type": "Value"}}, "_type": "List"}),
    ([None, None], {"a": {"dtype": "int8", "_type": "Value"}}),
    ([{"a": [1, "x"][:1]}, None], {"_type": "Json"}),
    (["[1]", "{}", None], {"_type": "Json"}),
    (["plain", "1", None], {"_type": "Json"}),
    ([1, None], {"_type": "Json"}),
]


@pytest.mark.parametrize(("values", "feature"), CASTS, ids=repr)
def test_a_cast_gives_what_datasets_gives(values: list[Any], feature: dict[str, Any]) -> None:
    from datasets.table import table_cast

    table = pa.table({"x": values})
    schema = schema_of({"x": feature})
    expected = table_cast(table, datasets.Features.from_dict({"x": feature}).arrow_schema)
    ours = cast_batch(table.to_batches()[0], schema)
    assert ours.to_pylist() == expected.to_pylist()
    assert ours.schema == expected.schema


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        (["x"], {"dtype": "int64", "_type": "Value"}),
        ([1.5], {"dtype": "int64", "_type": "Value"}),
        ([300], {"dtype": "int8", "_type": "Value"}),
        (["z"], {"names": ["x"], "_type": "ClassLabel"}),
        ([5], {"names": ["x"], "_type": "ClassLabel"}),
        ([{"a": 1}], {"b": {"dtype": "int8", "_type": "Value"}}),
        ([[1]], {"dtype": "string", "_type": "Value"}),
        ([[1, 2], [3]], {"feature": {"dtype": "int8", "_type": "Value"}, "length": 2, "_type": "List"}),
        ([1], {"_type": "Image"}),
    ],
    ids=repr,
)
def test_values_that_do_not_fit_name_the_column_and_the_file(values: list[Any], feature: dict[str, Any]) -> None:
    batch = pa.table({"x": values}).to_batches()[0]
    with pytest.raises(SchemaConflict, match=r"'x'.*in some\.file"):
        cast_batch(batch, schema_of({"x": feature}), "some.file")


def test_missing_columns_become_nulls_and_unknown_ones_are_refused() -> None:
    batch = pa.table({"a": [1, 2]}).to_batches()[0]
    schema = schema_of({"j": {"_type": "Json"}, "a": {"dtype": "int64", "_type": "Value"}, "i": {"_type": "Image"}})
    assert cast_batch(batch, schema).to_pylist() == [{"j": None, "a": 1, "i": None}, {"j": None, "a": 2, "i": None}]
    with pytest.raises(SchemaConflict, match="'a'"):
        cast_batch(batch, schema_of({"b": {"_type": "Json"}}))


def test_casts_of_slices_see_only_the_slice() -> None:
    table = pa.table({"l": [[1], [2, 3], None, [4]], "s": [{"a": 1}, None, {"a": 3}, {"a": 4}]})
    schema = schema_of(
        {
            "l": {"feature": {"dtype": "float64", "_type": "Value"}, "_type": "List"},
            "s": {"a": {"dtype": "string", "_type": "Value"}},
        }
    )
    ours = cast_batch(table.to_batches()[0].slice(1, 2), schema)
    ours.validate(full=True)
    assert ours.to_pylist() == [{"l": [2.0, 3.0], "s": None}, {"l": None, "s": {"a": "3"}}]


def value(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "_type": "Value"}


@pytest.mark.parametrize(
    ("one", "other", "joined"),
    [
        (value("null"), value("string"), value("string")),
        (value("int64"), value("float64"), value("float64")),
        (value("float64"), value("int64"), value("float64")),
        (value("int8"), value("int32"), value("int32")),
        (value("string"), value("large_string"), value("large_string")),
        (value("string"), value("int64"), value("string")),
        (value("timestamp[s]"), value("timestamp[us]"), value("timestamp[us]")),
        ({"a": value("null")}, {"b": value("int8")}, {"a": value("null"), "b": value("int8")}),
        ({"a": value("int8")}, {"_type": "Json"}, {"_type": "Json"}),
        (
            {"feature": value("null"), "_type": "List"},
            {"feature": {"a": value("int8")}, "_type": "List"},
            {"feature": {"a": value("int8")}, "_type": "List"},
        ),
        ({"names": ["x"], "_type": "ClassLabel"}, value("int64"), {"names": ["x"], "_type": "ClassLabel"}),
        (value("int64"), value("string"), None),
        (value("bool"), value("int64"), None),
        (value("string"), {"a": value("int8")}, None),
        ({"feature": value("int8"), "_type": "List"}, value("int8"), None),
    ],
    ids=repr,
)
def test_two_files_meet_in_a_type_that_holds_both(one: Any, other: Any, joined: Any) -> None:
    assert join_features(one, other) == joined


def test_a_conflict_names_both_files_and_both_types() -> None:
    schemas = [("a.json", pa.schema([("x", pa.int64())])), ("b.json", pa.schema([("x", pa.string())]))]
    with pytest.raises(SchemaConflict, match=r"'x' is string in b\.json but int64 in a\.json"):
        unify(schemas)


def test_columns_come_in_the_order_they_first_appear() -> None:
    schemas = [
        ("1", pa.schema([("b", pa.null()), ("a", pa.int8())])),
        ("2", pa.schema([("c", pa.int8()), ("b", pa.int8())])),
    ]
    assert unify(schemas).names == ["b", "a", "c"]
    assert unify(schemas).types == [pa.int8(), pa.int8(), pa.int8()]


def png(size: tuple[int, int] = (2, 3), mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    PIL.Image.new(mode, size).save(out, "png")
    return out.getvalue()


def test_rows_are_decoded_only_where_there_is_something_to_decode() -> None:
    assert decoder(None, pa.schema([("a", pa.int64())])) is None
    assert decoder(dump_features({"l": {"names": ["x"], "_type": "ClassLabel"}}), pa.schema([])) is None
    features = {
        "i": {"_type": "Image", "mode": "L"},
        "many": {"feature": {"_type": "Image"}, "_type": "List"},
        "s": {"j": {"_type": "Json"}, "n": value("int8")},
        "raw": {"_type": "Image", "decode": False},
    }
    decode = decoder(dump_features(features), pa.schema([]))
    assert decode is not None
    image = {"bytes": png(), "path": None}
    row = decode({"i": image, "many": [image, None], "s": {"j": '{"a": [1]}', "n": 2}, "raw": image})
    assert (row["i"].size, row["i"].mode, row["many"][0].mode, row["many"][1]) == ((2, 3), "L", "RGB", None)
    assert row["s"] == {"j": {"a": [1]}, "n": 2}
    assert row["raw"] == image
    assert decode({"i": None, "many": None, "s": None}) == {"i": None, "many": None, "s": None}


@pytest.mark.parametrize(
    "content", [b"", b"garbage", png()[:40], png()[:-20], None], ids=["empty", "garbage", "head", "cut", "path"]
)
def test_an_image_that_cannot_be_decoded_is_named(content: bytes | None) -> None:
    with pytest.raises(CorruptFile, match=r"x\.png at column 'pic'"):
        decode_image({"bytes": content, "path": "/etc/x.png"}, column="pic")


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(CorruptFile, match="refused"):
        decode_image({"bytes": png((40, 40)), "path": None})


def test_an_image_is_turned_upright() -> None:
    out = io.BytesIO()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (2, 3)).save(out, "jpeg", exif=exif)
    image = decode_image({"bytes": out.getvalue(), "path": None})
    assert image is not None
    assert image.size == (3, 2)


@pytest.mark.real_data
def test_cifar_images_decode_to_the_pixels_datasets_decodes() -> None:
    from crucible.formats.read import read_file
    from crucible.refs import ReadOptions

    path = Path(os.environ.get("CRUCIBLE_REAL_DATA", "../shared/data")) / "cifar10/test-00000-of-00001.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not there; set CRUCIBLE_REAL_DATA to the real data folder")
    theirs = datasets.load_dataset("parquet", data_files=str(path), split="train")
    rows: list[dict[str, Any]] = []
    for batch in read_file(path, path.name, ReadOptions("parquet")):
        rows += batch.to_pylist()
        if len(rows) >= 100:
            break
    decode = decoder(None, batch.schema)
    assert decode is not None
    for number in range(0, 100, 7):
        ours = decode(rows[number])
        assert ours["img"].tobytes() == theirs[number]["img"].tobytes()
        assert ours["label"] == theirs[number]["label"]
