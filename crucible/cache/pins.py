"""Manifests whose shards stay on this node, whatever else needs the room.

<home>/pins/<manifest id>.json    what is pinned, why, and since when
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from crucible.cache.disk import disk_errors, is_key, write_atomic
from crucible.errors import ManifestError


@dataclass(frozen=True, slots=True)
class Pin:
    manifest: str
    """Its id."""
    note: str
    since: float
    """Seconds since 1970."""

    def to_dict(self) -> dict[str, Any]:
        return {"manifest": self.manifest, "note": self.note, "since": self.since}


class Pins:
    """The pins of one store. Concurrency: any thread and process; each pin is one file, made by a rename."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._folder = home / "pins"

    def pin(self, manifest_id: str, note: str = "") -> None:
        """Pin a manifest of this store, or pin it again with another note.

        Raises ManifestError when it is not here, and what the disk says.
        """
        self._shards(manifest_id)
        path = self._folder / f"{manifest_id}.json"
        record = json.dumps({"manifest": manifest_id, "note": note, "since": time.time()}).encode()
        with disk_errors(path, f"{len(record):,} bytes for a pin"):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, record)

    def unpin(self, manifest_id: str) -> bool:
        """False if it was not pinned."""
        path = self._folder / f"{manifest_id}.json"
        if not is_key(manifest_id):
            return False
        with disk_errors(path):
            try:
                path.unlink()
            except FileNotFoundError:
                return False
            return True

    def listing(self) -> list[Pin]:
        """All pins, oldest first; one whose record cannot be read is still a pin, of no note."""
        found = []
        for manifest_id in self._ids():
            note, since = "", 0.0
            with suppress(OSError, ValueError, KeyError, TypeError):
                record = json.loads((self._folder / f"{manifest_id}.json").read_bytes())
                note, since = str(record["note"]), float(record["since"])
            found.append(Pin(manifest_id, note, since))
        return sorted(found, key=lambda pin: (pin.since, pin.manifest))

    def keys(self) -> set[str]:
        """Keys of all shards that a pin keeps, wherever they are. A pin whose manifest is gone keeps none."""
        keys: set[str] = set()
        for manifest_id in self._ids():
            with suppress(ManifestError):
                keys |= self._shards(manifest_id)
        return keys

    def _ids(self) -> list[str]:
        with suppress(OSError), os.scandir(self._folder) as entries:
            return sorted(e.name[:-5] for e in entries if e.name.endswith(".json") and is_key(e.name[:-5]))
        return []

    def _shards(self, manifest_id: str) -> frozenset[str]:
        if not is_key(manifest_id):
            raise ManifestError(manifest_id[:12], "is not a manifest id")
        try:
            return _shards_of(self._home, manifest_id)
        except OSError as error:
            problem = f"is not in {self._home} ({error.strerror}), so it cannot be pinned; prefetch it"
            raise ManifestError(manifest_id[:12], problem) from error


@lru_cache(maxsize=64)
def _shards_of(home: Path, manifest_id: str) -> frozenset[str]:
    """A manifest never changes, so it is read once; and not as one, which takes seconds for 50,000 shards."""
    data = (home / "manifests" / f"{manifest_id}.json").read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest_id:
        raise ManifestError(manifest_id[:12], "was altered on disk; prefetch again")
    return frozenset(str(shard["key"]) for shard in json.loads(data)["shards"])
