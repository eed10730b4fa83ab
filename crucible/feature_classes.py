"""Features as a person writes and asks them: `ClassLabel(names=["cat", "dog"]).int2str(1)`, `Features({...})`.

Each is the plain dict that `feature_types` describes, with methods: it compares, pickles and prints to JSON as that
dict. What takes features takes both, and `datasets`' own objects too (`plain_features`). Nothing here does I/O.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import pyarrow as pa

from crucible.decode import decoder
from crucible.encode import encode, label_number
from crucible.errors import UsageError
from crucible.feature_types import Feature, arrow_type, features_of, is_struct, normalise, schema_of


class FeatureDict(dict[str, Any]):
    """One feature. Its settings are its items, and attributes too: `feature.dtype` is `feature["dtype"]`."""

    implied: ClassVar[dict[str, Any]] = {"id": None}
    """What is left out of the dict when nobody said otherwise."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(normalise({**_plain(settings), "_type": type(self).__name__}))

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return wrap(self[name])
        if name in self.implied:
            return self.implied[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={wrap(value)!r}" for name, value in self.items() if name != "_type")
        return f"{type(self).__name__}({said})"

    def __reduce__(self) -> tuple[Any, ...]:
        return wrap, (dict(self),)

    @property
    def arrow_type(self) -> pa.DataType:
        return arrow_type(self)

    def encode_example(self, value: Any) -> Any:
        """What is stored for `value`. Raises ValueError or TypeError for one that does not fit."""
        return encode(dict(self), value)

    def decode_example(self, value: Any) -> Any:
        """What a reader gets for a stored value: an image, the value of JSON text, else the value itself."""
        decode = decoder(None, schema_of({"value": dict(self)}))
        return value if decode is None else decode({"value": value})["value"]


class Value(FeatureDict):
    def __init__(self, dtype: str, id: str | None = None) -> None:
        super().__init__(dtype=dtype, id=id)

    def __repr__(self) -> str:
        return f"Value({self['dtype']!r})"


class ClassLabel(FeatureDict):
    """Whole numbers that stand for names; -1 is no label."""

    def __init__(
        self, num_classes: int | None = None, names: Iterable[str] | None = None, id: str | None = None
    ) -> None:
        if num_classes is None and names is None:
            raise UsageError("a ClassLabel needs names or num_classes")
        listed = [str(name) for name in names] if names is not None else [str(n) for n in range(num_classes or 0)]
        if num_classes is not None and num_classes != len(listed):
            raise UsageError(f"a ClassLabel of {num_classes} classes has {len(listed)} names")
        super().__init__(names=listed, id=id)

    @property
    def num_classes(self) -> int:
        return len(self["names"])

    def str2int(self, values: str | Iterable[str]) -> Any:
        """The number of a name, or of each of several. Raises ValueError for what is no name and no label's number."""
        if isinstance(values, str):
            return label_number(self["names"], values)
        return [label_number(self["names"], str(value)) for value in _several(values, "a string")]

    def int2str(self, values: int | Iterable[int]) -> Any:
        """The name of a number, or of each of several. Raises ValueError outside 0 to num_classes - 1."""
        if isinstance(values, int):
            return self._name(values)
        return [self._name(value) for value in _several(values, "an integer")]

    def _name(self, number: Any) -> str:
        if not 0 <= number < self.num_classes:
            raise ValueError(f"{int(number)} is no class label: there are 0 to {self.num_classes - 1}")
        return str(self["names"][int(number)])


class List(FeatureDict):
    implied: ClassVar = {"length": -1, "id": None}

    def __init__(self, feature: Any, length: int = -1, id: str | None = None) -> None:
        super().__init__(feature=feature, length=length, id=id)


class LargeList(FeatureDict):
    def __init__(self, feature: Any, id: str | None = None) -> None:
        super().__init__(feature=feature, id=id)


def Sequence(feature: Any, length: int = -1) -> Any:
    """`List`, but of a struct a struct of lists: what `datasets` has always meant by it."""
    return wrap(normalise({"feature": plain_feature(feature), "length": length, "_type": "Sequence"}))


class Image(FeatureDict):
    implied: ClassVar = {"mode": None, "decode": True, "id": None}

    def __init__(self, mode: str | None = None, decode: bool = True, id: str | None = None) -> None:
        super().__init__(mode=mode, decode=decode, id=id)


class Audio(FeatureDict):
    implied: ClassVar = {"sampling_rate": None, "decode": True, "num_channels": None, "stream_index": None, "id": None}


class Json(FeatureDict):
    implied: ClassVar = {"decode": True, "id": None}


class Translation(FeatureDict):
    def __init__(self, languages: Iterable[str], id: str | None = None) -> None:
        super().__init__(languages=list(languages), id=id)


class TranslationVariableLanguages(FeatureDict):
    implied: ClassVar = {"languages": None, "num_languages": None, "id": None}

    def __init__(self, languages: Iterable[str] | None = None, id: str | None = None) -> None:
        known = sorted(set(languages)) if languages else None
        super().__init__(languages=known, num_languages=None if known is None else len(known), id=id)


class _Array(FeatureDict):
    def __init__(self, shape: Iterable[int | None], dtype: str, id: str | None = None) -> None:
        super().__init__(shape=list(shape), dtype=dtype, id=id)


class Array2D(_Array):
    pass


class Array3D(_Array):
    pass


class Array4D(_Array):
    pass


class Array5D(_Array):
    pass


class Video(FeatureDict):
    implied: ClassVar = {"decode": True, "id": None}


class Pdf(FeatureDict):
    implied: ClassVar = {"decode": True, "id": None}


class Nifti(FeatureDict):
    implied: ClassVar = {"decode": True, "id": None}


class Mesh(FeatureDict):
    implied: ClassVar = {"decode": True, "id": None}


class Features(dict[str, Any]):
    """Column to feature; the order of the keys is that of the columns. A column of structs has a dict of features."""

    def __init__(self, columns: Mapping[str, Any] | None = None, **more: Any) -> None:
        plain = plain_features({**(columns or {}), **more})
        super().__init__({name: wrap(feature) for name, feature in plain.items()})

    @classmethod
    def from_dict(cls, features: Mapping[str, Any]) -> Features:
        return cls(features)

    @classmethod
    def from_arrow_schema(cls, schema: pa.Schema) -> Features:
        """What the schema's metadata says, where it fits the types; else what the types mean."""
        return cls(features_of(schema))

    def to_dict(self) -> dict[str, Any]:
        """The plain dict, as JSON has it."""
        return plain_features(self)

    @property
    def arrow_schema(self) -> pa.Schema:
        return schema_of(self.to_dict())

    def encode_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as it is stored: label names to numbers, images to bytes, JSON to text. Raises UsageError by column."""
        return {name: self._encoded(name, row.get(name)) for name in self}

    def encode_batch(self, batch: Mapping[str, Iterable[Any]]) -> dict[str, list[Any]]:
        """The same for a dict of columns, which are those of the features."""
        if set(batch) != set(self):
            raise UsageError(f"the batch has the columns {sorted(batch)}, the features {sorted(self)}")
        return {name: [self._encoded(name, value) for value in column] for name, column in batch.items()}

    def _encoded(self, name: str, value: Any) -> Any:
        try:
            return encode(plain_feature(self[name]), value)
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"column {name!r}: {error}") from error

    def decode_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A stored row as a reader gets it."""
        decode = decoder(None, self.arrow_schema)
        return dict(row) if decode is None else decode(dict(row))

    def copy(self) -> Features:
        return Features(self)


_CLASSES: dict[str, type[FeatureDict]] = {
    cls.__name__: cls
    for cls in (
        *(Value, ClassLabel, List, LargeList, Image, Audio, Json, Translation, TranslationVariableLanguages),
        *(Array2D, Array3D, Array4D, Array5D, Video, Pdf, Nifti, Mesh),
    )
}


def wrap(value: Any) -> Any:
    """The same dict with the methods of its kind; structs of features too. What is no feature comes back as it is."""
    if not isinstance(value, dict):
        return value
    cls = _CLASSES.get(value["_type"]) if isinstance(value.get("_type"), str) else None
    if cls is None:
        return {name: wrap(inner) for name, inner in value.items()}
    made = cls.__new__(cls)
    dict.update(made, value)
    return made


def plain_feature(feature: Any) -> Feature:
    """The plain dict of a feature: ours, `datasets`', or one that is plain already. Raises ValueError."""
    return normalise(_plain(feature))


def plain_features(features: Any) -> dict[str, Feature]:
    """The plain dict of a dataset's features. Raises UsageError for what are none."""
    try:
        plain = plain_feature(features)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UsageError(f"features are a dict from column to feature: {error}") from error
    if not is_struct(plain):
        raise UsageError("features are a dict from column to feature, and not one feature")
    return dict(plain)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # an object of `datasets`
        named = {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
        return {**named, "_type": getattr(value, "_type", type(value).__name__)}
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _several(values: Any, what: str) -> Iterable[Any]:
    if not isinstance(values, Iterable):
        raise ValueError(f"{values!r} is neither {what} nor several")
    return values
