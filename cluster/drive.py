"""Perform what the mind commands, and tell it what happened. The same loop over Ray tasks and over threads.

An `Executor` starts work and gives futures; this module waits for them with a bound, turns outcomes into events, and
turns the finished state into manifests. It imports no Ray, so a laptop never pays for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import pyarrow as pa

from crucible.cluster.items import Joined, sizes_of
from crucible.cluster.locked import check_made
from crucible.cluster.place import NO_RACKS
from crucible.cluster.prepare import Prepared
from crucible.cluster.track import (
    STEP,
    Command,
    CopyDone,
    CopyFailed,
    CopyShard,
    Event,
    Fail,
    Finish,
    ItemDone,
    ItemFailed,
    JobState,
    NodesChanged,
    RunItem,
    Started,
    Together,
    Wished,
    apply,
)
from crucible.errors import ClusterError, CrucibleError, RowsMismatch, SourceUnavailable, StoreError, VersionSkew
from crucible.features import dump_features, features_of, unify
from crucible.hub.governor import Waiting
from crucible.manifest import Manifest, pack_schema
from crucible.refs import NodeId, ShardInfo, WorkItem
from crucible.report import Counts, ItemResult, JobReport, Progress, SplitReport
from crucible.workers.work import Gate, Workplace, run_item

TICK_S = 1.0
"""How long the loop waits for an outcome before it looks at the nodes again."""
MOST_LOCAL = 4
"""Items that are converted at a time without Ray: each holds its share of memory."""
AHEAD = 2
"""Items beside these that download, or wait for the disk, so that the cores have work."""
LOCAL = NodeId("local")
NOTHING = Counts()


class Executor(Protocol):
    """Where work runs."""

    def run(self, command: RunItem) -> Future[ItemResult]: ...

    def copy(self, command: CopyShard) -> Future[Counts]: ...

    def nodes(self) -> Mapping[NodeId, float]:
        """The nodes that can take work now, with their weights."""
        ...

    def as_error(self, error: BaseException, what: str) -> tuple[CrucibleError, bool]:
        """(typed error, may it pass) for what a future raised."""
        ...


class LocalExecutor:
    """Work in threads of this process: one node, no Ray.

    An item a core is converted, at most `MOST_LOCAL`, and `AHEAD` more may download meanwhile or wait for the disk. For
    fewer items each uses more threads (`convert`). Items that did all in one go went in step: on two cores they
    downloaded, decoded and waited for the disk together, and a quarter of the time nobody worked.
    """

    def __init__(self, place: Workplace) -> None:
        gate = Gate(min(MOST_LOCAL, len(os.sched_getaffinity(0))))
        self._place = replace(place, gate=gate)
        self._pool = ThreadPoolExecutor(gate.most + AHEAD, thread_name_prefix="crucible-work")

    def run(self, command: RunItem) -> Future[ItemResult]:
        return self._pool.submit(run_item, command.item, self._place)

    def copy(self, command: CopyShard) -> Future[Counts]:
        raise ClusterError(f"shard {command.shard.key[:12]}: there is no other node to copy it to")

    def nodes(self) -> Mapping[NodeId, float]:
        return {self._place.node: 1.0}

    def as_error(self, error: BaseException, what: str) -> tuple[CrucibleError, bool]:
        return as_crucible_error(error, what), False  # the same thread, disk and network would fail again

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def as_crucible_error(error: BaseException, what: str) -> CrucibleError:
    """A typed error as it is; anything else is a defect of ours, and is named as one with its own text."""
    if isinstance(error, CrucibleError):
        return error
    wrapped = ClusterError(f"{what}: unexpected {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def may_pass(error: CrucibleError) -> bool:
    """True for errors that another node, or a later try, may not have: a source that is down, a disk that is full,
    a node of another version."""
    return isinstance(error, (SourceUnavailable, StoreError, VersionSkew))


def run_job(
    job: str,
    prepared: Prepared,
    executor: Executor,
    *,
    limit_bytes: int,
    replicas: int = 1,
    part_bytes: int | None = None,
    prefer: Callable[[WorkItem], NodeId | None] = lambda _: None,
    observe: Callable[[Progress], None] = lambda _: None,
    arrived: Callable[[], int] = lambda: 0,
    slots: int | None = None,
    racks: Mapping[NodeId, str] = NO_RACKS,
    wishes: Callable[[], Sequence[tuple[int, ...]]] = tuple,
    done: Callable[[ItemResult], None] = lambda _: None,
    waiting: Callable[[], Waiting | None] = lambda: None,
    offset_s: float = 0.0,
    metadata: Counts = NOTHING,
) -> tuple[tuple[Manifest, ...], JobReport]:
    """Do all items of a prepared request, and build the manifests. Raises the first error that would not pass.

    Items with files bigger than `part_bytes` have a spare node. `prefer` names a node that has an item done already.
    `observe` gets the progress about once a second; `arrived` says how many source bytes came so far, `waiting` how
    long the Hub wants to be left alone, for the countdown. `slots` items are given to a node at a time; replicas are
    spread over `racks`. `wishes` gives what readers asked for since it was called last, as indexes of `job_items`;
    `done` is told of every item's end.
    """
    began = time.monotonic() - offset_s
    items = job_items(prepared)
    total = sum(sizes_of(items))
    found = {item.index: node for item in items if (node := prefer(item)) is not None}
    state = JobState(
        items, executor.nodes(), limit_bytes, replicas, racks=racks, prefer=found, part_bytes=part_bytes, slots=slots
    )
    running: dict[Future[Any], Command] = {}
    over: SimpleQueue[Future[Any]] = SimpleQueue()
    counts = metadata
    copies = 0
    state, commands = apply(state, Started())
    while True:
        for command in commands:
            match command:
                case RunItem():
                    future: Future[Any] = executor.run(command)
                    running[future] = command
                    future.add_done_callback(over.put)
                case CopyShard():
                    future = executor.copy(command)
                    running[future] = command
                    future.add_done_callback(over.put)
                case Fail(error):
                    observe(Progress(job, "failed", len(state.done), len(items), arrived(), total))
                    raise error
                case Finish():
                    manifests = build_manifests(prepared, state.done)
                    report = job_report(job, prepared, manifests, state, counts, time.monotonic() - began)
                    observe(Progress(job, "finished", len(items), len(items), total, total))
                    return manifests, replace(report, copies=copies)
        outcomes: list[Event] = []
        for future in _ended(over, 0.0 if state.more else TICK_S):
            event = _event(running.pop(future), future, executor)
            if isinstance(event, CopyDone):
                counts, copies = counts + future.result(), copies + 1
            elif isinstance(event, ItemDone):
                counts += event.result.counts  # also of what is lost later, and done again
                done(event.result)
            outcomes.append(event)
        # before the outcomes, because what ended makes room for what is wished for
        events: list[Event] = [*(Wished(indexes) for indexes in wishes()), *outcomes]
        nodes = executor.nodes()
        if nodes.keys() != state.nodes.keys():
            events.append(NodesChanged(nodes))
        state, commands = apply(state, Together(events))
        phase = "items" if state.phase == "new" else state.phase
        progress = Progress(job, phase, len(state.done), len(items), min(total, arrived()), total, state.retries)
        observe(with_waiting(progress, waiting()))


def _ended(over: SimpleQueue[Future[Any]], wait_s: float) -> list[Future[Any]]:
    """What has ended, a bounded number; after a while, when nothing has, []."""
    ended: list[Future[Any]] = []
    with suppress(Empty):
        ended.append(over.get(timeout=wait_s) if wait_s else over.get_nowait())
        while len(ended) < STEP:
            ended.append(over.get_nowait())
    return ended


def with_waiting(progress: Progress, waiting: Waiting | None) -> Progress:
    """A running job's progress with the wait that the Hub asked for, if somebody waits."""
    if waiting is None or progress.phase in ("finished", "failed"):
        return progress
    left = max(0.0, waiting.until - time.monotonic())
    return replace(progress, waiting_s=left, waiting_for=f"{waiting.bucket}, {waiting.reason}")


