"""Do one work item: bring its files, convert them, commit the shards. The same function in a Ray task and without Ray.

What is finished is in the store and is found again, so an item that is run twice (a retry, another process, the next
job) moves nothing the second time. A killed task leaves a folder in the store's `tmp`, which the next task removes, and
the source bytes that it brought in the store's `raw`, where the next task finds them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from crucible.cache.blobs import BlobFolder
from crucible.cache.check import mark_used
from crucible.cache.disk import check_written, disk_errors
from crucible.cache.hubcache import HubCache
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.errors import ChecksumMismatch, ConversionError, SourceUnavailable, StoreError, VersionSkew
from crucible.failpoints import reach
from crucible.formats.growth import peak_bytes
from crucible.formats.limits import Limits
from crucible.hub.client import is_folder
from crucible.hub.governor import Governor
from crucible.hub.http import HubHttp, Refusal
from crucible.manifest import pack_schema
from crucible.parts import SMALL_BYTES, link_batches
from crucible.refs import (
    CONVERSION_VERSION,
    NodeId,
    RepoRef,
    ShardInfo,
    SourceFile,
    WorkItem,
    item_key,
    safe_repo_path,
)
from crucible.report import ItemResult, Observer, Tally, TransferEvent, unobserved
from crucible.stopping import check, never
from crucible.workers.cached import cached_copy, drop_rotten, is_right, note_right
from crucible.workers.columns import bring_columns, naming_columns
from crucible.workers.download import DownloadOptions, Spare, bring
from crucible.workers.links import batching
from crucible.workers.room import Claim, Need, admitted, room_of_item
from crucible.workers.sources import Body, HubSource, PeerSource, Source
from crucible.workers.tls import Trust
from crucible.workers.xet import having, xet_source

FILES_AT_ONCE = 16
"""Small files of one item in flight together: enough to hide a round trip of 20 ms behind the others. A file holds at
most a MiB of memory a stream, so these and the streams bound what a task holds, whatever it brings."""


class Gate:
    """Lets `most` items of this process be converted at a time. The others bring their files, or wait for the disk."""

    def __init__(self, most: int) -> None:
        self.most, self._free = most, threading.Semaphore(most)

    def __enter__(self) -> None:
        self._free.acquire()

    def __exit__(self, *_: object) -> None:
        self._free.release()


@dataclass(frozen=True)
class Workplace:
    """What a worker function needs to know about where it runs."""

    store: Store
    settings: Settings
    node: NodeId
    observe: Observer = unobserved
    """Told what happens to the source files."""
    governor: Governor | None = None
    """Who may send to the Hub when; None: this process's own."""
    spare: Spare | None = None
    """Where finished ranges of big files go as well, so that this node's death costs only what was in flight."""
    keep_raw: bool = False
    """Keep the source files, in the Hub cache of this node, where the official client finds them."""
    promised: Mapping[str, str] = field(default_factory=dict)
    """Digests that shards must have, by key. One that turns out otherwise never gets its name."""
    stopped: Callable[[], bool] = never
    """True once nobody waits for the result: what is under way then raises Stopped."""
    made: Callable[[ShardInfo], None] = lambda _: None
    """Told of each shard that is new in the store, before its item is done."""
    gate: Gate | None = None
    """Who may convert; None: one process does one item, and others see to it that these are not too many."""
    since: float | None = None
    """Shards that were used then or later, in seconds since 1970, do not make room for what is done here: a job must
    not push out what it made itself. None: any that can be had again may."""


