"""What was moved, and what a task, a plan or a job says about it. Frozen data, plus the one counter that adds it up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from operator import add, attrgetter
from typing import Literal

from crucible.refs import NodeId, ShardInfo


@dataclass(frozen=True, slots=True)
class Counts:
    """Requests sent and bytes received, by who answered. Adds with `+`."""

    hub_requests: int = 0
    """To the Hub's own origin: metadata and resolve."""
    cdn_requests: int = 0
    """To where the Hub redirected."""
    peer_requests: int = 0
    hub_bytes: int = 0
    """File bytes from the Hub or its CDN, those of failed tries included."""
    peer_bytes: int = 0
    local_bytes: int = 0
    """Bytes read from a repo that is a folder on this disk."""
    cached_bytes: int = 0
    """Source bytes that were in the Hub cache of their node already, right by their hash."""
    retries: int = 0
    verified_files: int = 0
    """Files and shards whose hash was checked against what was promised."""
    spare_bytes: int = 0
    """Of files still on their way, given to the node that would go on with them."""
    spare_failures: int = 0
    """Ranges that such a node did not take."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(add, _AMOUNTS(self), _AMOUNTS(other)))

    @property
    def requests(self) -> int:
        """To the Hub and its CDN together: what the Hub sees."""
        return self.hub_requests + self.cdn_requests


_AMOUNTS = attrgetter(*(one.name for one in fields(Counts)))


class Tally:
    """A `Counts` that several threads may add to.

    Concurrency: every method may be called from any thread. Never shared between processes: a process returns its own
    `Counts`, and they are added where they arrive.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts()

    def add(self, **amounts: int) -> None:
        with self._lock:
            now = self._counts
            self._counts = replace(now, **{name: getattr(now, name) + amount for name, amount in amounts.items()})

    def merge(self, counts: Counts) -> None:
        """Add what another tally counted."""
        with self._lock:
            self._counts += counts

    @property
    def counts(self) -> Counts:
        with self._lock:
            return self._counts


@dataclass(frozen=True, slots=True)
class TransferEvent:
    """Something happened to one file on its way. What progress bars, logs and metrics are made of."""

    kind: Literal["started", "asking", "progress", "retried", "waiting", "verified", "finished", "failed"]
    path: str
    """The file's path in its repo, or the shard's key."""
    size: int = 0
    """Bytes: of the file for started, verified and finished; that arrived since the last event for progress, negative
    where bytes were taken back because they were wrong."""
    seconds: float = 0.0
    """How long it will wait (waiting) or took (finished)."""
    source: str = ""
    """Who is asked now (asking), has failed (retried, waiting) or had a part in it."""
    reason: str = ""


Observer = Callable[[TransferEvent], None]
"""Called from any thread; must be quick and must not raise."""


def unobserved(event: TransferEvent) -> None:
    """The observer of those who do not care."""


@dataclass(frozen=True, slots=True)
class ItemResult:
    """A work item that is done: its shards lie in the store of `node`, whole and visible."""

    index: int
    key: str
    node: NodeId
    shards: tuple[ShardInfo, ...]
    schemas: tuple[tuple[str, str], ...]
    """(sha256, base64) of every Arrow schema among the shards; of the files' own when there are no rows."""
    counts: Counts = Counts()
    seconds: float = 0.0
    reused: bool = False
    """True when the store already had the item and nothing was moved."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is. Monotone in every field but `phase`."""

    job: str
    phase: Literal["resolve", "items", "copies", "finished", "failed", "superseded", "interrupted"]
    items_done: int = 0
    items: int = 0
    bytes_done: int = 0
    """Source bytes that have arrived, those of unfinished files included."""
    bytes: int = 0
    retries: int = 0
    """Items that had to be started again."""
    waiting_s: float = 0.0
    """How much longer the Hub asked to be left alone; 0 when nobody waits for it. Like the next, not monotone."""
    waiting_for: str = ""
    """What is waited for: `resolvers, 0 of 3000 left`."""


@dataclass(frozen=True, slots=True)
class SplitReport:
    """One split of a finished job."""

    split: str
    manifest: str
    rows: int
    shards: int
    size: int
    """Bytes of the shards."""
    source_bytes: int


@dataclass(frozen=True, slots=True)
class JobReport:
    """What a finished prefetch did."""

    job: str
    repo: str
    commit: str
    config: str
    splits: tuple[SplitReport, ...]
    counts: Counts
    seconds: float
    nodes: tuple[tuple[NodeId, int, int], ...]
    """(node, shards born there, their bytes)."""
    copies: int = 0
    reused_items: int = 0
    partial: bool = False
    """True when the rows come from ranges of the files, which were not checked against a hash."""
    notes: tuple[str, ...] = ()
    """What is wrong with the versions or the clock of a node, one line each."""

    @property
    def rows(self) -> int:
        return sum(split.rows for split in self.splits)

    @property
    def source_bytes(self) -> int:
        return sum(split.source_bytes for split in self.splits)