def _event(command: Command, future: Future[Any], executor: Executor) -> Event:
    error = future.exception()
    match command:
        case RunItem(item, node):
            if error is None:
                return ItemDone(future.result())
            typed, passing = executor.as_error(error, ", ".join(file.path for file in item.files[:3]))
            return ItemFailed(item.index, node, typed, passing)
        case CopyShard(shard, _, node):
            if error is None:
                return CopyDone(shard.key, node)
            return CopyFailed(shard.key, node, executor.as_error(error, f"shard {shard.key[:12]}")[0])
        case _:
            raise AssertionError(f"{command} has no future")


def job_items(prepared: Prepared) -> Sequence[WorkItem]:
    """All splits' items in one row, numbered through: the mind's indexes are a job's, a manifest's are a split's."""
    return prepared.items[0] if len(prepared.items) == 1 else Joined(prepared.items)


def build_manifests(prepared: Prepared, done: Mapping[int, ItemResult]) -> tuple[Manifest, ...]:
    """One manifest a split, its shards in source order.

    Raises SchemaConflict when its files disagree, RowsMismatch when they have other rows than the card declares, and
    LockMismatch when they are not what the request is locked to.
    """
    manifests = []
    offset = 0
    for split, items in zip(prepared.splits, prepared.items, strict=True):
        results = [done[offset + item.index] for item in items]
        offset += len(items)
        manifests.append(build_manifest(prepared, split.name, items, results))
    check_rows(prepared, manifests)
    check_made(prepared.request, manifests)
    return tuple(manifests)


