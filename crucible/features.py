"""Everything about column types under one name; the parts are `feature_types`, `casts` and `decode`."""

from crucible.casts import cast_batch, unify
from crucible.decode import decoder
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
