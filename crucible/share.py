"""Which positions of an epoch one process reads, and how the epoch ends. Pure.

Rank r of R reads the positions p = r (mod R) (`order.deal`). A rank's stream is cut into units, a batch or a row each,
and its DataLoader workers take units in turn. How the last of them come out is the end of the epoch:

exact   every row once and nothing else: a rank's last batch may be short, and some ranks may have one batch less
drop    only global batches that are full on every rank: the rows of the last one that is not are left out
pad     every batch full on every rank: the last one goes on with the rows that the epoch began with
mask    as pad, and a column `valid` says of each row whether it is not such a repetition
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from crucible.errors import UsageError
from crucible.order import Int64s, check_rank, deal

End = Literal["exact", "drop", "pad", "mask"]

VALID = "valid"
"""The column that `mask` adds."""


def check_end(end: str) -> End:
    if end not in get_args(End):
        raise UsageError(f"an epoch ends in one of {', '.join(get_args(End))}, not in {end!r}")
    return end  # type: ignore[return-value]


def whole_number(value: object, name: str, least: int = 0) -> int:
    """`value` as an int, such as numpy's are too. Raises UsageError if it is none, or less than `least`."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise UsageError(f"{name} is a whole number from {least} on, not {value!r}") from None
    if number < least:
        raise UsageError(f"{name} must be {least} or more, got {number}")
    return number


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of an epoch one process reads, and how many rows it delivers at a time."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    """DataLoader worker within the rank: takes units `worker`, `worker + workers`, ... of the rank's stream."""
    workers: int = 1
    unit: int = 1
    """Rows delivered together: the batch size, or 1."""
    start: int = 0
    """Global position at which all ranks start."""
    end: End = "exact"

    def __post_init__(self) -> None:
        check_rank(self.rank, self.world_size)
        if not 0 <= self.worker < self.workers or self.unit < 1 or self.start < 0:
            raise UsageError(
                f"no such share: worker {self.worker} of {self.workers}, {self.unit} rows from {self.start}"
            )

    @property
    def padded(self) -> bool:
        return self.end in ("pad", "mask")

    def units_of_rank(self, total: int) -> int:
        """Units of this rank from `start` on; equal on all ranks but for `exact`, where they differ by one at most."""
        left, step = max(0, total - self.start), self.unit * self.world_size
        if self.end == "exact":
            return -(-deal(total, self.rank, self.world_size, start=self.start).rows // self.unit)
        return left // step if self.end == "drop" else -(-left // step)

    def units(self, total: int) -> int:
        """How many of them this worker delivers."""
        return max(0, -((self.worker - self.units_of_rank(total)) // self.workers))

    def positions(self, total: int, first: int, stop: int, every: int = 1) -> Int64s:
        """Positions of this worker's units [first, stop), or of one in `every` of them, in delivery order.

        Only the last unit of an `exact` epoch may be short. Positions from `total` on are padding: p stands for the row
        at position p modulo `total`.
        """
        mine = deal(total, self.rank, self.world_size, start=self.start)
        unit = self.worker + self.workers * np.arange(first, stop, every, dtype=np.int64)
        width = self.unit if self.padded else min(self.unit, mine.rows)  # no longer, however much a batch may hold
        index = (unit[:, None] * self.unit + np.arange(width, dtype=np.int64)).ravel()
        return mine.first + self.world_size * (index if self.padded else index[index < mine.rows])

    def position_after(self, total: int, units: int) -> int:
        """Global position when every rank (and worker) has delivered as many units as this one."""
        return min(total, self.start + self.world_size * self.workers * self.unit * units)
