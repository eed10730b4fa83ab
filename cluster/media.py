"""Items of formats whose plan needs a look into files: folders of media with metadata, and archives. Does the I/O.

Of an archive only its list of files is read, by range; of metadata files the whole, once, because its rows say which
files an item needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import pyarrow as pa

from crucible.cache.store import Store
from crucible.cluster.folders import LinesOf, columns_named, plan_rows, settle
from crucible.cluster.plan import plan_items
from crucible.cluster.resolve import NamesIn, ResolvedSplit
from crucible.config import Settings
from crucible.feature_types import parse_features
from crucible.formats.archives import names_inside
from crucible.formats.folders import FOLDERS, metadata_names, metadata_reader
from crucible.formats.limits import Limits
from crucible.hub.client import Repo
from crucible.refs import ByteRange, RepoRef, SourceFile, WorkItem


def look_inside(repo: Repo, pinned: RepoRef) -> NamesIn:
    """A function that lists an archive of the repo. It asks for each once."""

    @cache
    def names_in(file: SourceFile) -> tuple[str, ...]:
        return names_inside(lambda start, stop: repo.read(pinned, file, ByteRange(start, stop)), file.size, file.path)

    return names_in


def plan_splits(
    repo: Repo,
    pinned: RepoRef,
    all_splits: Sequence[ResolvedSplit],
    splits: Sequence[ResolvedSplit],
    settings: Settings,
    store: Store,
) -> tuple[tuple[ResolvedSplit, ...], tuple[Sequence[WorkItem], ...]]:
    """`splits` with what their rows have settled, and the items of each. `all_splits` are those of the whole config."""
    if not splits or splits[0].options.builder not in FOLDERS:
        return tuple(splits), tuple(plan_items(pinned, s, shard_bytes=settings.shard_bytes) for s in splits)
    asked = replace(splits[0].options, columns=None)  # with what the request itself says
    everything = [replace(split, options=asked) for split in all_splits]
    settled = settle(pinned, everything, look_inside(repo, pinned))
    limits = Limits(settings.row_bytes, settings.unpacked_bytes)

    def lines_of(file: SourceFile) -> Iterator[pa.RecordBatch]:
        limits.check_row(file.path, "", file.size)
        declared = settled[0].options.features
        reader = metadata_reader(file.path, parse_features(declared) if declared is not None else None)
        with store.workspace() as folder:
            path = folder / "metadata"
            path.write_bytes(repo.read(pinned, file))
            yield from reader(path)

    by_path = {file.path: file for split in all_splits for file in split.files}
    listed = False

    def file_at(path: str) -> SourceFile | None:
        nonlocal listed
        if path not in by_path and not listed:  # a file that no pattern of the config selects
            by_path.update((file.path, file) for file in repo.files(pinned))
            listed = True
        return by_path.get(path)

    settled = _alike(settled, lines_of)
    chosen = []
    items: list[Sequence[WorkItem]] = []
    for split in splits:
        done = next(one for one in settled if one.name == split.name)
        done = replace(done, options=replace(done.options, columns=split.options.columns))
        chosen.append(done)
        if done.options.param("metadata"):
            made = plan_rows(pinned, done, shard_bytes=settings.shard_bytes, lines_of=lines_of, file_at=file_at)
            items.append(tuple(made))
        else:
            items.append(plan_items(pinned, done, shard_bytes=settings.shard_bytes))
    return tuple(chosen), tuple(items)


def _alike(splits: tuple[ResolvedSplit, ...], lines_of: LinesOf) -> tuple[ResolvedSplit, ...]:
    """Where some splits have metadata files and others none, these get the columns of those, with nulls."""
    plain = [split for split in splits if not split.options.param("metadata")]
    if len(plain) in (0, len(splits)) or splits[0].options.features is not None:
        return splits
    names = metadata_names(splits[0].options)
    metadata = (
        (file, split)
        for split in splits
        if split.options.param("metadata")
        for file in split.files
        if file.path.rpartition("/")[2] in names
    )
    found = next(metadata, None)
    columns = None if found is None else columns_named(*found, lines_of)
    return tuple(
        replace(split, options=replace(split.options, features=columns)) if split in plain else split
        for split in splits
    )
