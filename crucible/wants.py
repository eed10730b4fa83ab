"""Which shards a reader will need, in the order in which it will need them. Pure; what is brought ahead goes by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from crucible.manifest import Manifest
from crucible.order import shard_rows
from crucible.refs import ShardInfo
from crucible.share import Share
from crucible.streams import Walk

FIRST_ROWS = 1 << 10
LOOK_ROWS = 1 << 15
"""Positions looked through at once: few at first, as a reader waits for the first look, then twice as many each time. A
lane reader comes to a new window of shards after many more."""
SAMPLES = 32
"""Rows of a shard of average size that are looked at, of those that a process reads of it. A shard that none of them is
of is not told, and only found when it is read."""


def shards_wanted(
    manifests: Sequence[Manifest], walk: Walk, share: Share, total: int
) -> Iterator[tuple[Manifest, ShardInfo]]:
    """Each shard that the units of `share` touch, once, by the first row of it that they come to.

    `walk`'s row ids count through the rows of `manifests` in turn. Lazy: looks no further than it is asked for. Of big
    shards it looks at `SAMPLES` rows or so, since all it is for is what to bring ahead.
    """
    rows = [shard_rows(manifest) for manifest in manifests]
    stops = np.cumsum(np.concatenate(rows)) if rows else np.zeros(0, dtype=np.int64)
    owners = np.repeat(np.arange(len(manifests)), [len(one) for one in rows])
    first = np.cumsum([0, *(len(one) for one in rows)])
    told = np.zeros(len(stops), dtype=bool)
    units, done, left = share.units(total), 0, len(stops)
    look = FIRST_ROWS
    every = max(1, total // max(1, SAMPLES * len(stops) * share.world_size * share.workers * share.unit))
    while done < units and left:
        stop, look = min(units, done + max(1, look // share.unit) * every), min(LOOK_ROWS, 2 * look)
        ids = walk.rows(share.positions(total, done, stop, every) % max(1, total))
        met = np.searchsorted(stops, ids, side="right")
        fresh, place = np.unique(met, return_index=True)
        fresh = fresh[np.argsort(place)]
        for number in fresh[~told[fresh]].tolist():
            told[number] = True
            left -= 1
            manifest = manifests[int(owners[number])]
            yield manifest, manifest.shards[number - int(first[owners[number]])]
        done = stop
