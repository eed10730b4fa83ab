"""Where a reader is, as JSON: the state that `state_dict` gives and `load_state_dict` takes. Pure.

A state is a few hundred bytes whatever it is of. It says which data (the order id of the manifest, or the digest of the
stream that was made of several), which order, which epoch, and the global position from which all ranks go on.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from crucible.errors import StateMismatch, UsageError
from crucible.order import OrderSpec
from crucible.streams import Shuffled, Source, Stream, digest

STATE_FORMAT = 1
"""Version of a state dict and of the order's arithmetic. A state of another version is refused."""

_SPEC = ("mode", "seed", "epoch", "lanes", "window", "reshuffle")
_NAME_MOST = 160
"""Letters of a dataset's name in a state, which has to stay small however many datasets are mixed."""


class Place(NamedTuple):
    """What a state says to a dataset that takes it: its stream, with the state's lanes, and where to go on."""

    stream: Stream
    epoch: int
    position: int


def state_of(stream: Stream, epoch: int, position: int, *, name: str) -> dict[str, Any]:
    """The state of a reader of `stream`, which people know by `name`."""
    told: dict[str, Any] = {"format": STATE_FORMAT, "manifest": _identity(stream), "dataset": name[:_NAME_MOST]}
    spec = _spec(stream)
    if spec is None:
        told |= {"mode": "composed", "epoch": epoch}
    else:
        told |= {field: getattr(spec, field) for field in _SPEC} | {"epoch": epoch}
    return told | {"position": position}


def place_of(state: Mapping[str, Any], stream: Stream, *, name: str) -> Place:
    """Raises StateMismatch if the state is of other data, of another order or seed, or is none."""
    told = state.get("format")
    if told != STATE_FORMAT:
        raise StateMismatch("format", str(STATE_FORMAT), str(told))
    mine, theirs = _identity(stream), state.get("manifest")
    if mine != theirs:
        of = state.get("dataset")
        raise StateMismatch("manifest", f"{mine} ({name})", f"{theirs} ({of})" if of else str(theirs))
    spec = _spec(stream)
    if (spec is None) != (state.get("mode") == "composed"):
        raise StateMismatch("order", "one of several datasets" if spec is None else "of one dataset", "the other")
    try:
        epoch, position = operator.index(state["epoch"]), operator.index(state["position"])
        if spec is not None:
            stream = _taken(state, stream, spec)
        if epoch < 0:
            raise UsageError(f"epoch {epoch}")
    except (KeyError, TypeError, UsageError) as error:
        raise StateMismatch("fields", "a complete state", f"none ({error})") from error
    if not 0 <= position <= stream.total:
        raise StateMismatch("position", f"{stream.total:,} rows", f"{position:,}")
    return Place(stream, epoch, position)


def worker_start(state: Mapping[str, Any], worker: int, workers: int, step: int) -> int | None:
    """Where `worker` of `workers` goes on from its own state, maybe past the end; None if the state is for all.

    `step` is how far a turn of all ranks reaches. Raises StateMismatch if the state is that of one DataLoader worker of
    several, and this process is another one or takes other turns.
    """
    turn = state.get("worker")
    if turn is None:
        return None
    if [turn[0], turn[1], turn[3]] != [worker, workers, step]:
        mine = f"{worker} of {workers} with turns of {step} rows"
        theirs = f"{turn[0]} of {turn[1]} with turns of {turn[3]} (crucible.state_of_loader makes one for all of them)"
        raise StateMismatch("DataLoader worker", mine, theirs)
    return int(turn[2]) - step * worker


def _taken(state: Mapping[str, Any], stream: Stream, spec: OrderSpec) -> Stream:
    """`stream` with the lanes of the state, so that a new default does not disturb an old run."""
    shuffled, was_shuffled = spec.mode != "source", state["mode"] != "source"
    if shuffled != was_shuffled:
        raise StateMismatch("order", *("shuffled" if one else "source order" for one in (shuffled, was_shuffled)))
    if state["seed"] != spec.seed:
        raise StateMismatch("seed", str(spec.seed), str(state["seed"]))
    told = OrderSpec(**{field: state[field] for field in _SPEC})
    return replace(stream, spec=replace(told, epoch=0)) if isinstance(stream, Shuffled) else stream


def _spec(stream: Stream) -> OrderSpec | None:
    """The order of one split, shuffled or not; None when the stream is made of more."""
    if isinstance(stream, Source):
        return OrderSpec()
    return stream.spec if isinstance(stream, Shuffled) and isinstance(stream.of, Source) else None


def _identity(stream: Stream) -> str:
    """The name of the manifest where there is one, else of the whole stream."""
    base = stream.of if isinstance(stream, Shuffled) else stream
    return base.name if isinstance(base, Source) else digest(stream)
