"""The Hub cache (`HF_HUB_CACHE`) as the official client lays it out, read and written by code of our own.

What lies there is shared both ways: the official client uses what we wrote without a request, and we use what it
downloaded. So nothing of crucible's own is kept in it, and every rule is the client's:

<root>/CACHEDIR.TAG                           tells backups to pass by
<root>/.locks/<repo>/<oid>.lock               held while a blob is brought: others wait and do not download too
<root>/<type>s--<namespace>--<name>/          one repo
    blobs/<oid>                               sha256 or git sha1; a file, or a link into a store shared by repos
    blobs/*.incomplete                        work in progress, and all a crash leaves; `hf cache prune` removes it
    snapshots/<commit>/<path>                 relative link to the blob; the file itself where links cannot be made
    refs/<revision>                           the commit, without a newline; never of a commit without a snapshot
    trees/<commit>.json                       every file of the commit; never a part of them

Everything visible is made by rename or by creating a link, and never written through one. Reading needs no right to
write. Nothing here checks a hash: a blob of ours was verified before it got its name, but the official client looks at
sizes only, so whoever uses a file that was found verifies it first. Raises StoreError, or UnsafePath for a path, a
revision or a hash that would lead out of the repo's folder.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crucible.cache.blobs import BlobFolder
from crucible.cache.disk import disk_errors
from crucible.errors import UnsafePath, UsageError
from crucible.hashing import git_pointer_oid
from crucible.refs import REPO_TYPES, RepoRef, SourceFile, check_repo_id, is_full_sha, is_oid, safe_repo_path

TREE_FORMAT = 1
_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This file marks a cache directory, which backups may leave out. See https://bford.info/cachedir/\n"
)
_NO_LINKS = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})
"""What a file system without symbolic links answers."""


@dataclass(frozen=True)
class HubCache:
    """One cache folder, of any number of repos.

    A `repo` given to a method that is about a commit carries the commit as its revision. Concurrency: any number of
    threads and processes, ours and the official client's.
    """

    root: Path

    def folder(self, repo: RepoRef) -> Path:
        """The repo's folder. Raises UsageError when `repo` is a folder of its own and not on a Hub, or of no type."""
        if repo.repo_type not in REPO_TYPES:
            raise UsageError(f"{str(repo.repo_type)[:60]!r} is no kind of repo; there are {', '.join(REPO_TYPES)}")
        return self.root / "--".join([f"{repo.repo_type}s", *check_repo_id(repo.repo_id).split("/")])

    def blobs(self, repo: RepoRef) -> BlobFolder:
        """Where the repo's files are brought to, under the locks that the official client takes."""
        folder = self.folder(repo)
        return BlobFolder(folder / "blobs", self.root / ".locks" / folder.name)

    def snapshot(self, repo: RepoRef) -> Path:
        """The folder of a commit, as `snapshot_download` returns it. It need not be there."""
        return self.folder(repo) / "snapshots" / _commit(repo)

    def begin(self, repo: RepoRef) -> None:
        """Make the commit's snapshot folder. Before anything else of a repo: without one, a scan calls it corrupted."""
        path = self.snapshot(repo)
        with disk_errors(path):
            self._tag()
            path.mkdir(parents=True, exist_ok=True)

    def find(self, repo: RepoRef, file: SourceFile) -> Path | None:
        """A file of the right size: by its path in the snapshot, else by its hash. Not verified; see the module."""
        for path in (self._snapshot_path(repo, file), self._blob(repo, file)):
            if _has_size(path, file.size):
                return path
        return None

    def link(self, repo: RepoRef, file: SourceFile) -> Path:
        """Show a blob that is here at its path in the commit's snapshot, and return that path."""
        path, blob = self._snapshot_path(repo, file), self._blob(repo, file)
        if _has_size(path, file.size):
            return path
        with disk_errors(path):
            self._tag()
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.symlink(os.path.relpath(blob, path.parent), path)
            except FileExistsError:  # something wrong, or another process just now
                self._replace(repo, path, blob)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                self._replace(repo, path, blob)
        return path

    def ref(self, repo: RepoRef) -> str | None:
        """The commit that a revision pointed to when it was last looked up; a full commit is its own answer."""
        if is_full_sha(repo.revision):
            return repo.revision
        try:
            commit = self._ref_path(repo, repo.revision).read_text()
        except (OSError, UnicodeDecodeError):
            return None
        return commit if is_full_sha(commit) else None

    def set_ref(self, repo: RepoRef, revision: str, commit: str) -> None:
        """Let `revision` point to `commit`. Called last: what a ref names is taken to be there."""
        path = self._ref_path(repo, revision)
        at_commit = replace(repo, revision=commit)
        if revision == commit or self.ref(replace(repo, revision=revision)) == commit:
            return
        self.begin(at_commit)
        with disk_errors(path):
            self._write(repo, path, commit.encode())

    def write_tree(self, repo: RepoRef, files: Iterable[SourceFile]) -> None:
        """Keep the listing of a commit. `files` are all of them: a missing one would count as not in the repo."""
        path = self._tree_path(repo)
        listing = {file.path: _tree_entry(file) for file in sorted(files, key=lambda file: file.path)}
        self.begin(repo)
        with disk_errors(path):
            self._write(repo, path, json.dumps({"format_version": TREE_FORMAT, "files": listing}, indent=1).encode())

    def read_tree(self, repo: RepoRef) -> tuple[SourceFile, ...] | None:
        """Every file of a commit, by path; None when no listing is here that this code understands."""
        try:
            listing = json.loads(self._tree_path(repo).read_bytes())
            if listing["format_version"] != TREE_FORMAT:
                return None
            return tuple(_from_tree(path, entry) for path, entry in listing["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def drop(self, repo: RepoRef, file: SourceFile) -> None:
        """Take a file whose bytes are wrong out of sight, with every link of the repo to it."""
        blob = self._blob(repo, file)
        with disk_errors(blob):
            for folder, _, names in os.walk(self.folder(repo) / "snapshots"):
                for path in (Path(folder, name) for name in names):
                    if path.is_symlink() and os.path.normpath(path.parent / path.readlink()) == os.path.normpath(blob):
                        path.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)  # of a link into a shared store: the link, not what other repos use
            self._snapshot_path(repo, file).unlink(missing_ok=True)  # the file itself, in a cache without links

    # --- places

    def _snapshot_path(self, repo: RepoRef, file: SourceFile) -> Path:
        return self.snapshot(repo) / safe_repo_path(repo.repo_id, file.path)

    def _blob(self, repo: RepoRef, file: SourceFile) -> Path:
        if not is_oid(file.oid, lfs=file.lfs):
            raise UnsafePath(repo.repo_id, file.oid)
        return self.folder(repo) / "blobs" / file.oid

    def _ref_path(self, repo: RepoRef, revision: str) -> Path:
        return self.folder(repo) / "refs" / safe_repo_path(repo.repo_id, revision)

    def _tree_path(self, repo: RepoRef) -> Path:
        return self.folder(repo) / "trees" / f"{_commit(repo)}.json"

    # --- writing

    def _tag(self) -> None:
        path = self.root / "CACHEDIR.TAG"
        if not path.exists():
            with suppress(OSError):  # a cache without it works as well
                self.root.mkdir(parents=True, exist_ok=True)
                path.write_text(_TAG)

    @contextmanager
    def _scratch(self, repo: RepoRef) -> Iterator[Path]:
        """A free name where `hf cache prune` finds what a crash leaves, and where no scan takes it for a file."""
        path = self.folder(repo) / "blobs" / f"new.{secrets.token_hex(4)}.incomplete"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield path
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _write(self, repo: RepoRef, path: Path, data: bytes) -> None:
        with self._scratch(repo) as scratch:
            with scratch.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch, path)

    def _replace(self, repo: RepoRef, path: Path, blob: Path) -> None:
        """Put a link to `blob`, or the file itself where there are no links, in the place of what is at `path`."""
        with self._scratch(repo) as scratch:
            try:
                os.symlink(os.path.relpath(blob, path.parent), scratch)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                try:
                    os.link(blob.resolve(), scratch)
                except OSError:
                    shutil.copyfile(blob, scratch)
            os.replace(scratch, path)
            scratch.unlink(missing_ok=True)  # a rename between two names of one inode does nothing


