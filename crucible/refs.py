"""The nouns that cross rooms and processes: frozen, small enough to log, free of I/O."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal, NewType

from crucible.errors import UnsafePath, UsageError

NodeId = NewType("NodeId", str)
"""A node's name: Ray's hex id inside a cluster, `local` without one."""

RepoType = Literal["dataset", "model", "space"]
REPO_TYPES: tuple[RepoType, ...] = ("dataset", "model", "space")

_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
_PLAIN_PATH = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}/)*[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}")
_FULL_SHA = re.compile(r"[0-9a-f]{40}")
_HEX = frozenset("0123456789abcdef")


def is_repo_id(repo_id: str) -> bool:
    """True if the Hub could have such a repo: `namespace/name`, or the legacy `name`.

    The rules are the Hub's: ASCII letters, digits, `-`, `_`, `.`; at most 96 characters a part, which begins and ends
    with a letter, a digit or `_`; no `--`, no `..`, no `.git` at the end.
    """
    parts = repo_id.split("/")
    return len(parts) <= 2 and all(
        _REPO_PART.fullmatch(part) and "--" not in part and ".." not in part and not part.endswith(".git")
        for part in parts
    )


def check_repo_id(repo_id: str) -> str:
    """Return `repo_id` if it is one, else raise UsageError."""
    if not is_repo_id(repo_id):
        raise UsageError(f"{repo_id!r} is not a repo id; write it as namespace/name, or a folder as ./folder")
    return repo_id


def is_full_sha(revision: str) -> bool:
    """True for a 40-hex commit: such a revision never moves, so nothing needs to ask the Hub where it points."""
    return _FULL_SHA.fullmatch(revision) is not None


def is_oid(text: str, *, lfs: bool) -> bool:
    """True for what can be a file's hash, and so safely part of a path: 64 (`lfs`) or 40 lower-case hex digits."""
    return len(text) == (64 if lfs else 40) and _HEX.issuperset(text)


def safe_repo_path(repo: str, path: str) -> str:
    """Return `path` if it stays inside a folder when joined to it, on any file system; else raise UnsafePath."""
    if _PLAIN_PATH.fullmatch(path):  # as nearly all of a million are
        return path
    parts = path.split("/")
    try:
        path.encode()
    except UnicodeEncodeError:  # lone surrogates: no file system agrees on what they are
        raise UnsafePath(repo, path) from None
    bad = (
        not path
        or path.startswith("/")
        or "\\" in path
        or "\0" in path
        or any(part in ("", ".", "..") for part in parts)
        or re.match(r"[A-Za-z]:", path) is not None
        or any(len(part.encode()) > 255 for part in parts)
    )
    if bad:
        raise UnsafePath(repo, path)
    return path


@dataclass(frozen=True, slots=True)
class RepoRef:
    """What the user asked for: a repo of one Hub at a branch, tag, ref or commit."""

    repo_id: str
    revision: str = "main"
    repo_type: RepoType = "dataset"

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a repo at a commit. `oid` is what the Hub promises its bytes hash to."""

    path: str
    size: int
    """Bytes."""
    oid: str
    """sha256 of the content (`lfs`), or git's sha1 of it with the `blob <size>\\0` header (not `lfs`)."""
    lfs: bool
    xet_hash: str = field(default="", compare=False)
    """The content's name in Xet storage, where the Hub says that it is there. No part of what the file is."""
    blob_id: str = field(default="", compare=False)
    """git's sha1 of an LFS file's pointer, where it is not that of the usual pointer text. For the Hub cache only."""
    made: bool = field(default=False, compare=False)
    """True of a shard that a peer gives: `oid` is then its digest (`hashing.shard_hasher`), whatever `lfs` says."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes [start, stop) of a file."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"a range needs 0 <= start <= stop, got [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class DataRequest:
    """What a job, a plan or a loader is about. `config` and `split` None mean the default config and all splits.

    `split` is an expression (`crucible.splits`); what is brought are the whole splits that it names.
    """

    repo: RepoRef
    config: str | None = None
    split: str | None = None
    columns: tuple[str, ...] | None = None
    data_files: tuple[tuple[str, tuple[str, ...]], ...] | None = None
    """(split, patterns relative to `data_dir`) in place of the files that the card or the names of files say."""
    data_dir: str = ""
    """Folder of the repo to look in, in place of the whole repo."""
    features: str | None = None
    """JSON of the feature dict to read by, in place of what the card declares and the files say."""
    builder: str = ""
    """The format to read `data_files` as, of files that are no repo: no card counts, and nothing else is looked at."""
    settings: tuple[tuple[str, str], ...] = ()
    """(name, JSON value) of the reader's settings that the caller gives, before those of the card."""
    check_rows: bool = True
    """Hold splits and rows against those that the card declares. Changes no row, so it is no part of `variant`."""
    partial: bool = False
    """Bring only the ranges of `columns`, which no hash can vouch for."""
    locked: tuple[tuple[str, str, str], ...] = field(default=(), compare=False)
    """(split, manifest id, marks of its shards) of what must come out, or the job fails; see `cluster.locked`."""

    @property
    def variant(self) -> str:
        """16 hex digits when the request says what else the card would, or nothing. Manifests are found by it too."""
        named = ("data_files", "data_dir", "features", "builder", "settings", "partial")
        said = {name: value for name in named if (value := getattr(self, name))}
        return digest_of(said)[:16] if said else ""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How the files of a split are read. Part of a shard's key, so every field changes the bytes.

    `builder` is one of `parquet`, `json`, `csv`, `text`, `arrow`; `params` are that builder's own settings as sorted
    (name, JSON value) pairs; `features` is the declared type of the columns, as JSON of `datasets`' feature dict, or
    None to infer.
    """

    builder: str
    params: tuple[tuple[str, str], ...] = ()
    features: str | None = None
    columns: tuple[str, ...] | None = None
    partial: bool = False
    """Of the files only the ranges of `columns` are brought, unchecked against a hash. Said only where it is so."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, but `partial` only where it is true: names from before it was there stay what they are."""
        told = asdict(self)
        if not self.partial:
            del told["partial"]
        return told

    def param(self, name: str, default: Any = None) -> Any:
        for key, value in self.params:
            if key == name:
                return json.loads(value)
        return default


