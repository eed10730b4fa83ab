"""The cluster's secret as its coordinator knows it, and how it is changed while readers read.

A change has two rounds, because a process reads its node's file and asks the agents of others: first every agent
accepts the new secret besides the old one, then each node's file gets the new one, and the old one is accepted for a
while. An agent that a round does not reach asks for what it missed as soon as the coordinator meets it again. What is
secret crosses Ray in replies only: an argument is kept and shown by more parts of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from crucible.cache.store import Store
from crucible.refs import NodeId
from crucible.workers.secret import News, Secret, ensure_numbered, keep_old, keep_secret, new_secret

OVERLAP_S = 600.0
"""How long an old secret is accepted unless it is said otherwise: longer than one shard takes to come."""
Round = Callable[[], Mapping[NodeId, str]]
"""Has every agent ask for the news; gives what was wrong where it did not."""


class Keys:
    """Concurrency: any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._now = ensure_numbered(store)
        self._coming: Secret | None = None
        self._overlap_s = OVERLAP_S
        self._lock, self._turning = threading.Lock(), threading.Lock()

    @property
    def number(self) -> int:
        """Which secret this is."""
        return self._now.number

    def news(self) -> News:
        """What an agent is to know now."""
        with self._lock:
            return News(self._now, self._coming, self._overlap_s)

    def turn(self, overlap_s: float, tell: Round) -> dict[str, Any]:
        """Change the secret; the old one is refused `overlap_s` seconds later. Gives the number, and who missed it.

        Raises StoreError when this node cannot keep the new one: nothing has changed then.
        """
        with self._turning:
            with self._lock:
                self._overlap_s = overlap_s
                self._coming = new_secret(self._now.number + 1)
            try:
                tell()
                self._keep(self._coming, overlap_s)
            finally:
                with self._lock:
                    self._coming = None
            return {"number": self._now.number, "overlap_s": overlap_s, "missed": dict(tell())}

    def adopt(self, newer: Secret) -> None:
        """An agent of this cluster has a later one: this node was not there when it was changed. Raises StoreError."""
        with self._turning:
            if newer.number > self._now.number:
                self._keep(newer, self._overlap_s)

    def _keep(self, secret: Secret, overlap_s: float) -> None:
        keep_old(self._store, self._now.text, overlap_s)
        keep_secret(self._store, secret.text, secret.number)
        with self._lock:
            self._now = secret
