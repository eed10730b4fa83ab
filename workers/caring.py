"""What an agent tells a coordinator for the upkeep of its cluster: its rack, its manifests; and what it sets aside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from crucible.cache.disk import is_key
from crucible.cache.store import Store
from crucible.config import node_settings
from crucible.errors import ManifestError


class Caring:
    """For an agent to inherit."""

    _store: Store

    def rack(self) -> str:
        """Where this node stands, as CRUCIBLE_RACK says; empty if it does not."""
        return node_settings().rack

    def manifest_ids(self) -> list[str]:
        """Of the manifests in this node's store."""
        return manifest_ids(self._store)

    def names(self) -> dict[str, list[str]]:
        """The manifests in this node's store, with the revisions whose names point to them."""
        known = self._store.names()
        return {manifest_id: sorted(known.get(manifest_id, ())) for manifest_id in self.manifest_ids()}

    def manifest(self, manifest_id: str) -> tuple[bytes, list[str], dict[str, Any] | None] | None:
        """(JSON, revisions that point to it, survey of its commit) of a manifest here; None if there is none."""
        try:
            manifest = self._store.get_manifest(manifest_id)
        except ManifestError:
            return None
        revisions = sorted(self._store.names().get(manifest_id, ()))
        return manifest.to_json(), revisions, self._store.get_survey(manifest.repo, manifest.variant)

    def set_aside(self, keys: Sequence[str]) -> None:
        """Take shards whose bytes are not what was promised out of sight."""
        for key in keys:
            self._store.quarantine(key)


def manifest_ids(store: Store) -> list[str]:
    """Of the manifests in a store, readable or not."""
    with suppress(OSError), os.scandir(store.home / "manifests") as entries:
        return sorted(e.name[:-5] for e in entries if e.name.endswith(".json") and is_key(e.name[:-5]))
    return []
