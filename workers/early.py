"""A `ShardSource` for manifests whose shards are not all made yet. What a reader asks for is made, or waited for.

Beside a running job the reader waits for that job, and its wish puts the shard's item at the front of those that have
not started. Beside none, the process that asks makes the item itself, as it would re-make a lost one: under the store's
lock, so once a node. Either way the bytes come once, and are checked like all others.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crucible.cache.holds import Holds
from crucible.cache.seen import Stamp
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.errors import ManifestError, PrefetchFailed, StoreError
from crucible.hub.governor import local_governor
from crucible.manifest import Manifest
from crucible.refs import NodeId, ShardInfo, WorkItem
from crucible.report import ItemResult
from crucible.stopping import check, never
from crucible.workers.asking import Line
from crucible.workers.fetch import NodeShards
from crucible.workers.watch import Quarrels, Watch
from crucible.workers.work import Workplace, run_item

log = logging.getLogger("crucible.early")

FIRST_ASK_S, LAST_ASK_S = 0.05, 0.5
"""How long between two questions about a job: short at first, twice as long each time nothing is new."""
LOST_S = 30.0
"""A job that nobody has known for so long does not come back. A coordinator that died is replaced within seconds."""
MOST_WISHES = 64


@dataclass
class _Left:
    """Items of a split that are not known to be done."""

    items: dict[str, WorkItem]
    look_at: int
    """When so few are left, the store is asked which of them others have done."""


class EarlyShards:
    """The shards of early manifests, and of complete ones.

    `job` is the cluster's job that brings them, None when there is none: then a split's manifest is kept in the store,
    under `revisions` and beside `survey`, by the process that learns of its last shard.

    Concurrency: usable from several threads; picklable, and each process then asks for itself.
    """

    def __init__(
        self, settings: Settings, job: str | None, survey: Mapping[str, Any], revisions: tuple[str, ...]
    ) -> None:
        self._settings, self._job, self._survey, self._revisions = settings, job, dict(survey), revisions
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._inner = NodeShards(self._settings)
        self.rank, self.stall_log_s = self._settings.rank, self._settings.stall_log_s
        self.ahead_bytes = self._settings.ahead_bytes
        self._quarrels = Quarrels(self.rank)
        self._watches: dict[str, Watch] = {}
        self._made_here: dict[str, int] = {}
        """Sizes of shards that somebody waited for while this process made them, by key."""
        self._store = Store(self._settings.home)
        self._line = Line(self._settings)
        self._lock = threading.Lock()
        """Guards what follows. Never held while waiting for anything."""
        self._asking = threading.Lock()
        """Held by the one thread that asks the agent for all."""
        self._known: dict[str, ShardInfo] = {}
        self._blocked: dict[int, str] = {}
        """Item keys that threads wait for, by ticket."""
        self._ahead: tuple[str, ...] = ()
        self._tickets = 0
        self._ask_at, self._ask_every = 0.0, FIRST_ASK_S
        self._heard_at = time.monotonic()
        self._failure: PrefetchFailed | None = None
        self._left: dict[str, _Left] = {}
        """By order id, while there is no job to keep the manifest."""

    # --- ShardSource

    def path(self, manifest: Manifest, shard: ShardInfo, stopped: Callable[[], bool] = never) -> Path:
        """A complete local file with the shard's bytes, waited for if need be.

        Raises PrefetchFailed when the job that was to make it has failed; else what making or fetching it raised.
        """
        if not shard.digest and self._inner.has(shard):
            with suppress(FileNotFoundError):
                shard = replace(shard, size=self._store.shard_path(shard.key).stat().st_size)
                return self._inner.path(manifest, shard, stopped)
        if shard.digest:
            return self._inner.path(manifest, shard, stopped)
        self._after_fork()
        found = self._settled(manifest, shard, stopped)
        if found.rows != shard.rows and not manifest.cuts:  # of a slice, whoever opens the file counts
            raise ManifestError(
                manifest.order_id[:12],
                f"promised {shard.rows:,} rows in shard {shard.key[:12]} and {found.rows:,} came; load it again",
            )
        return self._inner.path(manifest, replace(found, item=shard.item), stopped)

    def note(self) -> Mapping[str, int]:
        """As `NodeShards.note`. What this process made came from the Hub, though it then lay on this disk."""
        note = dict(self._inner.note())
        for size in list(self._made_here.values()):
            for unit, amount in (("shards", 1), ("bytes", size)):
                note[f"hub_{unit}"] += amount
                note[f"disk_{unit}"] -= amount
        return note

    def wish(self, shards: Sequence[tuple[Manifest, ShardInfo]]) -> None:
        """These will be needed next, in this order. Never waits: the job hears of it with the next question."""
        missing = [(manifest, shard) for manifest, shard in shards if not shard.digest and shard.key not in self._known]
        self._ahead = tuple(dict.fromkeys(manifest.item_of(shard).key for manifest, shard in missing))

    # --- FeedingSource

    @property
    def holds(self) -> Holds:
        return self._inner.holds

    def has(self, shard: ShardInfo) -> bool:
        """True if the shard is in this node's store, whoever made it."""
        return self._inner.has(shard)

    def still(self, shard: ShardInfo, stamp: Stamp) -> bool:
        """As `NodeShards.still`."""
        return self._inner.still(shard, stamp)

    def doing(self, shard: ShardInfo) -> str:
        """What is waited for at this moment."""
        watch = self._watches.get(shard.key)
        if watch is not None:
            return watch.doing()
        if shard.digest or shard.key in self._known or self._job is None:
            return self._inner.doing(self._known.get(shard.key, shard))
        return f"job {self._job} has not made it yet"

    def completed(self, manifest: Manifest) -> Manifest:
        """`manifest` with all its shards, and kept, if this node has all its items; else as it is."""
        for item in manifest.items:
            if (result := self._store.get_item(item, NodeId("local"))) is None:
                return manifest
            self._known.update((shard.key, shard) for shard in result.shards)
        with suppress(StoreError):
            return self._keep(manifest)
        return manifest

    # --- what has become of a shard

    def _settled(self, manifest: Manifest, shard: ShardInfo, stopped: Callable[[], bool]) -> ShardInfo:
        item = manifest.item_of(shard)
        with self._lock:
            self._tickets += 1
            ticket = self._tickets
            self._blocked[ticket] = item.key
        try:
            while True:
                if (found := self._known.get(shard.key)) is not None:
                    return found
                if (result := self._store.get_item(item, NodeId("local"))) is not None:
                    self._learn(manifest, result)
                elif self._job is None:
                    self._make(manifest, shard, item, stopped)
                else:
                    self._wait(stopped)
                    continue
                if shard.key not in self._known:
                    lacks = f"promised a shard {shard.key[:12]} that item {item.index} does not have"
                    raise ManifestError(manifest.order_id[:12], lacks)
        finally:
            with self._lock:
                del self._blocked[ticket]

    def _make(self, manifest: Manifest, shard: ShardInfo, item: WorkItem, stopped: Callable[[], bool]) -> None:
        watch = self._watches[shard.key] = Watch(manifest, shard, self._store, self._settings, self._quarrels)
        watch.hub(item)
        governor = local_governor(self._settings, stopped)
        place = Workplace(
            self._store, self._settings, NodeId("local"), watch.observe, governor=governor, stopped=stopped
        )
        try:
            result = run_item(item, place)
        finally:
            self._watches.pop(shard.key, None)
        if not result.reused:
            self._made_here.update((made.key, made.size) for made in result.shards if made.key == shard.key)
        self._learn(manifest, result)

    def _learn(self, manifest: Manifest, result: ItemResult) -> None:
        with self._lock:
            self._known.update((shard.key, shard) for shard in result.shards)
            if self._job is not None or manifest.cuts:  # a slice is nobody's whole split
                return
            left = self._left.get(manifest.order_id)
            if left is None:
                items = {item.key: item for item in manifest.items}
                left = self._left[manifest.order_id] = _Left(items, len(items) // 2)
            left.items.pop(result.key, None)
            look = len(left.items) <= left.look_at
            left.look_at = len(left.items) // 2 if look else left.look_at
            missing = list(left.items.values()) if look else []
        if not look:
            return
        # what other processes made meanwhile; looked for seldom enough to be linear in the number of items
        done_here = (self._store.get_item(item, NodeId("local")) for item in missing)
        found = [done for done in done_here if done is not None]
        with self._lock:
            for done in found:
                left.items.pop(done.key, None)
                self._known.update((shard.key, shard) for shard in done.shards)
            whole = not left.items
        if whole:
            with suppress(StoreError):  # a name for the next process; this one has all it needs
                self._keep(manifest)

    def _keep(self, manifest: Manifest) -> Manifest:
        shards = tuple(replace(self._known[shard.key], item=shard.item) for shard in manifest.shards)
        manifest = replace(manifest, shards=shards)
        self._store.put_manifest(manifest, self._revisions)
        for revision in {manifest.repo.revision, *self._revisions}:
            self._store.put_survey(replace(manifest.repo, revision=revision), self._survey)
        return manifest

    def _wait(self, stopped: Callable[[], bool]) -> None:
        """Ask the agent if it is time to, else wait a little for the thread that does."""
        if self._failure is not None:
            raise self._failure
        if self._asking.acquire(timeout=FIRST_ASK_S):
            try:
                pause = self._ask_at - time.monotonic()
                if pause <= 0:
                    self._ask()
                else:
                    time.sleep(min(pause, FIRST_ASK_S))
            finally:
                self._asking.release()
        check(stopped)

    def _ask(self) -> None:
        with self._lock:
            keys = list(dict.fromkeys([*self._blocked.values(), *self._ahead]))[:MOST_WISHES]
        job = self._job
        if job is None:
            return
        told = self._line.wish(job, keys)
        news = False
        if told is None or told["state"] == "unknown":
            if time.monotonic() - self._heard_at > LOST_S:
                log.warning("job %s is gone: this process makes the shards it needs itself", job)
                self._job = None
        elif told["state"] == "failed":
            self._failure = PrefetchFailed(job, str(told["error"]))
        else:
            self._heard_at = time.monotonic()
            shards = [ShardInfo(**one) for one in told["shards"]]
            with self._lock:
                news = any(shard.key not in self._known for shard in shards)
                self._known.update((shard.key, shard) for shard in shards)
        self._ask_every = FIRST_ASK_S if news else min(2 * self._ask_every, LAST_ASK_S)
        self._ask_at = time.monotonic() + self._ask_every

    # --- processes

    def _after_fork(self) -> None:
        if self._pid != os.getpid():  # locks may be held by threads that exist in the parent only
            self._begin()

    def __getstate__(self) -> dict[str, Any]:
        return {"args": (self._settings, self._job, self._survey, self._revisions)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["args"])  # type: ignore[misc]
