"""Put files into a local Hub: a folder, or a handful of files, as one commit; and refs, renames, removals.

A file is read once, in pieces of 1 MiB, hashed while it is copied. A killed import leaves blobs that nothing names
and files in ROOT/tmp, never a ref to a commit that lacks a file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import IO

from crucible.errors import UnsafePath, UsageError

from .names import check_path, full_ref
from .repos import Repo, RepoMeta, Store
from .snapshot import FileEntry, git_sha1, lfs_pointer

PIECE = 1 << 20
LFS_BYTES = 10_000_000  # the Hub's own limit for regular files
LFS_SUFFIXES = (
    ".7z",
    ".bz2",
    ".gz",
    ".lz4",
    ".rar",
    ".tar",
    ".tgz",
    ".xz",
    ".zip",
    ".zst",
    ".arrow",
    ".avro",
    ".feather",
    ".h5",
    ".npy",
    ".npz",
    ".orc",
    ".parquet",
    ".bin",
    ".ckpt",
    ".ftz",
    ".onnx",
    ".pb",
    ".pickle",
    ".pkl",
    ".pt",
    ".pth",
    ".safetensors",
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pdf",
    ".png",
    ".tif",
    ".tiff",
    ".webp",
    ".flac",
    ".mp3",
    ".mp4",
    ".ogg",
    ".opus",
    ".wav",
    ".webm",
)

LfsRule = Callable[[str, int], bool]
"""(path in the repo, size in bytes) -> whether the file is LFS."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file to import: where it lies, or its bytes, and what it will be called."""

    path: str
    origin: Path | bytes


def import_folder(
    root: str | os.PathLike[str],
    repo_id: str,
    folder: str | os.PathLike[str],
    *,
    repo_type: str = "dataset",
    message: str = "Import a folder",
    branch: str = "main",
    author: str = "crucible",
    private: bool = False,
    gated: bool = False,
    allowed: Sequence[str] = (),
    lfs: bool | LfsRule | None = None,
    durable: bool = True,
) -> str:
    """Make `branch` hold exactly the files of `folder`; returns the commit, which is the old one if nothing changed.

    `branch` may be a full ref (`refs/pr/1`, `refs/convert/parquet`). `lfs` decides for all files (True, False) or by
    a function; None is the Hub's habit: binary or above 10 MB. `.git` folders are left out. Raises UnsafePath for
    a link that leaves the folder, UsageError for what is neither file nor folder.
    """
    top = Path(folder)
    if not top.is_dir():
        raise UsageError(f"{top} is no folder")
    repo = _create(root, repo_id, repo_type, private, gated, allowed, durable)
    return _commit(repo, _walk(repo_id, top), full_ref(branch), message, author, lfs, keep=False, drop=())


def import_files(
    root: str | os.PathLike[str],
    repo_id: str,
    files: Mapping[str, bytes | Path],
    *,
    delete: Iterable[str] = (),
    repo_type: str = "dataset",
    message: str = "Import files",
    branch: str = "main",
    author: str = "crucible",
    private: bool = False,
    gated: bool = False,
    allowed: Sequence[str] = (),
    lfs: bool | LfsRule | None = None,
    durable: bool = True,
) -> str:
    """Add or replace single files (name in the repo to bytes or a path on disk) on `branch`; returns the commit."""
    repo = _create(root, repo_id, repo_type, private, gated, allowed, durable)
    sources = (Source(check_path(repo_id, path), origin) for path, origin in files.items())
    return _commit(repo, sources, full_ref(branch), message, author, lfs, keep=True, drop=tuple(delete))


def create_branch(
    root: str | os.PathLike[str], repo_id: str, branch: str, *, at: str = "main", repo_type: str = "dataset"
) -> str:
    """A branch, or any full ref (`refs/pr/3`), at a revision; returns the commit. An existing one is moved."""
    return _set_ref(root, repo_id, repo_type, full_ref(branch), at)


def create_tag(
    root: str | os.PathLike[str], repo_id: str, tag: str, *, at: str = "main", repo_type: str = "dataset"
) -> str:
    return _set_ref(root, repo_id, repo_type, full_ref(f"refs/tags/{tag}"), at)


def create_pr(
    root: str | os.PathLike[str], repo_id: str, number: int, *, at: str = "main", repo_type: str = "dataset"
) -> str:
    return _set_ref(root, repo_id, repo_type, full_ref(f"refs/pr/{number}"), at)


def rename_repo(root: str | os.PathLike[str], repo_id: str, new_id: str, *, repo_type: str = "dataset") -> None:
    """Give a repo another id. The old id redirects (307) until a new repo takes it."""
    store = Store(root, create=False)
    store.rename(store.open(repo_type, repo_id), new_id)


def delete_repo(root: str | os.PathLike[str], repo_id: str, *, repo_type: str = "dataset") -> None:
    store = Store(root, create=False)
    store.delete(store.open(repo_type, repo_id))