def run_item(item: WorkItem, place: Workplace) -> ItemResult:
    """Make sure that all shards of `item` are in the store, and say which they are.

    Raises a TransferError, RepoError, ConversionError, StoreError, or VersionSkew for a recipe whose shards another
    crucible made; the store is then as it was before.
    """
    began = time.monotonic()
    if (found := _found(item, place)) is not None:
        return found
    if item.key != item_key(item.files, item.options, item.shard_bytes):
        raise VersionSkew(
            f"shards of {', '.join(file.path for file in item.files[:3])}",
            "their recipe is of",
            "another conversion",
            str(CONVERSION_VERSION),
            "prefetch the dataset again",
        )
    # one process of this node works on an item, the others wait here and then find it done
    with place.store.lock(f"item-{item.key[:32]}", place.stopped):
        if (found := _found(item, place)) is not None:
            return found
        tally = Tally()
        try:
            wanted = room_of_item(item, place.settings, keep_raw=place.keep_raw)
            with (
                admitted(place.store, place.settings, wanted, since=place.since, stopped=place.stopped) as claim,
                place.store.workspace() as folder,
            ):
                brought = _bring(item, place, folder, tally)
                reach("worker.brought")
                claim.expect(peak_bytes(item) - item.size)
                try:
                    with naming_columns(item, [source.path for source in brought]):
                        shards, schemas = _convert(item, brought, folder, place, claim)
                except ConversionError:
                    for source in brought:  # right bytes that cannot be read will not read better the next time
                        source.done()
                    raise
        except Exception:
            # on a disk without locks two may work at once, and the first to end takes the source files away
            if (found := _found(item, place)) is not None:
                return found
            raise
        seconds = time.monotonic() - began
        result = ItemResult(
            item.index, item.key, place.node, tuple(shards), tuple(schemas.items()), tally.counts, seconds
        )
        place.store.put_item(result)
        reach("worker.recorded")
        for source in brought:
            source.done()
        return result


def _convert(
    item: WorkItem, brought: Sequence[_Brought], folder: Path, place: Workplace, claim: Claim
) -> tuple[list[ShardInfo], dict[str, str]]:
    """The item's shards, each committed, and the schemas by their digests."""
    # who only moves bytes (a pull, a copy of a shard) need not wait 0.25 s for pyarrow, nor hold its 90 MB
    from crucible.workers.convert import convert, schema_of_item

    limits = Limits(place.settings.row_bytes, place.settings.unpacked_bytes)
    paths = [source.path for source in brought]
    shards: list[ShardInfo] = []
    schemas: dict[str, str] = {}
    for draft in convert(item, paths, folder, limits=limits, turn=_turn(folder, place.gate)):
        check(place.stopped)
        digest, packed = pack_schema(draft.schema)
        schemas[digest] = packed
        key = item.shard_key(draft.number)
        if place.promised.get(key, draft.digest) != draft.digest:
            raise ChecksumMismatch(
                f"shard {key[:12]} ({', '.join(file.path for file in item.files[:3])})",
                "its re-made copy here (another pyarrow than the one that wrote the manifest?)",
                place.promised[key],
                draft.digest,
            )
        for source in brought:
            source.check()
        claim.landed(draft.size)
        reach("worker.converted")
        place.store.commit_shard(draft.path, key, draft.digest)
        reach("worker.committed")
        shards.append(ShardInfo(key, draft.rows, draft.size, draft.digest, digest, item.index, draft.number))
        place.made(shards[-1])
    if not shards and (schema := schema_of_item(item, paths, folder, limits)) is not None:
        schemas = dict([pack_schema(schema)])
    return shards, schemas


@contextmanager
def _turn(folder: Path, gate: Gate | None) -> Iterator[int]:
    """A turn to convert: how many items of this node are converted now, as far as can be told, with this one."""
    with gate or nullcontext():
        # each item at work on this node, in whatever process, has a folder beside this one
        at_work = sum(1 for _ in folder.parent.iterdir())
        yield at_work if gate is None else min(at_work, gate.most)


def _found(item: WorkItem, place: Workplace) -> ItemResult | None:
    found = place.store.get_item(item, place.node)
    if found is not None:
        place.observe(TransferEvent("progress", item.files[0].path, item.size, source="disk"))
        if place.since is not None:
            for shard in found.shards:
                mark_used(place.store, shard.key, place.since)
    return found


