"""Folders of media files: what their rows have besides the file, and the items they are read in. `datasets`' rules.

Labels are the names of the folders that the files lie in, if there are several and all files are equally deep. Where a
metadata file lies among them, the rows are its lines instead, and there are no labels. Both are looked for in all
splits in turn, so what one split has decides about those after it.

Pure, but for what the callers give: `names_in` lists an archive, `lines_of` reads a metadata file.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from crucible.cluster.plan import BATCH_FILES, batch_limit, named_options
from crucible.cluster.resolve import NamesIn, ResolvedSplit
from crucible.errors import CorruptFile
from crucible.feature_types import Feature, dump_features, features_of
from crucible.formats.folders import (
    FOLDERS,
    FolderKind,
    has_extension_of,
    label_of,
    metadata_names,
    named_files,
    with_files,
)
from crucible.refs import RepoRef, SourceFile, WorkItem

METADATA_SHARE = 8
"""An item brings at least so many times the bytes of its metadata file, which every item of it brings again."""

LinesOf = Callable[[SourceFile], Iterator[pa.RecordBatch]]


@dataclass
class _Sorted:
    """A split's files by what they are for."""

    media: list[SourceFile] = field(default_factory=list)
    metadata: list[SourceFile] = field(default_factory=list)
    archives: list[SourceFile] = field(default_factory=list)


def _sort(split: ResolvedSplit, folder: FolderKind, names: frozenset[str]) -> _Sorted:
    found = _Sorted()
    for file in split.files:
        if folder.holds(file.path):
            found.media.append(file)
        elif posixpath.basename(file.path) in names:
            found.metadata.append(file)
        elif file.path.lower().endswith(".zip"):
            found.archives.append(file)
    return found


def settle(repo: RepoRef, splits: Sequence[ResolvedSplit], names_in: NamesIn) -> tuple[ResolvedSplit, ...]:
    """All splits of a config, with what their rows have in their options. Other builders' splits stay as they are."""
    if not splits or splits[0].options.builder not in FOLDERS:
        return tuple(splits)
    options = splits[0].options
    folder, names = FOLDERS[options.builder], metadata_names(options)
    drop_labels, drop_metadata = options.param("drop_labels"), options.param("drop_metadata")
    labels: set[str] = set()
    depths: set[tuple[bool, int]] = set()
    found_metadata = labelled = False
    drafts: list[tuple[ResolvedSplit, bool, bool]] = []
    for split in splits:
        kept = _sort(split, folder, names)
        has_metadata = bool(kept.metadata)
        with_metadata: list[SourceFile] = []
        for file in kept.media if not drop_labels else ():
            if has_extension_of(file.path, folder):
                labels.add(label_of(file.path) or posixpath.basename(repo.repo_id))
                depths.add((False, file.path.count("/")))
        for archive in kept.archives if not (drop_labels and drop_metadata) else ():
            inside = names_in(archive)
            if any(posixpath.basename(name) in names for name in inside):
                with_metadata.append(archive)
            for name in inside if not drop_labels else ():
                if has_extension_of(name, folder):
                    labels.add(label_of(name))
                    depths.add((True, archive.path.count("/") + name.count("/")))
        found_metadata = found_metadata or has_metadata or bool(with_metadata)
        if found_metadata or (drop_labels and drop_metadata):
            labelled = False
        else:
            labelled = (len(labels) > 1 and len(depths) == 1) if drop_labels is None else not drop_labels
        rows = not drop_metadata and (has_metadata or bool(with_metadata))
        files = (*kept.metadata, *kept.media, *with_metadata) if rows else (*kept.media, *kept.archives)
        drafts.append((replace(split, files=files), labelled, rows))
    names_files = found_metadata and not drop_metadata
    features: dict[str, Feature] = {folder.column: {"_type": folder.feature}}
    if labelled:
        features["label"] = {"names": sorted(labels), "_type": "ClassLabel"}
    said = options.features if options.features is not None or names_files else dump_features(features)
    settled = []
    for split, label, rows in drafts:
        flags = [("labels", "true")] if label and (labelled or options.features is not None) else []
        flags += [("metadata", "true")] if rows else []
        params = [(key, value) for key, value in options.params if key not in ("drop_labels", "drop_metadata")]
        settled.append(replace(split, options=replace(options, params=tuple(sorted((*params, *flags))), features=said)))
    return tuple(settled)


def plan_rows(
    repo: RepoRef,
    split: ResolvedSplit,
    *,
    shard_bytes: int,
    lines_of: LinesOf,
    file_at: Callable[[str], SourceFile | None],
) -> Iterator[WorkItem]:
    """The items of a split whose rows are those of its metadata files, in the order of these files and their rows.

    `file_at` gives the repo's file of a path. Raises CorruptFile for a row that names a file which is not there.
    """
    folder = FOLDERS[split.options.builder]
    kept = _sort(split, folder, metadata_names(split.options))
    limit = batch_limit(split.files)
    index = 0

    def item(files: Sequence[SourceFile], rows: tuple[int, int] | None) -> WorkItem:
        options = split.options
        if rows is not None:
            options = replace(options, params=tuple(sorted((*options.params, ("rows", json.dumps(rows))))))
        return WorkItem(index, repo, tuple(files), named_options(options, files), shard_bytes)

    for metadata in kept.metadata:
        least = METADATA_SHARE * metadata.size
        batch: dict[str, SourceFile] = {}
        start = row = size = 0
        for lines in lines_of(metadata):
            for paths in named_files(lines, metadata.path, row, folder):
                files = {path: _file_of(metadata, path, row, file_at) for path in paths}
                more = sum(file.size for path, file in files.items() if path not in batch)
                full = size + more > limit or len(batch) + len(files) > BATCH_FILES
                if batch and full and size + more > least:
                    yield item((metadata, *batch.values()), (start, row))
                    index += 1
                    batch, start, size = {}, row, 0
                    more = sum(file.size for file in files.values())
                batch |= files
                size += more
                row += 1
        if row > start or not row:
            yield item((metadata, *batch.values()), (start, row))
            index += 1
    for archive in kept.archives:
        yield item((archive,), None)
        index += 1


def _file_of(metadata: SourceFile, path: str, row: int, file_at: Callable[[str], SourceFile | None]) -> SourceFile:
    file = file_at(path)
    if file is None:
        raise CorruptFile(metadata.path, f"row {row:,}", f"names {path!r}, which is not in the repo")
    return file


def columns_named(metadata: SourceFile, split: ResolvedSplit, lines_of: LinesOf) -> str | None:
    """The features that rows of a metadata file get; None for a file without a line that says so."""
    folder = FOLDERS[split.options.builder]
    first = next(lines_of(metadata), None)
    if first is None:
        return None
    schema = with_files(first.slice(0, 0), metadata.path, 0, folder, lambda _: b"").schema
    return dump_features(features_of(schema))
