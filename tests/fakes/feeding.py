"""A `FeedingSource` that copies shards from a far folder into a store, when the test lets it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from crucible.cache.store import Store
from crucible.errors import SourceUnavailable
from crucible.manifest import Manifest
from crucible.refs import ShardInfo
from crucible.stopping import check, never

WAIT_S = 60.0


def until(true: Callable[[], object]) -> None:
    """Wait for it, with a bound."""
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def feed_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("crucible-feed")]


class FarSource:
    """Shards of the folder `far`; what was fetched lies in the store at `home`."""

    def __init__(self, far: Path, home: Path) -> None:
        self.rank: int | None = 3
        self.stall_log_s = WAIT_S
        self.store = Store(home)
        self.holds = self.store.holds
        self.far = far
        self.fetched: list[str] = []
        """Keys in the order in which their fetches began."""
        self.came: Counter[str] = Counter()
        self.open = threading.Event()
        """Fetches wait for it."""
        self.open.set()
        self.failing: set[str] = set()
        self.looks = 0

    def has(self, shard: ShardInfo) -> bool:
        self.looks += 1
        return self.store.has_shard(shard)

    def path(self, manifest: Manifest, shard: ShardInfo, stopped: Callable[[], bool] = never) -> Path:
        path = self.store.shard_path(shard.key)
        if path.exists():
            return path
        self.fetched.append(shard.key)
        while not self.open.wait(0.01):
            check(stopped)
        if shard.key in self.failing:
            raise SourceUnavailable(shard.key, "far", "it is broken")
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        shutil.copyfile(self.far / f"{shard.key}.arrow", scratch)
        scratch.rename(path)
        self.came[shard.key] += 1
        return path

    def doing(self, shard: ShardInfo) -> str:
        return f"carries {shard.key[:4]} over the hills"

    def note(self) -> Mapping[str, int]:
        return dict(self.came)
