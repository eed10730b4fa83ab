"""States that loaders of other libraries keep for us, and loaders that would split what is split already."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

from crucible.errors import UsageError
from crucible.launch import rank_here
from crucible.torching import worker

_log = logging.getLogger("crucible.loaders")
_STEP = "save it with snapshot_every_n_steps=1, which is the default"
_BATCHED = "use batch(n) on the dataset and batch_size=None on the loader"


def state_of_loader(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the dataset in that of a torchdata StatefulDataLoader, for any number of workers and ranks.

    The loader itself goes on with as many workers as it had, and no others. `IterableDataset.load_state_dict` takes
    what this returns, and a new loader with no state then goes on from there.

    Raises UsageError where no one position says what was delivered: when workers did not deliver in turn, because the
    loader makes batches of rows itself, or a filter left whole batches out.
    """
    if "_snapshot" not in state:
        return _checked(state.get("dataset_state"))
    if state.get("_steps_since_snapshot"):
        raise UsageError(f"the state of the loader is older than the loader: {_STEP}")
    workers = state["_snapshot"]["_worker_snapshots"]
    states = [_checked(worker["dataset_state"]) for worker in workers.values()]
    return {name: value for name, value in states[0].items() if name != "worker"} | {"position": _position(states)}


def _checked(state: Any) -> dict[str, Any]:
    if not isinstance(state, Mapping) or not {"format", "manifest", "position"} <= set(state):
        raise UsageError("no state of a crucible dataset in it: is the loader a StatefulDataLoader of one?")
    return dict(state)


def _position(states: list[dict[str, Any]]) -> int:
    """Up to where the workers have delivered everything, and nothing after it."""
    positions = [int(state["position"]) for state in states]
    if len(set(positions)) == 1:  # as many turns each, or all at the end
        return positions[0]
    turns = sorted(state["worker"][2] for state in states)
    step = states[0]["worker"][3]
    if turns != [turns[0] + step * number for number in range(len(turns))]:
        raise UsageError(
            f"the workers of the loader have not delivered in turn, so it goes on with {len(states)} workers or not at "
            f"all; {_BATCHED}, and no filter that leaves nothing of a batch (end='mask' delivers those too)"
        )
    return min(int(turns[0]), max(positions))


def check_split(rank: int, world_size: int, *, dealt: bool) -> None:
    """Raises UsageError if what is split already is split again; warns where every rank is about to read all rows.

    accelerate wraps what `Accelerator.prepare` is given: each process then uses its part of what it reads, or the first
    one reads for all. Of a rank's share rows would be lost, and nothing would say so. Who reads is the only sign of it.

    `dealt` says that `shard` was said, be it `shard(0, 1)`.
    """
    splitter = _splitter()
    if splitter is not None and world_size > 1:
        raise UsageError(
            f"rank {rank} of {world_size} has its rows from shard(), and accelerate's {splitter} would split these "
            "once more: leave this DataLoader out of Accelerator.prepare, or leave out shard()"
        )
    if dealt or splitter is not None or worker()[0] > 0:
        return
    with suppress(UsageError):
        place = rank_here(os.environ)
        if place is not None and place[1] > 1 and place[0] == 0:
            _log.warning(
                "each of %d processes reads all rows: say shard() for a share each, or shard(0, 1) if it is meant",
                place[1],
            )


def _splitter() -> str | None:
    """Which class of accelerate is asking for rows in order to split them, if one is."""
    if "accelerate.data_loader" not in sys.modules:
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "accelerate.data_loader" and frame.f_code.co_name == "__iter__":
            reader = type(frame.f_locals.get("self")).__name__
            if reader in ("IterableDatasetShard", "DataLoaderDispatcher"):
                return reader
        frame = frame.f_back
    return None
