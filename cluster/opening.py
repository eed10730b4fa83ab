"""Open a split for a reader that streams it: at once where the rows are known, whoever brings the data and when.

What is in this node's store is used as it is. Else a running job of the cluster is asked for what it knows; beside no
job the footers are read here. Where neither tells the rows, the reader waits until all is converted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from crucible.cache.store import Store
from crucible.cluster.early import early_manifests
from crucible.cluster.prepare import Prepared, prepare
from crucible.config import Settings
from crucible.errors import PrefetchFailed
from crucible.iterate import ShardSource
from crucible.manifest import Manifest, manifest_from_json
from crucible.refs import DataRequest
from crucible.report import Tally
from crucible.workers.asking import Line
from crucible.workers.early import LOST_S, EarlyShards
from crucible.workers.fetch import NodeShards
from crucible.workers.serve import read_address

log = logging.getLogger("crucible.opening")

FIRST_ASK_S, LAST_ASK_S = 0.05, 0.5
"""How long between two questions to the agent: twice as long each time."""


@dataclass(frozen=True)
class Opened:
    manifests: tuple[Manifest, ...]
    """One a split, whole ones; with rows, though maybe not with all shards."""
    source: ShardSource


def open_early(request: DataRequest, settings: Settings, whole: Callable[[Prepared], tuple[Manifest, ...]]) -> Opened:
    """The splits of `request` for a reader. `whole` makes all shards first, in this process.

    Raises what `load_dataset` raises, and PrefetchFailed when the job that it waited for has failed.
    """
    store = Store(settings.home)
    unheard_of = store.get_survey(request.repo, request.variant) is None
    if unheard_of and (found := _from_job(request, settings)) is not None:
        return found  # no request to the Hub at all
    prepared = prepare(request, settings, store, Tally(), reading=True)
    if prepared.cached:
        return Opened(prepared.manifests, NodeShards(settings))
    if not unheard_of and (found := _from_job(request, settings)) is not None:
        return found
    early = early_manifests(prepared, settings, store, Tally())
    if early is None:
        log.info("%s: its rows are known only when all is converted, so it is brought whole first", request.repo)
        return Opened(whole(prepared), NodeShards(settings))
    source = EarlyShards(settings, None, prepared.survey, prepared.revisions)
    return Opened(tuple(source.completed(manifest) for manifest in early), source)


def _from_job(request: DataRequest, settings: Settings) -> Opened | None:
    """From a job of this node's cluster; None if there is none, or nobody to ask."""
    if settings.agent_url is None and read_address(Store(settings.home)) is None:
        return None
    line, pause, said = Line(settings), FIRST_ASK_S, False
    job, heard_at = "", time.monotonic()
    while True:
        told = line.opening(request)
        state = "none" if told is None else str(told["state"])
        if told is not None and state in ("early", "done"):
            manifests = tuple(manifest_from_json(text.encode()) for text in told["manifests"])
            if state == "done":
                return Opened(manifests, NodeShards(settings))
            log.info("%s: read while job %s brings it", request.repo, told["job"])
            return Opened(manifests, EarlyShards(settings, told["job"], told["survey"], tuple(told["revisions"])))
        if told is not None and state in ("soon", "whole"):
            job, heard_at = str(told["job"]), time.monotonic()
            if state == "whole" and not said:
                said = True
                log.info("%s: its rows are known only when job %s has ended, which is waited for", request.repo, job)
        elif not job or time.monotonic() - heard_at > LOST_S:
            return None
        elif told is not None:
            _raise_if_failed(line, job)
        time.sleep(pause)
        pause = min(2 * pause, LAST_ASK_S)


def _raise_if_failed(line: Line, job: str) -> None:
    """The job that was waited for is about this request no more: has it failed, or is its coordinator a new one?"""
    told = line.wish(job, ())
    if told is not None and told["state"] == "failed":
        raise PrefetchFailed(job, str(told["error"]))