def set_access(
    root: str | os.PathLike[str],
    repo_id: str,
    *,
    repo_type: str = "dataset",
    private: bool | None = None,
    gated: bool | None = None,
    disabled: bool | None = None,
    allowed: Sequence[str] | None = None,
) -> None:
    """Change who may read a repo; what is None stays as it is."""
    repo = Store(root, create=False).open(repo_type, repo_id)
    with repo.lock():
        meta = repo.meta()
        repo.set_meta(
            replace(
                meta,
                private=meta.private if private is None else private,
                gated=meta.gated if gated is None else gated,
                disabled=meta.disabled if disabled is None else disabled,
                allowed=meta.allowed if allowed is None else tuple(allowed),
            )
        )


def _create(
    root: str | os.PathLike[str],
    repo_id: str,
    repo_type: str,
    private: bool,
    gated: bool,
    allowed: Sequence[str],
    durable: bool,
) -> Repo:
    meta = RepoMeta(_now(), private=private, gated=gated, allowed=tuple(allowed))
    return Store(root, durable=durable).create(repo_type, repo_id, meta)


def _set_ref(root: str | os.PathLike[str], repo_id: str, repo_type: str, ref: str, at: str) -> str:
    repo = Store(root, create=False).open(repo_type, repo_id)
    with repo.lock():
        commit = repo.pin(at)
        repo.set_ref(ref, commit)
    return commit


def _commit(
    repo: Repo,
    sources: Iterable[Source],
    ref: str,
    message: str,
    author: str,
    lfs: bool | LfsRule | None,
    *,
    keep: bool,
    drop: Sequence[str],
) -> str:
    with repo.lock():
        head = repo.ref(ref)
        before = {file.path: file for file in repo.snapshot(head).files} if head else {}
        files = dict(before) if keep else {}
        for path in drop:
            files.pop(path, None)
        for source in sources:
            files[source.path] = _ingest(repo.store, source, before.get(source.path), lfs)
        commit = repo.add_commit(files.values(), parent=head, message=message, author=author, date=_now())
        if commit.id != head:
            repo.set_ref(ref, commit.id)
        return commit.id


def _walk(repo_id: str, top: Path) -> Iterator[Source]:
    inside = top.resolve()
    for folder, subfolders, names in os.walk(top):
        subfolders[:] = sorted(name for name in subfolders if name != ".git")
        for name in [*subfolders, *sorted(names)]:
            origin = Path(folder, name)
            path = origin.relative_to(top).as_posix()
            if origin.is_symlink():
                if not origin.resolve().is_relative_to(inside):
                    raise UnsafePath(repo_id, path)
                if origin.is_dir():
                    raise UsageError(f"{origin} is a link to a folder; copy what it names (cp -L) and import again")
            mode = origin.stat().st_mode
            if S_ISDIR(mode):
                continue
            if not S_ISREG(mode):
                raise UsageError(f"{origin} is neither a file nor a folder")
            yield Source(check_path(repo_id, path), origin)


def _ingest(store: Store, source: Source, before: FileEntry | None, lfs: bool | LfsRule | None) -> FileEntry:
    """Store one file's bytes and say what it is. What lies there already under the same name is hashed, not copied."""
    if isinstance(source.origin, bytes):
        sha256, oid, binary = (
            hashlib.sha256(source.origin).hexdigest(),
            git_sha1(source.origin),
            b"\0" in source.origin[:8000],
        )
        size = len(source.origin)
        if not store.blob_path(sha256).exists():
            store.write(store.blob_path(sha256), source.origin)
    else:
        size = source.origin.stat().st_size
        with source.origin.open("rb") as stream:
            sha256 = ""
            if before is not None and before.size == size and store.blob_path(before.sha256).exists():
                sha256, oid, binary = _read(stream, size, None, source.origin)
                stream.seek(0)
            if not sha256 or not store.blob_path(sha256).exists():
                temporary = store.temporary()
                try:
                    with temporary.open("wb") as copy:
                        sha256, oid, binary = _read(stream, size, copy, source.origin)
                    if store.blob_path(sha256).exists():
                        temporary.unlink()
                    else:
                        store.publish(temporary, store.blob_path(sha256))
                except BaseException:
                    temporary.unlink(missing_ok=True)
                    raise
    if _is_lfs(source.path, size, binary, lfs):
        return FileEntry(source.path, size, sha256, git_sha1(lfs_pointer(sha256, size)), True)
    return FileEntry(source.path, size, sha256, oid, False)


def _read(stream: IO[bytes], size: int, copy: IO[bytes] | None, origin: Path) -> tuple[str, str, bool]:
    """(sha256, git sha1, whether it looks binary) of a stream of `size` bytes, copied on the way."""
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    count, binary = 0, False
    while piece := stream.read(PIECE):
        if not count:
            binary = b"\0" in piece[:8000]  # git's own test
        count += len(piece)
        sha256.update(piece)
        sha1.update(piece)
        if copy is not None:
            copy.write(piece)
    if count != size:
        raise UsageError(f"{origin} changed while it was read ({count:,} bytes, then {size:,}); import again")
    return sha256.hexdigest(), sha1.hexdigest(), binary


def _is_lfs(path: str, size: int, binary: bool, lfs: bool | LfsRule | None) -> bool:
    if size == 0:
        return False  # the Hub stores empty files as regular, always
    if lfs is None:
        return binary or size > LFS_BYTES or path.lower().endswith(LFS_SUFFIXES)
    return lfs if isinstance(lfs, bool) else lfs(path, size)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
