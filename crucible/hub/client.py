"""Read a repo: pin a revision, list its files, read a small file or a range. One repo type's API, plus folders on disk.

`open_repo` gives a `HubRepo`, a `FolderRepo`, or offline a `CachedRepo`; all answer the same questions, so nothing
above knows which it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urljoin

import httpx

from crucible.cache.hubcache import HubCache
from crucible.config import Settings
from crucible.errors import (
    ChecksumMismatch,
    CrucibleError,
    EntryNotFound,
    RepoNotFound,
    RevisionNotFound,
    SizeMismatch,
    SourceUnavailable,
    UsageError,
)
from crucible.hashing import git_pointer_oid, hash_bytes, sha256_file
from crucible.hub.cached import CachedRepo
from crucible.hub.governor import Governor
from crucible.hub.http import HubHttp, Refusal, named_error, origin
from crucible.refs import (
    ByteRange,
    RepoRef,
    SourceFile,
    check_repo_id,
    digest_of,
    is_full_sha,
    is_oid,
    safe_repo_path,
)
from crucible.report import Tally

Listing = Callable[[Path], Iterable[str]]
"""A folder to the paths in it that count, relative to it."""

METADATA_LIMIT = 64 << 20
"""Bytes of one metadata reply. A page of 1,000 files is about 300 kB; more than this is not a Hub speaking."""


MOST_FILES = 10_000_000
"""Of one commit: ten times what the biggest repos have, in a few GB of memory."""
BARREN_PAGES = 1_000
"""Pages of a listing in a row without a file, after which no end is expected any more."""
MOST_FILE_BYTES = 1 << 44
"""16 TiB: no Hub keeps a file of more."""


class Repo(Protocol):
    """What resolution needs of a repo, wherever it lies."""

    def pin(self, ref: RepoRef) -> RepoRef:
        """`ref` with its revision replaced by the commit it points to now."""
        ...

    def files(self, ref: RepoRef) -> Iterator[SourceFile]:
        """Every file at a pinned commit, in the Hub's order. Streams."""
        ...

    def read(self, ref: RepoRef, file: SourceFile, part: ByteRange | None = None) -> bytes:
        """A small file's bytes, checked against its hash; or a range of it, checked by length."""
        ...

    def revisions(self, ref: RepoRef) -> list[str]:
        """Names of branches, tags and convert refs, to name in an error message; [] when they cannot be had."""
        ...


def is_folder(repo_id: str) -> bool:
    """True for what names a folder on this disk and not a repo: `./x`, `../x`, `/x`, `~/x`, `.`."""
    return repo_id in (".", "..") or repo_id.startswith(("./", "../", "/", "~/"))


def repo_ref(repo_id: str, revision: str | None) -> RepoRef:
    """Check what the user typed. A folder becomes its absolute path, `hf://datasets/x/y` is x/y. Raises UsageError."""
    repo_id = repo_id.removeprefix("hf://datasets/")
    if is_folder(repo_id):
        if revision not in (None, "main"):
            raise UsageError(f"{repo_id} is a folder: it has no revision {revision!r}")
        return RepoRef(str(Path(repo_id).expanduser().resolve()))
    return RepoRef(check_repo_id(repo_id), revision or "main")


@contextmanager
def open_repo(
    ref: RepoRef, settings: Settings, tally: Tally, governor: Governor | None = None, only: Listing | None = None
) -> Iterator[Repo]:
    """The repo for the time of a `with`; its connections are closed at the end. Offline it is the Hub cache's.

    `only` are the paths that count of a folder, given its path; all without it.
    """
    if is_folder(ref.repo_id):
        yield FolderRepo(only)
        return
    if settings.offline:
        yield CachedRepo(HubCache(settings.hub_cache))
        return
    http = HubHttp(settings, tally, governor)
    try:
        yield HubRepo(http)
    finally:
        http.close()


