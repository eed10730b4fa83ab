"""Bring record batches of different files to one schema, by the rules `datasets` casts with.

A column that is missing becomes nulls. Integers widen to floats, anything to a string where the schema says string,
structs may lack fields, label names become label numbers, paths and bytes become image columns. What cannot be said
without losing something raises SchemaConflict, which names the column and both sides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute

from crucible.errors import SchemaConflict
from crucible.feature_types import (
    ARRAY_DIMENSIONS,
    MEDIA,
    METADATA_KEY,
    Feature,
    arrow_type,
    features_of,
    is_struct,
    kind,
    schema_of,
)
from crucible.misfit import MISFITS, misfit, short

pc: Any = pyarrow.compute  # its functions are made at run time, which no type checker follows

TARGET = "the schema of the split"


def cast_batch(batch: pa.RecordBatch, schema: pa.Schema, path: str = "a batch") -> pa.RecordBatch:
    """`batch` as `schema`. Columns that are missing become nulls; `path` names the batch in errors.

    Raises SchemaConflict for a column the schema does not have, and for values that do not fit.
    """
    if batch.schema.equals(schema, check_metadata=True):
        return batch
    features = features_of(schema)
    for name in batch.schema.names:
        if name not in features:
            raise SchemaConflict(name, path, short(batch.schema.field(name).type), TARGET, "absent")
    columns = []
    for field in schema:
        place = batch.schema.get_field_index(field.name)
        feature = features[field.name]
        if place < 0:
            columns.append(nulls(batch.num_rows, field.type))
            continue
        column = batch.column(place)
        try:
            columns.append(_as_type(cast_array(column, feature), field.type))
        except MISFITS as error:
            reason = misfit(column, partial(cast_array, feature=feature), error)
            raise SchemaConflict(field.name, path, reason, TARGET, _said(feature)) from error
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _as_type(array: pa.Array, type_: pa.DataType) -> pa.Array:
    """`array` under an extension type that `datasets` has registered in this process, where the schema has one."""
    if isinstance(type_, pa.BaseExtensionType) and not isinstance(array, pa.ExtensionArray):
        return pa.ExtensionArray.from_storage(type_, array)
    return array


def _said(feature: Feature) -> str:
    """A feature as an error names it."""
    what = kind(feature)
    return short(arrow_type(feature)) if what in ("Value", "struct", "List", "LargeList") else what


def nulls(length: int, type_: pa.DataType) -> pa.Array:
    if isinstance(type_, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(type_, nulls(length, type_.storage_type))
    return pa.nulls(length, type_)


def cast_array(array: pa.Array, feature: Feature) -> pa.Array:
    """`array` as the storage of `feature`. Raises ValueError, TypeError or an Arrow error."""
    if isinstance(array, pa.ExtensionArray):
        if array.type == arrow_type(feature):
            return array
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_null(array.type):
        return nulls(len(array), arrow_type(feature))
    what = kind(feature)
    if what == "struct":
        return _cast_struct(array, feature)
    if what in ("List", "LargeList"):
        return _cast_list(array, feature)
    if what == "ClassLabel":
        return _cast_labels(array, feature["names"])
    if what == "Json":
        return _cast_json(array)
    target = arrow_type(feature)
    if what in ARRAY_DIMENSIONS:
        return _cast_fixed_shape(array, feature, target)
    if target == MEDIA:
        return _cast_media(array)
    if pa.types.is_struct(target):  # Translation
        return _cast_struct(array, {field.name: {"dtype": "string", "_type": "Value"} for field in target})
    if pa.types.is_struct(array.type) and is_text(target):
        return _print_structs(array).cast(target)
    if pa.types.is_nested(array.type) and not pa.types.is_nested(target):
        raise TypeError(f"nested values do not fit {target}")
    if is_text(array.type) and pa.types.is_temporal(target):
        array = _read_temporal(array.cast(pa.string()), target)
    return array if array.type == target else array.cast(target)


def _read_temporal(text: pa.Array, target: pa.DataType) -> pa.Array:
    """What Arrow reads out of text; times of day, which it only reads behind a date; durations as whole numbers."""
    if pa.types.is_duration(target):
        return text.cast(pa.int64())
    if not pa.types.is_time(target):
        return text
    day = pc.binary_join_element_wise(pa.scalar("1970-01-01"), text, pa.scalar(" "))
    return day.cast(pa.timestamp(target.unit))


def _cast_struct(array: pa.Array, feature: dict[str, Feature]) -> pa.Array:
    if not pa.types.is_struct(array.type) or not is_struct(feature):
        raise TypeError("not a struct")
    names = [field.name for field in array.type]
    unknown = [name for name in names if name not in feature]
    if unknown:
        raise TypeError(f"field {unknown[0]!r} is not in the schema")
    children = dict(zip(names, array.flatten(), strict=True))  # flatten puts the struct's own nulls into its children
    arrays = [
        cast_array(children[name], inner) if name in children else nulls(len(array), arrow_type(inner))
        for name, inner in feature.items()
    ]
    fields = [pa.field(name, one.type) for name, one in zip(feature, arrays, strict=True)]
    if not fields:
        return array
    return pa.StructArray.from_arrays(arrays, fields=fields, mask=array.is_null())


def _cast_list(array: pa.Array, feature: Feature) -> pa.Array:
    """Offsets are rebuilt from the lengths, so a slice or a null with a hidden value cannot leak through."""
    if not _is_list(array.type):
        raise TypeError("not a list")
    target = arrow_type(feature)
    values = cast_array(array.flatten(), feature["feature"])
    lengths = pc.list_value_length(array)
    if pa.types.is_fixed_size_list(target):
        wrong = pc.any(pc.not_equal(lengths, target.list_size)).as_py()
        if wrong:
            raise ValueError(f"a list is not of length {target.list_size}")
        if array.null_count:  # a null of a fixed list still occupies its places
            return array.cast(target)
        return pa.FixedSizeListArray.from_arrays(values, type=target)
    made = pa.LargeListArray if pa.types.is_large_list(target) else pa.ListArray
    offset_type = pa.int64() if pa.types.is_large_list(target) else pa.int32()
    ends = pc.cumulative_sum(pc.fill_null(lengths, 0).cast(pa.int64()))
    offsets = pa.concat_arrays([pa.array([0], pa.int64()), ends]).cast(offset_type)
    return made.from_arrays(offsets, values, type=target, mask=array.is_null() if array.null_count else None)


def _cast_fixed_shape(array: pa.Array, feature: Feature, target: pa.DataType) -> pa.Array:
    """Nested lists of one shape. Nothing inside an array is null; the array itself may be."""
    level = array
    for depth, size in enumerate(feature["shape"]):
        if not _is_list(level.type):
            raise TypeError(f"{depth} dimensions where {len(feature['shape'])} belong")
        lengths = pc.list_value_length(level)
        if depth and level.null_count:
            raise ValueError("a null inside an array")
        if size is not None and pc.any(pc.not_equal(lengths, size)).as_py():
            raise ValueError(f"an array is not of shape {feature['shape']}")
        level = level.flatten()
    inner: Feature = {"dtype": feature["dtype"], "_type": "Value"}
    for _ in feature["shape"]:
        inner = {"feature": inner, "_type": "List"}
    return array if array.type == target else _cast_list(array, inner)


def _is_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def is_text(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def _is_bytes(type_: pa.DataType) -> bool:
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_))


def _cast_labels(array: pa.Array, names: Sequence[str]) -> pa.Array:
    """Label numbers, from numbers or names. -1 means no label."""
    if is_text(array.type):
        numbers = {name: number for number, name in enumerate(names)}

        def number_of(label: str) -> int:
            found = numbers.get(label, numbers.get(label.strip()))
            try:
                number = int(label) if found is None else found
            except ValueError:
                number = -2
            if not -1 <= number < len(names):
                raise ValueError(f"{label!r} is not a label")
            return number

        return pa.array([None if label is None else number_of(label) for label in array.to_pylist()], pa.int64())
    if pa.types.is_integer(array.type):
        highest = pc.max(array).as_py()
        if highest is not None and highest >= len(names):
            raise ValueError(f"label {highest} of only {len(names)}")
    return array.cast(pa.int64())


def dump_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def json_text(value: Any) -> str | None:
    """What a JSON column stores: a string that is JSON already stays, as in `datasets`; None stays null."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return dump_json(value)
        return value
    return dump_json(value)


