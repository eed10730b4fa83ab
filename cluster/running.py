"""One job, from request to manifests: prepare, look what is there, do the rest, let every node know. No call to Ray."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from crucible.cache.store import Store
from crucible.cluster.agents import Agents
from crucible.cluster.drive import as_crucible_error, cached_report, run_job
from crucible.cluster.early import early_manifests
from crucible.cluster.executor import Known, RayExecutor
from crucible.cluster.items import sizes_of
from crucible.cluster.jobs import Job
from crucible.cluster.journal import ENDED
from crucible.cluster.prepare import Prepared, prepare
from crucible.cluster.remembered import with_progress
from crucible.config import Settings
from crucible.errors import RepoError, StaleCoordinator, TokenForgotten
from crucible.failpoints import reach
from crucible.manifest import Manifest
from crucible.refs import DataRequest, NodeId, ShardInfo
from crucible.report import Progress, Tally
from crucible.workers.governing import cluster_governor
from crucible.workers.tasks import JobOptions

MANY_ITEMS = 10_000
"""Of a job that is worth half a second before it begins."""


class Keeper(Protocol):
    """Who looks after what jobs leave behind."""

    def kept(self, manifests: Sequence[Manifest], replicas: int, options: JobOptions, job: str) -> None:
        """From now on so many nodes are to hold the shards of these manifests."""
        ...

    def racks(self) -> Mapping[NodeId, str]:
        """Where nodes stand, of those that say it."""
        ...


class Runner:
    """Runs jobs over the agents of a cluster. `store` is this node's; `note` keeps what is in a job's `value`.

    Concurrency: a call a job, each in a thread of its own.
    """

    def __init__(
        self,
        store: Store,
        agents: Agents,
        note: Callable[[str, Job], None],
        keeper: Keeper,
    ) -> None:
        self._store, self._agents, self._note, self._keeper = store, agents, note, keeper

    def run(
        self, job: str, record: Job, request: DataRequest, options: JobOptions, replicas: int, nodes: int | None
    ) -> None:
        """Fills in the record: its progress, then its report or the error that ended it. Raises nothing."""
        began = time.monotonic()
        try:
            settings = replace(options.on_this_node(), token=record.await_token())
            governor = record.governor = cluster_governor(settings)
            tally = Tally()
            commit = str(record.value["commit"])
            known: Mapping[str, Known] = {}
            prepared = prepare(request, settings, self._store, tally, governor=governor, commit=commit)
            self._pinned(job, record, prepared)
            reach("job.resolved")
            self._begin_readers(record, prepared, settings)
            self._agents.ensure()
            self._agents.rebuild()
            if prepared.cached and self._agents.all_held(prepared.manifests, replicas):
                self._agents.share(prepared, prepared.manifests)
                self._keeper.kept(prepared.manifests, replicas, options, job)
                record.readers.finish(prepared.manifests)
                report = cached_report(job, prepared, tally.counts, time.monotonic() - began)
                record.report = replace(report, notes=self._agents.notes())
                items, size = record.value["items"], record.value["bytes"]
                record.progress = Progress(job, "finished", items, items, size, size)
                return
            if prepared.cached:  # the manifest is known but shards of it are gone: make them again
                commit, known = prepared.repo.revision, known_items(prepared.manifests)
                prepared = prepare(request, settings, self._store, tally, again=True, governor=governor, commit=commit)
                self._begin_readers(record, prepared, settings)
            options = replace(options, pyarrow=self._agents.writers())
            executor = RayExecutor(self._agents, options, job, nodes, known)
            with _searched_once(sum(map(len, prepared.items))):
                manifests, report = run_job(
                    job,
                    prepared,
                    executor,
                    limit_bytes=options.inflight_bytes,
                    replicas=replicas,
                    # source files that stay in a Hub cache do not pass the store, where a spare keeps its ranges
                    part_bytes=None if options.keep_raw else options.part_bytes,
                    prefer=self._agents.where_done,
                    observe=lambda progress: self._observe(job, record, progress),
                    arrived=lambda: record.arrived,
                    slots=executor.slots,
                    racks=self._keeper.racks() if replicas > 1 else {},
                    wishes=record.readers.wishes,
                    done=record.readers.done,
                    offset_s=time.monotonic() - began,
                    metadata=tally.counts,
                )
            reach("job.sharing")
            self._agents.share(prepared, manifests)
            self._keeper.kept(manifests, replicas, options, job)
            reach("job.shared")
            record.readers.finish(manifests)
            record.report = replace(report, notes=self._agents.notes())
        except Exception as error:  # noqa: BLE001 - whatever ends a job must reach the one who waits for it
            self._failed(job, record, error)

    def _failed(self, job: str, record: Job, error: Exception) -> None:
        stale = self._agents.turn.over.is_set() or isinstance(error, StaleCoordinator)
        record.error = as_crucible_error(error, f"job {job}")
        if record.forgotten and isinstance(error, RepoError):
            record.error = TokenForgotten(job, str(error))
        if isinstance(error, StaleCoordinator):
            self._agents.turn.end(error)
        if as_crucible_error(error, "") is not error:
            traceback.print_exc()
        record.progress = replace(record.progress, phase="superseded" if stale else "failed")

    def _pinned(self, job: str, record: Job, prepared: Prepared) -> None:
        """Let the job stay at its commit, and know what it is about, whoever goes on with it."""
        splits = prepared.items or [manifest.items for manifest in prepared.manifests]
        items, size = sum(map(len, splits)), sum(sum(sizes_of(items)) for items in splits)
        record.value = {**record.value, "commit": prepared.repo.revision, "items": items, "bytes": size}
        self._note(job, record)

    def _observe(self, job: str, record: Job, progress: Progress) -> None:
        changed = progress.phase != record.progress.phase
        record.progress = progress
        if changed and progress.phase not in ENDED:
            record.value = with_progress(record.value, progress)
            self._note(job, record)

    def _begin_readers(self, record: Job, prepared: Prepared, settings: Settings) -> None:
        record.readers.begin(
            prepared, lambda: early_manifests(prepared, settings, self._store, Tally(), governor=record.governor)
        )


@contextmanager
def _searched_once(items: int) -> Iterator[None]:
    """For the time of a big job: its listing stays, and is not looked through for garbage again and again."""
    if items < MANY_ITEMS:
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def known_items(manifests: Sequence[Manifest]) -> dict[str, Known]:
    """Item key -> what a manifest says of it, of the items that have shards."""
    found: dict[str, Known] = {}
    for manifest in manifests:
        packed, shards = dict(manifest.schemas), dict[int, list[ShardInfo]]()
        for shard in manifest.shards:
            shards.setdefault(shard.item, []).append(shard)
        for index, mine in shards.items():
            schemas = tuple((digest, packed[digest]) for digest in sorted({shard.schema for shard in mine}))
            found[manifest.items[index].key] = tuple(mine), schemas
    return found