class HubRepo:
    """Repos of one Hub."""

    def __init__(self, http: HubHttp) -> None:
        self._http = http
        self._endpoint = http.settings.endpoint

    def pin(self, ref: RepoRef) -> RepoRef:
        """One request, or none when the revision is a full commit already."""
        if is_full_sha(ref.revision):
            return ref
        info = self._json(f"{self._api(ref)}/revision/{quote(ref.revision, safe='')}", ref)[0]
        sha = info.get("sha") if isinstance(info, dict) else None
        if not isinstance(sha, str) or not is_full_sha(sha):
            raise SourceUnavailable(str(ref), self._endpoint, "the Hub's answer names no commit")
        return replace(ref, revision=sha)

    def files(self, ref: RepoRef) -> Iterator[SourceFile]:
        url: str | None = f"{self._api(ref)}/tree/{quote(ref.revision, safe='')}?recursive=true&expand=false"
        seen: set[str] = set()
        found = barren = 0
        while url is not None:
            if url in seen:
                raise SourceUnavailable(str(ref), self._endpoint, "the Hub's file listing goes round in a circle")
            seen.add(url)
            page, response = self._json(url, ref)
            if not isinstance(page, list):
                raise SourceUnavailable(str(ref), self._endpoint, "the Hub's file listing is not a list")
            before = found
            for entry in page:
                if not isinstance(entry, dict):
                    raise SourceUnavailable(str(ref), self._endpoint, f"the Hub's file listing has {str(entry)[:40]!r}")
                if entry.get("type") == "file":
                    found += 1
                    yield self._source_file(ref, entry)
            barren = barren + 1 if found == before else 0
            if found > MOST_FILES or barren > BARREN_PAGES:
                raise SourceUnavailable(
                    str(ref),
                    self._endpoint,
                    f"the Hub's file listing does not end ({found:,} files, {len(seen):,} pages)",
                )
            following = response.links.get("next", {}).get("url")
            url = urljoin(url, following) if following else None
            if url is not None and origin(url) != origin(self._endpoint):
                raise SourceUnavailable(str(ref), self._endpoint, f"the next page of the listing is elsewhere: {url}")

    def read(self, ref: RepoRef, file: SourceFile, part: ByteRange | None = None) -> bytes:
        headers = {"range": f"bytes={part.start}-{part.stop - 1}"} if part else {}
        wanted = len(part) if part else file.size
        url = resolve_url(self._endpoint, ref, file.path)
        try:
            response = self._http.read(url, headers, limit=max(file.size, METADATA_LIMIT))
        except Refusal as refused:
            signed_in = self._http.settings.token is not None
            raise named_error(refused, ref, self._endpoint, path=file.path, signed_in=signed_in) from refused
        data = response.content
        if part and response.status_code == 200:  # the server ignored the range and sent the whole file
            data = data[part.start : part.stop]
        self._http.tally.add(hub_bytes=len(response.content))
        if len(data) != wanted:
            raise SizeMismatch(file.path, self._endpoint, wanted, len(data))
        if part is None and (actual := hash_bytes(file, data)) != file.oid:
            raise ChecksumMismatch(file.path, self._endpoint, file.oid, actual)
        return data

    def revisions(self, ref: RepoRef) -> list[str]:
        """As in `Repo`. Branches and tags by name, convert refs in full, as `--revision` takes them."""
        try:
            refs = json.loads(self._http.read(f"{self._api(ref)}/refs", limit=METADATA_LIMIT).content)
            named = [str(item["name"]) for kind in ("branches", "tags") for item in refs[kind]]
            return named + [str(item["ref"]) for item in refs["converts"]]
        except (Refusal, ValueError, KeyError, TypeError, RecursionError):
            return []  # this is for an error message: it must not become another error

    def has(self, ref: RepoRef) -> bool:
        """True if the Hub answers now that it has this revision, and lets us see it."""
        try:
            self._json(f"{self._api(ref)}/revision/{quote(ref.revision, safe='')}", ref)
        except CrucibleError:
            return False
        return True

    def _api(self, ref: RepoRef) -> str:
        return f"{self._endpoint}/api/{ref.repo_type}s/{ref.repo_id}"

    def _json(self, url: str, ref: RepoRef) -> tuple[Any, httpx.Response]:
        try:
            response = self._http.read(url, limit=METADATA_LIMIT)
        except Refusal as refused:
            signed_in = self._http.settings.token is not None
            error = named_error(refused, ref, self._endpoint, signed_in=signed_in)
            if isinstance(error, RevisionNotFound):
                error = RevisionNotFound(ref.repo_id, ref.revision, self.revisions(ref))
            raise error from refused
        try:
            return json.loads(response.content), response
        except (ValueError, RecursionError) as error:
            raise SourceUnavailable(str(ref), self._endpoint, f"the Hub's answer is not JSON ({error})") from error

    def _source_file(self, ref: RepoRef, entry: dict[str, Any]) -> SourceFile:
        try:
            lfs = entry.get("lfs")
            oid = str(lfs["oid"] if lfs else entry["oid"]).removeprefix("sha256:")
            size = int(lfs["size"] if lfs else entry["size"])
            blob_id = str(entry.get("oid") or "") if lfs else ""
            if blob_id == git_pointer_oid(oid, size):
                blob_id = ""  # as nearly always: not worth the memory
            file = SourceFile(str(entry["path"]), size, oid, bool(lfs), str(entry.get("xetHash") or ""), blob_id)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise SourceUnavailable(str(ref), self._endpoint, f"a file listing entry lacks {error}") from error
        if not 0 <= file.size <= MOST_FILE_BYTES or not is_oid(oid, lfs=file.lfs):
            raise SourceUnavailable(
                str(ref), self._endpoint, f"{file.path}: size {file.size} or hash {oid!r} is absurd"
            )
        return file


