"""The names `datasets` gives to Arrow's types (`int64`, `timestamp[us, tz=UTC]`, `decimal128(10, 2)`), both ways."""

from __future__ import annotations

import re

import pyarrow as pa

_PLAIN: dict[str, pa.DataType] = {
    "null": pa.null(),
    "bool": pa.bool_(),
    "int8": pa.int8(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "uint8": pa.uint8(),
    "uint16": pa.uint16(),
    "uint32": pa.uint32(),
    "uint64": pa.uint64(),
    "float16": pa.float16(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "date32": pa.date32(),
    "date64": pa.date64(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "time32[s]": pa.time32("s"),
    "time32[ms]": pa.time32("ms"),
    "time64[us]": pa.time64("us"),
    "time64[ns]": pa.time64("ns"),
}
_NAMES = {type_: name for name, type_ in _PLAIN.items()}
_ALIASES = {"float": "float32", "double": "float64", "bool_": "bool", "utf8": "string", "large_utf8": "large_string"}

_TIMESTAMP = re.compile(r"timestamp\[(s|ms|us|ns)(?:,\s*tz=([\w/+:-]*))?\]")
_DURATION = re.compile(r"duration\[(s|ms|us|ns)\]")
_DECIMAL = re.compile(r"decimal(128|256)\((\d+),\s*(-?\d+)\)")
_FIXED = re.compile(r"fixed_size_binary\[(\d+)\]")


def plain_name(dtype: str) -> str:
    """The one spelling of a dtype: `float` is `float32`, `double` is `float64`."""
    return _ALIASES.get(dtype, dtype)


def type_of_dtype(dtype: str) -> pa.DataType:
    """The Arrow type of a dtype name. Raises ValueError for a name that is none."""
    dtype = plain_name(dtype)
    if dtype in _PLAIN:
        return _PLAIN[dtype]
    if match := _TIMESTAMP.fullmatch(dtype):
        return pa.timestamp(match[1], match[2] or None)
    if match := _DURATION.fullmatch(dtype):
        return pa.duration(match[1])
    if match := _DECIMAL.fullmatch(dtype):
        make = pa.decimal128 if match[1] == "128" else pa.decimal256
        return make(int(match[2]), int(match[3]))
    if match := _FIXED.fullmatch(dtype):
        return pa.binary(int(match[1]))
    raise ValueError(f"{dtype!r} is not a dtype")


def dtype_of_type(type_: pa.DataType) -> str:
    """The dtype name of a flat Arrow type. Raises ValueError for a type `datasets` has no name for."""
    if type_ in _NAMES:
        return _NAMES[type_]
    if pa.types.is_timestamp(type_):
        return f"timestamp[{type_.unit}, tz={type_.tz}]" if type_.tz else f"timestamp[{type_.unit}]"
    if pa.types.is_duration(type_):
        return f"duration[{type_.unit}]"
    if pa.types.is_decimal128(type_) or pa.types.is_decimal256(type_):
        return f"decimal{type_.bit_width}({type_.precision}, {type_.scale})"
    if pa.types.is_fixed_size_binary(type_):
        return f"fixed_size_binary[{type_.byte_width}]"
    if pa.types.is_dictionary(type_):
        return dtype_of_type(type_.value_type)
    raise ValueError(f"Arrow type {type_} has no dtype in datasets")
