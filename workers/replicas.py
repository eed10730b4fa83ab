"""The Ray task that brings copies of shards to a node, many at a time: a task each would cost more than a small shard.

One that cannot be brought does not stop the others. What comes back is small: what went wrong, and what was moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray as untyped_ray

from crucible.errors import CrucibleError, StoreError
from crucible.refs import ShardInfo
from crucible.report import Counts, Tally
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


copy_shards_task: Any = ray.remote(num_cpus=0, max_retries=0)(_copy_shards)
