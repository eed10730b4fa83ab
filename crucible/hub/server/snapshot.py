"""The files of one commit, in memory: what a listing, a page of it, or a single path answers. No I/O."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file at one commit. The bytes are found by `sha256`, whatever kind it is."""

    path: str
    size: int
    sha256: str
    oid: str
    """git sha1: of the bytes, or of the pointer text when the file is LFS."""
    lfs: bool

    @property
    def etag(self) -> str:
        """What the official client names the cached blob: sha256 for LFS, git sha1 for the others."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True, slots=True)
class DirEntry:
    """A folder; it exists because a file below it does."""

    path: str
    oid: str
    """git's sha1 of the tree object."""


Entry = FileEntry | DirEntry


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a listing. `cursor` is where the next page begins, None on the last."""

    entries: list[Entry]
    cursor: str | None


def git_sha1(content: bytes, kind: str = "blob") -> str:
    """The id git gives to an object: a blob, a tree or a commit."""
    return hashlib.sha1(b"%b %d\0" % (kind.encode(), len(content)) + content, usedforsecurity=False).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The text git stores in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Snapshot:
    """All entries of a tree, sorted by path.

    Built once in O(n log n), then read only, so any thread may use it. A page costs O(log n + page).
    """

    def __init__(self, files: Iterable[FileEntry]) -> None:
        self.files: list[FileEntry] = sorted(files, key=lambda file: file.path)
        children: dict[str, list[Entry]] = {"": []}
        for file in self.files:
            parent = file.path.rpartition("/")[0]
            while parent not in children:
                children[parent] = []
                parent = parent.rpartition("/")[0]
            children[file.path.rpartition("/")[0]].append(file)
        # deepest first: a folder's id is made of its children's ids
        for folder in sorted(children, key=lambda path: path.count("/") + bool(path), reverse=True):
            children[folder].sort(key=lambda entry: entry.path)
            oid = git_sha1(_tree_object(children[folder]), "tree")
            if folder:
                children[folder.rpartition("/")[0]].append(DirEntry(folder, oid))
        self.oid = oid
        """git's sha1 of the whole tree."""
        self._children = children
        self._all: list[Entry] = sorted(
            [entry for entries in children.values() for entry in entries], key=lambda entry: entry.path
        )
        self._paths = [entry.path for entry in self._all]

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def lfs(self) -> dict[str, FileEntry]:
        """The LFS files by their content; of several with the same, one."""
        return {file.sha256: file for file in self.files if file.lfs}

    def trees(self) -> Iterator[bytes]:
        """git's tree object of each folder, the whole tree's first."""
        for folder in sorted(self._children):
            yield _tree_object(self._children[folder])

    def get(self, path: str) -> Entry | None:
        index = bisect_left(self._paths, path)
        return self._all[index] if index < len(self._all) and self._paths[index] == path else None

    def file(self, path: str) -> FileEntry | None:
        entry = self.get(path)
        return entry if isinstance(entry, FileEntry) else None

    def page(self, folder: str, *, recursive: bool, after: str, limit: int) -> Page | None:
        """Up to `limit` entries below `folder` whose path is greater than `after`; None if there is no such folder."""
        if folder not in self._children:
            return None
        entries: Sequence[Entry]
        if recursive:
            start, stop = 0, len(self._all)
            if folder:  # "0" is the character after "/": the range holds exactly what begins with `folder/`
                start, stop = bisect_left(self._paths, folder + "/"), bisect_left(self._paths, folder + "0")
            entries = self._all
            first = max(start, bisect_right(self._paths, after)) if after else start
        else:
            entries = self._children[folder]
            stop = len(entries)
            first = bisect_right(entries, after, key=lambda entry: entry.path) if after else 0
        last = min(stop, first + limit)
        chosen = list(entries[first:last])
        return Page(chosen, chosen[-1].path if chosen and last < stop else None)


def _tree_object(children: Iterable[Entry]) -> bytes:
    """A folder as git stores it. git sorts a folder among its neighbours as if its name ended in a slash."""
    lines = []
    for child in children:
        name = child.path.rpartition("/")[2].encode()
        if isinstance(child, DirEntry):
            lines.append((name + b"/", b"40000 %b\0%b" % (name, bytes.fromhex(child.oid))))
        else:
            lines.append((name, b"100644 %b\0%b" % (name, bytes.fromhex(child.oid))))
    return b"".join(line for _, line in sorted(lines))
