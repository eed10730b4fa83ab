"""Whether two processes of different versions, or with different clocks, may work together. Pure.

What must hold is that a shard has the same bytes on every node. So a node with another protocol or another conversion
takes part in nothing; one whose pyarrow writes other bytes converts nothing, but holds and serves shards, which are
checked by their digests wherever they arrive. Clocks decide nothing anywhere in crucible: one that is wrong is named,
because it makes logs, certificates and links that expire hard to understand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from crucible.errors import VersionSkew
from crucible.versions import Versions, versions_here

CLOCK_BOUND_S = 5.0
"""Seconds by which a clock may differ unmentioned: more than a healthy NTP client ever does, and than a busy node takes
to answer."""

Level = Literal["note", "no work", "refused"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference, and what follows from it."""

    level: Level
    what: str
    theirs: str
    ours: str
    todo: str

    def __str__(self) -> str:
        ours = f", the coordinator has {self.ours}" if self.ours else ""
        return f"{self.what} {self.theirs or 'unknown'}{ours}: {self.todo}"


@dataclass(frozen=True, slots=True)
class Clock:
    """How another process's clock compares with ours: `offset_s` is theirs less ours, known to within `slack_s`."""

    offset_s: float
    slack_s: float

    @staticmethod
    def compared(asked: float, told: float, heard: float) -> Clock:
        """From our time before we asked, theirs when they answered, ours when we heard; seconds since 1970."""
        return Clock(told - (asked + heard) / 2, max(0.0, heard - asked) / 2)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a node may do. The reasons, gravest first, are fit for a person."""

    findings: tuple[Finding, ...] = ()
    of: Versions = field(default_factory=Versions)

    @property
    def refused(self) -> Finding | None:
        """Why the node takes part in nothing; None if it does."""
        return next((one for one in self.findings if one.level == "refused"), None)

    @property
    def works(self) -> bool:
        """True if the node may convert."""
        return all(one.level == "note" for one in self.findings)

    @property
    def reasons(self) -> list[str]:
        return [str(one) for one in self.findings]


_GRAVITY = ("refused", "no work", "note")


def judge(
    mine: Versions,
    theirs: Versions,
    *,
    clock: Clock | None = None,
    same_bytes: bool | None = None,
    store_problem: str = "",
) -> Verdict:
    """What a node that tells `theirs` may do in a cluster whose coordinator has `mine`.

    `same_bytes` says whether both made the same shards of the same sample, None that nobody has looked, which counts as
    no where their pyarrows differ. `store_problem` is why the node cannot serve its own store.
    """
    found: list[Finding] = []
    newer = f"install crucible {mine.crucible or 'as on the coordinator'} on that node and start its raylet anew"
    if store_problem:
        found.append(Finding("refused", "it serves nothing:", store_problem, "", "the cluster goes on without it"))
    if theirs.protocol != mine.protocol:
        found.append(Finding("refused", "protocol", str(theirs.protocol or ""), str(mine.protocol), newer))
    if theirs.conversion != mine.conversion:
        found.append(Finding("refused", "conversion", str(theirs.conversion or ""), str(mine.conversion), newer))
    if theirs.pyarrow != mine.pyarrow:
        if same_bytes:
            found.append(Finding("note", "pyarrow", theirs.pyarrow, mine.pyarrow, "a sample gave the same bytes"))
        else:
            todo = "a sample gave other bytes, so it converts nothing; install the same pyarrow"
            found.append(Finding("no work", "pyarrow", theirs.pyarrow, mine.pyarrow, todo))
    if _minor(theirs.python) != _minor(mine.python):
        found.append(Finding("note", "Python", theirs.python, mine.python, "install the same minor version"))
    if theirs.crucible != mine.crucible and theirs.protocol == mine.protocol:
        found.append(Finding("note", "crucible", theirs.crucible, mine.crucible, "they understand each other"))
    if clock is not None and abs(clock.offset_s) - clock.slack_s > CLOCK_BOUND_S:
        way = "ahead" if clock.offset_s > 0 else "behind"
        todo = "no data depends on it; set the clock (NTP), or dates in logs mislead"
        found.append(Finding("note", "clock", f"{abs(clock.offset_s):.0f} s {way}", "the time", todo))
    return Verdict(tuple(sorted(found, key=lambda one: _GRAVITY.index(one.level))), theirs)


def check_coordinator(theirs: Versions) -> None:
    """Raise VersionSkew if this process cannot speak with a coordinator of these versions."""
    mine = versions_here()
    if (why := judge(theirs, mine, same_bytes=True).refused) is not None:
        its = f"crucible {theirs.crucible}" if theirs.crucible else "the crucible of the cluster"
        todo = f"install {its} here, or this one there and start its Ray anew"
        said = "unknown" if why.ours in ("", "0") else why.ours
        raise VersionSkew("the coordinator of this Ray cluster", f"it has {why.what}", said, why.theirs, todo)


def _minor(python: str) -> Sequence[str]:
    return python.split(".")[:2]
