"""Everything about column types under one name: `from crucible.features import ClassLabel, Features, Value`.

The parts are `feature_types`, `feature_classes`, `casts`, `encode` and `decode`.
"""

from crucible.casts import cast_batch, unify
from crucible.decode import decoder
from crucible.feature_classes import (
    Array2D,
    Array3D,
    Array4D,
    Array5D,
    Audio,
    ClassLabel,
    Features,
    Image,
    Json,
    LargeList,
    List,
    Sequence,
    Translation,
    TranslationVariableLanguages,
    Value,
)
from crucible.feature_types import (
    METADATA_KEY,
    dump_features,
    features_from_yaml,
    features_of,
    parse_features,
    schema_for,
    schema_of,
    select_features,
)

__all__ = [
    "METADATA_KEY",
    "Array2D",
    "Array3D",
    "Array4D",
    "Array5D",
    "Audio",
    "ClassLabel",
    "Features",
    "Image",
    "Json",
    "LargeList",
    "List",
    "Sequence",
    "Translation",
    "TranslationVariableLanguages",
    "Value",
    "cast_batch",
    "decoder",
    "dump_features",
    "features_from_yaml",
    "features_of",
    "parse_features",
    "schema_for",
    "schema_of",
    "select_features",
    "unify",
]