def _print_structs(array: pa.Array) -> pa.Array:
    """Structs declared as strings, in the JSON that pandas prints and so `datasets` has: ASCII, slashes escaped."""
    texts = (None if v is None else json.dumps(v, separators=(",", ":"), default=str) for v in array.to_pylist())
    return pa.array([None if text is None else text.replace("/", "\\/") for text in texts], pa.string())


def _cast_json(array: pa.Array) -> pa.Array:
    """Text that is JSON in every row stays as it is; else each value is written as JSON, text included."""
    values = array.to_pylist()
    if not (is_text(array.type) and all(value is None or json_text(value) == value for value in values)):
        values = [None if value is None else dump_json(value) for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(values, pa.string()))


def _cast_media(array: pa.Array) -> pa.Array:
    """An image, audio or other file column: from paths, from bytes, or from a struct that has one or both."""
    empty_bytes, empty_path = pa.nulls(len(array), pa.binary()), pa.nulls(len(array), pa.string())
    if is_text(array.type):
        content, path = empty_bytes, array.cast(pa.string())
    elif _is_bytes(array.type):
        content, path = array.cast(pa.binary()), empty_path
    elif pa.types.is_struct(array.type):
        children = dict(zip([field.name for field in array.type], array.flatten(), strict=True))
        content = _cast_bytes(children.get("bytes", empty_bytes))
        path = children.get("path", empty_path).cast(pa.string())
    else:
        raise TypeError("media columns are made from paths, bytes or {bytes, path}")
    mask = array.is_null() if array.null_count else None
    return pa.StructArray.from_arrays([content, path], fields=list(MEDIA), mask=mask)


