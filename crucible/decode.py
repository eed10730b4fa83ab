"""Rows as a training loop wants them: images as Pillow's, sounds as samples, JSON columns as the values they hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow as pa

from crucible.audio import decode_audio
from crucible.feature_types import Feature, features_of, is_struct, kind, parse_features
from crucible.images import Claim, decode_image, unbounded

Row = dict[str, Any]
Decode = Callable[[Any, Claim], Any]
"""Makes the value of a column, after claiming the memory of what it unpacks."""

MEDIA_KINDS = ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh")


class Decoder:
    """Decodes rows, as `to_pylist` gives them: those columns that have something to decode, the others stay."""

    def __init__(self, columns: Mapping[str, Decode], *, media: bool = False) -> None:
        self.columns = columns
        self.media = media
        """Whether any of them is worth a thread: images and sounds are, JSON is not."""

    def __call__(self, row: Row, claim: Claim = unbounded) -> Row:
        columns = self.columns
        return {name: columns[name](value, claim) if name in columns else value for name, value in row.items()}


def decoder(features: str | None, schema: pa.Schema) -> Decoder | None:
    """What decodes rows of these features (else of those the schema means), or None when there is nothing to decode.

    Class labels stay integers. Audio without torchcodec raises UsageError when a row is decoded, unless `decode` is
    False in its feature; video and other files stay `{bytes, path}`.
    """
    described: Mapping[str, Feature] = parse_features(features) if features is not None else features_of(schema)
    columns = {name: decode for name, feature in described.items() if (decode := _decode(name, feature)) is not None}
    return Decoder(columns, media=any(_holds_media(described[name]) for name in columns)) if columns else None


def without_decoding(feature: Feature, kinds: Iterable[str] = MEDIA_KINDS, *, decode: bool = False) -> Feature:
    """`feature` with its media, at any depth, left as `{bytes, path}`; or with `decode` decoded again."""
    if is_struct(feature):
        return {name: without_decoding(inner, kinds, decode=decode) for name, inner in feature.items()}
    if "feature" in feature:
        return {**feature, "feature": without_decoding(feature["feature"], kinds, decode=decode)}
    if feature["_type"] not in kinds:
        return feature
    rest = {key: value for key, value in feature.items() if key not in ("decode", "_type")}
    return {**rest, **({} if decode else {"decode": False}), "_type": feature["_type"]}


def _holds_media(feature: Feature) -> bool:
    if is_struct(feature):
        return any(map(_holds_media, feature.values()))
    return _holds_media(feature["feature"]) if "feature" in feature else kind(feature) in MEDIA_KINDS


def _decode(column: str, feature: Feature) -> Decode | None:
    what = kind(feature)
    if what in ("Image", "Audio", "Json") and not feature.get("decode", True):
        return None
    if what == "Image":
        return lambda value, claim: decode_image(value, mode=feature.get("mode"), column=column, claim=claim)
    if what == "Audio":
        return lambda value, _claim: decode_audio(value, feature, column)
    if what == "Json":
        return lambda value, _claim: json.loads(value) if isinstance(value, (str, bytes)) else value
    if what in ("List", "LargeList") and (inner := _decode(column, feature["feature"])) is not None:
        return lambda value, claim: None if value is None else [inner(one, claim) for one in value]
    if is_struct(feature):
        fields = {name: one for name, sub in feature.items() if (one := _decode(column, sub)) is not None}
        if fields:
            return lambda value, claim: (
                None
                if value is None
                else {name: fields[name](one, claim) if name in fields else one for name, one in value.items()}
            )
    return None
