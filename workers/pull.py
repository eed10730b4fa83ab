"""Bring a repo's files into the Hub cache: `crucible hub pull`. Runs in this process, without Ray.

The revision is pinned, the commit listed once (and never again: the listing stays in the cache), and every wanted file
is brought by `download.bring`: small ones many at once, big ones by ranges, each verified against the listing's hash
before it can be seen. Many small files that git has come in one pack. Order on disk: listing, blobs, links, and last
the ref; so a killed pull leaves files that are right, a snapshot that the official client knows to be incomplete, and
the ref where it was. The next one goes on there.

A file that does not come does not stop the others: they are kept and PullIncomplete names it. What stops everything is
an error of the repo or of the disk, or `GIVE_UP_AFTER` failures in a row.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

from crucible.cache.blobs import SMALL_BYTES
from crucible.cache.hubcache import HubCache
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.errors import (
    EntryNotFound,
    OfflineMode,
    PullIncomplete,
    StoreReadOnly,
    TransferError,
    UnsafePath,
    UsageError,
)
from crucible.hub.cached import CachedRepo
from crucible.hub.client import HubRepo, is_folder
from crucible.hub.gitpack import worth_a_pack
from crucible.hub.http import HubHttp
from crucible.parts import LINKED_FILES
from crucible.refs import NodeId, RepoRef, SourceFile, safe_repo_path
from crucible.report import Counts, Progress, Tally, TransferEvent
from crucible.workers.cached import is_right
from crucible.workers.download import DownloadOptions, bring
from crucible.workers.links import LINKS_AHEAD, ahead, batching
from crucible.workers.packed import bring_packed
from crucible.workers.sources import Source
from crucible.workers.work import Workplace, hub_sources
from crucible.workers.xet import having

SMALL_AT_ONCE = 32
"""Files of at most one range in flight together, to hide a round trip behind the others: half the time of 16 for LFS
files of 20 KB at 20 ms and at 100 ms. More would wait for connections: the client keeps as many to a host."""
BIG_AT_ONCE = 3
"""Files of several ranges in flight together. Each has `Settings.streams` connections of its own; a second and a third
keep the line full while one ends."""
GIVE_UP_AFTER = 16
"""Failures in a row after which the rest is not tried: then it is the Hub or the line, and not the files."""
NAMED = 5
"""Missing files that an error names; the others it counts."""
PROGRESS_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class PullReport:
    """What a pull found and did."""

    repo: str
    repo_type: str
    revision: str
    commit: str
    path: str
    """The snapshot's folder."""
    files: int
    """Files wanted, all of them in the snapshot now."""
    size: int
    """Their bytes."""
    reused_files: int
    """Of them, those that were here."""
    reused_bytes: int
    replaced: tuple[str, ...]
    """Files that were here with wrong bytes; `verify` only."""
    listed: bool
    """False when offline without a listing: the snapshot is what it is, and whether that is all cannot be known."""
    counts: Counts
    seconds: float