def _cast_bytes(array: pa.Array) -> pa.Array:
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):  # bytes as a list of uint8
        return pa.array([None if value is None else bytes(value) for value in array.to_pylist()], pa.binary())
    return array.cast(pa.binary())


def unify(schemas: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    """One schema for files in order: columns as they first appear, each of a type that holds the values of all.

    Raises SchemaConflict naming the column, both files and both types, and ValueError for no schemas at all.
    """
    if not schemas:
        raise ValueError("no schemas to unify")
    first = schemas[0][1]
    if all(schema.equals(first, check_metadata=True) for _, schema in schemas[1:]):
        return schema_of(features_of(first))
    joined: dict[str, tuple[str, Feature]] = {}
    for path, schema in _distinct(schemas):
        for name, feature in features_of(schema).items():
            if name not in joined:
                joined[name] = (path, feature)
                continue
            where, before = joined[name]
            wider = join_features(before, feature)
            if wider is None:
                raise SchemaConflict(name, path, short(arrow_type(feature)), where, short(arrow_type(before)))
            joined[name] = (where if wider == before else path, wider)
    return schema_of({name: feature for name, (_, feature) in joined.items()})


def _distinct(schemas: Sequence[tuple[str, pa.Schema]]) -> list[tuple[str, pa.Schema]]:
    """The first file of each schema: a split of ten thousand files has a handful."""
    seen: dict[tuple[Any, bytes], tuple[str, pa.Schema]] = {}
    for path, schema in schemas:
        seen.setdefault((schema, (schema.metadata or {}).get(METADATA_KEY, b"")), (path, schema))
    return list(seen.values())


def join_features(one: Feature, other: Feature) -> Feature | None:
    """A feature that holds the values of both, or None. The earlier file's feature wins where both would do."""
    if one == other or _is_null(other):
        return one
    if _is_null(one):
        return other
    kinds = (kind(one), kind(other))
    if "Json" in kinds:
        return one if kinds[0] == "Json" else other
    if kinds == ("struct", "struct"):
        return _join_structs(one, other)
    if kinds[0] in ("List", "LargeList") and kinds[1] in ("List", "LargeList"):
        inner = join_features(one["feature"], other["feature"])
        if inner is None:
            return None
        large = "LargeList" in kinds
        same_length = one.get("length") == other.get("length")
        rest = {"length": one["length"]} if not large and same_length and "length" in one else {}
        return {**rest, "feature": inner, "_type": "LargeList" if large else "List"}
    if kinds == ("Value", "Value"):
        return _join_values(one, other)
    if arrow_type(one) == arrow_type(other) or (kinds[1] == "Value" and kinds[0] in ("ClassLabel", "Image", "Audio")):
        return one  # the first file says what the column is; whether the values fit shows when they are cast
    return None


def _join_structs(one: Feature, other: Feature) -> Feature | None:
    joined = {}
    for name in (*one, *(name for name in other if name not in one)):
        joined[name] = join_features(one[name], other[name]) if name in one and name in other else None
        if name not in other:
            joined[name] = one[name]
        elif name not in one:
            joined[name] = other[name]
        if joined[name] is None:
            return None
    return joined


def _join_values(one: Feature, other: Feature) -> Feature | None:
    before, after = arrow_type(one), arrow_type(other)
    if is_text(before) and is_text(after):
        return one if pa.types.is_large_string(before) else other
    if is_text(before) and not pa.types.is_nested(after) and not _is_bytes(after):
        return one  # `datasets` casts later files to the first one's type, and anything flat prints as a string
    if _is_number(before) and _is_number(after):
        try:
            wider = pa.unify_schemas(
                [pa.schema([("x", before)]), pa.schema([("x", after)])], promote_options="permissive"
            )
        except pa.ArrowException:
            return None
        return {"dtype": str(_DTYPE.get(wider.field("x").type, wider.field("x").type)), "_type": "Value"}
    if _is_bytes(before) and _is_bytes(after):
        return one if pa.types.is_large_binary(before) else other
    if pa.types.is_timestamp(before) and pa.types.is_timestamp(after) and before.tz == after.tz:
        return one if _UNITS.index(before.unit) >= _UNITS.index(after.unit) else other
    return None


_UNITS = ("s", "ms", "us", "ns")
_DTYPE = {pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64"}


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_))


def _is_null(feature: Feature) -> bool:
    return kind(feature) == "Value" and feature["dtype"] == "null"
