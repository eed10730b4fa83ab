"""Give a reader the local file of any shard: from this node's disk, else from a peer, else made anew from the Hub.

This is what a training process holds. It needs no Ray: it finds its node's agent through the store (`agent.json`) or
CRUCIBLE_AGENT, and asks it who has a shard. Whatever it brings stays in the node's store, verified, for the other ranks
of the node and for the next epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from crucible.cache.store import Store
from crucible.config import Settings
from crucible.errors import ChecksumMismatch, CrucibleError, StoreError, TransferError
from crucible.manifest import Manifest
from crucible.refs import NodeId, ShardInfo
from crucible.report import Counts, Tally
from crucible.workers.secret import load_secret
from crucible.workers.serve import read_address
from crucible.workers.work import Workplace, copy_shard, run_item

LOCATE_TIMEOUT_S = 3.0
"""An agent that does not answer for this long is skipped: the peers it last knew are asked directly."""


class NodeShards:
    """The `ShardSource` of a node's processes.

    Concurrency: usable from several threads; picklable, and each process then counts for itself.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._store = Store(settings.home)
        self._tally = Tally()
        self._origins: dict[str, tuple[str, int]] = {}

    def path(self, manifest: Manifest, shard: ShardInfo) -> Path:
        """A complete local file with the shard's bytes. Raises what the last place that was tried said."""
        if self._store.has_shard(shard):
            self._origins.setdefault(shard.key, ("disk", shard.size))
            return self._store.shard_path(shard.key)
        place = Workplace(self._store, self._settings, NodeId("local"))
        problems: list[str] = []
        secret = load_secret(self._store)
        if secret is not None and (urls := self._peers(shard.key, secret)):
            try:
                path = copy_shard(shard, urls, secret, place, self._tally)
                self._origins[shard.key] = ("peer", shard.size)
                return path
            except StoreError:
                raise  # this node's disk: no other source can help
            except TransferError as error:
                problems.append(str(error))
        try:
            path = self._remake(manifest, shard, place)
        except CrucibleError as error:
            for problem in problems:
                error.add_note(f"tried before: {problem}")
            raise
        self._origins[shard.key] = ("hub", shard.size)
        return path

    def _remake(self, manifest: Manifest, shard: ShardInfo, place: Workplace) -> Path:
        item = manifest.item_of(shard)
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

    def _peers(self, key: str, secret: str) -> list[str]:
        """Agents that may have the shard, the likeliest first. Never fails: no peers is an answer."""
        address = read_address(self._store)
        agent = self._settings.agent_url or (address.url if address else None)
        urls: list[str] = []
        if agent is not None:
            try:
                with httpx.Client(timeout=LOCATE_TIMEOUT_S, trust_env=False) as client:
                    self._tally.add(peer_requests=1)
                    headers = {"authorization": f"Bearer {secret}"}
                    reply = client.get(f"{agent.rstrip('/')}/v1/locate/{key}", headers=headers)
                    urls = [str(url) for url in reply.raise_for_status().json()["urls"]]
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
