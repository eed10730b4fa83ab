"""The launcher of a training, as torchrun is one: starts the ranks; when one dies it ends the others and starts again.

They go on from the newest state that every rank of the last start has saved, with another number of ranks and on other
nodes than before.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.chaos.rank import FAST
from tests.chaos.schedule import Story

MOST_STARTS = 12
PACE_S = 0.012


@dataclass(frozen=True, slots=True)
class Received:
    """One batch that a rank's loop had: what it holds, and which positions of the epoch that has to be."""

    run: int
    rank: int
    world: int
    epoch: int
    start: int
    unit: int
    ids: tuple[int, ...]
    digest: str

    def positions(self, batch: int, total: int) -> list[int]:
        """As docs/order.md deals them: rank r of R reads those that are r modulo R, from where its run began."""
        first = self.start + (self.rank - self.start) % self.world + self.world * self.unit * batch
        return [at for at in range(first, first + self.world * batch, self.world) if at < total]


@dataclass(frozen=True, slots=True)
class Run:
    """One start of the training."""

    number: int
    world: int
    epoch: int
    position: int
    """Where it went on."""


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    slot: int
    errors: IO[bytes]


@dataclass
class Training:
    """Drive it with `tick` until `done`. Used by one thread."""

    story: Story
    repo: str
    folder: Path
    homes: list[Path]
    environment: Mapping[str, str]
    runs: list[Run] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """What ranks said that ended by themselves with an error."""
    done: bool = False
    before_start: Callable[[], None] = lambda: None
    """Called while no rank runs, each time before some are started."""
    _ranks: list[_Rank] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)

    def start(self, slots: list[int]) -> None:
        """One start more, on the nodes that there are."""
        self.before_start()
        number = len(self.runs)
        world = self.story.worlds[min(number, len(self.story.worlds) - 1)]
        state = self._common_state()
        epoch, position = (0, 0) if state is None else _place(state)
        self.runs.append(Run(number, world, epoch, position))
        for rank in range(world):
            slot = slots[(rank + number) % len(slots)]
            asked = {
                "repo": self.repo, "folder": str(self.folder), "rank": rank, "world": world, "run": number,
                "batch": self.story.batch, "save_every": self.story.save_every, "epochs": self.story.epochs,
                "pace": PACE_S, "state": None if state is None else str(state),
            }  # fmt: skip
            own = {**os.environ, **self.environment, "CRUCIBLE_HOME": str(self.homes[slot])}
            errors = (self.folder / f"errors-{number:02d}-{rank}.txt").open("wb")
            command = [sys.executable, "-m", "tests.chaos.rank", json.dumps(asked)]
            process = subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL, stderr=errors)
            self._ranks.append(_Rank(process, slot, errors))

    def tick(self, slots: list[int]) -> None:
        """Look after the ranks."""
        codes = [rank.process.poll() for rank in self._ranks]
        if all(code == 0 for code in codes):
            self._end()
            self.done = True
        elif any(code not in (None, 0) for code in codes):
            self._fail(codes)
            self.end()
            if len(self.runs) < MOST_STARTS:
                self.start(slots)
            else:
                self.failures.append(f"the training was started {MOST_STARTS} times and did not end")
                self.done = True

    def kill(self, rank: int) -> bool:
        """SIGKILL a rank that runs; False if there is none to be killed."""
        return self._signal(rank, signal.SIGKILL)

    def process(self, rank: int) -> subprocess.Popen[bytes] | None:
        """A rank that runs, counted round."""
        found = self._ranks[rank % len(self._ranks)].process if self._ranks else None
        return found if found is not None and found.poll() is None else None

    def kill_on(self, slot: int) -> None:
        """The node has lost its power."""
        for one in self._ranks:
            if one.slot == slot and one.process.poll() is None:
                one.process.kill()

    def tell_stacks(self) -> str:
        """Where each rank is, for a report about one that hangs."""
        for one in self._ranks:
            if one.process.poll() is None:
                one.process.send_signal(signal.SIGUSR1)
        try:
            for one in self._ranks:
                one.process.wait(1)
        except subprocess.TimeoutExpired:
            pass
        return "\n".join(path.read_text()[-6000:] for path in sorted(self.folder.glob("errors-*.txt")))

    def hurry(self) -> None:
        """There is nothing to strike at any more."""
        (self.folder / FAST).touch()

    def end(self) -> None:
        """Kill what runs."""
        for one in self._ranks:
            one.process.kill()
        self._end()

    def progress(self) -> float:
        """Batches received, those that were rolled back too, over those of the whole training."""
        if not self.runs:
            return 0.0
        lines = sum(path.read_bytes().count(b"\n") for path in self.folder.glob("rows-*.jsonl"))
        return lines / max(1, self.story.epochs * self.story.total // self.story.batch)

    def received(self) -> list[Received]:
        """All batches of all ranks of all starts, each rank's in its order."""
        found = []
        for path in sorted(self.folder.glob("rows-*.jsonl")):
            run, rank = map(int, path.stem.split("-")[1:])
            for line in path.read_bytes().splitlines():
                told = json.loads(line)
                found.append(
                    Received(
                        run, rank, self.runs[run].world, told["epoch"], told["start"], told["unit"],
                        tuple(told["ids"]), told["digest"],
                    )
                )  # fmt: skip
        return found

    # --- inside

    def _signal(self, rank: int, number: int) -> bool:
        process = self.process(rank)
        if process is not None:
            process.send_signal(number)
        return process is not None

    def _end(self) -> None:
        for one in self._ranks:
            one.process.wait(20)
            one.errors.close()
        self._ranks = []

    def _fail(self, codes: list[int | None]) -> None:
        number = len(self.runs) - 1
        for rank, code in enumerate(codes):
            if code is not None and code > 0:
                said = (self.folder / f"errors-{number:02d}-{rank}.txt").read_text().strip()
                self.failures.append(f"rank {rank} of start {number} ended with {code}: {said[-3000:]}")

    def _common_state(self) -> Path | None:
        """The newest state that all ranks of one start have saved; of the last start that has one."""
        for run in reversed(self.runs):
            saved = []
            for rank in range(run.world):
                paths = self.folder.glob(f"state-{run.number:02d}-{rank}-*.json")
                saved.append({_place(path): path for path in paths})
            common = set.intersection(*(set(places) for places in saved))
            if common:
                return saved[0][max(common)]
        return None


def _place(state: Path) -> tuple[int, int]:
    """(epoch, position), which is the end of a state's name."""
    epoch, position = state.stem.split("-")[-2:]
    return int(epoch), int(position)
