"""What the fetch of one shard is doing, for the log; and which peers have not answered of late. Decides only that.

A peer that answers nothing for CRUCIBLE_STALL seconds is left for another one by the transfer engine. Here it is
remembered for a while, so that not every shard waits for it anew.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence

from crucible.cache import journal
from crucible.cache.lease import Names
from crucible.cache.owner import lock_holder
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.hub.governor import local_governor
from crucible.manifest import Manifest
from crucible.patience import place_of
from crucible.refs import ShardInfo, WorkItem
from crucible.report import TransferEvent

AVOIDED_S = 30.0
"""How long a peer that did not answer is asked last: after all others, and after the Hub."""
_log = logging.getLogger("crucible.feed")


class Quarrels:
    """Whom this process has had trouble with. Concurrency: any thread."""

    def __init__(self, rank: int | None) -> None:
        self.rank = rank
        self._lock = threading.Lock()
        self._until: dict[str, float] = {}

    def note(self, name: str) -> bool:
        """It did not answer. True if it had, as far as was known."""
        with self._lock:
            now = time.monotonic()
            known = self._until.get(name, 0.0) > now
            self._until[name] = now + AVOIDED_S
            return not known

    def fine(self, name: str) -> bool:
        with self._lock:
            return self._until.get(name, 0.0) <= time.monotonic()

    def sorted(self, urls: Sequence[str]) -> tuple[list[str], list[str]]:
        """Those that may be asked first, in the order given, and those to be asked last."""
        good = [url for url in urls if self.fine(url)]
        return good, [url for url in urls if url not in good]


class Watch:
    """The observer of one fetch. Concurrency: any thread."""

    def __init__(
        self, manifest: Manifest, shard: ShardInfo, store: Store, settings: Settings, quarrels: Quarrels
    ) -> None:
        self._place = place_of(manifest, shard)
        self._shard, self._store, self._settings, self._quarrels = shard, store, settings, quarrels
        self._urls: frozenset[str] = frozenset()
        self._lock_name = ""
        self._oids: tuple[str, ...] = ()
        self._text = "is about to be looked for"
        self._source = ""
        self._moved = time.monotonic()
        self._rests: tuple[float, str] = (0.0, "")

    # --- what it is told

    def asking(self, whom: str) -> None:
        self._text, self._source, self._moved = f"waits for {whom}", "", time.monotonic()

    def peers(self, urls: Sequence[str]) -> None:
        """It will be copied from one of these."""
        self._urls = frozenset(urls)
        self._expect(f"shard-{(self._shard.digest or self._shard.key)[:32]}", (self._shard.digest,))

    def hub(self, item: WorkItem) -> None:
        """It will be made from its source files."""
        self._expect(f"item-{item.key[:32]}", tuple(file.oid for file in item.files[:64]))

    def _expect(self, lock_name: str, oids: tuple[str, ...]) -> None:
        self._lock_name, self._oids, self._text, self._source = lock_name, oids, "", ""
        self._moved = time.monotonic()

    def observe(self, event: TransferEvent) -> None:
        if event.kind == "retried":
            self._complain(event)
        elif event.kind == "waiting":
            self._rests = (time.monotonic() + event.seconds, f"{event.source} ({event.reason})")
            return
        elif event.kind == "asking":
            self._source, self._text = event.source, ""
        elif event.kind == "finished":
            self._source, self._text = "", "is being converted and written to this node's disk"
        self._lock_name = ""
        self._moved = time.monotonic()

    def _complain(self, event: TransferEvent) -> None:
        # a reply is an answer, also one that says no; silence, a refused connection and wrong bytes are none
        if event.source in self._urls and not event.reason.startswith("HTTP ") and self._quarrels.note(event.source):
            who = "" if self._quarrels.rank is None else f"rank {self._quarrels.rank}: "
            _log.warning(
                "%sshard %s (%s): %s; %s is asked last for %.0f s",
                who, self._shard.key[:12], self._place, event.reason, event.source, AVOIDED_S,
            )  # fmt: skip

    # --- what it says

    def doing(self) -> str:
        """What is waited for now, in one line."""
        now = time.monotonic()
        if self._rests[0] > now:
            return f"rests {self._rests[0] - now:.0f} s before it asks {self._rests[1]} again"
        if self._source and self._source not in self._urls:
            quiet = local_governor(self._settings).waiting()
            if quiet is not None:
                asked = f"{self._source} asked to be left alone ({quiet.reason})"
                return f"{asked}, for {max(0.0, quiet.until - now):.0f} s more"
        if self._source:
            what = "peer" if self._source in self._urls else "Hub"
            return f"waits for {what} {self._source}, {now - self._moved:.0f} s without a byte"
        if self._lock_name:
            holder = lock_holder(self._store.home / "locks" / f"{self._lock_name}.lock")
            if holder not in (None, os.getpid()):
                return f"another process of this node (pid {holder}) is bringing it"
            if holder == os.getpid():
                return "this process is bringing it for another shard of the same file"
        for oid in self._oids:
            if (pid := self._downloader(oid)) is not None:
                return f"another process of this node (pid {pid}) is downloading its file"
        return self._text or "is about to be asked for"

    def _downloader(self, oid: str) -> int | None:
        """The other process that has the lease of a source file."""
        names = Names(self._store.raw.root, oid)
        top = names.top() if oid else 0
        holder = journal.glance(names.journal(top)) if top else None
        if holder is None or holder.owner is None or holder.released or holder.owner.pid == os.getpid():
            return None
        return holder.owner.pid
