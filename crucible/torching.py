"""What torch's DataLoader wants of a dataset, without importing torch for it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_classes: dict[tuple[type, type], type] = {}


def worker() -> tuple[int, int]:
    """(worker, workers) of the DataLoader worker this process is, else (0, 1)."""
    info = _worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def torch_class(ours: type) -> type:
    """`ours` as `isinstance` should see it: once torch is loaded, also a torch IterableDataset.

    DataLoader chooses how to read by `isinstance`. A base class would mean importing torch; `datasets` changes
    `__bases__` when a dataset is made, which misses one that was made before torch was imported.
    """
    torch_data = sys.modules.get("torch.utils.data")
    if torch_data is None:
        return ours
    key = (ours, torch_data.IterableDataset)
    if key not in _classes:
        _classes[key] = type(ours.__name__, key, {"__module__": ours.__module__})
    return _classes[key]


# --- what the copies in live workers are told ---


class Word(NamedTuple):
    """What a copy in a worker has not heard yet."""

    state: dict[str, Any]
    resumes: bool
    """Whether the position of `state` was loaded; else its epoch is iterated from the start."""


class Line:
    """From a dataset to its copies in DataLoader workers that live on when its epoch is set, or a state is loaded.

    Workers that persist keep the copy they were started with. So where torch is loaded, a dataset has a page of memory
    in common with the copies that are forked, or spawned, from it. A copy looks at it when it begins an
    iteration, but not its first: what it was started with is then the truth, and the page may be ahead of it.

    A loaded position is for one iteration. Where each epoch has new workers, the dataset they are copies of does not
    see that they took it, so the first workers leave the mark of their team on the page.

    Concurrency: one thread of the process that has the dataset, and the workers of one iterator at a time.
    """

    def __init__(self, told: int = 0, loaded: int = 0, board: Board | None = None) -> None:
        self.told = told
        """How often epoch or position were set, as far as this copy knows."""
        self.loaded = loaded
        """At which of these the position was loaded that is to be taken; 0 if only this copy knows of it, or none."""
        self.board = board
        """Where this process tells; in a worker, where the process tells that started it."""
        self._begun_in = 0

    def open(self) -> None:
        """Have a page, if this process may start workers: torch is loaded, and no worker itself, which are daemons.

        A process that was forked with the dataset gets a page of its own: it is told things by itself, and so are its
        siblings. So this is called whenever torch looks at the dataset, as it does before it starts workers.
        """
        if "torch.utils.data" not in sys.modules or (self.board is not None and self.board.pid == os.getpid()):
            return
        if not sys.modules["multiprocessing.process"].current_process().daemon:
            self.board = Board()

    def tell(self, now: Callable[[], tuple[Mapping[str, Any], bool]], *, loads: bool) -> None:
        """Epoch or position were set; if anybody can hear it, `now` says to which, as a Word does.

        `loads` says that the position is a new one.
        """
        if _worker_info() is not None:  # only this copy was told; what the dataset is told later still counts
            self.loaded = 0 if loads else self.loaded
            return
        self.open()
        self.told += 1
        self.loaded = self.told if loads else self.loaded
        if self.board is not None and self.board.pid == os.getpid():
            state, resumes = now()
            self.board.write([self.told, self.loaded if resumes else 0, dict(state)])
            if loads:
                self.board.team = 0

    def hear(self) -> Word | None:
        """What was told since. Asked when an iteration begins."""
        first, self._begun_in = self._begun_in != os.getpid(), os.getpid()
        if first or self.board is None or _worker_info() is None:
            return None
        told, loaded, state = self.board.read() or (self.told, 0, {})
        if told == self.told:
            return None
        resumes = loaded > self.told
        self.told, self.loaded = told, loaded if resumes else self.loaded
        return Word(state, resumes)

    def take(self) -> bool:
        """Whether the loaded position is still to be taken: by this process, or by the workers that it is one of."""
        info, board = _worker_info(), self.board
        if not self.loaded or board is None or (info is None and board.pid != os.getpid()):
            return True
        # What the workers of one iterator have in common, and no others: the seed that torch drew for them.
        team = -1 if info is None else max(1, info.seed - info.id)
        if not board.team:
            board.team = team
            return True
        return info is not None and board.team == team

    def __reduce__(self) -> tuple[Any, ...]:
        # Such memory goes to a process that is being started, and nowhere else.
        context = sys.modules.get("multiprocessing.context")
        starting = context is not None and context.get_spawning_popen() is not None
        return Line, (self.told, self.loaded, self.board if starting else None)


class Board:
    """A page that processes have in common. It has no name in /dev/shm, and is gone with the last of them."""

    BYTES = 4096

    def __init__(self) -> None:
        from multiprocessing import RawArray, RawValue

        self.pid = os.getpid()
        """Who writes."""
        self._text: Any = RawArray("c", self.BYTES)
        self._team: Any = RawValue("q", 0)

    @property
    def team(self) -> int:
        """Which workers took the loaded position; 0 while nobody did, -1 for the process that has the dataset."""
        return int(self._team.value)

    @team.setter
    def team(self, value: int) -> None:
        self._team.value = value

    def write(self, told: list[Any]) -> None:
        """Instead of what was there. Nobody reads meanwhile: workers look while the loader waits for them."""
        self._text.value = json.dumps(told).encode()

    def read(self) -> list[Any] | None:
        """The last that was written; None if nothing was."""
        text = self._text.value
        return json.loads(text) if text else None


def _worker_info() -> Any:
    torch_data = sys.modules.get("torch.utils.data")
    return None if torch_data is None else torch_data.get_worker_info()