def check_rows(prepared: Prepared, manifests: Sequence[Manifest]) -> None:
    """Raise RowsMismatch if the card declares other rows than the splits have, unless the request says not to look."""
    declared = [split.declared_rows for split in prepared.splits] if prepared.request.check_rows else []
    wrong = [
        (manifest.split, rows, manifest.rows)
        for manifest, rows in zip(manifests, declared, strict=False)
        if rows is not None and rows != manifest.rows
    ]
    if wrong:
        raise RowsMismatch(prepared.repo.repo_id, wrong)


def build_manifest(
    prepared: Prepared, split: str, items: Sequence[WorkItem], results: Sequence[ItemResult]
) -> Manifest:
    """The manifest of one split from what became of its items. Raises SchemaConflict."""
    schemas: dict[str, str] = {}
    named: dict[str, str] = {}  # schema digest -> the first path that has it, for the error of a conflict
    shards: list[ShardInfo] = []
    for item, result in zip(items, results, strict=True):
        for digest, packed in result.schemas:
            schemas[digest] = packed
            named.setdefault(digest, item.files[0].path)
        shards += [replace(shard, item=item.index) for shard in sorted(result.shards, key=lambda s: s.number)]
    draft = Manifest(
        prepared.repo,
        prepared.config,
        split,
        None,
        "",
        tuple(sorted(schemas.items())),
        tuple(items),
        tuple(shards),
        variant=prepared.request.variant,
    )
    # files that are empty altogether have no columns to speak of
    unified = (
        unify([(path, draft.arrow_schema_of(digest)) for digest, path in named.items()]) if named else pa.schema([])
    )
    digest, packed = pack_schema(unified)
    schemas[digest] = packed
    found = features_of(unified)
    features = dump_features(found) if found is not None else None
    return replace(draft, schema=digest, schemas=tuple(sorted(schemas.items())), features=features)


def job_report(
    job: str,
    prepared: Prepared,
    manifests: tuple[Manifest, ...],
    state: JobState,
    counts: Counts,
    seconds: float,
) -> JobReport:
    """What a job did; `counts` are those of all its tasks together."""
    return JobReport(
        job=job,
        repo=prepared.request.repo.repo_id,
        commit=prepared.repo.revision,
        config=prepared.config,
        splits=split_reports(manifests),
        counts=counts,
        seconds=seconds,
        nodes=tuple((node, shards, size) for node, (shards, size) in sorted(state.done.births().items())),
        reused_items=state.done.reused,
        partial=prepared.request.partial,
    )


def split_reports(manifests: tuple[Manifest, ...]) -> tuple[SplitReport, ...]:
    return tuple(
        SplitReport(m.split, m.id, m.rows, len(m.shards), m.size, sum(item.size for item in m.items)) for m in manifests
    )


def cached_report(job: str, prepared: Prepared, counts: Counts, seconds: float) -> JobReport:
    """The report of a job that found everything done."""
    return JobReport(
        job=job,
        repo=prepared.request.repo.repo_id,
        commit=prepared.repo.revision,
        config=prepared.config,
        splits=split_reports(prepared.manifests),
        counts=counts,
        seconds=seconds,
        nodes=(),
        reused_items=sum(len(manifest.items) for manifest in prepared.manifests),
        partial=prepared.request.partial,
    )
