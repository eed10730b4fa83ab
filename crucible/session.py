"""The public way in: `load_dataset`, `prefetch`, `pull`, `plan`, `status`, `nodes`, `locate`. Ray only where said.

`load_dataset` never starts Ray: what is not in this node's store and not on a peer it brings and converts here.
`prefetch` does: embedded in this process, or in a running cluster with `address`.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crucible.cache.lease import disk_time
from crucible.cache.store import Store
from crucible.cluster.connect import cluster, import_ray
from crucible.cluster.drive import LOCAL, LocalExecutor, cached_report, run_job
from crucible.cluster.look import Located as Located
from crucible.cluster.look import locate as locate
from crucible.cluster.look import nodes as nodes
from crucible.cluster.look import status as status
from crucible.cluster.manage import rotate_secret as rotate_secret
from crucible.cluster.opening import open_early
from crucible.cluster.plan import Plan
from crucible.cluster.prepare import Prepared, prepare, remember
from crucible.cluster.preview import preview
from crucible.config import Settings, settings_with
from crucible.data_files import DataFiles, data_request
from crucible.dataset import Dataset, DatasetDict, IterableDataset
from crucible.errors import ClusterError, CrucibleError, JobUnknown, StaleCoordinator, TokenForgotten, UsageError
from crucible.hub.client import repo_ref
from crucible.hub.governor import local_governor
from crucible.iterate import ShardSource
from crucible.manifest import Manifest
from crucible.refs import DataRequest, RepoType
from crucible.report import JobReport, Progress, Tally
from crucible.splits import each_split, request_of, split_texts, take
from crucible.workers.fetch import NodeShards
from crucible.workers.work import Workplace

if TYPE_CHECKING:
    from crucible.workers.pull import PullReport
    from crucible.workers.tasks import JobOptions

POLL_S = 0.2
SILENCE_S = 90.0
"""A coordinator that says nothing for so long is lost to us, though its connection stands: its host hangs or is cut
off. Longer than it may take to hear what the agents of a big cluster know."""

COORDINATOR_LIVES = 8
"""How often one `prefetch` begins anew with a coordinator that answers: one that died is replaced, and what was done is
found done. One that dies again and again does not die by accident."""


def load_dataset(
    path: str,
    name: str | None = None,
    data_dir: str | None = None,
    data_files: DataFiles | None = None,
    *,
    split: Any = None,
    features: Mapping[str, Any] | None = None,
    streaming: bool = False,
    revision: str | None = None,
    columns: Sequence[str] | None = None,
    partial: bool = False,
    endpoint: str | None = None,
    token: str | bool | None = None,
    **format_settings: Any,
) -> Dataset | DatasetDict | IterableDataset | dict[str, IterableDataset] | list[Any]:
    """Open a dataset repo (or a folder, `./my-repo`), as `datasets.load_dataset` would.

    `name` is the config. `split` is a name, a slice (`train[:10%]`, `train[100:200]`), a sum of these, or `all`, and
    gives a `Dataset` (an `IterableDataset` when `streaming`); a list or a dict of them gives a list or a dict. Without
    `split` all splits come, in a `DatasetDict` (a plain dict when `streaming`). `data_files` (a path or pattern, a list
    of them, or a dict of split to these) and `data_dir` choose other files of the repo than its card does; `features`
    gives the columns these types, whatever the card and the files say. `format_settings` are those of the files
    (`sep=";"`, `field="data"`), before those of the card. `partial` with `columns` brings only the ranges of those
    columns of parquet files, which no hash can vouch for: docs/transfer.md says what is checked instead.

    What an earlier `prefetch` left on this node or on a peer is used; the rest is downloaded, verified and converted
    here, before this returns: whole splits, a slice being a view of its split. With `streaming`, parquet comes while it
    is read, by a prefetch that is running or by this process; other formats wait for the prefetch, or are brought whole
    first. `columns` converts only those. `token` False means anonymous.

    Raises a RepoError that names what there is, OfflineMode, a TransferError, a ConversionError or a StoreError.
    """
    settings = settings_with(Settings.from_env(), endpoint=endpoint, token=token)
    wanted = None if split is None else request_of(split_texts(split))
    request = data_request(
        path,
        name,
        split=wanted,
        revision=revision,
        columns=columns,
        data_dir=data_dir,
        data_files=data_files,
        features=features,
        settings=format_settings,
        partial=partial,
    )
    source: ShardSource
    if streaming:
        found = open_early(request, settings, _whole(settings))
        whole, source = found.manifests, found.source
    else:
        whole, source = local_job(request, settings)[0], NodeShards(settings)
    manifests = {manifest.split: manifest for manifest in whole}
    kind = IterableDataset if streaming else Dataset
    opened = each_split(
        {name: name for name in manifests} if split is None else split,
        lambda expression: kind(take(expression, manifests), source),
    )
    made: Dataset | IterableDataset | dict[str, IterableDataset] | list[Any] = opened
    return DatasetDict(opened) if isinstance(opened, dict) and not streaming else made


def prefetch(
    repo: str,
    config: str | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
    columns: Sequence[str] | None = None,
    partial: bool = False,
    data_dir: str | None = None,
    data_files: DataFiles | None = None,
    features: Mapping[str, Any] | None = None,
    replicas: int = 1,
    address: str | None = None,
    nodes: int | None = None,
    keep_raw: bool = False,
    endpoint: str | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    **format_settings: Any,
) -> JobReport:
    """Bring a repo into the stores of a Ray cluster, each byte once, and return what was done.

    `split`, `columns`, `partial`, `data_dir`, `data_files` and `features` are `load_dataset`'s; of a slice the whole
    split is brought.
    `address` is a running cluster's (`auto` finds this machine's); without it, and without RAY_ADDRESS, Ray is embedded
    in this process and ends with it. `replicas` nodes will hold each shard; `nodes` limits how many take part.
    `keep_raw` leaves the source files that this job downloads in the Hub cache of the node that brought them.
    `on_progress` is called a few times a second.

    Raises what `load_dataset` raises, and ClusterUnreachable.
    """
    if replicas < 1 or (nodes is not None and nodes < 1):
        raise UsageError(f"replicas and nodes are at least 1, got replicas={replicas}, nodes={nodes}")
    if partial and keep_raw:
        raise UsageError("partial brings no whole file that could be kept: leave out partial, or keep_raw")
    settings = settings_with(Settings.from_env(), endpoint=endpoint)
    request = data_request(
        repo,
        config,
        split=split,
        revision=revision,
        columns=columns,
        data_dir=data_dir,
        data_files=data_files,
        features=features,
        settings=format_settings,
        partial=partial,
    )
    with cluster(address or settings.ray_address) as embedded:
        return _run_on_cluster(request, settings, embedded, replicas, nodes, keep_raw, on_progress)


def prefetch_locked(
    path: str | os.PathLike[str],
    *,
    replicas: int = 1,
    address: str | None = None,
    nodes: int | None = None,
    keep_raw: bool = False,
    endpoint: str | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> JobReport:
    """Prefetch exactly what the lock file at `path`, or that of a bundle, says. The others are `prefetch`'s arguments.

    Raises LockMismatch naming the source file, the setting or the shard that differs; names then lead to nothing new.
    """
    from crucible.cluster.bundles import request_for

    if replicas < 1 or (nodes is not None and nodes < 1):
        raise UsageError(f"replicas and nodes are at least 1, got replicas={replicas}, nodes={nodes}")
    settings = settings_with(Settings.from_env(), endpoint=endpoint)
    request, settings = request_for(os.fspath(path), settings)
    with cluster(address or settings.ray_address) as embedded:
        return _run_on_cluster(request, settings, embedded, replicas, nodes, keep_raw, on_progress)


def plan(
    repo: str,
    config: str | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
    columns: Sequence[str] | None = None,
    partial: bool = False,
    data_dir: str | None = None,
    data_files: DataFiles | None = None,
    features: Mapping[str, Any] | None = None,
    nodes: int = 1,
    ranks_per_node: int = 1,
    batch: int = 1,
    replicas: int = 1,
    endpoint: str | None = None,
    **format_settings: Any,
) -> Plan:
    """Say what a prefetch on `nodes` cold nodes would move and what each rank would then read. Moves no data.

    Reads the repo's listing and card, and parquet footers by range. `requests` and `rows` equal what the run then
    counts, when nothing fails on the way. With several splits, `rows` and `ranks` are about their sum. Of a slice the
    whole split is moved; `rows` and `ranks` are the slice's.
    """
    if min(nodes, ranks_per_node, batch, replicas) < 1:
        raise UsageError("nodes, ranks, batch and replicas are at least 1")
    settings = settings_with(Settings.from_env(), endpoint=endpoint)
    request = data_request(
        repo,
        config,
        split=split,
        revision=revision,
        columns=columns,
        data_dir=data_dir,
        data_files=data_files,
        features=features,
        settings=format_settings,
        partial=partial,
    )
    store, tally = Store(settings.home), Tally()
    prepared = prepare(request, settings, store, tally)
    return preview(prepared, settings, tally, nodes, ranks_per_node, batch, replicas)


def pull(
    repo: str,
    *,
    repo_type: RepoType = "dataset",
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    cache_dir: str | os.PathLike[str] | None = None,
    verify: bool = False,
    endpoint: str | None = None,
    token: str | bool | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> PullReport:
    """Bring a repo's files, as they are, into the Hub cache that the official client uses too. Starts no Ray.

    `include` and `exclude` are patterns as `snapshot_download` takes them. `cache_dir` is another cache than
    HF_HUB_CACHE. `verify` also hashes the files that are there already, and replaces those that are wrong. The report's
    `path` is the snapshot's folder.

    Raises a RepoError, OfflineMode, PullIncomplete (what came is kept) or a StoreError.
    """
    from crucible.cache.hubcache import HubCache
    from crucible.workers.pull import pull as bring_repo

    settings = settings_with(Settings.from_env(), endpoint=endpoint, token=token)
    cache = HubCache(Path(cache_dir or settings.hub_cache).expanduser().absolute())
    ref = replace(repo_ref(repo, revision), repo_type=repo_type)
    return bring_repo(ref, settings, cache, include=include, exclude=exclude, verify=verify, on_progress=on_progress)


def local_job(
    request: DataRequest, settings: Settings, on_progress: Callable[[Progress], None] = lambda _: None
) -> tuple[tuple[Manifest, ...], JobReport]:
    """The same job in this process, without Ray. Shards that only a peer holds are left there until they are read."""
    began, tally = time.monotonic(), Tally()
    prepared = prepare(request, settings, Store(settings.home), tally, reading=True)
    if prepared.cached:
        report = cached_report(job_name(request), prepared, tally.counts, time.monotonic() - began)
        return prepared.manifests, report
    return _do_here(prepared, settings, on_progress, began, tally)


def _do_here(
    prepared: Prepared, settings: Settings, on_progress: Callable[[Progress], None], began: float, tally: Tally
) -> tuple[tuple[Manifest, ...], JobReport]:
    store, job = Store(settings.home), job_name(prepared.request)
    executor = LocalExecutor(Workplace(store, settings, LOCAL, since=disk_time(store.home)))
    try:
        manifests, report = run_job(
            job,
            prepared,
            executor,
            limit_bytes=settings.inflight_bytes,
            observe=on_progress,
            waiting=local_governor(settings).waiting,
            offset_s=time.monotonic() - began,
            metadata=tally.counts,
        )
    finally:
        executor.close()
    remember(prepared, manifests, store)
    return manifests, report


def _whole(settings: Settings) -> Callable[[Prepared], tuple[Manifest, ...]]:
    return lambda prepared: _do_here(prepared, settings, lambda _: None, time.monotonic(), Tally())[0]


def job_name(request: DataRequest) -> str:
    """A name a person can type: the repo's last part and six random letters."""
    return f"{Path(request.repo.repo_id).name[:40]}-{secrets.token_hex(3)}"


