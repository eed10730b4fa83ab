"""Whether a job gives what its lock file says, and if not, what differs. Pure.

Source files are compared before anything moves; shards when they are made, before any name leads to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from crucible.errors import LockMismatch
from crucible.lockfile import Lock
from crucible.manifest import Manifest
from crucible.refs import DataRequest, SourceFile, WorkItem

MARK = 4
"""Hex digits of each shard's digest that a job carries, to say which differs; that one does, the manifest's id says."""
MOST_MARKED = 100_000
"""Shards of a split above which it carries none: a job's record has to stay small."""


def locked_request(lock: Lock) -> DataRequest:
    """The request that gives `lock` again, or fails: at its commit, for its splits."""
    first = lock.manifests[0]
    wanted = tuple((one.split, one.id, _marks(one)) for one in lock.manifests)
    split = "+".join(one.split for one in lock.manifests)
    return replace(lock.request, repo=first.repo, config=first.config, split=split, locked=wanted)


def _marks(manifest: Manifest) -> str:
    shards = manifest.shards
    return "".join(shard.digest[:MARK] for shard in shards) if len(shards) <= MOST_MARKED else ""


def check_sources(lock: Lock, splits: Sequence[tuple[str, Sequence[WorkItem]]]) -> None:
    """Raise LockMismatch if these items are not those of the lock file, naming the first thing that differs."""
    found = dict(splits)
    for manifest in lock.manifests:
        if manifest.split not in found:
            raise LockMismatch(f"split {manifest.split}", "it is there", "not there", "its files are not there")
        theirs, ours = manifest.items, found[manifest.split]
        if [item.key for item in theirs] == [item.key for item in ours] and _paths(theirs) == _paths(ours):
            continue
        locked = {file.path: file for file in _files(theirs)}
        here = {file.path: file for file in _files(ours)}
        for path in dict.fromkeys([*locked, *here]):
            if path not in here or path not in locked or (locked[path] != here[path]):
                hint = "what the Hub has at this commit is not what it had: ask who rewrote it, or import a bundle"
                raise LockMismatch(f"source file {path}", _told(locked.get(path)), _told(here.get(path)), hint)
        raise LockMismatch(
            f"split {manifest.split}",
            f"{len(theirs)} items of other settings or of another order",
            f"{len(ours)} items",
            "the card, or another crucible, cuts the same files otherwise",
        )


def check_made(request: DataRequest, manifests: Iterable[Manifest]) -> None:
    """Raise LockMismatch if what a job made is not what `request` is locked to, naming the first shard that differs."""
    made = {manifest.split: manifest for manifest in manifests}
    for split, wanted, marks in request.locked:
        manifest = made.get(split)
        if manifest is None:
            raise LockMismatch(f"split {split}", f"manifest {wanted[:12]}", "no such split")
        if manifest.id == wanted:
            continue
        hint = "the same files gave other bytes: is the pyarrow here another one than the lock file names?"
        for number, shard in enumerate(manifest.shards):
            mark = marks[number * MARK : (number + 1) * MARK]
            if marks and mark != shard.digest[:MARK]:
                files = ", ".join(file.path for file in manifest.item_of(shard).files[:3])
                what = f"shard {number} of split {split} ({files})"
                raise LockMismatch(what, f"digest {mark}…" if mark else "no such shard", shard.digest[:12], hint)
        if len(marks) > len(manifest.shards) * MARK:
            raise LockMismatch(f"split {split}", f"{len(marks) // MARK} shards", f"{len(manifest.shards)}", hint)
        raise LockMismatch(f"split {split}", f"manifest {wanted[:12]}", manifest.id[:12], hint)


def _files(items: Iterable[WorkItem]) -> Iterable[SourceFile]:
    return (file for item in items for file in item.files)


def _paths(items: Iterable[WorkItem]) -> list[str]:
    return [file.path for file in _files(items)]


def _told(file: SourceFile | None) -> str:
    return "not there" if file is None else f"{file.size:,} bytes with hash {file.oid[:12]}"
