"""A stream from what it told: the way back from `Stream.told()`, for those who check an order and were not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from crucible.errors import CrucibleError, UsageError
from crucible.mix import MixSpec
from crucible.order import Int64s, OrderSpec
from crucible.streams import Mixed, Repeated, Shuffled, Slice, Source, Stream, Sum


def sources_of(stream: Stream) -> dict[str, Int64s]:
    """Name to the rows of each shard, for every split that the stream is made of, in the order of their row ids."""
    if isinstance(stream, Source):
        return {stream.name: stream.shard_rows}
    inner = stream.parts if isinstance(stream, (Sum, Mixed)) else (stream.of,)  # type: ignore[attr-defined]
    return {name: rows for part in inner for name, rows in sources_of(part).items()}


def retold(told: Sequence[Any], shard_rows: Callable[[str], Int64s]) -> Stream:
    """The stream that told this. `shard_rows` gives the rows of each shard of a manifest by its name.

    Raises UsageError if it is not what a stream tells, and what `shard_rows` raises.
    """
    try:
        return _retold(told, shard_rows)
    except CrucibleError:
        raise
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise UsageError(f"not the order of a dataset ({error!r})") from error


def _retold(told: Sequence[Any], shard_rows: Callable[[str], Int64s]) -> Stream:
    what, *rest = told
    if what == "split":
        name, first = rest
        return Source(str(name), shard_rows(str(name)), int(first))
    if what == "shuffle":
        mode, seed, lanes, window, reshuffle, of = rest
        return Shuffled(_retold(of, shard_rows), OrderSpec(mode, seed, 0, lanes, window, reshuffle))
    if what == "slice":
        start, stop, of = rest
        return Slice(_retold(of, shard_rows), int(start), int(stop))
    if what == "sum":
        return Sum(tuple(_retold(part, shard_rows) for part in rest))
    if what == "repeat":
        times, of = rest
        return Repeated(_retold(of, shard_rows), int(times))
    if what == "mix":
        weights, seed, stop, lanes, *parts = rest
        streams = tuple(_retold(part, shard_rows) for part in parts)
        spec = MixSpec(
            tuple(part.total for part in streams),
            None if weights is None else tuple(float.fromhex(weight) for weight in weights),
            seed,
            stop,
            None if lanes is None else tuple(lanes),
        )
        return Mixed(streams, spec)
    raise ValueError(what)
