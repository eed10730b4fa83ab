"""Give a reader the local file of any shard: from this node's disk, else from a peer, else made anew from the Hub.

This is what a training process holds. It needs no Ray: it finds its node's agent through the store (`agent.json`) or
CRUCIBLE_AGENT, and asks it who has a shard. Whatever it brings stays in the node's store, verified, for the other ranks
of the node and for the next epoch. Of several processes that want the same shard at once, one brings it.
"""

from __future__ import annotations

import os
import weakref
from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from crucible.cache.check import is_sound
from crucible.cache.seen import Stamp, stamp_of
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.errors import ChecksumMismatch, CrucibleError, StoreError, TransferError
from crucible.hub.governor import local_governor
from crucible.manifest import Manifest
from crucible.refs import NodeId, ShardInfo
from crucible.report import Counts, Tally
from crucible.stopping import check, never
from crucible.workers.secret import load_secret
from crucible.workers.serve import read_address
from crucible.workers.tls import Trust, answer_of
from crucible.workers.watch import Quarrels, Watch
from crucible.workers.work import Workplace, copy_shard, run_item

MOST_PEERS = 64
"""As many as are asked for one shard; each may cost a timeout."""
LOCATE_TIMEOUT_S = 3.0
"""An agent that does not answer for this long is skipped: the peers it last knew are asked directly."""


