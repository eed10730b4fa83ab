"""Column types as `datasets` writes them: feature dicts, their YAML form in a card, and the Arrow schemas they mean.

A feature is plain JSON: `{"dtype": "int64", "_type": "Value"}`, `{"feature": …, "_type": "List"}`, a dict of features
for a struct, `{"_type": "Image"}` and so on. The features of a split are a dict from column to feature; the order of
its keys is the order of the columns. Schemas carry them under the metadata key `huggingface`, which is where
`datasets.load_dataset("arrow", data_files=shard)` looks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pyarrow as pa

from crucible.dtypes import dtype_of_type, plain_name, type_of_dtype

Feature = Any
"""A feature dict, or a dict of features for a struct."""

METADATA_KEY = b"huggingface"

MEDIA = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_MEDIA_TYPES = ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh")
ARRAY_DIMENSIONS = {"Array2D": 2, "Array3D": 3, "Array4D": 4, "Array5D": 5}
_DEFAULTS = {"decode": True, "mono": True, "length": -1}
# written by older versions of `datasets`; the type implies them
_DERIVED = {"Image": ("dtype", "pa_type"), "Audio": ("dtype", "pa_type"), "ClassLabel": ("num_classes", "names_file")}
_CAMEL = re.compile(r"(?<!_)_(?!_)")


def is_struct(feature: Feature) -> bool:
    return isinstance(feature, dict) and not isinstance(feature.get("_type"), str)


def kind(feature: Feature) -> str:
    """`Value`, `List`, `Image`, …; `struct` for a dict of features."""
    return "struct" if is_struct(feature) else str(feature["_type"])


def normalise(feature: Feature) -> Feature:
    """The one spelling of a feature: defaults left out, old forms (`[x]`, `Sequence`) as the `List` they mean."""
    if isinstance(feature, list):
        return {"feature": normalise(feature[0]), "_type": "List"}
    if not isinstance(feature, dict):
        raise ValueError(f"{feature!r} is not a feature")
    if is_struct(feature):
        return {str(name): normalise(inner) for name, inner in feature.items()}
    name = feature["_type"]
    rest = {key: value for key, value in feature.items() if key != "_type" and _said(key, value)}
    if name == "Value":
        type_of_dtype(feature["dtype"])
        return {**rest, "dtype": plain_name(feature["dtype"]), "_type": "Value"}
    if name in ("Sequence", "List", "LargeList"):
        inner = normalise(feature["feature"])
        if name == "Sequence" and is_struct(inner):
            return {column: {**rest, "feature": one, "_type": "List"} for column, one in inner.items()}
        return {**rest, "feature": inner, "_type": "List" if name == "Sequence" else name}
    if name == "ClassLabel":
        names = feature.get("names")
        if names is None:
            names = [str(number) for number in range(int(feature["num_classes"]))]
        names = [str(label) for label in names]
        if len(set(names)) != len(names):
            raise ValueError("a ClassLabel has the same name twice")
        rest["names"] = names
    if name in ARRAY_DIMENSIONS:
        rest["shape"] = list(feature["shape"])
    clean = {key: value for key, value in rest.items() if key not in _DERIVED.get(name, ())}
    made = {**clean, "_type": name}
    arrow_type(made)  # an unknown type is refused here, not when the data has moved
    return made


def _said(key: str, value: Any) -> bool:
    return value is not None and not (key in _DEFAULTS and value == _DEFAULTS[key])


def arrow_type(feature: Feature) -> pa.DataType:
    """How a feature is stored. Raises ValueError for a feature type crucible does not know."""
    name = kind(feature)
    if name == "struct":
        return pa.struct([pa.field(key, arrow_type(inner)) for key, inner in feature.items()])
    if name == "Value":
        return type_of_dtype(feature["dtype"])
    if name == "List":
        return pa.list_(arrow_type(feature["feature"]), feature.get("length", -1))
    if name == "LargeList":
        return pa.large_list(arrow_type(feature["feature"]))
    if name == "ClassLabel":
        return pa.int64()
    if name in _MEDIA_TYPES:
        return MEDIA
    if name == "Json":
        return pa.json_()
    if name == "Translation":
        return pa.struct([pa.field(language, pa.string()) for language in sorted(feature["languages"])])
    if name == "TranslationVariableLanguages":
        return pa.struct({"language": pa.list_(pa.string()), "translation": pa.list_(pa.string())})
    if name in ARRAY_DIMENSIONS:
        _check_shape(name, feature["shape"])
        stored = type_of_dtype(feature["dtype"])
        for _ in range(ARRAY_DIMENSIONS[name]):
            stored = pa.list_(stored)
        return stored
    raise ValueError(f"feature type {name!r} is not known")


def _check_shape(name: str, shape: Any) -> None:
    sized = [isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape]
    if len(sized) != ARRAY_DIMENSIONS[name] or not all(sized[1:]) or not (sized[0] or shape[0] is None):
        raise ValueError(f"{list(shape)} is no shape of an {name}; only its first size may be open (null)")


def arrow_field(name: str, feature: Feature) -> pa.Field:
    """The column of a feature. An array says which it is, so that `datasets` reads it as the array it is."""
    type_, what = arrow_type(feature), kind(feature)
    if what not in ARRAY_DIMENSIONS:
        return pa.field(name, type_)
    said = json.dumps([list(feature["shape"]), feature["dtype"]])
    extension = f"datasets.features.features.{what}ExtensionType"
    return pa.field(name, type_, metadata={"ARROW:extension:name": extension, "ARROW:extension:metadata": said})


def feature_of(type_: pa.DataType) -> Feature:
    """The feature an Arrow type means when nothing else was said."""
    if isinstance(type_, pa.JsonType):
        return {"_type": "Json"}
    if isinstance(type_, pa.BaseExtensionType):
        return feature_of(type_.storage_type)
    if pa.types.is_struct(type_):
        return {field.name: feature_of(field.type) for field in type_}
    if pa.types.is_fixed_size_list(type_):
        return {"feature": feature_of(type_.value_type), "length": type_.list_size, "_type": "List"}
    if pa.types.is_list(type_):
        return {"feature": feature_of(type_.value_type), "_type": "List"}
    if pa.types.is_large_list(type_):
        return {"feature": feature_of(type_.value_type), "_type": "LargeList"}
    return {"dtype": dtype_of_type(type_), "_type": "Value"}


def features_of(schema: pa.Schema) -> dict[str, Feature]:
    """The features of a file: what its metadata says, where that fits the column's type; else what the type means."""
    said = _metadata_features((schema.metadata or {}).get(METADATA_KEY, b""))
    return {
        field.name: said[field.name]
        if field.name in said and _stored(arrow_type(said[field.name])) == _stored(field.type)
        else feature_of(field.type)
        for field in schema
    }


