"""Export what was prefetched, take in what was exported, and read a lock file for a job that is to give the same again.

Exporting asks nobody what the data is: the manifests in this node's store say it. Shards come from this node's store,
else from peers, else from the Hub. Runs in the process of whoever asks; imports Ray only to tell a running
cluster of an import.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from crucible.bundle import CHUNK, BundleReport, Chunks, Counter, read_lock, report_of
from crucible.bundle_write import new_bundle, put_file
from crucible.cache.disk import disk_errors
from crucible.cache.hubcache import HubCache
from crucible.cache.store import Store
from crucible.cluster.connect import cluster, import_ray
from crucible.cluster.drive import LOCAL
from crucible.cluster.locked import check_sources, locked_request
from crucible.cluster.prepare import prepare
from crucible.config import Settings, settings_with
from crucible.data_files import DataFiles, data_request
from crucible.errors import ManifestError, OfflineMode, UsageError
from crucible.hub.client import is_folder
from crucible.lockfile import Lock, Member
from crucible.refs import DataRequest, RepoRef, ShardInfo, SourceFile
from crucible.report import Progress, Tally
from crucible.versions import versions_here
from crucible.workers.cached import cached_copy, drop_rotten
from crucible.workers.download import DownloadOptions, bring
from crucible.workers.fetch import NodeShards
from crucible.workers.unpack import unpack
from crucible.workers.work import Workplace, hub_sources
from crucible.workers.xet import having


def lock_of(request: DataRequest, settings: Settings, *, raw: bool = False) -> Lock:
    """The lock file of a dataset that was prefetched with this request. Asks no Hub. Raises ManifestError."""
    repo = request.repo.repo_id
    if is_folder(repo):
        todo = "copy the folder, or put it into a Hub (`crucible hub serve`) and prefetch it from there"
        raise UsageError(f"{repo} is a folder of this machine, and has no name on another one: {todo}")
    if raw and request.partial:
        raise UsageError("partial brings no whole file that could be exported: leave out partial, or raw")
    store = Store(settings.home)
    try:
        prepared = prepare(request, replace(settings, offline=True), store, Tally())
    except OfflineMode as error:
        raise ManifestError(repo, _absent(request, settings)) from error
    survey = store.get_survey(replace(request.repo, revision=prepared.repo.revision), request.variant)
    if not prepared.cached or survey is None:
        raise ManifestError(repo, _absent(request, settings))
    here = versions_here()
    return Lock(request, survey, prepared.manifests, raw=raw, crucible=here.crucible, pyarrow=here.pyarrow)


def _absent(request: DataRequest, settings: Settings) -> str:
    asked = f"revision {request.repo.revision}, config {request.config or 'default'}, split {request.split or 'all'}"
    todo = f"run `crucible prefetch {request.repo.repo_id}` with the same options"
    return f"{asked} is not in {settings.home} in full; {todo}"


def export(
    request: DataRequest,
    settings: Settings,
    out: str,
    *,
    raw: bool = False,
    lock_only: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> BundleReport:
    """Write a bundle, or its lock file alone, to `out`: see `crucible.bundle_write`.

    Raises ManifestError when the data was not prefetched here, and what fetching a shard or writing a file raises.
    """
    lock = lock_of(request, settings, raw=raw)
    if lock_only:
        put_file(out, lock.to_json())
        return report_of(out, lock)
    count = Counter(lock, f"export {lock.repo.repo_id}", on_progress)
    shelf = _Shelf(lock, settings)
    with new_bundle(out, lock) as bundle:
        for member in lock.members():
            bundle.add(member, shelf.reading(member))
            count.done(member)
        bundle.finish()
        return report_of(bundle.where, lock, bundle.reused)


class _Shelf:
    """Where the files of a bundle are on this node, once they are."""

    def __init__(self, lock: Lock, settings: Settings) -> None:
        self._settings, self._shards = settings, NodeShards(settings)
        self._cache = HubCache(settings.hub_cache)
        self._manifest_of = {shard.key: manifest for manifest in lock.manifests for shard in manifest.shards}

    def reading(self, member: Member) -> Callable[[], AbstractContextManager[Chunks]]:
        """What opens the member, and brings it to this node first if it is not here."""

        @contextmanager
        def read() -> Iterator[Chunks]:
            what = member.what
            path = self._shard(what) if isinstance(what, ShardInfo) else self._raw(member.repo, what)
            with disk_errors(path), path.open("rb", buffering=0) as file:  # it stays open if it is evicted meanwhile
                yield iter(lambda: file.read(CHUNK), b"")

        return read

    def _shard(self, shard: ShardInfo) -> Path:
        return self._shards.path(self._manifest_of[shard.key], shard)

    def _raw(self, repo: RepoRef, file: SourceFile) -> Path:
        """The source file in the Hub cache, brought there if it is not."""
        cache, tally = self._cache, Tally()
        if (path := cached_copy(cache, repo, file, tally)) is not None:
            return path
        cache.begin(repo)
        blobs, place = cache.blobs(repo), Workplace(Store(self._settings.home), self._settings, LOCAL)
        drop_rotten(place.store, blobs, file)
        with ExitStack() as stack:
            sources = having(file, hub_sources(repo, place, tally, stack, blobs.root))
            return bring(file, sources, blobs, DownloadOptions.of(self._settings), tally)


def export_bundle(
    repo: str,
    config: str | None = None,
    *,
    out: str | os.PathLike[str],
    split: str | None = None,
    revision: str | None = None,
    columns: Sequence[str] | None = None,
    partial: bool = False,
    data_dir: str | None = None,
    data_files: DataFiles | None = None,
    features: Mapping[str, Any] | None = None,
    raw: bool = False,
    lock_only: bool = False,
    endpoint: str | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    **format_settings: Any,
) -> BundleReport:
    """Write what was prefetched with the same arguments to `out`: a folder, a name in .tar, `-` for standard output.

    `raw` adds the source files; `lock_only` writes the lock file alone. Raises what `export` does.
    """
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
    return export(request, settings, os.fspath(out), raw=raw, lock_only=lock_only, on_progress=on_progress)


def import_bundle(
    path: str | os.PathLike[str],
    *,
    lock: str = "",
    address: str | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> BundleReport:
    """Import a bundle into this node's store; with `address` also let all nodes of that cluster know what it is.

    `lock` is the digest that its lock file must have, or the beginning of it.
    """
    settings = Settings.from_env()
    said, report = unpack(os.fspath(path), settings, expected=lock, on_progress=on_progress)
    if address is not None:
        from crucible.cluster.coordinator import reach_coordinator

        ray = import_ray()
        with cluster(address):
            data = [manifest.to_json() for manifest in said.manifests]
            ray.get(reach_coordinator(embedded=False).adopt.remote(said.request, dict(said.survey), data))
    return report


def request_for(path: str, settings: Settings) -> tuple[DataRequest, Settings]:
    """The request, and the settings to run it by, that give what the lock file at `path` (or of the bundle there) says.

    What the Hub has at the commit is compared first, when the data is not here yet. Raises BundleError, or LockMismatch
    naming the file or the setting that differs.
    """
    lock = read_lock(path)
    request = locked_request(lock)
    sizes = {item.shard_bytes for manifest in lock.manifests for item in manifest.items}
    settings = replace(settings, shard_bytes=max(sizes, default=settings.shard_bytes))
    prepared = prepare(request, settings, Store(settings.home), Tally())
    if not prepared.cached:
        check_sources(lock, [(split.name, items) for split, items in zip(prepared.splits, prepared.items, strict=True)])
    return request, settings