def resolve_url(endpoint: str, ref: RepoRef, path: str) -> str:
    """Where a file's bytes are asked for. Revisions are quoted whole, paths keep their slashes."""
    prefix = "" if ref.repo_type == "model" else f"{ref.repo_type}s/"
    return f"{endpoint}/{prefix}{ref.repo_id}/resolve/{quote(ref.revision, safe='')}/{quote(path)}"


class FolderRepo:
    """A folder on this disk, seen as a repo. Its commit is a hash of paths and contents: a changed file changes it.

    The contents are hashed once, when the folder is pinned; `open_repo` makes a new one each time.
    """

    def __init__(self, only: Listing | None = None) -> None:
        self._only = only
        self._listing: list[SourceFile] | None = None

    def pin(self, ref: RepoRef) -> RepoRef:
        folder = Path(ref.repo_id)
        if not folder.is_dir():
            raise RepoNotFound(ref.repo_id, "this disk", "no such folder")
        self._listing = list(self._hashed(ref.repo_id))
        listing = {file.path: [file.oid, file.size] for file in self._listing}
        return replace(ref, revision=digest_of(listing)[:40])

    def files(self, ref: RepoRef) -> Iterator[SourceFile]:
        yield from self._hashed(ref.repo_id) if self._listing is None else self._listing

    def read(self, ref: RepoRef, file: SourceFile, part: ByteRange | None = None) -> bytes:
        try:
            with Path(ref.repo_id, file.path).open("rb") as source:
                source.seek(part.start if part else 0)
                return source.read(len(part) if part else file.size)
        except OSError as error:
            raise EntryNotFound(ref.repo_id, "this disk", file.path) from error

    def revisions(self, ref: RepoRef) -> list[str]:  # noqa: ARG002 - a folder has none
        return []

    def _hashed(self, repo_id: str) -> Iterator[SourceFile]:
        """The folder's files in order of their paths, each read once for its hash."""
        folder = Path(repo_id)
        for relative in _walked(folder) if self._only is None else self._only(folder):
            path = folder / relative
            yield SourceFile(safe_repo_path(repo_id, relative), path.stat().st_size, sha256_file(path), lfs=True)


def _walked(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != ".git")
        for name in sorted(names):
            path = Path(root, name)
            if not path.is_file() or not path.resolve().is_relative_to(folder):
                continue  # a socket, or a link that leads out of the folder
            yield path.relative_to(folder).as_posix()
