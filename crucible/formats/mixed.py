"""JSON fields whose values have no common Arrow type: `datasets` keeps them as JSON text, and so do we. Pure.

A path is a tuple of keys, with `ITEMS` for "each item of the list".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from crucible.casts import json_text
from crucible.feature_types import Feature, is_struct, kind

ITEMS = 0
Path = tuple[str | int, ...]


def mixed_paths(rows: list[Any]) -> set[Path]:
    """Paths at which structs differ in their keys, are empty, or are mixed with something that is no struct."""
    found: set[Path] = set()
    todo: list[tuple[Path, list[Any]]] = [((), [row for row in rows if row is not None])]
    while todo:
        path, values = todo.pop()
        if not values:
            continue
        if all(isinstance(value, dict) for value in values):
            keys = values[0].keys()
            if path and (not keys or any(value.keys() != keys for value in values)):
                found.add(path)
                continue
            every_key = dict.fromkeys(key for value in values for key in value)
            todo += [((*path, key), [v[key] for v in values if v.get(key) is not None]) for key in every_key]
        elif all(isinstance(value, list) for value in values):
            todo.append(((*path, ITEMS), [item for value in values for item in value if item is not None]))
        elif any(isinstance(value, (dict, list)) for value in values):
            found.add(path)
    return found - {()}


def add_path(paths: set[Path], new: Path) -> set[Path]:
    """`paths` with `new`, which swallows those below it."""
    return {path for path in paths if path[: len(new)] != new} | {new}


def encode(value: Any, path: Path) -> Any:
    """`value` with what lies at `path` replaced by its JSON text."""
    if value is None:
        return None
    if not path:
        return json_text(value)
    key, rest = path[0], path[1:]
    if key == ITEMS:
        return [encode(item, rest) for item in value] if isinstance(value, list) else value
    return {**value, key: encode(value.get(key), rest)} if isinstance(value, dict) else value


def find_path(spelled: str, rows: Iterable[Any]) -> Path | None:
    """The path that Arrow's error spells `/a/[]/b`. Keys may hold slashes, so the rows are walked to tell."""
    for row in rows:
        todo: list[tuple[Any, str, Path]] = [(row, spelled, ())]
        while todo:
            value, rest, path = todo.pop()
            if not rest:
                return path
            if isinstance(value, dict):
                for key, child in value.items():
                    if rest == f"/{key}" or rest.startswith(f"/{key}/"):
                        todo.append((child, rest[len(key) + 1 :], (*path, key)))
            elif isinstance(value, list) and (rest == "/[]" or rest.startswith("/[]/")):
                todo.extend((child, rest[3:], (*path, ITEMS)) for child in value)
    return None


def json_paths(feature: Feature, path: Path = ()) -> set[Path]:
    """Where a feature says Json."""
    what = kind(feature)
    if what == "Json":
        return {path}
    if what in ("List", "LargeList"):
        return json_paths(feature["feature"], (*path, ITEMS))
    if is_struct(feature):
        return {found for key, inner in feature.items() for found in json_paths(inner, (*path, key))}
    return set()


def with_json(feature: Feature, paths: set[Path], path: Path = ()) -> Feature:
    """The feature with Json at `paths`."""
    if path in paths:
        return {"_type": "Json"}
    what = kind(feature)
    if what in ("List", "LargeList"):
        return {**feature, "feature": with_json(feature["feature"], paths, (*path, ITEMS))}
    if is_struct(feature):
        return {key: with_json(inner, paths, (*path, key)) for key, inner in feature.items()}
    return feature
