"""Split expressions: `train[:10%]`, `train[100:200]+test`. Pure; read as `datasets` 5.2 reads them.

A slice is a manifest of its own (`take`): the same shards, those that it touches, with the rows of each that belong. So
a reader, an order or a state sees no difference, nothing is copied, and which rows it has is exact, because a manifest
knows how many rows each shard has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from crucible.errors import UsageError
from crucible.manifest import Manifest, pack_schema
from crucible.refs import ShardInfo, WorkItem

ALL = "all"
"""The expression for every split of a config, one after the other."""

_NAME = r"\w+(?:\.\w+)*"
_PART = re.compile(
    rf"({_NAME})(?:\[(?:(-?[\d_]+)(%?))?:(?:(-?[\d_]+)(%?))?\])?(?:\(([^)]*)\))?",
)
_SUM = re.compile(r"\s*\+\s*")
_ROUNDINGS = ("closest", "pct1_dropremainder")


@dataclass(frozen=True, slots=True)
class Part:
    """One term of an expression. The bounds are as typed: maybe negative, maybe percent, None where left out."""

    split: str
    start: int | None = None
    stop: int | None = None
    percent: bool = False
    rounding: str = ""
    """Empty, or one of `closest` and `pct1_dropremainder`; percentages only."""

    def bounds(self, rows: int) -> tuple[int, int]:
        """[start, stop) in a split of `rows` rows, both inside it; start may lie behind stop. Raises UsageError."""
        start = 0 if self.start is None else self._row(self.start, rows)
        stop = rows if self.stop is None else self._row(self.stop, rows)
        return _inside(start, rows), _inside(stop, rows)

    def _row(self, bound: int, rows: int) -> int:
        if not self.percent:
            return bound
        if self.rounding != "pct1_dropremainder":
            return round(bound * rows / 100.0)
        if rows < 100:
            raise UsageError(
                f"split {self.split!r} has {rows} rows: with pct1_dropremainder any percentage of fewer than 100 rows "
                "is none; use the default rounding"
            )
        return bound * (rows // 100)


def _inside(row: int, rows: int) -> int:
    return min(max(rows + row, 0) if row < 0 else row, rows)


def is_split_name(name: str) -> bool:
    return re.fullmatch(_NAME, name) is not None


def parse_split(expression: str) -> tuple[Part, ...]:
    """The terms of an expression, in order. Raises UsageError naming the one that cannot be read."""
    parts = tuple(_parse_part(text, expression) for text in _SUM.split(expression.strip()))
    first = parts[0]
    for part in parts[1:]:
        if first.percent and part.percent and (first.rounding or "closest") != (part.rounding or "closest"):
            raise UsageError(f"split {expression!r}: the terms of a sum cannot be rounded in different ways")
    return parts


def _parse_part(text: str, expression: str) -> Part:
    match = _PART.fullmatch(text)
    if match is None:
        raise UsageError(
            f"split {expression!r}: {text!r} cannot be read; write a name, name[10:20], name[:10%], or a sum of these"
        )
    name, start, start_percent, stop, stop_percent, rounding = match.groups()
    percent = bool(start_percent or stop_percent)
    if rounding is not None and (not percent or rounding not in _ROUNDINGS):
        raise UsageError(f"split {expression!r}: ({rounding}) is no way to round; {' and '.join(_ROUNDINGS)} are, of %")
    try:
        low, high = (None if bound is None else int(bound) for bound in (start, stop))
    except ValueError:
        raise UsageError(f"split {expression!r}: {text!r} has a bound that is no number") from None
    if percent and any(bound is not None and abs(bound) > 100 for bound in (low, high)):
        raise UsageError(f"split {expression!r}: a percentage is between -100 and 100")
    return Part(name, low, high, percent, rounding or "")


def split_names(expression: str, known: Sequence[str]) -> tuple[str, ...]:
    """The splits an expression draws on, each once. `known` are those there are: what `all` means."""
    if expression == ALL:
        return tuple(known)
    return tuple(dict.fromkeys(part.split for part in parse_split(expression)))


def ranges(expression: str, rows: Mapping[str, int]) -> tuple[tuple[str, int, int], ...]:
    """(split, start, stop) of every term, for splits of so many rows. Raises UsageError for no rows at all."""
    if expression == ALL:
        return tuple((name, 0, count) for name, count in rows.items())
    parts = parse_split(expression)
    found = tuple((part.split, *part.bounds(rows[part.split])) for part in parts)
    if all(start == stop for _, start, stop in found) and any(part != Part(part.split) for part in parts):
        said = ", ".join(f"{name} has {rows[name]:,}" for name in dict.fromkeys(name for name, _, _ in found))
        raise UsageError(f"split {expression!r} has no rows ({said})")
    return found


def count(expression: str | None, rows: Mapping[str, int]) -> int:
    """Rows of an expression, None being every split."""
    return sum(max(0, stop - start) for _, start, stop in ranges(expression or ALL, rows))


def take(expression: str, manifests: Mapping[str, Manifest]) -> Manifest:
    """The rows an expression names, as one manifest: a whole split's own, else one made of the shards it touches.

    `manifests` are the config's by split; those that are not named are not looked at, but for `all`.
    """
    wanted = split_names(expression, tuple(manifests))
    chosen = {name: manifests[name] for name in wanted}
    bounds = ranges(expression, {name: manifest.rows for name, manifest in chosen.items()})
    name, start, stop = bounds[0]
    if len(bounds) == 1 and (start, stop) == (0, chosen[name].rows):
        return chosen[name]
    items: dict[tuple[str, int], WorkItem] = {}
    shards: list[ShardInfo] = []
    cuts: list[tuple[int, int]] = []
    for name, start, stop in bounds:
        manifest, base = chosen[name], 0
        for number, shard in enumerate(manifest.shards):
            first, last = max(start - base, 0), min(stop - base, shard.rows)
            base += shard.rows
            if first >= last:
                continue
            if manifest.items:
                made = replace(manifest.item_of(shard), index=len(items))
                item = items.setdefault((name, shard.item), made)
                shard = replace(shard, item=item.index)
            skipped, whole = manifest.cut(number) or (0, shard.rows)
            shards.append(replace(shard, rows=last - first))
            cuts.append((skipped + first, whole))
    schema, schemas, features = _schema([chosen[name] for name in wanted])
    return replace(
        chosen[wanted[0]],
        split=expression,
        features=features,
        schema=schema,
        schemas=schemas,
        items=tuple(items.values()),
        shards=tuple(shards),
        cuts=tuple(cuts),
    )


def _schema(manifests: list[Manifest]) -> tuple[str, tuple[tuple[str, str], ...], str | None]:
    """(schema, schemas, features) of rows of all of these. Raises SchemaConflict naming two splits and the column."""
    first = manifests[0]
    schemas = {digest: packed for manifest in manifests for digest, packed in manifest.schemas}
    if all((other.schema, other.features) == (first.schema, first.features) for other in manifests):
        return first.schema, tuple(sorted(schemas.items())), first.features
    from crucible.casts import unify
    from crucible.feature_types import dump_features, features_of

    unified = unify([(m.split, m.arrow_schema) for m in manifests if m.rows] or [(first.split, first.arrow_schema)])
    digest, packed = pack_schema(unified)
    schemas[digest] = packed
    found = features_of(unified)
    return digest, tuple(sorted(schemas.items())), dump_features(found) if found is not None else None


def split_texts(split: Any) -> tuple[str, ...]:
    """Every expression in what `load_dataset` was given: one, or a list, a tuple or a dict of them."""
    found: list[str] = []
    each_split(split, found.append)
    return tuple(found)


def each_split(split: Any, make: Callable[[str], Any]) -> Any:
    """`make` of each expression, in the shape of `split`. What is no text counts by its `str`: a `ReadInstruction`."""
    if isinstance(split, Mapping):
        return {name: each_split(one, make) for name, one in split.items()}
    if isinstance(split, (list, tuple)):
        return type(split)(each_split(one, make) for one in split)
    if split is None:
        raise UsageError("a list of splits has None in it; leave split out to get all splits")
    return make(str(split).strip())


def request_of(expressions: Iterable[str]) -> str | None:
    """What has to be fetched for all of these: the names of their splits as a sum, or None for all splits."""
    names: dict[str, None] = {}
    for expression in expressions:
        if expression == ALL:
            return None
        names.update(dict.fromkeys(part.split for part in parse_split(expression)))
    return "+".join(names)
