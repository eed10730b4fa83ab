"""Python values to what a column stores: label names to numbers, images to bytes, arrays to lists. No I/O.

The values are those `datasets` stores. Raises ValueError or TypeError for a value that does not fit, saying why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from crucible.casts import is_text, json_text
from crucible.feature_types import ARRAY_DIMENSIONS, MEDIA, Feature, arrow_type, is_struct, kind
from crucible.images import encode_image


def encode(feature: Feature, value: Any) -> Any:
    """What is stored for `value`. None stays None."""
    if value is None:
        return None
    if is_struct(feature):
        return {name: encode(inner, value.get(name)) for name, inner in feature.items()}
    what = kind(feature)
    if what in ARRAY_DIMENSIONS:
        return _array(feature, value)
    if what in ("List", "LargeList"):
        return _list(feature, value)
    if make := _MAKERS.get(what):
        return make(feature, value)
    if what != "Image" and arrow_type(feature) == MEDIA:
        return _media(value)
    return value


def label_number(names: Sequence[str], label: str) -> int:
    """The number of a label's name, or of one that is the number itself as text."""
    for text in (label, label.strip()):
        if text in names:
            return names.index(text)
    try:
        number = int(label)
    except ValueError:
        number = -2
    if not -1 <= number < len(names):
        raise ValueError(f"{label!r} is no class label")
    return number


def _label(feature: Feature, value: Any) -> int:
    number = label_number(feature["names"], value) if isinstance(value, str) else _python(value)
    if not -1 <= number < len(feature["names"]):
        raise ValueError(f"class label {number} is outside -1 to {len(feature['names']) - 1}")
    return int(number)


def _value(feature: Feature, value: Any) -> Any:
    type_ = arrow_type(feature)
    value = _python(value)
    if pa.types.is_boolean(type_):
        return bool(value)
    if pa.types.is_integer(type_):
        number = int(value)
        bits, signed = type_.bit_width, pa.types.is_signed_integer(type_)
        lowest, highest = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
        if not lowest <= number <= highest:
            raise ValueError(f"{number} does not fit {feature['dtype']} ({lowest} to {highest})")
        return number
    if pa.types.is_floating(type_):
        return float(value)
    return str(value) if is_text(type_) else value


def _list(feature: Feature, value: Any) -> list[Any]:
    values = list(value)
    length = feature.get("length", -1)
    if length >= 0 and len(values) != length:
        raise ValueError(f"a list of {len(values)} values where {length} belong")
    return [encode(feature["feature"], one) for one in values]


def _array(feature: Feature, value: Any) -> Any:
    shape = np.shape(value)
    wanted = feature["shape"]
    if len(shape) != len(wanted) or any(want is not None and want != is_ for want, is_ in zip(wanted, shape)):
        raise ValueError(f"an array of shape {shape} where {tuple(wanted)} belongs")
    return np.asarray(value).tolist()


def _variable_languages(feature: Feature, value: Mapping[str, Any]) -> Any:
    if set(value) == {"language", "translation"}:
        return value
    known = feature.get("languages")
    unknown = sorted(set(value) - set(known)) if known else []
    if unknown:
        raise ValueError(f"languages {', '.join(unknown)} are not among {', '.join(known)}")
    pairs = sorted(
        (language, text) for language, texts in value.items() for text in ([texts] if isinstance(texts, str) else texts)
    )
    return {"language": [pair[0] for pair in pairs], "translation": [pair[1] for pair in pairs]}


def _media(value: Any) -> Any:
    """A file that is carried: its bytes, its path, or both."""
    if isinstance(value, Mapping):
        return {"bytes": value.get("bytes"), "path": value.get("path")}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value), "path": None}
    return {"bytes": None, "path": str(value)}


def _python(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


_MAKERS: dict[str, Callable[[Feature, Any], Any]] = {
    "ClassLabel": _label,
    "Value": _value,
    "Json": lambda _, value: json_text(value),
    "Image": lambda _, value: encode_image(value),
    "TranslationVariableLanguages": _variable_languages,
}
