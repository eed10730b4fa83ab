"""Running a conversion in a test, or in a process that a test starts (so this imports no oracle)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crucible.refs import ReadOptions, RepoRef, SourceFile, WorkItem
from crucible.workers.convert import DraftShard, convert

REPO = RepoRef("someone/repo", "0" * 40)


def item_of(paths: Sequence[Path], options: ReadOptions, shard_bytes: int = 64 << 20) -> WorkItem:
    files = tuple(SourceFile(path.name, path.stat().st_size, "0" * 40, False) for path in paths)
    return WorkItem(0, REPO, files, options, shard_bytes)


def run(paths: Sequence[Path], options: ReadOptions, folder: Path, shard_bytes: int = 64 << 20) -> list[DraftShard]:
    folder.mkdir(parents=True, exist_ok=True)
    return list(convert(item_of(paths, options, shard_bytes), paths, folder))
