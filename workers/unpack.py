"""Take a bundle into this node's store: every byte checked on the way in, names last. No Hub, and no cluster.

A shard becomes visible when it is right; manifests, and the names that lead to them, when all shards are. So an import
that was interrupted leaves a store as good as before, and the same import goes on: what is there is looked at and not
taken again. Source files go to the Hub cache. Raises BundleError, ChecksumMismatch, NoRoom or what the disk says.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from crucible.bundle import BundleReader, BundleReport, Chunks, Counter, checked, open_bundle, report_of
from crucible.cache.check import hash_shard
from crucible.cache.disk import disk_errors
from crucible.cache.hubcache import HubCache
from crucible.cache.seen import stamp_of
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.errors import BundleError
from crucible.lockfile import Lock, Member
from crucible.manifest import Manifest
from crucible.refs import NodeId, RepoRef, ShardInfo, SourceFile
from crucible.report import ItemResult, Progress
from crucible.workers.cached import is_right
from crucible.workers.room import Claim, Need, admitted

HERE = NodeId("local")


def unpack(
    path: str,
    settings: Settings,
    *,
    expected: str = "",
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> tuple[Lock, BundleReport]:
    """Import the bundle at `path` into the store and, with source files, the Hub cache of `settings`.

    `expected` is the digest that the lock file must have, or its beginning.
    """
    began = time.time()
    with open_bundle(path) as bundle:
        lock = bundle.lock
        if not lock.digest.startswith(expected):
            problem = f"its lock file has digest {lock.digest[:16]}, wanted is {expected[:16]}: it is another job's"
            raise BundleError(bundle.where, "", problem)
        place = _Place(bundle, Store(settings.home), HubCache(settings.hub_cache))
        missing = sum(m.size for m in lock.members() if isinstance(m.what, ShardInfo) and not place.seems_here(m.what))
        what = f"bundle {bundle.where}"
        with admitted(place.store, settings, Need(what, missing, lambda: missing), since=began) as claim:
            reused = place.take_all(claim, Counter(lock, f"import {lock.repo.repo_id}", on_progress))
        bundle.finish()
        place.name_all()
        return lock, report_of(bundle.where, lock, reused)


class _Place:
    """Where a bundle goes."""

    def __init__(self, bundle: BundleReader, store: Store, cache: HubCache) -> None:
        self._bundle, self.store, self._cache = bundle, store, cache
        self._known: dict[str, set[str]] | None = None

    def seems_here(self, shard: ShardInfo) -> bool:
        return self.store.has_shard(shard)

    def take_all(self, claim: Claim, count: Counter) -> int:
        """Bring every member that is not here; how many were."""
        reused = 0
        with self.store.workspace() as folder:
            for member in self._bundle.lock.members():
                with self._bundle.open(member) as chunks:
                    if isinstance(member.what, ShardInfo):
                        new = self._take_shard(member, member.what, chunks, folder / "shard", claim)
                    else:
                        new = self._take_file(member.repo, member, member.what, chunks)
                reused += not new
                count.done(member)
        return reused

    def name_all(self) -> None:
        """Let the job's names lead to it: items, manifests, revisions."""
        lock, store = self._bundle.lock, self.store
        for manifest in lock.manifests:
            for result in item_results(manifest):
                store.put_item(result)
        asked = lock.request.repo.revision
        for manifest in lock.manifests:
            store.put_manifest(manifest, (asked,))
        for revision in {lock.repo.revision, asked}:
            at = RepoRef(lock.repo.repo_id, revision, lock.repo.repo_type)
            store.put_survey(at, dict(lock.survey))
        if lock.raw:
            for item in (item for manifest in lock.manifests for item in manifest.items):
                for file in item.files:  # of several with one content the bundle has one
                    self._cache.link(lock.repo, file)
            self._cache.set_ref(lock.repo, asked, lock.repo.revision)

    def _take_shard(self, member: Member, shard: ShardInfo, chunks: Chunks, draft: Path, claim: Claim) -> bool:
        """False if the shard is here already."""
        if self._is_here(shard):
            return False
        with disk_errors(draft, f"{shard.size:,} bytes for {member.name}"):
            with draft.open("wb", buffering=0) as file:
                for chunk in checked(self._bundle.where, member, chunks):
                    rest = memoryview(chunk)
                    while rest:
                        rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            self.store.commit_shard(draft, shard.key, shard.digest)
        claim.landed(shard.size)
        return True

    def _is_here(self, shard: ShardInfo) -> bool:
        """True if the store has the shard. One with other bytes makes way, unless a manifest here means just those."""
        try:
            stamp = stamp_of(os.stat(self.store.shard_path(shard.key)))
        except OSError:
            return False
        found = self.store.seen.digest(shard.key, stamp) or hash_shard(self.store, shard.key)
        if found == shard.digest:
            return True
        if found is not None and found in self._meant(shard.key):
            problem = (
                f"this store has it with other bytes ({found[:12]}, not {shard.digest[:12]}: made by another pyarrow); "
                "import into another CRUCIBLE_HOME, or remove what was prefetched here"
            )
            raise BundleError(self._bundle.where, f"shard {shard.key[:12]}", problem)
        self.store.quarantine(shard.key, stamp)
        return False

    def _meant(self, key: str) -> set[str]:
        """Digests that manifests of this store give a shard."""
        if self._known is None:
            self._known = {}
            for manifest in self.store.manifests():
                for shard in manifest.shards:
                    self._known.setdefault(shard.key, set()).add(shard.digest)
        return self._known.get(key, set())

    def _take_file(self, repo: RepoRef, member: Member, file: SourceFile, chunks: Chunks) -> bool:
        """False if the Hub cache has the file already."""
        cache = self._cache
        cache.begin(repo)
        path = cache.find(repo, file)
        if path is not None:
            if is_right(path, file):
                return False
            cache.drop(repo, file)
        with cache.blobs(repo).claim(file) as partial:
            if partial is None:
                return False
            partial.reset()
            at = 0
            for chunk in checked(self._bundle.where, member, chunks):
                partial.write(at, chunk)
                at += len(chunk)
            partial.publish()
        return True


def item_results(manifest: Manifest) -> list[ItemResult]:
    """What each item gave, as its worker would have recorded it.

    Which schema a file without rows had is not known: it gets all, which together are what the split has.
    """
    packed = dict(manifest.schemas)
    shards: list[list[ShardInfo]] = [[] for _ in manifest.items]
    for shard in manifest.shards:
        shards[shard.item].append(shard)
    return [
        ItemResult(
            item.index,
            item.key,
            HERE,
            tuple(sorted(made, key=lambda one: one.number)),
            tuple((digest, packed[digest]) for digest in sorted({one.schema for one in made} or packed)),
        )
        for item, made in zip(manifest.items, shards, strict=True)
    ]