def copy_shard(shard: ShardInfo, urls: Sequence[str], secret: str, place: Workplace, tally: Tally) -> Path:
    """Bring a shard from the first peer that has it right, verified against its digest. Raises a TransferError."""
    if place.store.has_shard(shard):
        return place.store.shard_path(shard.key)
    # by content: two shards that are equal come by one name, and the second would lose it to the first
    with place.store.lock(f"shard-{(shard.digest or shard.key)[:32]}", place.stopped):
        if place.store.has_shard(shard):
            return place.store.shard_path(shard.key)
        file = SourceFile(shard.key, shard.size, shard.digest, lfs=True, made=True)
        timeouts = [place.settings.timeout_s] * len(urls)
        if shard.size < SMALL_BYTES:  # it has no hedge: who stalls makes way for the next when one would come
            timeouts[:-1] = [min(place.settings.stall_s, place.settings.timeout_s)] * (len(urls) - 1)
        trust = Trust.of(place.settings, place.store)
        peers = [
            PeerSource(url, secret, tally, timeout_s=wait, trust=trust, pace_s=max(1.0, 2 * place.settings.stall_s))
            for url, wait in zip(urls, timeouts)
        ]
        # a peer that fails is not asked again: another one, or the Hub, is nearer than its backoff
        options = replace(DownloadOptions.of(place.settings, stopped=place.stopped), tries=1, backoff_cap_s=0)
        drop_rotten(place.store, place.store.raw, file)
        landed = place.store.raw.landed
        wanted = Need(f"shard {shard.key[:12]}", shard.size, lambda: max(0, shard.size - landed(file)))
        with admitted(place.store, place.settings, wanted, since=place.since, stopped=place.stopped):
            draft = bring(file, peers, place.store.raw, options, tally, place.observe)
        try:
            return place.store.commit_shard(draft, shard.key, shard.digest)
        except StoreError:
            if place.store.has_shard(shard):
                return place.store.shard_path(shard.key)  # another process has just given it its name
            raise


@dataclass(frozen=True)
class _Brought:
    """A source file on this disk, verified, for the time of one item."""

    file: SourceFile
    path: Path
    staged: BlobFolder | None = None
    """Where it was brought to for this item only."""
    seen: tuple[int, int] | None = None
    """(mtime in ns, size) when it was verified, of a file that is somebody else's and used where it lies."""

    def check(self) -> None:
        """Raise ChecksumMismatch if somebody has written into the file since it was verified, and StoreError if the
        disk has refused a part of it: what was read after that may have been something else."""
        if self.staged is not None:
            try:
                with (
                    disk_errors(self.path, f"{self.file.size:,} bytes for {self.file.path}"),
                    suppress(FileNotFoundError),  # no hard links, and another item is done with the blob
                ):
                    check_written(self.path)
            except StoreError:
                self.done()
                raise
        if self.seen is not None and _stamp(self.path) != self.seen:
            raise ChecksumMismatch(self.file.path, str(self.path), self.file.oid, "a file that is being written to")

    def done(self) -> None:
        if self.staged is not None:
            self.staged.remove(self.file.oid)


