"""The Ray tasks: thin wrappers around worker functions, nothing else.

What crosses a Ray call is frozen and small: a work item in, a result out. File contents and the Hub token never do. The
token is this node's own (HF_TOKEN or the token file), else it is asked of the coordinator, in memory, at run time.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any

import ray as untyped_ray

from crucible.cache.hubcache import HubCache
from crucible.cache.store import Store
from crucible.config import Settings, Token, node_settings
from crucible.errors import ClusterError, VersionSkew
from crucible.failpoints import reach
from crucible.hub.client import is_folder
from crucible.refs import CONVERSION_VERSION, NodeId, ShardInfo, WorkItem
from crucible.report import Counts, ItemResult, Tally, TransferEvent
from crucible.versions import check_conversion, installed
from crucible.workers.columns import staged_as
from crucible.workers.evict import job_began
from crucible.workers.fencing import Epoch, Fence
from crucible.workers.governing import NAMESPACE as NAMESPACE
from crucible.workers.governing import cluster_governor
from crucible.workers.secret import load_secret
from crucible.workers.serve import read_address
from crucible.workers.spare import SparePusher, announce
from crucible.workers.tls import Trust
from crucible.workers.work import Workplace, copy_shard, run_item

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns

COORDINATOR = "crucible-coordinator"
ASK_TIMEOUT_S = 30.0
PROGRESS_EVERY_S = 0.5
RETRY_S = 0.2
NOTHING: Mapping[str, str] = {}
COPY_KEEPS_S = 3600.0
"""A copy for safety's sake pushes out nothing that was used within this time."""


@dataclass(frozen=True, slots=True)
class JobOptions:
    """The part of the settings that a job carries to the nodes. No token, no path: those are each node's own."""

    endpoint: str
    offline: bool
    part_bytes: int
    shard_bytes: int
    inflight_bytes: int
    tries: int
    timeout_s: float
    backoff_cap_s: float
    streams: int
    connections: int
    stall_s: float
    mirrors: tuple[str, ...]
    xet: bool
    keep_raw: bool = False
    """Keep the source files, in the Hub cache of the node that brings them."""
    revision: str = ""
    """What was asked for, which is what the Hub cache then says the commit is."""
    conversion: int = CONVERSION_VERSION
    """Of whoever wants the shards: a node that would make others refuses."""
    pyarrow: tuple[str, ...] = ()
    """Versions that write the same bytes as the coordinator's; empty: nobody has looked."""
    run: str = ""
    """Names this run of the job: one of the same name, long before, made what may make room now."""
    epoch: Epoch | None = None
    """Of the coordinator that sends the task; a node that has heard of a later one refuses it."""

    @classmethod
    def of(cls, settings: Settings, *, keep_raw: bool = False, revision: str = "") -> JobOptions:
        shared = {name: getattr(settings, name) for name in _SHARED}
        return cls(**shared, keep_raw=keep_raw, revision=revision, run=secrets.token_hex(4))

    def check_here(self) -> None:
        """Raise VersionSkew on a node that would make other shards: Ray may put a task where nobody wanted it."""
        where = f"node {this_node()[:12]}"
        check_conversion(self.conversion, where)
        if self.pyarrow and (mine := installed("pyarrow")) not in self.pyarrow:
            wanted = " or ".join(self.pyarrow)
            raise VersionSkew(where, "its job is written by pyarrow", wanted, mine, "install the same pyarrow")

    def on_this_node(self) -> Settings:
        """This node's settings with the job's options on top. The node's token stays only if it is for that Hub."""
        own = node_settings()
        token = own.token if own.endpoint == self.endpoint else None
        return replace(own, token=token, **{name: getattr(self, name) for name in _SHARED})


_SHARED = tuple(field.name for field in fields(Settings) if field.name in JobOptions.__slots__)


def this_node() -> NodeId:
    return NodeId(ray.get_runtime_context().get_node_id())


def session_name() -> str:
    """Ray's name for the cluster that this process is in."""
    return str(ray.get_runtime_context().get_session_name())


def coordinator() -> Any:
    """The cluster's coordinator. Raises ClusterError when there is none."""
    try:
        return ray.get_actor(COORDINATOR, namespace=NAMESPACE)
    except ValueError as error:
        raise ClusterError(
            "this Ray cluster has no crucible coordinator; start one with `crucible prefetch`"
        ) from error


