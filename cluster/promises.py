"""Who may drop which copy, so that no two nodes drop the last two of a shard. Pure: the time comes as an argument.

A permission counts at once as if the copy were gone, and goes on counting for `KEPT_S`, whatever is reported meanwhile:
by then it is gone, or its node has asked again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from collections.abc import Set as AbstractSet

from crucible.refs import NodeId

KEPT_S = 120.0
"""Longer than an agent takes to remove what it may remove: it asks about that many at a time."""


class Promises:
    """Permissions that were given.

    Concurrency: none; its owner guards it, together with what it is told of the holders.
    """

    def __init__(self, unsure_until: float = -math.inf) -> None:
        """Until then a coordinator before this one may have promised what nobody here knows of: so nobody else's copy
        counts, and only what its source has may go."""
        self._unsure_until = unsure_until
        self._given: dict[str, dict[NodeId, float]] = {}
        """key -> node -> until when its copy does not count."""
        self._next_sweep = 0.0

    def could(
        self,
        node: NodeId,
        keys: Collection[str],
        holders: Callable[[str], AbstractSet[NodeId]],
        staying: AbstractSet[NodeId],
        again: Callable[[str], bool],
        now: float,
    ) -> list[str]:
        """Those of `keys` that `node` might drop now: another of the `staying` nodes holds it, or its source has it.

        `again` says of a shard whether its source answers; asked only about last copies.
        """
        allowed = []
        for key in keys:
            given = self._given.get(key, {})
            others = {one for one in holders(key) & staying if given.get(one, now) <= now} - {node}
            if (others and now >= self._unsure_until) or again(key):
                allowed.append(key)
        return allowed

    def give(self, node: NodeId, keys: Collection[str], now: float) -> None:
        """The node may drop these, for all of which it `could`."""
        self._sweep(now)
        for key in keys:
            self._given.setdefault(key, {})[node] = now + KEPT_S

    def _sweep(self, now: float) -> None:
        if now < self._next_sweep:
            return
        self._next_sweep = now + KEPT_S
        for key, given in list(self._given.items()):
            if all(until <= now for until in given.values()):
                del self._given[key]

    def __len__(self) -> int:
        return len(self._given)