def _bring(item: WorkItem, place: Workplace, folder: Path, tally: Tally) -> list[_Brought]:
    settings = place.settings
    for file in item.files:
        safe_repo_path(item.repo.repo_id, file.path)
    if is_folder(item.repo.repo_id):
        return [_in_place(Path(item.repo.repo_id) / file.path, file, place, tally) for file in item.files]
    cache = HubCache(settings.hub_cache)
    blobs = cache.blobs(item.repo) if place.keep_raw else place.store.staged
    if place.keep_raw:
        cache.begin(item.repo)
    options = DownloadOptions.of(settings, spare=place.spare, stopped=place.stopped)
    with ExitStack() as stack:
        sources = hub_sources(item.repo, place, tally, stack, blobs.root)

        def wanted() -> bool:
            return place.store.get_item(item, place.node) is None

        def get(number: int, file: SourceFile) -> _Brought:
            if (path := cached_copy(cache, item.repo, file, tally)) is not None:
                place.observe(TransferEvent("progress", file.path, file.size, source=str(path)))
                if place.keep_raw:
                    cache.link(item.repo, file)
                return _Brought(file, path, seen=_stamp(path))
            partial = item.options.partial
            # Xet storage gives whole files only
            known = having(replace(file, xet_hash="") if partial else file, sources)
            drop_rotten(place.store, blobs, file)
            asked: list[Source] = [_Wanted(source, wanted) for source in known]
            if partial:
                path, file = bring_columns(
                    file, item.options.columns or (), asked, blobs, options, tally, place.observe
                )
            else:
                path = bring(file, asked, blobs, options, tally, place.observe)
                note_right(place.store, blobs, file)
            if place.keep_raw:
                cache.link(item.repo, file)
                return _Brought(file, path)
            return _Brought(file, _own_name(path, folder / f"source-{number}"), staged=blobs)

        if len(item.files) == 1:
            return [get(0, item.files[0])]
        with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="crucible-download") as pool:
            missing = [f for f in item.files if cache.find(item.repo, f) is None and not blobs.has(f)]
            if (hub := batching(sources)) is not None:
                # all links before the first file: one that had to wait for its own would sooner ask for itself
                list(pool.map(hub.prime, link_batches(missing)))
            futures = [pool.submit(get, number, file) for number, file in enumerate(item.files)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def hub_sources(repo: RepoRef, place: Workplace, tally: Tally, stack: ExitStack, scratch: Path) -> list[Source]:
    """Where a repo's files come from, cheapest first: mirrors, Xet storage, the Hub. They close with `stack`.

    `having` says which of them may have a file. `scratch` is a folder on the disk that the files are for.
    """
    settings = place.settings
    # a mirror is another origin: it never gets the token
    hubs = [
        replace(settings, endpoint=mirror, token=None) for mirror in settings.mirrors if mirror != settings.endpoint
    ]
    sources: list[Source] = []
    for hub in [*hubs, settings]:
        http = HubHttp(hub, tally, governor=place.governor.at(hub) if place.governor else None)
        stack.callback(http.close)
        sources.append(HubSource(http, repo))
    if (xet := stack.enter_context(xet_source(http, repo, scratch))) is not None:
        sources.insert(-1, xet)
    return sources


def _in_place(path: Path, file: SourceFile, place: Workplace, tally: Tally) -> _Brought:
    """A file of a repo that is a folder on this disk: verified, and used where it lies."""
    try:
        seen = _stamp(path)
        right = is_right(path, file)
    except OSError as error:
        raise SourceUnavailable(file.path, str(path.parent), error.strerror or str(error)) from error
    if not right:
        raise ChecksumMismatch(file.path, str(path), file.oid, "other bytes than when the folder was listed")
    tally.add(local_bytes=file.size, verified_files=1)
    place.observe(TransferEvent("progress", file.path, file.size, source=str(path)))
    return _Brought(file, path, seen=seen)


class _DoneMeanwhile(Exception):
    """Another process has finished the item that these bytes are for."""


class _Wanted:
    """A source that is asked for nothing that is not wanted any more.

    A process that waited for another one's download may find that it was not only brought but used up.
    """

    def __init__(self, source: Source, wanted: Callable[[], bool]) -> None:
        self._source, self._wanted, self.name = source, wanted, source.name

    def open(self, file: SourceFile, start: int, stop: int) -> AbstractContextManager[Body]:
        if not self._wanted():
            raise _DoneMeanwhile
        return self._source.open(file, start, stop)

    def refused(self, file: SourceFile, refusal: Refusal) -> Exception:
        return self._source.refused(file, refusal)

    def count(self, size: int) -> None:
        self._source.count(size)


def _own_name(blob: Path, name: Path) -> Path:
    """A name of this item's own for a staged blob: another item with the same content may be done with it earlier."""
    with suppress(OSError):
        name.hardlink_to(blob)
        return name
    return blob  # a disk without hard links


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