def asked_first(options: JobOptions, job: str) -> tuple[Settings, Any]:
    """This node's settings for a job, with the job's token if the node has none for its Hub; and the coordinator.

    Waits a while for a coordinator that is being started again. Raises ClusterError when none comes.
    """
    settings = options.on_this_node()
    give_up = time.monotonic() + ASK_TIMEOUT_S
    while True:
        try:
            there = coordinator()
            if settings.token is None:
                # never `ray.get` in a task: Ray then counts its CPU as free, starts another worker process (two seconds
                # of imports) and gives that one the next item, so that a node works on more of them than it has CPUs
                given = there.credential.remote(job).future().result(ASK_TIMEOUT_S)
                settings = replace(settings, token=Token(given) if given else None)
            return settings, there
        except (ClusterError, ray.exceptions.RayActorError):
            if time.monotonic() > give_up:
                raise
            time.sleep(RETRY_S)


def check_epoch(store: Store, options: JobOptions) -> None:
    """Raises StaleCoordinator for a task of a coordinator that has been replaced."""
    if options.epoch is not None:
        Fence(store, f"node {this_node()[:12]}").check(options.epoch)


def _run_item(
    item: WorkItem,
    options: JobOptions,
    job: str,
    spare_url: str | None = None,
    promised: Mapping[str, str] = NOTHING,
) -> ItemResult:
    """Do one item on whatever node this runs on. Retries are the coordinator's: it knows where else to go.

    `promised` are digests, by key, of shards that a manifest has already: one that turns out otherwise gets no name.
    """
    options.check_here()
    check_epoch(Store(options.on_this_node().home), options)
    settings, there = asked_first(options, job)
    store, tally = Store(settings.home), Tally()
    reporter = _Reporter(job, there)
    reach("worker.began")
    secret = load_secret(store)
    with ExitStack() as stack:
        stack.callback(reporter.flush)
        spare = None
        if secret is not None:
            big = [
                staged.oid
                for file in item.files
                if file.size > settings.part_bytes
                for staged in staged_as(file, item.options)
            ]
            address = read_address(store)
            if big and address is not None:
                announce(address.url, secret, big, Trust.of(settings, store))
            if spare_url is not None:
                spare = SparePusher(spare_url, secret, tally, Trust.of(settings, store))
                stack.callback(spare.close)
        place = Workplace(
            store,
            settings,
            this_node(),
            reporter.observe,
            cluster_governor(settings),
            spare=spare,
            keep_raw=options.keep_raw,
            made=reporter.made(item),
            since=job_began(store, f"{job} {options.run}"),
            promised=promised,
        )
        result = run_item(item, place)
        if spare is not None:
            spare.done()
    if options.keep_raw and not result.reused and not is_folder(item.repo.repo_id):
        HubCache(settings.hub_cache).set_ref(item.repo, options.revision, item.repo.revision)
    return replace(result, counts=result.counts + tally.counts)


def copying(options: JobOptions) -> tuple[Workplace, str]:
    """Where replicas come to on this node, and the cluster's secret. Raises ClusterError and StaleCoordinator."""
    settings = options.on_this_node()
    store = Store(settings.home)
    check_epoch(store, options)
    secret = load_secret(store)
    if secret is None:
        raise ClusterError(f"{settings.home}: no cluster secret on this node; is its agent running?")
    # for a copy of what others have nothing goes that is in use
    return Workplace(store, settings, this_node(), since=time.time() - COPY_KEEPS_S), secret


def _copy_shard(shard: ShardInfo, urls: tuple[str, ...], options: JobOptions) -> Counts:
    """Bring a replica of a shard to this node."""
    place, secret = copying(options)
    tally = Tally()
    copy_shard(shard, urls, secret, place, tally)
    reach("worker.copied")
    return tally.counts


run_item_task: Any = ray.remote(num_cpus=1, max_retries=0)(_run_item)
copy_shard_task: Any = ray.remote(num_cpus=0, max_retries=0)(_copy_shard)


class _Reporter:
    """Tells the coordinator how many bytes arrived, at most twice a second, and never waits for an answer."""

    def __init__(self, job: str, there: Any) -> None:
        self._job, self.coordinator = job, there
        self._lock = threading.Lock()
        self._unsent, self._sent_at = 0, time.monotonic()

    def observe(self, event: TransferEvent) -> None:
        if event.kind != "progress":
            return
        with self._lock:
            self._unsent += event.size
            due = time.monotonic() - self._sent_at >= PROGRESS_EVERY_S
        if due:
            self.flush()

    def made(self, item: WorkItem) -> Callable[[ShardInfo], None]:
        """What tells that a shard of `item` is in this node's store: a reader may be waiting for just that one."""
        node = this_node()

        def tell(shard: ShardInfo) -> None:
            if item.size > item.shard_bytes // 2:  # a smaller one hardly has a second shard: it is done as soon
                self.coordinator.made.remote(self._job, node, item.key, shard)

        return tell

    def flush(self) -> None:
        with self._lock:
            size, self._unsent, self._sent_at = self._unsent, 0, time.monotonic()
        if size:
            self.coordinator.arrived.remote(self._job, size)
