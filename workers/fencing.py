"""Which coordinator a node listens to: the newest it has heard of, which its store remembers. No Ray.

Every call to an agent and every task says the epoch of the coordinator that it comes from. A node that has heard of a
later one refuses with StaleCoordinator; a later one is noted before anything is done for it. So of two coordinators of
one cluster the older gets nothing done on any node that has heard of the younger, whatever it believes itself.
Epochs mean something inside one cluster only (a node's store may serve a cluster and, now and then, a process that
embeds one), so each cluster has its own file:

    <home>/coordinator/<digest of the cluster's name>.epoch
"""

from __future__ import annotations

import json
import threading
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from crucible.cache.store import Store
from crucible.errors import StaleCoordinator, StoreError
from crucible.refs import digest_of

FOLDER = "coordinator"
CLUSTERS_KEPT = 16
"""Files of clusters that a store remembers. An older one is over, or says its epoch again with its next word."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """One coordinator's turn."""

    cluster: str
    """Ray's name for its session."""
    number: int
    """Each turn's is higher than the one before."""
    coordinator: str
    """Tells two apart that took the same number, where Ray forgot who had it."""

    @property
    def file(self) -> str:
        return f"{FOLDER}/{digest_of({'cluster': self.cluster})[:16]}.epoch"


class Fence:
    """What a node's processes let through.

    Concurrency: any number of threads and processes of one node. A disk that cannot be written leaves each process with
    what it has heard itself.
    """

    def __init__(self, store: Store, who: str) -> None:
        self._store, self._who = store, who
        self._lock = threading.Lock()
        self._heard: dict[str, Epoch] = {}

    def check(self, epoch: Epoch) -> None:
        """Return if `epoch` is the newest of its cluster, and remember it. Raises StaleCoordinator."""
        if self._heard.get(epoch.cluster, epoch) == epoch == _read(self._store, epoch):
            return
        with self._lock, ExitStack() as stack:
            with suppress(StoreError):
                stack.enter_context(self._store.lock("epoch"))
            for newest in (self._heard.get(epoch.cluster), _read(self._store, epoch)):
                if newest is not None and newest != epoch and newest.number >= epoch.number:
                    raise StaleCoordinator(self._who, epoch.number, newest.number)
            self._heard[epoch.cluster] = epoch
            with suppress(StoreError):
                self._store.write_small(epoch.file, json.dumps(asdict(epoch)).encode())
                _forget_oldest(self._store.home / FOLDER)


def _read(store: Store, epoch: Epoch) -> Epoch | None:
    data = store.read_small(epoch.file)
    try:
        record = json.loads(data) if data else None
        found = None if record is None else Epoch(str(record["cluster"]), int(record["number"]), record["coordinator"])
    except (ValueError, KeyError, TypeError):
        return None
    return found if found is not None and found.cluster == epoch.cluster else None


def _forget_oldest(folder: Path) -> None:
    with suppress(OSError):
        files = sorted(folder.glob("*.epoch"), key=lambda path: path.stat().st_mtime_ns)
        for path in files[:-CLUSTERS_KEPT]:
            path.unlink(missing_ok=True)