CONVERSION_VERSION = 6
"""Raise it whenever the same inputs would give other shard bytes: old shards then simply have other keys."""


@dataclass(frozen=True, slots=True)
class WorkItem:
    """What one task does: bring these source files to its node, and convert them, in order, into shards.

    `index` is the item's place in the source order of the split. The shards of an item are numbered from 0 in row
    order, so (index, number) sorts a split's shards into the order of the source.
    """

    index: int
    repo: RepoRef
    """`revision` is the pinned commit."""
    files: tuple[SourceFile, ...]
    options: ReadOptions
    shard_bytes: int
    """Target size of one shard, in bytes of Arrow data."""
    key: str = field(default="")

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", item_key(self.files, self.options, self.shard_bytes))

    @property
    def size(self) -> int:
        """Bytes of the source files."""
        return sum(file.size for file in self.files)

    def shard_key(self, number: int) -> str:
        """Name of the item's shard `number`: 64 hex, a function of the item's inputs alone."""
        return hashlib.sha256(f"{self.key}/{number}".encode()).hexdigest()


_SET_INDEX, _SET_REPO, _SET_FILES, _SET_OPTIONS, _SET_SHARD_BYTES, _SET_KEY = (
    getattr(WorkItem, name).__set__ for name in ("index", "repo", "files", "options", "shard_bytes", "key")
)


def made_item(
    index: int, repo: RepoRef, files: tuple[SourceFile, ...], options: ReadOptions, shard_bytes: int, key: str
) -> WorkItem:
    """`WorkItem(...)` with a key that is known, in half the time: a job makes each of its million items once."""
    item = object.__new__(WorkItem)
    _SET_INDEX(item, index)
    _SET_REPO(item, repo)
    _SET_FILES(item, files)
    _SET_OPTIONS(item, options)
    _SET_SHARD_BYTES(item, shard_bytes)
    _SET_KEY(item, key)
    return item


def item_key(files: Sequence[SourceFile], options: ReadOptions, shard_bytes: int) -> str:
    """64 hex digits that name what converting `files` gives. Paths and commits do not enter: same content, same key."""
    return hashlib.sha256(key_inputs(files, key_end(options, shard_bytes))).hexdigest()


@lru_cache(maxsize=16)  # the items of a split share their options, of which every item's key has the whole text
def key_end(options: ReadOptions, shard_bytes: int) -> str:
    """What follows the files in the canonical JSON of an item's inputs; the names of all its entries sort so."""
    rest = {"options": options.to_dict(), "shard_bytes": shard_bytes, "version": CONVERSION_VERSION}
    return "]," + canonical_json(rest).decode()[1:]


def key_inputs(files: Iterable[SourceFile], end: str) -> bytes:
    """The canonical JSON of `{"files": [[oid, size], ...], ...}`, of which an item's key is the sha256."""
    listed = ",".join([f"[{_quoted(file.oid)},{file.size}]" for file in files])
    return f'{{"files":[{listed}{end}'.encode()  # for one plain file `items` spells this itself


def _quoted(oid: str) -> str:
    return f'"{oid}"' if oid.isalnum() else json.dumps(oid, ensure_ascii=False)


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8. Digests are taken over this."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(value: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard of a manifest: exact, because it was counted and hashed when it was made."""

    key: str
    rows: int
    size: int
    """Bytes of the Arrow IPC file."""
    digest: str
    """sha256 of the Arrow IPC file."""
    schema: str
    """sha256 of the serialised Arrow schema; the schema itself is in the manifest's `schemas`."""
    item: int
    number: int
    """Which shard of its item, from 0."""
