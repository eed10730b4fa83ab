"""What goes along with an iteration: where it is, what is fetched ahead of it, what it has on record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from crucible.feed import Feeder
from crucible.reading import Block, Leaf
from crucible.share import Share
from crucible.streams import Walk
from crucible.wants import shards_wanted

if TYPE_CHECKING:
    from crucible.proof import Proof


class Progress:
    """Where an iteration is. A new iteration gets a new one, so a loop that was left cannot move its successor's."""

    __slots__ = ("_ended", "_share", "_total", "units")

    def __init__(self, share: Share, total: int) -> None:
        self._share, self._total, self._ended = share, total, False
        self.units = 0
        """Rows or batches delivered. Only this is written per row; the arithmetic waits until a state is asked for."""

    @property
    def position(self) -> int:
        """Global position when all ranks have delivered as much."""
        return self._total if self._ended else self._share.position_after(self._total, self.units)

    @property
    def turn(self) -> list[int] | None:
        """For a worker of several: its number, of how many, and where all stand whose turn is before its next one.

        That is a global position, maybe past the end; the last number is how far a turn moves it.
        """
        share = self._share
        if share.workers == 1:
            return None
        step = share.unit * share.world_size
        next_turn = share.start + step * (share.worker + share.workers * self.units)
        return [share.worker, share.workers, next_turn, step]

    def finish(self) -> None:
        """The epoch is over, for a rank with one row less than others too."""
        self._ended = True

    @classmethod
    def at(cls, position: int) -> Progress:
        """Nothing delivered yet, from `position` on."""
        return cls(Share(start=position), position)


def feeders_of(leaves: Sequence[Leaf], walk: Walk, share: Share, total: int) -> dict[int, Feeder]:
    """What fetches ahead for a reader, by the `id` of the source of shards it is for."""
    manifests = [leaf.manifest for leaf in leaves]
    sources = {id(leaf.source): leaf.source for leaf in leaves}
    feeders = {}
    for number, source in sources.items():
        most = getattr(source, "ahead_bytes", 0) // len(sources)
        feeder = feeders[number] = Feeder(source, most_bytes=most, rank=share.rank)
        mine = {id(leaf.manifest) for leaf in leaves if leaf.source is source}
        wanted = shards_wanted(manifests, walk, share, total)
        feeder.want(wanted if len(sources) == 1 else (one for one in wanted if id(one[0]) in mine))
    return feeders


def noted(blocks: Iterator[Block], proof: Proof) -> Iterator[Block]:
    """The same blocks; `proof` is told of each before it is read."""
    for block in blocks:
        proof.block(block.ids, block.valid)
        yield block
