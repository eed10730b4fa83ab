"""A repo as the Hub cache knows it, for when the Hub may not be asked: no socket is opened here.

Only a commit whose whole listing is in the cache counts as known. A snapshot folder alone does not say whether it is
all of the commit, and half a dataset must not pass for one. Everything missing raises OfflineMode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from crucible.cache.hubcache import HubCache
from crucible.errors import OfflineMode
from crucible.hashing import hash_bytes
from crucible.refs import ByteRange, RepoRef, SourceFile


class CachedRepo:
    """The `Repo` of one Hub cache."""

    def __init__(self, cache: HubCache) -> None:
        self._cache = cache

    def knows(self, ref: RepoRef) -> bool:
        """True when the revision's commit and its listing are here."""
        commit = self._cache.ref(ref)
        return commit is not None and self._cache.read_tree(replace(ref, revision=commit)) is not None

    def pin(self, ref: RepoRef) -> RepoRef:
        commit = self._cache.ref(ref)
        if commit is None:
            raise OfflineMode(str(ref))
        return replace(ref, revision=commit)

    def files(self, ref: RepoRef) -> Iterator[SourceFile]:
        listing = self._cache.read_tree(ref)
        if listing is None:
            raise OfflineMode(f"the listing of {ref}")
        yield from listing

    def read(self, ref: RepoRef, file: SourceFile, part: ByteRange | None = None) -> bytes:
        path = self._cache.find(ref, file)
        if path is None:
            raise OfflineMode(f"{ref}/{file.path}")
        with path.open("rb") as source:
            source.seek(part.start if part else 0)
            data = source.read(len(part) if part else file.size)
        if part is None and hash_bytes(file, data) != file.oid:
            raise OfflineMode(f"{ref}/{file.path}, of which {path} is a broken copy,")
        return data

    def revisions(self, ref: RepoRef) -> list[str]:  # noqa: ARG002 - the cache's refs would say less than the error
        return []
