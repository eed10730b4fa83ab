"""Where a dataset is: which epoch it is in, how far, and where its next iteration starts.

The part of `IterableDataset` that changes in place. States are JSON, and those of `crucible.state`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from crucible.errors import UsageError
from crucible.progress import Progress
from crucible.share import Share, whole_number
from crucible.state import place_of, state_of, worker_start
from crucible.streams import Stream
from crucible.torching import Line

if TYPE_CHECKING:
    from crucible.proof import Proof


class Placed:
    """The epoch and the position of a dataset, and what its copies in DataLoader workers are told of them."""

    _stream: Stream

    @property
    def _name(self) -> str:
        raise NotImplementedError

    def _placed(
        self, epoch: int = 0, resume_at: int | None = None, position: int = 0, line: Line | None = None
    ) -> None:
        """In `epoch`; the next iteration starts at `resume_at`, a loaded position, if there is one."""
        self._epoch = epoch
        self._resume_at = resume_at
        self._progress = Progress.at(position if resume_at is None else resume_at)
        self._line = line or (Line() if resume_at is None else Line(told=1, loaded=1))
        if line is None:
            self._line.open()  # already now, as torch does not look at a dataset that is inside another
        self._proof: Proof | None = None

    def _worker(self) -> tuple[int, int]:
        raise NotImplementedError

    def _share(self, start: int, of: tuple[int, int]) -> Share:
        raise NotImplementedError

    @property
    def epoch(self) -> int:
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Iterate `epoch` from its start. Setting the epoch it is in already keeps the position of a loaded state.

        Copies in DataLoader workers hear of it when they begin an iteration, those of persistent workers too.
        """
        epoch = whole_number(epoch, "epoch")
        if epoch != self._epoch:
            self._epoch = epoch
            self._resume_at, self._progress = None, Progress.at(0)
        self._line.tell(self._told, loads=False)

    def state_dict(self) -> dict[str, Any]:
        """Where this rank is, in a few hundred bytes of JSON. Any rank's state restores all ranks, at any world size.

        It counts rows as delivered when the loop has received them. In a DataLoader with workers the copies in the
        workers move, not this object: use a StatefulDataLoader there, or `state_after(batches)`.
        """
        if self._proof is not None:
            self._proof.settle(self._progress.units)  # so that what the state counts as delivered is on record
        state = state_of(self._stream, self._epoch, self._progress.position, name=self._name)
        turn = self._progress.turn
        return state if turn is None else state | {"worker": turn}

    def state_after(self, count: int, since: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The state in which every rank has delivered `count` batches (rows without `batch`) of this epoch.

        With `since`, a state that was loaded, the batches are those after it.
        """
        stream, epoch, start = self._stream, self._epoch, 0
        if since is not None:
            stream, epoch, start = place_of(since, stream, name=self._name)
        position = self._share(start, (0, 1)).position_after(stream.total, count)
        return state_of(stream, epoch, position, name=self._name)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on from `state`, at its epoch and with its lanes.

        Raises StateMismatch if it is of another dataset, or of another order or seed.
        """
        if not isinstance(state, Mapping):
            raise UsageError(f"a state is what state_dict() gave, a dict; got {type(state).__name__}")
        one = self._share(0, (0, 1))
        start = worker_start(state, *self._worker(), one.unit * one.world_size)
        self._go_to(state, resumes=True)
        if start is not None:
            self._resume_at, self._progress = start, Progress.at(start)
        self._line.tell(self._told, loads=True)

    def _next_start(self) -> int:
        """Where the iteration that begins now starts; the one after it starts the epoch again."""
        word = self._line.hear()
        if word is not None:
            self._go_to(word.state, resumes=word.resumes)
        start = self._resume_at if self._resume_at is not None and self._line.take() else 0
        self._resume_at = None
        return start

    def _go_to(self, state: Mapping[str, Any], *, resumes: bool) -> None:
        self._stream, self._epoch, position = place_of(state, self._stream, name=self._name)
        self._resume_at = position if resumes else None
        self._progress = Progress.at(self._resume_at or 0)

    def _told(self) -> tuple[dict[str, Any], bool]:
        """What copies are told: the state of this dataset, and whether its position counts."""
        at = self._resume_at
        return state_of(self._stream, self._epoch, at or 0, name=""), at is not None
