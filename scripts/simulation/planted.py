"""Minds that are broken on purpose: a simulation that does not catch them proves nothing. Nothing else uses these.

Each replaces a function of the product for the time of a `with`, in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from crucible.cluster import track
from crucible.cluster.copying import Copying
from crucible.cluster.results import Results
from crucible.cluster.track import Command, CopyFailed, Event, ItemFailed, JobState, NodesChanged, RunItem, Together


def _forgets(*_: Any) -> tuple[list[int], list[int]]:
    """A node that dies takes its shards with it, and nobody makes them again."""
    return [], []


_apply = track.apply


def _doubles(state: JobState, event: Event) -> tuple[JobState, list[Command]]:
    """An item whose node is said to be gone is started on its spare while the first try may still run."""
    early: Sequence[RunItem] = ()
    for one in event.events if isinstance(event, Together) else (event,):
        if isinstance(one, NodesChanged):
            gone = state.nodes.keys() - one.nodes.keys()
            early = [
                RunItem(state.items[index], spare)
                for index, spare in state.spares.items()
                if state.running[index] in gone and spare in one.nodes
            ]
    state, commands = _apply(state, event)
    return state, [*early, *commands]


def _leaks(state: JobState, event: Event) -> tuple[JobState, list[Command]]:
    """What fails stays in the account of bytes in flight."""
    before = state.inflight
    state, commands = _apply(state, event)
    if isinstance(event, (ItemFailed, CopyFailed)) and state.inflight < before:
        state.inflight = before
    return state, commands


def _neglects(*_: Any) -> None:
    """A replica that is lost while others are made is not made again."""


PLANTED: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "forgets": (Results, "lose", _forgets),
    "doubles": (track, "apply", _doubles),
    "leaks": (track, "apply", _leaks),
    "neglects": (Copying, "look_at", _neglects),
}


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Run with one of the broken minds; None with the product's own."""
    if name is None:
        yield
        return
    where, attribute, broken = PLANTED[name]
    with patch.object(where, attribute, broken):
        yield
