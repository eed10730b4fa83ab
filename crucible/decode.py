"""Rows as a training loop wants them: image columns as PIL images, JSON columns as the values they hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from crucible.feature_types import Feature, features_of, is_struct, kind, parse_features
from crucible.images import decode_image

Row = dict[str, Any]
Decode = Callable[[Any], Any]


def decoder(features: str | None, schema: pa.Schema) -> Callable[[Row], Row] | None:
    """A function that decodes one row (as `to_pylist` gives it), or None when there is nothing to decode.

    Class labels stay integers; audio and other media stay `{bytes, path}`.
    """
    described: Mapping[str, Feature] = parse_features(features) if features is not None else features_of(schema)
    columns = {name: decode for name, feature in described.items() if (decode := _decode(name, feature)) is not None}
    if not columns:
        return None

    def decode_row(row: Row) -> Row:
        return {name: columns[name](value) if name in columns else value for name, value in row.items()}

    return decode_row


def _decode(column: str, feature: Feature) -> Decode | None:
    what = kind(feature)
    if what == "Image" and feature.get("decode", True):
        return lambda value: decode_image(value, mode=feature.get("mode"), column=column)
    if what == "Json" and feature.get("decode", True):
        return lambda value: json.loads(value) if isinstance(value, (str, bytes)) else value
    if what in ("List", "LargeList") and (inner := _decode(column, feature["feature"])) is not None:
        return lambda value: None if value is None else [inner(one) for one in value]
    if is_struct(feature):
        fields = {name: one for name, sub in feature.items() if (one := _decode(column, sub)) is not None}
        if fields:
            return lambda value: (
                None
                if value is None
                else {name: fields[name](one) if name in fields else one for name, one in value.items()}
            )
    return None