@lru_cache(maxsize=256)
def _metadata_features(packed: bytes) -> Mapping[str, Feature]:
    """Features of a `huggingface` metadata value. One that cannot be read says nothing: the types still do."""
    if not packed:
        return {}
    try:
        said = (json.loads(packed).get("info") or {}).get("features") or {}
    except (ValueError, AttributeError):
        return {}
    known = {}
    for name, feature in said.items() if isinstance(said, dict) else ():
        try:
            known[name] = normalise(feature)
        except (ValueError, KeyError, TypeError, IndexError):
            continue
    return known


def _stored(type_: pa.DataType) -> pa.DataType:
    """The type with extensions and nullability taken off: what two equal columns agree on."""
    if isinstance(type_, pa.BaseExtensionType) and not isinstance(type_, pa.JsonType):
        return _stored(type_.storage_type)
    if pa.types.is_struct(type_):
        return pa.struct([pa.field(field.name, _stored(field.type)) for field in type_])
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(_stored(type_.value_type), type_.list_size)
    if pa.types.is_list(type_):
        return pa.list_(_stored(type_.value_type))
    if pa.types.is_large_list(type_):
        return pa.large_list(_stored(type_.value_type))
    return type_


def schema_of(features: Mapping[str, Feature]) -> pa.Schema:
    """The Arrow schema of features, carrying them in its metadata."""
    fields = [arrow_field(name, feature) for name, feature in features.items()]
    packed = json.dumps({"info": {"features": dict(features)}}, ensure_ascii=False, separators=(",", ":"))
    return pa.schema(fields, metadata={METADATA_KEY: packed.encode()})


def schema_for(features: str | None, inferred: pa.Schema) -> pa.Schema:
    """What rows become: the declared features if there are any, else what the file's schema says and means."""
    return schema_of(parse_features(features) if features is not None else features_of(inferred))


def parse_features(features: str) -> dict[str, Feature]:
    """Features from their JSON (`ReadOptions.features`, `Manifest.features`). Raises ValueError."""
    parsed = normalise(json.loads(features))
    if not is_struct(parsed):
        raise ValueError("features are a dict from column to feature")
    return dict(parsed)


def dump_features(features: Mapping[str, Feature]) -> str:
    """JSON that `parse_features` reads. Keys stay in order, because that is the order of the columns."""
    return json.dumps(dict(features), ensure_ascii=False, separators=(",", ":"))


def select_features(features: str | None, columns: tuple[str, ...] | None) -> str | None:
    """Declared features of the chosen columns, in the order of the choice."""
    if features is None or columns is None:
        return features
    declared = parse_features(features)
    return dump_features({name: declared[name] for name in columns if name in declared})


def features_from_yaml(listed: Any) -> dict[str, Feature]:
    """Features in the form a card has them: a list of `{name, dtype | list | struct | …}`. Raises ValueError."""
    try:
        return dict(normalise(_from_yaml(listed)))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"features are not in the card's form: {error!r}") from error


def _from_yaml(node: Any) -> Feature:
    if isinstance(node, list):
        return {str(item["name"]): _from_yaml({k: v for k, v in item.items() if k != "name"}) for item in node}
    if not isinstance(node, dict):
        raise ValueError(f"expected a dict or a list, got {node!r}")
    if not node:
        return {}
    key, value = next(iter(node.items()))
    rest = {name: other for name, other in node.items() if name != key}
    if key in ("list", "large_list", "sequence"):
        inner = _from_yaml({"dtype": value} if isinstance(value, str) else value)
        if key == "sequence" and isinstance(value, list):
            return {name: {**rest, "feature": one, "_type": "List"} for name, one in inner.items()}
        return {**rest, "feature": inner, "_type": "LargeList" if key == "large_list" else "List"}
    if key == "struct":
        return _from_yaml(value)
    if key == "dtype" and isinstance(value, str):
        try:
            type_of_dtype(value)
        except ValueError:
            return {"_type": _camel(value)}
        return {**rest, "dtype": value, "_type": "Value"}
    if key == "dtype":
        return _from_yaml(value)
    return {"_type": _camel(key), **(_class_names(value) if key == "class_label" else value)}


def _class_names(label: dict[str, Any]) -> dict[str, Any]:
    """`names: {'0': cat, '1': dog}` as a list. Raises ValueError when an id is missing."""
    names = label.get("names")
    if not isinstance(names, dict):
        return label
    by_id = {int(number): name for number, name in names.items()}
    if sorted(by_id) != list(range(len(by_id))):
        raise ValueError(f"class_label ids must be 0 to {len(by_id) - 1}, got {sorted(by_id)}")
    return {**label, "names": [by_id[number] for number in range(len(by_id))]}


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in _CAMEL.split(name))
