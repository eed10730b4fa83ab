"""One job, from request to manifests: prepare, look what is there, do the rest, let every node know. No call to Ray."""

from __future__ import annotations

import time
import traceback
from dataclasses import replace

from crucible.cache.store import Store
from crucible.cluster.agents import Agents
from crucible.cluster.drive import as_crucible_error, cached_report, run_job
from crucible.cluster.early import early_manifests
from crucible.cluster.executor import RayExecutor
from crucible.cluster.jobs import Job
from crucible.cluster.prepare import Prepared, prepare
from crucible.config import Settings
from crucible.refs import DataRequest
from crucible.report import Progress, Tally
from crucible.workers.governing import cluster_governor
from crucible.workers.tasks import JobOptions


class Runner:
    """Runs jobs over the agents of a cluster. `store` is this node's.

    Concurrency: a call a job, each in a thread of its own.
    """

    def __init__(self, store: Store, agents: Agents) -> None:
        self._store, self._agents = store, agents

    def run(
        self, job: str, record: Job, request: DataRequest, options: JobOptions, replicas: int, nodes: int | None
    ) -> None:
        """Fills in the record: its progress, then its report or the error that ended it. Raises nothing."""
        began = time.monotonic()
        try:
            settings = replace(options.on_this_node(), token=record.token)
            governor = record.governor = cluster_governor(settings)
            tally = Tally()
            prepared = prepare(request, settings, self._store, tally, governor=governor)
            self._begin_readers(record, prepared, settings)
            self._agents.ensure()
            self._agents.rebuild()
            if prepared.cached and self._agents.all_held(prepared.manifests, replicas):
                self._agents.share(prepared, prepared.manifests)
                record.readers.finish(prepared.manifests)
                report = cached_report(job, prepared, tally.counts, time.monotonic() - began)
                record.report = replace(report, notes=self._agents.notes())
                record.progress = Progress(job, "finished")
                return
            if prepared.cached:  # the manifest is known but shards of it are gone: make them again
                prepared = prepare(request, settings, self._store, tally, again=True, governor=governor)
                self._begin_readers(record, prepared, settings)
            options = replace(options, pyarrow=self._agents.writers())
            executor = RayExecutor(self._agents, options, job, nodes)
            manifests, report = run_job(
                job,
                prepared,
                executor,
                limit_bytes=options.inflight_bytes,
                replicas=replicas,
                # source files that stay in a Hub cache do not pass through the store, where a spare keeps its ranges
                part_bytes=None if options.keep_raw else options.part_bytes,
                prefer=self._agents.where_done,
                observe=lambda progress: setattr(record, "progress", progress),
                arrived=lambda: record.arrived,
                slots=executor.slots,
                wishes=record.readers.wishes,
                done=record.readers.done,
                offset_s=time.monotonic() - began,
                metadata=tally.counts,
            )
            self._agents.share(prepared, manifests)
            record.readers.finish(manifests)
            record.report = replace(report, notes=self._agents.notes())
        except Exception as error:  # noqa: BLE001 - whatever ends a job must reach the one who waits for it
            record.error = as_crucible_error(error, f"job {job}")
            if record.error is not error:
                traceback.print_exc()
            record.progress = replace(record.progress, phase="failed")

    def _begin_readers(self, record: Job, prepared: Prepared, settings: Settings) -> None:
        record.readers.begin(
            prepared, lambda: early_manifests(prepared, settings, self._store, Tally(), governor=record.governor)
        )
