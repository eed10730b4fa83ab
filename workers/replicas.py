"""The Ray task that brings copies of shards to a node, many at a time: a task each would cost more than a small shard.

One that cannot be brought does not stop the others. What comes back is small: what went wrong, and what was moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray as untyped_ray

from crucible.errors import CrucibleError, StoreError
from crucible.refs import ShardInfo
from crucible.report import Counts, ItemResult, Tally
from crucible.workers.tasks import JobOptions, copying
from crucible.workers.work import Workplace, copy_shard

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns


def copy_shards(
    wanted: Sequence[tuple[ShardInfo, tuple[str, ...]]], place: Workplace, secret: str
) -> tuple[dict[str, str], Counts]:
    """Bring each shard from one of its urls. (key -> why it could not be brought, what was moved.)

    After this node's disk refused one, the rest is not tried: it would be refused as well.
    """
    problems: dict[str, str] = {}
    tally = Tally()
    full = ""
    for shard, urls in wanted:
        try:
            if full:
                problems[shard.key] = full
            else:
                copy_shard(shard, urls, secret, place, tally)
        except StoreError as error:
            problems[shard.key] = full = str(error)
        except CrucibleError as error:
            problems[shard.key] = str(error)
    return problems, tally.counts


def _copy_shards(
    wanted: Sequence[tuple[ShardInfo, tuple[str, ...]]], options: JobOptions
) -> tuple[dict[str, str], Counts]:
    place, secret = copying(options)
    return copy_shards(wanted, place, secret)


def bring_items(
    wanted: Sequence[tuple[ItemResult, Sequence[tuple[str, ...]]]], place: Workplace, secret: str
) -> tuple[dict[str, str], Counts]:
    """Bring the shards of items, each from one of its urls, and record the items that are here whole then: as if they
    had been done on this node. What comes back is as of `copy_shards`."""
    shards = [one for item, urls in wanted for one in zip(item.shards, urls, strict=True)]
    problems, counts = copy_shards(shards, place, secret)
    for item, _ in wanted:
        if not any(shard.key in problems for shard in item.shards):
            try:
                place.store.put_item(item)
            except StoreError as error:
                problems |= dict.fromkeys((shard.key for shard in item.shards), str(error))
    return problems, counts


def _bring_items(
    wanted: Sequence[tuple[ItemResult, Sequence[tuple[str, ...]]]], options: JobOptions
) -> tuple[dict[str, str], Counts]:
    place, secret = copying(options)
    return bring_items(wanted, place, secret)


copy_shards_task: Any = ray.remote(num_cpus=0, max_retries=0)(_copy_shards)
bring_items_task: Any = ray.remote(num_cpus=0, max_retries=0)(_bring_items)