def _commit(repo: RepoRef) -> str:
    if not is_full_sha(repo.revision):
        raise UnsafePath(repo.repo_id, repo.revision)
    return repo.revision


def _has_size(path: Path, size: int) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def _tree_entry(file: SourceFile) -> dict[str, Any]:
    if not file.lfs:
        return {"size": file.size, "blob_id": file.oid}
    entry = {
        "size": file.size,
        "blob_id": file.blob_id or git_pointer_oid(file.oid, file.size),
        "lfs_sha256": file.oid,
        "lfs_size": file.size,
    }
    # one malformed hash makes the official client refuse the whole listing
    return {**entry, "xet_hash": file.xet_hash} if is_oid(file.xet_hash, lfs=True) else entry


def _from_tree(path: str, entry: dict[str, Any]) -> SourceFile:
    lfs = entry.get("lfs_sha256")
    if lfs is None:
        return SourceFile(path, int(entry["size"]), str(entry["blob_id"]), lfs=False)
    size, blob_id = int(entry["lfs_size"]), str(entry["blob_id"])
    known = "" if blob_id == git_pointer_oid(str(lfs), size) else blob_id
    return SourceFile(path, size, str(lfs), lfs=True, xet_hash=str(entry.get("xet_hash") or ""), blob_id=known)
