"""What one seed of the chaos suite does: data, ranks, and the faults with the moment and the place of each. Pure.

The moment of a strike is a share of the work of its phase (bytes that the Hub sent, batches that ranks received), not a
time: a seed that failed on a slow machine means the same on a fast one. What the operating system then interleaves no
seed decides, so a failing seed is worth running more than once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

from crucible.failpoints import POINTS

SLOTS = 3
"""Nodes of the suite's cluster. Node 0 has the head and the driver: it loses processes, never all at once."""

Kind = Literal[
    "kill-worker", "kill-agent", "kill-coordinator", "kill-governor", "kill-node", "kill-rank",
    "stop-worker", "stop-agent", "stop-coordinator", "stop-rank",
    "hub", "disk-full", "read-only", "clock-jump", "flip-shard", "failpoint", "drain",
]  # fmt: skip
"""`kill-` is SIGKILL (of a node: the raylet, all its workers and its ranks), `stop-` SIGSTOP and later SIGCONT."""

HUB_FAULTS = (
    "429",
    "503",
    "500",
    "cut",
    "flip",
    "reset",
    "stall",
    "drip",
    "expired",
    "wrong-length",
    "ignore-range",
    "down",
)
FAILPOINTS = tuple(sorted(POINTS))
"""Of the product: a point more there means other stories for the same seeds here."""
FORMS = ("parquet", "jsonl", "jsonl.gz", "csv")


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault: when `at` of its phase's work is done (0 to 1), `kind` happens at `node` or `rank`."""

    at: float
    kind: Kind
    node: int = 0
    rank: int = 0
    what: str = ""
    """Which of HUB_FAULTS, or of the product's failpoints; for a node whether its disk is `kept` or `lost`."""
    times: int = 1
    """Replies that a Hub fault spoils; at which passing of a failpoint somebody dies."""
    seconds: float = 1.0
    """How long a process is stopped, a disk is full, a node is away, the Hub is quiet."""

    def __str__(self) -> str:
        place = {
            "kill-rank": f"rank {self.rank}", "stop-rank": f"rank {self.rank}",
            "hub": f"{self.what} x{self.times}", "failpoint": f"{self.what}, time {self.times}",
        }  # fmt: skip
        where = place.get(self.kind, f"node {self.node}" + (f", disk {self.what}" if self.what else ""))
        return f"at {self.at:4.0%} {self.kind} ({where}) for {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class Story:
    """All that happens for one seed."""

    seed: int
    files: int
    rows: int
    """Rows of one file."""
    form: str
    replicas: int
    worlds: tuple[int, ...]
    """How many ranks there are at the first start of the training, at the second, ...; the last one repeats."""
    batch: int
    save_every: int
    """Batches of a rank between two saved states."""
    epochs: int
    early: bool
    """The ranks begin while the prefetch runs."""
    coordinator: int
    """The node on which the coordinator begins."""
    prefetch: tuple[Strike, ...]
    training: tuple[Strike, ...]

    @property
    def total(self) -> int:
        return self.files * self.rows

    def calm(self) -> Story:
        """The same without a single fault."""
        return replace(self, prefetch=(), training=(), coordinator=0)

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}: {self.files} {self.form} files of {self.rows} rows, {self.replicas} replicas, "
            f"coordinator on node {self.coordinator}",
            f"  ranks {self.worlds} with batches of {self.batch}, a state every {self.save_every}, {self.epochs} epochs"
            + (", reading while the prefetch runs" if self.early else ""),
            *(f"  prefetch {strike}" for strike in self.prefetch),
            *(f"  training {strike}" for strike in self.training),
        ]
        return "\n".join(lines)


HARD = 10_000
"""From this seed on a story has up to nine faults in each phase, and not up to four."""
DURING_PREFETCH: tuple[tuple[Kind, int], ...] = (
    ("kill-worker", 4), ("kill-agent", 2), ("kill-coordinator", 3), ("kill-governor", 1), ("kill-node", 3),
    ("stop-worker", 1), ("stop-agent", 1), ("stop-coordinator", 1),
    ("failpoint", 6), ("hub", 6), ("disk-full", 2), ("read-only", 1), ("clock-jump", 1), ("drain", 1),
)  # fmt: skip
DURING_TRAINING: tuple[tuple[Kind, int], ...] = (
    ("kill-rank", 5), ("kill-agent", 2), ("kill-coordinator", 1), ("kill-node", 3),
    ("stop-agent", 2), ("stop-rank", 1),
    ("hub", 2), ("disk-full", 1), ("read-only", 1), ("clock-jump", 1), ("flip-shard", 2), ("drain", 2),
)  # fmt: skip
AT_THE_START: tuple[Kind, ...] = ("failpoint", "flip-shard")
"""A failpoint is armed before the job begins. A byte on a disk changes before ranks start: what a process has mapped
and checked, nobody can keep from changing under it."""
NOT_ON_THE_HEAD: tuple[Kind, ...] = ("kill-node", "disk-full", "read-only")


def story_of(seed: int) -> Story:
    """The story of a seed: a pure function of it."""
    dice = random.Random(f"chaos {seed}")
    least, most = (1, 4) if seed < HARD else (3, 9)
    prefetch = _strikes(dice, DURING_PREFETCH, dice.randint(least, most))
    training = _strikes(dice, DURING_TRAINING, dice.randint(least, most))
    return Story(
        seed=seed,
        files=dice.randint(5, 9),
        rows=dice.choice((400, 600, 700)),
        form=dice.choice(FORMS),
        replicas=dice.choice((1, 1, 2)),
        worlds=tuple(dice.randint(1, 3) for _ in range(3)),
        batch=dice.choice((8, 16, 25)),
        save_every=dice.choice((3, 5, 10)),
        epochs=2,
        early=dice.random() < 0.35,
        coordinator=dice.choice((0, 0, 1, 2)),
        prefetch=prefetch,
        training=training,
    )


def _strikes(dice: random.Random, weighted: tuple[tuple[Kind, int], ...], count: int) -> tuple[Strike, ...]:
    kinds, weights = zip(*weighted)
    found: list[Strike] = []
    for kind in dice.choices(kinds, weights, k=count):
        if kind == "kill-node" and any(strike.kind == "kill-node" for strike in found):
            kind = "kill-agent"
        what = ""
        if kind == "hub":
            what = dice.choice(HUB_FAULTS)
            if what == "flip" and any(strike.what == "flip" for strike in found):
                what = "cut"  # a Hub that gives wrong bytes for one file twice is believed to have no others
        elif kind == "failpoint":
            what = dice.choice(FAILPOINTS)
        elif kind == "kill-node":
            what = dice.choice(("kept", "lost"))
        found.append(
            Strike(
                at=0.0 if kind in AT_THE_START else round(dice.uniform(0.02, 0.9), 2),
                kind=kind,
                node=dice.randint(1, SLOTS - 1) if kind in NOT_ON_THE_HEAD else dice.randrange(SLOTS),
                rank=dice.randrange(3),
                what=what,
                times=dice.randint(1, 3),
                seconds=round(dice.uniform(0.3, 3.0), 1),
            )
        )
    return tuple(sorted(found, key=lambda strike: strike.at))
