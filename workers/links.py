"""Links to many small LFS files, asked for in batches shortly before they are used. See `crucible.hub.lfs`.

Which files: `crucible.parts.link_batches`. Which source: the first of the Hubs and mirrors, for that is whom `download`
asks first; whoever comes after it resolves, as for any file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from itertools import islice

from crucible.parts import LINK_BATCH, link_batches
from crucible.refs import SourceFile
from crucible.workers.sources import HubSource, Source

LINKS_AHEAD = 4
"""Batches asked for before their files are: enough to hide what a batch takes, and the links are seconds old when they
are used, however many files a repo has."""

Group = list[SourceFile]
"""The files of one content. The first is brought."""


def batching(sources: Sequence[Source]) -> HubSource | None:
    """Who is to be asked for links, if these are the sources of a file."""
    return next((source for source in sources if isinstance(source, HubSource)), None)


def ahead(
    groups: Iterable[Group], hub: HubSource, wanted: Callable[[Group], bool], asking: Executor
) -> Iterator[Group]:
    """`groups` of small LFS files in their order, each when the links of its batch were asked for.

    `wanted` says which are not here; it is called in the threads of `asking`, some batches ahead.
    """
    rest = iter(groups)
    waiting: deque[tuple[list[Group], Future[None]]] = deque()

    def ask(batch: Sequence[Group]) -> None:
        for files in link_batches(group[0] for group in batch if wanted(group)):
            hub.prime(files)

    while True:
        while len(waiting) < LINKS_AHEAD and (batch := list(islice(rest, LINK_BATCH))):
            waiting.append((batch, asking.submit(ask, batch)))
        if not waiting:
            return
        batch, asked = waiting.popleft()
        asked.result()
        yield from batch