class NodeShards:
    """The `FeedingSource` of a node's processes.

    Concurrency: usable from several threads; picklable, and each process then counts for itself.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._store = Store(settings.home)
        self.rank, self.stall_log_s = settings.rank, settings.stall_log_s
        self.ahead_bytes = settings.ahead_bytes
        self._origins: dict[str, tuple[str, int]] = {}
        self._begin()
        _ALL.add(self)

    def _begin(self) -> None:
        """What a process has of its own."""
        self.holds = self._store.holds
        self._tally = Tally()
        self._quarrels = Quarrels(self._settings.rank)
        self._watches: dict[str, Watch] = {}

    def path(self, manifest: Manifest, shard: ShardInfo, stopped: Callable[[], bool] = never) -> Path:
        """A complete local file with the shard's bytes. Raises what the last place that was tried said.

        Raises Stopped soon after `stopped` says that nobody waits for it any more.
        """
        if is_sound(self._store, shard):
            self._origins.setdefault(shard.key, ("disk", shard.size))
            return self._store.shard_path(shard.key)
        watch = self._watches[shard.key] = Watch(manifest, shard, self._store, self._settings, self._quarrels)
        try:
            path, origin = self._fetch(manifest, shard, watch, stopped)
        finally:
            self._watches.pop(shard.key, None)
        self._origins[shard.key] = (origin, shard.size)
        return path

    def has(self, shard: ShardInfo) -> bool:
        """True if the shard is in this node's store."""
        return self._store.has_shard(shard)

    def still(self, shard: ShardInfo, stamp: Stamp) -> bool:
        """False if the file that had this stamp was written to since, or put aside because its bytes are wrong.

        True for one that was evicted or replaced: who has it mapped keeps it.
        """
        status = self._store.look_at(shard.key)
        now = None if status is None else stamp_of(status)
        if now is not None and (now == stamp or now[0] == stamp[0]):
            return now == stamp
        return not self._store.put_aside(shard.key)

    def doing(self, shard: ShardInfo) -> str:
        """What the fetch of this shard waits for at this moment."""
        watch = self._watches.get(shard.key)
        return "is about to be read from this node's disk" if watch is None else watch.doing()

    def _fetch(
        self, manifest: Manifest, shard: ShardInfo, watch: Watch, stopped: Callable[[], bool]
    ) -> tuple[Path, str]:
        place = Workplace(
            self._store,
            self._settings,
            NodeId("local"),
            observe=watch.observe,
            governor=local_governor(self._settings, stopped),
            promised=_promises(manifest, shard),
            stopped=stopped,
        )
        secret = load_secret(self._store)
        peers = [] if secret is None else self._peers(shard.key, secret, watch)
        good, bad = self._quarrels.sorted(peers)
        problems: list[str] = []
        if secret is not None and good:
            try:
                return self._copy(shard, good, secret, watch, place), "peer"
            except TransferError as error:
                problems.append(str(error))
        try:
            check(stopped)
            return self._remake(manifest, shard, watch, place), "hub"
        except StoreError:
            raise  # this node's disk: no other source can help
        except CrucibleError as error:
            if secret is not None and bad:  # it did not answer a while ago; now there is nobody else
                try:
                    return self._copy(shard, bad, secret, watch, place), "peer"
                except TransferError as other:
                    problems.append(str(other))
            for problem in problems:
                error.add_note(f"tried before: {problem}")
            raise

    def _copy(self, shard: ShardInfo, urls: list[str], secret: str, watch: Watch, place: Workplace) -> Path:
        watch.peers(urls)
        return copy_shard(shard, urls, secret, place, self._tally)

    def _remake(self, manifest: Manifest, shard: ShardInfo, watch: Watch, place: Workplace) -> Path:
        item = manifest.item_of(shard)
        watch.hub(item)
        result = run_item(item, place)
        self._tally.merge(result.counts)
        made = next((made for made in result.shards if made.number == shard.number), None)
        if made is None or made.digest != shard.digest:
            self._store.quarantine(shard.key)  # its name says it is the manifest's shard, and it is not
            where = ", ".join(file.path for file in item.files[:3])
            raise ChecksumMismatch(
                f"shard {shard.key[:12]} ({where})",
                "its re-made copy here (another pyarrow than the one that wrote the manifest?)",
                shard.digest,
                made.digest if made else "nothing",
            )
        return self._store.shard_path(shard.key)

    def _peers(self, key: str, secret: str, watch: Watch) -> list[str]:
        """Agents that may have the shard, the likeliest first. Never fails: no peers is an answer."""
        address = read_address(self._store)
        agent = self._settings.agent_url or (address.url if address else None)
        urls: list[str] = []
        if agent is not None:
            if self._quarrels.fine(f"{agent} (locate)"):
                watch.asking(f"the agent of this node ({agent}), who has it")
                try:
                    self._tally.add(peer_requests=1)
                    client = Trust.of(self._settings, self._store).client(agent)
                    where, timeout = f"{agent.rstrip('/')}/v1/locate/{key}", httpx.Timeout(LOCATE_TIMEOUT_S)
                    answer = answer_of(client, "GET", where, secret=secret, timeout=timeout)
                    urls = [str(url) for url in answer["urls"]][:MOST_PEERS]
                except httpx.TimeoutException:
                    self._quarrels.note(f"{agent} (locate)")
                except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
                    urls = []
            if self._settings.agent_url:
                urls.append(agent)  # an agent named by hand may be another node's, with a store of its own
        known = address.peers if address else ()
        return list(dict.fromkeys([*urls, *known]))

    @property
    def counts(self) -> Counts:
        """Requests and bytes of this process so far."""
        return self._tally.counts

    def note(self) -> Mapping[str, int]:
        """Shards and bytes by where they were when first asked for: disk, peer or Hub."""
        note = {f"{origin}_{unit}": 0 for origin in ("disk", "peer", "hub") for unit in ("shards", "bytes")}
        for origin, size in list(self._origins.values()):
            note[f"{origin}_shards"] += 1
            note[f"{origin}_bytes"] += size
        return note

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["settings"])  # type: ignore[misc]


def _promises(manifest: Manifest, shard: ShardInfo) -> dict[str, str]:
    """Digests of the shards of the same item, as far as they are known and lie together."""
    shards = manifest.shards
    promised = {shard.key: shard.digest}
    at = bisect_left(shards, shard.item, key=lambda one: one.item)
    while at < len(shards) and shards[at].item == shard.item:
        promised[shards[at].key] = shards[at].digest
        at += 1
    return {key: digest for key, digest in promised.items() if digest}


_ALL: weakref.WeakSet[NodeShards] = weakref.WeakSet()


def _forked() -> None:
    # a thread that exists in the parent only may have held a lock
    for source in list(_ALL):
        source._begin()


os.register_at_fork(after_in_child=_forked)
