"""Rows of all files of a work item: archives are opened, and formats that need several files get them together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pyarrow as pa

from crucible.formats.archives import is_zip, open_zip
from crucible.formats.folders import FOLDERS, read_folder
from crucible.formats.limits import Limits
from crucible.formats.read import Reader, read_file, select_columns
from crucible.formats.webdataset import read_webdataset
from crucible.refs import ReadOptions

ZIPPED = frozenset(("csv", "json", "text"))
"""Builders that `datasets` lets read what is inside a zip archive."""


def read_item(
    names: Sequence[str],
    paths: Sequence[Path],
    options: ReadOptions,
    folder: Path,
    limits: Limits | None = None,
    read: Reader | None = None,
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The rows of the files `names`, whose bytes are at `paths`, in order; each batch with the name errors call it.

    Files of formats that need no other file are read by `read`; by default that is `read_file` within the same limits.
    `folder` is on a disk with room for a file from inside an archive, of which one at a time is unpacked there.
    """
    limits = limits or Limits()
    read = read or partial(read_file, limits=limits)
    spool = folder / "unpacked"
    try:
        if options.builder in FOLDERS:
            yield from read_folder(names, paths, options, limits, spool)
            return
        for name, path in zip(names, paths, strict=True):
            if options.builder in ZIPPED and is_zip(path):
                with open_zip(path, name, limits) as archive:
                    for inside in archive.names:
                        archive.copy(inside, spool)
                        for batch in read(spool, f"{name}/{inside}", options):
                            yield f"{name}/{inside}", batch
            elif options.builder == "webdataset":
                for batch in read_webdataset(path, name, options, limits):
                    yield name, select_columns(batch, name, options)
            else:
                for batch in read(path, name, options):
                    yield name, batch
    finally:
        with suppress(OSError):
            spool.unlink()


def read_heads(
    names: Sequence[str], paths: Sequence[Path], options: ReadOptions, folder: Path, limits: Limits | None = None
) -> Iterator[tuple[str, pa.Schema]]:
    """The schema of each file's first batch, but of files that are empty altogether."""
    together = options.builder in FOLDERS
    for files in [(names, paths)] if together else [([n], [p]) for n, p in zip(names, paths, strict=True)]:
        for name, batch in read_item(*files, options, folder, limits):
            yield name, batch.schema
            break
