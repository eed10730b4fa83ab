"""In which requests files are asked for. Pure: the plan counts with it what the download then sends."""

from __future__ import annotations

from collections.abc import Iterable

from crucible.refs import SourceFile

SMALL_BYTES = 1 << 20
"""Below this a file comes in one request and one write: a lease and a journal would cost more than to ask again."""
LEAST_PART = 16 << 20
"""Smaller ranges cost more in round trips than they gain in parallelism."""
LINKED_FILES = 16
"""Fewer small LFS files than this are resolved one by one: as quick, and below what any quota minds."""
LINK_BATCH = 100
"""Links asked for in one request, as git-lfs does."""


def part_size(size: int, streams: int, most: int) -> int:
    """Bytes of one range of a file: a share for every stream, at least `LEAST_PART`, never more than `most`."""
    if size < SMALL_BYTES:
        return max(1, size)
    share = -(-size // max(1, streams))
    return max(1, min(most, max(LEAST_PART, share)))


def link_batches(files: Iterable[SourceFile]) -> list[list[SourceFile]]:
    """The batches in which links to these files, which are brought together, are asked for; none for the others.

    Small LFS files, if there are at least `LINKED_FILES` of them.
    """
    small = [file for file in files if file.lfs and 0 < file.size < SMALL_BYTES]
    if len(small) < LINKED_FILES:
        return []
    return [small[at : at + LINK_BATCH] for at in range(0, len(small), LINK_BATCH)]