def _run_on_cluster(
    request: DataRequest,
    settings: Settings,
    embedded: bool,
    replicas: int,
    nodes: int | None,
    keep_raw: bool,
    on_progress: Callable[[Progress], None],
) -> JobReport:
    from crucible.workers.tasks import JobOptions

    ray = import_ray()
    options = JobOptions.of(settings, keep_raw=keep_raw, revision=request.repo.revision)
    job = job_name(request)
    forgotten = False
    for life in range(COORDINATOR_LIVES):
        try:
            return _one_job(job, request, settings, options, embedded, replicas, nodes, on_progress, again=life > 0)
        except (JobUnknown, StaleCoordinator):
            if life + 1 == COORDINATOR_LIVES:
                raise
            time.sleep(POLL_S)
        except TokenForgotten:
            if settings.token is None or forgotten:
                raise
            forgotten = True  # the next coordinator gets it from us
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            if life + 1 == COORDINATOR_LIVES:
                raise ClusterError(
                    f"job {job}: the coordinator was lost {COORDINATOR_LIVES} times ({error})"
                ) from error
    raise AssertionError("the loop returns or raises")


def _one_job(
    job: str,
    request: DataRequest,
    settings: Settings,
    options: JobOptions,
    embedded: bool,
    replicas: int,
    nodes: int | None,
    on_progress: Callable[[Progress], None],
    *,
    again: bool,
) -> JobReport:
    from crucible.cluster.coordinator import reach_coordinator

    ray = import_ray()
    coordinator = reach_coordinator(embedded=embedded)
    token_file = _hand_over(settings)
    try:
        ray.get(coordinator.submit.remote(job, request, options, replicas, nodes, token_file, again), timeout=SILENCE_S)
    finally:
        if token_file is not None:
            Path(token_file).unlink(missing_ok=True)
    while True:
        outcome = ray.get(coordinator.result.remote(job, POLL_S), timeout=SILENCE_S)
        on_progress(ray.get(coordinator.progress.remote(job), timeout=SILENCE_S))
        if isinstance(outcome, CrucibleError):
            raise outcome
        if outcome is not None:
            report: JobReport = outcome
            return report


def _hand_over(settings: Settings) -> str | None:
    """Put the token where the coordinator on this machine reads and removes it. Its path crosses Ray, it does not."""
    if settings.token is None:
        return None
    name = f"token-{secrets.token_hex(8)}"
    Store(settings.home).write_small(name, settings.token.encode(), mode=0o600)
    return str(settings.home / name)