def pull(
    repo: RepoRef,
    settings: Settings,
    cache: HubCache,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    verify: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> PullReport:
    """Make the wanted files of `repo` be in `cache`, and its snapshot show them.

    `include` and `exclude` are the official client's allow and ignore patterns. `verify` hashes what is here already
    and replaces what is wrong. No request when the revision is a commit that is here, one when it is a branch.

    Raises UsageError, a RepoError, OfflineMode naming what is missing, PullIncomplete or StoreError.
    """
    if is_folder(repo.repo_id):
        raise UsageError(f"{repo.repo_id} is a folder on this disk already; pull takes the name of a repo on the Hub")
    began = time.monotonic()
    tally = Tally()
    with ExitStack() as stack:
        http = stack.enter_context(closing(HubHttp(settings, tally)))
        hub = None if settings.offline else HubRepo(http)
        pinned = (hub or CachedRepo(cache)).pin(repo)
        listing = cache.read_tree(pinned)
        if listing is None and hub is not None:
            listing = tuple(hub.files(pinned))
            for file in listing:
                safe_repo_path(repo.repo_id, file.path)
            with suppress(StoreReadOnly):  # what is there may be all that is wanted
                cache.write_tree(pinned, listing)
        if listing is None:
            return _unlisted(repo, pinned, cache, include, exclude, time.monotonic() - began)
        paths = wanted((file.path for file in listing), include, exclude)
        if listing and not paths:
            raise UsageError(f"{repo}: none of its {len(listing):,} files is wanted by these patterns")
        files = [file for file in listing if file.path in paths]
        place = Workplace(Store(settings.home), settings, NodeId("local"))
        sources = hub_sources(pinned, place, tally, stack, cache.blobs(pinned).root)
        work = _Pull(pinned, settings, cache, tally, sources, verify=verify, on_progress=on_progress)
        if not settings.mirrors:  # they are asked before the Hub, and have files only
            work.pack = partial(bring_packed, http, pinned, listing=listing, folder=cache.blobs(pinned).root)
        work.run(files)
        with suppress(StoreReadOnly):
            cache.set_ref(repo, repo.revision, pinned.revision)
    return PullReport(
        repo=repo.repo_id,
        repo_type=repo.repo_type,
        revision=repo.revision,
        commit=pinned.revision,
        path=str(cache.snapshot(pinned)),
        files=len(files),
        size=sum(file.size for file in files),
        reused_files=work.reused_files,
        reused_bytes=work.reused_bytes,
        replaced=tuple(work.replaced),
        listed=True,
        counts=tally.counts,
        seconds=time.monotonic() - began,
    )


def wanted(paths: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """The paths that a pattern of `include` matches (any path if there is none) and none of `exclude`.

    As the official client matches: case counts, `*` matches `/` too, a pattern that ends in `/` means all below it.
    """
    allowed, ignored = ([_pattern(text) for text in patterns] for patterns in (include, exclude))
    return {
        path
        for path in paths
        if (not allowed or any(fnmatchcase(path, pattern) for pattern in allowed))
        and not any(fnmatchcase(path, pattern) for pattern in ignored)
    }


def _pattern(text: str) -> str:
    text = text.replace("\\", "/")
    return f"{text}*" if text.endswith("/") else text


def _unlisted(
    repo: RepoRef, pinned: RepoRef, cache: HubCache, include: Sequence[str], exclude: Sequence[str], seconds: float
) -> PullReport:
    """What the official client left without a listing, offline: as it does, give what is there."""
    folder = cache.snapshot(pinned)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    paths = wanted(sizes, include, exclude)
    if not paths:
        raise OfflineMode(str(repo))
    size = sum(sizes[path] for path in paths)
    return PullReport(
        repo.repo_id, repo.repo_type, repo.revision, pinned.revision, str(folder),
        len(paths), size, len(paths), size, (), False, Counts(), seconds,
    )  # fmt: skip


class _Pull:
    """The files of one pull on their way. Its methods run in many threads."""

    def __init__(
        self,
        repo: RepoRef,
        settings: Settings,
        cache: HubCache,
        tally: Tally,
        sources: Sequence[Source],
        *,
        verify: bool,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._repo, self._settings, self._cache = repo, settings, cache
        self._tally, self._sources = tally, sources
        self._verify, self._on_progress = verify, on_progress
        self._blobs = cache.blobs(repo)
        self._options = DownloadOptions.of(settings)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._files = self._size = self._done = self._bytes = self._in_a_row = 0
        self._told_at = 0.0
        self._missing: list[str] = []
        self._problems: dict[str, str] = {}
        self.reused_files = self.reused_bytes = 0
        self.replaced: list[str] = []
        self.pack: Callable[..., None] | None = None
        """`bring_packed`, where it may be used."""

    def run(self, files: Sequence[SourceFile]) -> None:
        """Bring what is not here. Raises OfflineMode, PullIncomplete, or what stopped it."""
        self._files, self._size = len(files), sum(file.size for file in files)
        groups: dict[str, list[SourceFile]] = {}  # by content: what lies at several paths is brought once
        for file in files:
            groups.setdefault(file.oid, []).append(file)
        big = [group for group in groups.values() if group[0].size > self._settings.part_bytes]
        small = [group for group in groups.values() if group[0].size <= self._settings.part_bytes]
        # threads that take the next of a shared row: a million files are never a million futures
        asking = ThreadPoolExecutor(LINKS_AHEAD, thread_name_prefix="crucible-links")
        rows = [_Row(big)] * min(len(big), BIG_AT_ONCE)
        rows += [_Row(self._small(small, asking))] * min(len(small), SMALL_AT_ONCE)
        with asking, ThreadPoolExecutor(len(rows) or 1, thread_name_prefix="crucible-pull") as pool:
            futures = [pool.submit(self._take, row) for row in rows]
            try:
                for future in futures:
                    future.result()
            finally:
                self._stop.set()
        if self._missing:
            raise OfflineMode(f"{self._repo}: {_names(sorted(self._missing))}")
        if self._problems:
            problems = [f"{path}: {why}" for path, why in sorted(self._problems.items())]
            raise PullIncomplete(str(self._repo), self._files - self._done, problems)
        self._tell("finished")

    def _take(self, row: _Row) -> None:
        try:
            for group in row:
                if self._stop.is_set():
                    return
                self._one(group)
        except BaseException:
            self._stop.set()
            raise

    def _small(self, groups: Sequence[list[SourceFile]], asking: Executor) -> Iterator[list[SourceFile]]:
        """The groups that are to be brought one by one, in what order and with what help."""
        hub = None if self._settings.offline else batching(self._sources)
        linked = [group for group in groups if hub is not None and group[0].lfs and 0 < group[0].size < SMALL_BYTES]
        if hub is None or len(linked) < LINKED_FILES:
            yield from self._packed_first(groups)
            return
        yield from ahead(linked, hub, self._is_missing, asking)
        done = {group[0].oid for group in linked}
        yield from self._packed_first([group for group in groups if group[0].oid not in done])

    def _is_missing(self, group: list[SourceFile]) -> bool:
        """True when the content is to be brought for at least one path, and by the Hub."""
        return not self._blobs.has(group[0]) and any(self._cache.find(self._repo, file) is None for file in group)

    def _packed_first(self, groups: Sequence[list[SourceFile]]) -> Iterator[list[SourceFile]]:
        """The groups that are to be brought one by one: all, or those that no pack can have, then those it had not."""
        left = {group[0].oid: group for group in groups if self._fits_a_pack(group)}
        if self.pack is None or not worth_a_pack([group[0] for group in left.values()]):
            yield from groups
            return
        yield from (group for group in groups if group[0].oid not in left)

        def keep(batch: Sequence[tuple[SourceFile, bytes]]) -> None:
            self._blobs.put_all(batch)
            for first, _ in batch:
                group = left.pop(first.oid)
                with self._lock:
                    self._bytes += sum(file.size for file in group)
                self._show(group)

        with suppress(OSError):  # a folder that cannot be is told of where the first file goes into it
            self._blobs.root.mkdir(parents=True, exist_ok=True)
        self.pack([group[0] for group in left.values()], keep=keep, stopped=self._stop.is_set)
        yield from left.values()

    def _fits_a_pack(self, group: list[SourceFile]) -> bool:
        """True for small regular files that are not here."""
        first = group[0]
        if self._settings.offline or first.lfs or first.size >= SMALL_BYTES:
            return False
        return any(self._cache.find(self._repo, file) is None for file in group)

    def _one(self, group: list[SourceFile]) -> None:
        if self._is_here(group):
            with self._lock:
                self.reused_files += len(group)
                self.reused_bytes += sum(file.size for file in group)
                self._bytes += sum(file.size for file in group)
        elif self._settings.offline:
            with self._lock:
                self._missing += [file.path for file in group]
            return
        elif not self._bring(group):
            return
        self._show(group)

    def _show(self, group: list[SourceFile]) -> None:
        """Its content is here: let the snapshot have it, and count it."""
        for file in group:
            self._cache.link(self._repo, file)
        with self._lock:
            self._done += len(group)
        self._tell("items")

    def _is_here(self, group: list[SourceFile]) -> bool:
        """True when the cache has the content for every path of it, verified if that was asked for."""
        found = {self._cache.find(self._repo, file) for file in group}
        paths = {path for path in found if path is not None}
        if self._verify:
            for path in paths:
                if is_right(path, group[0]):
                    self._tally.add(verified_files=1)
                    continue
                if not self._settings.offline:
                    for file in group:
                        self._cache.drop(self._repo, file)
                with self._lock:
                    self.replaced.append(group[0].path)
                return False
        return None not in found

    def _bring(self, group: list[SourceFile]) -> bool:
        first, arrived = group[0], 0

        def observe(event: TransferEvent) -> None:
            nonlocal arrived
            if event.kind == "progress":
                with self._lock:
                    arrived += event.size
                    self._bytes += event.size
                self._tell("items")

        try:
            bring(first, having(first, self._sources), self._blobs, self._options, self._tally, observe)
        except UnsafePath:
            raise
        except (TransferError, EntryNotFound) as error:
            with self._lock:
                self._bytes -= arrived
                self._problems.update((file.path, str(error)) for file in group)
                self._in_a_row += 1
                if self._in_a_row >= GIVE_UP_AFTER:
                    self._stop.set()
            return False
        with self._lock:
            self._bytes += sum(file.size for file in group) - arrived
            self._in_a_row = 0
        return True

    def _tell(self, phase: Literal["items", "finished"]) -> None:
        with self._lock:
            now = time.monotonic()
            if phase == "items" and now - self._told_at < PROGRESS_EVERY_S:
                return
            self._told_at = now
            progress = Progress(self._repo.repo_id, phase, self._done, self._files, self._bytes, self._size)
        self._on_progress(progress)


class _Row:
    """An iterator that several threads may share."""

    def __init__(self, groups: Iterable[list[SourceFile]]) -> None:
        self._lock, self._groups = threading.Lock(), iter(groups)

    def __iter__(self) -> _Row:
        return self

    def __next__(self) -> list[SourceFile]:
        with self._lock:
            return next(self._groups)


def _names(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - NAMED:,} more" if len(paths) > NAMED else ""
    return ", ".join(paths[:NAMED]) + more
