"""Two places that never meet but by a bundle: one that prefetched from a Hub, one that has no Hub."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import crucible
from crucible.bundle import BundleReport
from crucible.cache.store import Store
from crucible.cluster.bundles import export_bundle, import_bundle
from crucible.hashing import shard_hasher
from crucible.lockfile import NAME, lock_from_json
from crucible.refs import canonical_json, digest_of
from tests.hubserver.faults import FaultyHub

CARD = b"""---
configs:
- config_name: main
  data_files:
  - split: train
    path: data/*.jsonl
  - split: test
    path: test.jsonl
---
"""
NOWHERE = "http://127.0.0.1:9"


def files() -> dict[str, bytes | Path]:
    """A repo of two splits of JSON lines: one of several shards (of 32 KiB), one with nested columns."""
    lines = [
        b"".join(
            json.dumps({"id": i, "text": hashlib.sha256(str(i).encode()).hexdigest() * 2, "tags": [i, i + 1]}).encode()
            + b"\n"
            for i in range(start, start + 300)
        )
        for start in (0, 300)
    ]
    nested = [{"id": i, "nested": {"a": [i], "b": None if i % 2 else str(i)}} for i in range(50)]
    test = b"".join(json.dumps(one).encode() + b"\n" for one in nested)
    return {"README.md": CARD, "data/a.jsonl": lines[0], "data/b.jsonl": lines[1], "test.jsonl": test}


@dataclass
class Sides:
    """Outside there is a Hub and the data; inside there is nothing, and nothing can be reached."""

    hub: FaultyHub
    outside: Path
    inside: Path
    monkeypatch: pytest.MonkeyPatch

    def at(self, home: Path, *, offline: bool = False) -> None:
        """Be the machine whose store is `home`."""
        self.monkeypatch.setenv("CRUCIBLE_HOME", str(home))
        self.monkeypatch.setenv("HF_HOME", str(home / "hf"))
        self.monkeypatch.setenv("HF_ENDPOINT", NOWHERE if home == self.inside else self.hub.endpoint)
        if offline:
            self.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        else:
            self.monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def export(self, out: Path | str, **named: Any) -> BundleReport:
        self.at(self.outside)
        return export_bundle("org/data", out=out, **named)

    def take(self, path: Path | str, **named: Any) -> BundleReport:
        """Import inside, and stay there."""
        self.at(self.inside, offline=True)
        return import_bundle(path, **named)

    def inside_is_empty(self) -> bool:
        """True if no name leads to anything inside, and nothing but whole shards lies there."""
        store = Store(self.inside)
        left = list((self.inside / "tmp").glob("*/*"))
        return not list(store.manifests()) and not store.names() and not left


@pytest.fixture
def sides(hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sides:
    """`org/data` is on the Hub, and loaded outside."""
    hub.import_files("org/data", files())
    monkeypatch.setenv("CRUCIBLE_SHARD_BYTES", "32768")
    monkeypatch.setenv("CRUCIBLE_TRIES", "1")
    made = Sides(hub, tmp_path / "outside", tmp_path / "inside", monkeypatch)
    made.at(made.outside)
    crucible.load_dataset("org/data")
    hub.clear_log()
    return made


def everything() -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Split -> (features, rows) of `org/data` as this machine has it, in order of the splits."""
    found: Any = crucible.load_dataset("org/data")
    return {name: (str(one.features), one.to_list()) for name, one in found.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lock_dict(folder: Path) -> dict[str, Any]:
    return lock_from_json((folder / NAME).read_bytes(), "here").to_dict()


def rewritten(folder: Path, key: str, data: bytes) -> None:
    """Put other bytes in the place of a shard, and let the lock file say so."""
    digest = shard_hasher()
    digest.update(data)
    raw = lock_dict(folder)
    for manifest, split in zip(raw["manifests"], raw["splits"], strict=True):
        for shard in manifest["shards"]:
            if shard["key"] == key:
                shard["digest"] = digest.hexdigest()
        split["manifest"] = digest_of(manifest)
    (folder / "shards" / key[:2] / f"{key}.arrow").write_bytes(data)
    (folder / NAME).write_bytes(canonical_json({**raw, "digest": digest_of(raw)}))
