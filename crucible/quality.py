"""How well an order mixes, beside a permutation drawn at random. Pure; for reports and tests, not for readers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crucible.errors import UsageError
from crucible.order import Int64s
from crucible.streams import Walk


class Quality(NamedTuple):
    """What an order of rows looks like to a reader. Lower is better but for `shards_per_batch`."""

    rank_correlation: float
    """Of position and row id: 1 for the source's order, near 0 for a random one."""
    same_shard_next: float
    """Of two rows in a row, how often both are of one shard: 1 for the source's order, about 1/S for a random one."""
    shards_per_batch: float
    """Different shards in a batch, on average."""


def quality(ids: Int64s, shard_rows: Int64s, batch: int) -> Quality:
    """Of rows `ids`, in the order in which they are read. `shard_rows` are the rows of each shard, in source order."""
    if len(ids) < 2 or batch < 1:
        raise UsageError(f"two rows and a batch of one at least, got {len(ids)} and {batch}")
    shard = np.searchsorted(np.cumsum(shard_rows), ids, side="right")
    places = np.argsort(np.argsort(ids))
    spread = float(np.std(places)) * float(np.std(np.arange(len(ids))))
    covariance = float(np.mean((places - places.mean()) * (np.arange(len(ids)) - (len(ids) - 1) / 2)))
    whole = len(ids) // batch * batch
    batches = shard[:whole].reshape(-1, batch) if whole else shard[None]
    different = (np.diff(np.sort(batches, axis=1), axis=1) != 0).sum(axis=1) + 1
    return Quality(covariance / spread, float(np.mean(shard[1:] == shard[:-1])), float(different.mean()))


def measured(
    walk: Walk, shard_rows: Int64s, *, batch: int, rank: int = 0, world_size: int = 1, most: int = 1 << 20
) -> tuple[Quality, Quality]:
    """(of the walk, of as many rows drawn at random) for the first `most` rows that a rank reads."""
    total = int(shard_rows.sum())
    positions = np.arange(rank, total, world_size, dtype=np.int64)[:most]
    random = np.random.default_rng(0).permutation(total)[: len(positions)]
    return quality(walk.rows(positions), shard_rows, batch), quality(random, shard_rows, batch)
