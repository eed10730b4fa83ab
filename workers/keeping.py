"""What an agent does to its own store when it is told to: pins, eviction, verification, gc. And scrubbing, by itself.

Arguments and answers are small and plain, because they cross Ray. Each call may take long; the agent serves meanwhile.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from crucible.cache.pins import Pins
from crucible.cache.store import Store
from crucible.cache.usage import room_of, usage_of
from crucible.config import Settings, node_settings
from crucible.errors import CrucibleError
from crucible.refs import NodeId
from crucible.report import ItemResult
from crucible.stopping import Stopped, never, rest
from crucible.workers.evict import Alone, Neighbours, evict, spare_of
from crucible.workers.litter import litter, sweep
from crucible.workers.scrub import WRONG, Finding, heal, scrub

FIRST_SCRUB_S = 600.0
"""After an agent has started: what else starts with it comes first."""
SCRUB_REST_S = 6 * 3600.0
"""Between two rounds through a store."""
MOST_FINDINGS = 10_000
"""That one call tells of what is wrong, and of what is only untidy: more of them say no more."""
log = logging.getLogger("crucible.integrity")


class Keeping:
    """The part of an agent that looks after its store. Whoever inherits it sets `_store` and `_node`.

    Concurrency: any method from any thread. One eviction at a time, and one round through all files.
    """

    _store: Store
    _node: NodeId

    @cached_property
    def _keeping(self) -> threading.Lock:
        """Held by whoever evicts: processes of this node wait for it."""
        return threading.Lock()

    @cached_property
    def _looking(self) -> threading.Lock:
        """Held by whoever goes through all files, which may take hours."""
        return threading.Lock()

    def _neighbours(self) -> Neighbours:
        """Whom to ask before a shard goes."""
        return Alone(self._store, node_settings())

    # --- pins

    def pin(self, ids: Sequence[str], note: str = "") -> list[str]:
        """Pin manifests of this store; those that it has. Raises StoreError."""
        pinned, pins = [], Pins(self._store.home)
        for manifest_id in ids:
            try:
                pins.pin(manifest_id, note)
            except CrucibleError as error:
                if isinstance(error, OSError):
                    raise
                continue  # a node that does not have the manifest has nothing to keep
            pinned.append(manifest_id)
        return pinned

    def unpin(self, ids: Sequence[str]) -> list[str]:
        """Those that were pinned. Raises StoreError."""
        pins = Pins(self._store.home)
        return [manifest_id for manifest_id in ids if pins.unpin(manifest_id)]

    def pins(self) -> list[dict[str, Any]]:
        """{manifest, note, since} of each pin, oldest first."""
        return [pin.to_dict() for pin in Pins(self._store.home).listing()]

    # --- room

    def usage(self) -> dict[str, int | None]:
        """Bytes: quota (None: no other than the disk), used, reserved, free on the disk, left, pinned, leased."""
        return usage(self._store, node_settings())

    def evict(self, keys: Sequence[str] | None, need_bytes: int = 0, dry_run: bool = False) -> dict[str, int]:
        """Shards that go, with their bytes: all of `keys` that may, or the least missed ones worth `need_bytes`.

        If all that may go is worth less, all of it goes. Raises StoreError.
        """
        with self._keeping:
            return evict(self._store, need_bytes, self._neighbours(), keys=keys, whole=False, dry_run=dry_run)

    def _room(self, question: Any) -> dict[str, int] | None:
        """The answer to a process of this node that needs room. None if it has another store. Raises TypeError."""
        if str(question["home"]) != str(self._store.home):
            return None
        need, since = int(question["need"]), question["since"]
        room = room_of(self._store.home, node_settings().quota)
        with self._keeping:
            freed = evict(
                self._store,
                need,
                self._neighbours(),
                since=None if since is None else float(since),
                spare=spare_of(need, room.limit or room.disk),
            )
        return {"freed": sum(freed.values())}

    # --- what was made here

    def records(self, keys: Collection[str]) -> list[ItemResult]:
        """The items that are recorded here in full and have one of these shards."""
        wanted, found = set(keys), []
        for key in self._store.item_keys():
            item = self._store.get_record(key, self._node)
            if item is not None and any(shard.key in wanted for shard in item.shards):
                found.append(item)
        return found

    # --- integrity

    def verify(self, keys: Sequence[str] | None, deep: bool = False) -> list[dict[str, Any]]:
        """What is wrong with these shards, or with all of the store; see `scrub`. Wrong ones are in quarantine then."""
        wrong: list[Finding] = []
        others: list[Finding] = []
        with self._looking:
            for finding in scrub(self._store, keys, deep=deep):
                kept = wrong if finding.kind in WRONG else others
                if len(kept) < MOST_FINDINGS:  # else it is looked at, and put aside, all the same
                    kept.append(finding)
        return [finding.to_dict() for finding in (*wrong, *others)]

    def quarantined(self) -> list[dict[str, Any]]:
        """{key, path, bytes, at} of what lies in quarantine, oldest first; at in seconds since 1970."""
        return quarantined(self._store)

    def litter(self, dry_run: bool = True) -> list[dict[str, Any]]:
        """What nobody needs; removed, unless it is a dry run: then only what is gone is told."""
        with self._looking:
            found = litter(self._store)
            return [one.to_dict() for one in (found if dry_run else sweep(found))]

    def _begin_scrubbing(self, stopped: Callable[[], bool] = never) -> None:
        """Look for rot in a thread of its own, for as long as the process lives."""
        settings = node_settings()
        if settings.scrub_rate:
            threading.Thread(
                target=scrub_for_ever, args=(self._store, settings, stopped), name="crucible-scrub", daemon=True
            ).start()


def scrub_for_ever(store: Store, settings: Settings, stopped: Callable[[], bool] = never) -> None:
    """Read all shards at `settings.scrub_rate`, heal what is wrong, rest, and again. Ends when it is stopped."""
    try:
        rest(FIRST_SCRUB_S, stopped)
        while True:
            scrub_once(store, settings, stopped)
            rest(SCRUB_REST_S, stopped)
    except Stopped:
        return


def scrub_once(store: Store, settings: Settings, stopped: Callable[[], bool] = never) -> dict[str, str]:
    """One round: shards that were wrong -> "" if they are whole again, else why not. Raises Stopped."""
    outcome: dict[str, str] = {}
    try:
        for finding in scrub(store, deep=True, rate=settings.scrub_rate, stopped=stopped):
            if finding.kind in WRONG:
                healed = heal(store, settings, [finding], stopped)
                outcome |= healed
                for key, problem in healed.items():
                    log.warning("%s: %s", finding, problem or f"shard {key[:12]} is whole again")
    except CrucibleError as error:
        log.warning("%s: looking for rot ended: %s", store.home, error)
    return outcome


def usage(store: Store, settings: Settings) -> dict[str, int | None]:
    """As `Keeping.usage`, of any store."""
    room = room_of(store.home, settings.quota)
    pinned, leased = Pins(store.home).keys(), store.leased()
    sizes = dict(store.shards()) if pinned or leased else {}
    return {
        "quota": room.limit,
        "used": room.used if room.limit is not None else usage_of(store.home).bytes(),
        "reserved": room.reserved,
        "free": room.free,
        "left": max(0, room.left),
        "pinned": sum(sizes.get(key, 0) for key in pinned),
        "leased": sum(sizes.get(key, 0) for key in leased),
    }


def quarantined(store: Store) -> list[dict[str, Any]]:
    """As `Keeping.quarantined`, of any store."""
    found = []
    with suppress(FileNotFoundError), os.scandir(store.home / "quarantine") as entries:
        for entry in entries:
            with suppress(OSError):
                status = entry.stat()
                at = max(status.st_mtime, status.st_ctime)
                key = entry.name.partition(".")[0]
                found.append({"key": key, "path": entry.path, "bytes": status.st_size, "at": at})
    return sorted(found, key=lambda one: (one["at"], one["path"]))
