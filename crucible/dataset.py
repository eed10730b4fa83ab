"""What a training script holds: `IterableDataset` streams rows; `Dataset`, of the module `mapped`, indexes them.

Both read manifests through a `ShardSource`, and are cheap to make, copy and pickle: shards are opened when the first
row is asked for, in the process that asks. Transforms return a new object; only epoch and position change in place.
"""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crucible.errors import UsageError
from crucible.iterate import ShardSource
from crucible.launch import rank_here, rank_in
from crucible.loaders import check_split
from crucible.manifest import Manifest
from crucible.mapped import Dataset, DatasetDict
from crucible.order import LANES, WINDOW, Mode, OrderSpec, Reshuffle, check_rank, deal, shard_rows
from crucible.output import SKIPPED
from crucible.placed import Placed
from crucible.progress import Progress, feeders_of, noted
from crucible.reading import Leaf, UnitReader, block_of, read_blocks
from crucible.shaping import Delivery, Shaped
from crucible.share import End, Share, check_end, whole_number
from crucible.streams import Repeated, Shuffled, Source, Stream, Walk, check_exact, slice_of
from crucible.torching import torch_class, worker
from crucible.view import View

if TYPE_CHECKING:
    from crucible.proof import Proof

__all__ = ["Dataset", "DatasetDict", "IterableDataset"]


ROWS_BETWEEN = 64
"""Rows between two looks whether a record is to be written: a look at each costs a third of what reading a row does."""


_RANK_FIRST = (
    "shard(rank, world_size) deals rows to ranks, and has the rank first; shard(num_shards, index) of datasets takes "
    "whole files, and has it last. A part of a split is split='train[:25%]', take or skip"
)


class IterableDataset(Shaped, Placed):
    """The rows of a split as this rank reads them: in source order, or after `shuffle` in the order of (seed, epoch).

    Iterating after an epoch has ended, or was left, starts the same epoch again; `set_epoch` moves to another one. In a
    torch DataLoader use `batch(n)` here and `batch_size=None` there: workers then take whole batches in turn, and the
    consumer sees the same batches in the same order for any number of workers.

    Concurrency: one iteration at a time; processes hold copies.
    """

    def __init__(self, manifest: Manifest, source: ShardSource) -> None:
        self._begin((Leaf(manifest, source, View()),), Source(manifest.order_id, shard_rows(manifest)), Delivery())

    def _begin(self, leaves: tuple[Leaf, ...], stream: Stream, out: Delivery, *place: Any) -> None:
        self._leaves, self._stream, self._out = leaves, stream, out
        self._walk: tuple[Stream, int, Walk] | None = None
        self._placed(*place)
        self._single: UnitReader | None = None

    @classmethod
    def of(cls, leaves: Sequence[Leaf], stream: Stream, out: Delivery, epoch: int = 0) -> IterableDataset:
        """A dataset of these splits; row ids of `stream` count through them in turn."""
        made = cls.__new__(cls)
        made._begin(tuple(leaves), stream, out, epoch)
        return made

    # --- what it is ---

    @property
    def manifest(self) -> Manifest:
        """Of the split. Raises UsageError for a dataset made of several, which has `manifests`."""
        first, *others = self._leaves
        if others:
            raise UsageError(f"made of {len(self._leaves)} splits: `manifests` has them all")
        return first.manifest

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        return tuple(leaf.manifest for leaf in self._leaves)

    @property
    def num_rows(self) -> int:
        """Positions of an epoch, over all ranks: its rows, before filters."""
        return self._stream.total

    @property
    def num_shards(self) -> int:
        return sum(len(manifest.shards) for manifest in self.manifests)

    @property
    def n_shards(self) -> int:
        """`num_shards`, as it was called before."""
        return self.num_shards

    @property
    def skipped(self) -> int:
        """Rows that `decode(on_error="skip")` has left out in this process so far."""
        return sum(leaf.skipped for leaf in self._leaves)

    @property
    def padded_rows(self) -> int:
        """Rows that this rank gets in an epoch although they are not its own, with `end="pad"` or `"mask"`."""
        share = self._share(0, (0, 1))
        if not share.padded:
            return 0
        return share.units_of_rank(self.num_rows) * share.unit - deal(self.num_rows, *self._rank).rows

    def read_counts(self) -> dict[str, int]:
        """Shards and bytes that this process has asked for, by where each was first found: disk, peer or hub."""
        found: Counter[str] = Counter()
        for source in {id(leaf.source): leaf.source for leaf in self._leaves}.values():
            found.update(source.note())
        return dict(found)

    def __repr__(self) -> str:
        columns = self.column_names
        shown = "columns that a function makes" if columns is None else ", ".join(columns)
        return f"IterableDataset({self._name}: {self.num_rows:,} rows of {shown})"

    def __len__(self) -> int:
        """Rows, or batches, that this rank delivers in a whole epoch; of filtered rows, as many as there are before."""
        return self._share(0, (0, 1)).units(self.num_rows)

    # --- order ---

    def shuffle(
        self,
        seed: int | Mode | None = None,
        generator: None = None,
        buffer_size: int | None = None,  # noqa: ARG002
        max_buffer_input_shards: int | None = None,  # noqa: ARG002
        *,
        mode: Mode | None = None,
        reshuffle: Reshuffle = "local",
        lanes: int = LANES,
        window: int = WINDOW,
    ) -> IterableDataset:
        """Rows in an order that depends on (seed, epoch). `seed` None is 0; sizes of buffers have no meaning here.

        `mode="exact"` (or `shuffle("exact")`) is one permutation of all rows, in epoch 0 that of
        `datasets.Dataset.shuffle(seed)`; `"lanes"` has bounded memory, whatever the size. Without it, a split small
        enough to lie on every node is shuffled exactly. `reshuffle="global"` deals shards to lanes anew in each epoch;
        `"local"` leaves them on the node they are on. `lanes` and `window` are those of docs/order.md.
        """
        if generator is not None:
            raise UsageError("shuffle takes no generator: the order follows from seed and epoch; say shuffle(seed=...)")
        if isinstance(seed, str):
            seed, mode = None, seed
        if mode not in (None, "exact", "lanes"):
            raise UsageError(f"shuffle is 'exact' or in 'lanes', not {mode!r}")
        stream = self._stream.of if isinstance(self._stream, Shuffled) else self._stream
        number = 0 if seed is None else whole_number(seed, "seed")
        if mode == "exact" or (mode is None and self._small):
            exact = check_exact(stream.total, asked=mode == "exact")
        else:
            exact = False
        spec = OrderSpec("exact", number) if exact else OrderSpec("lanes", number, 0, lanes, window, reshuffle)
        return self._of(Shuffled(stream, spec))

    def take(self, n: int) -> IterableDataset:
        """The first `n` rows; after `shard` or `batch`, the first `n` rows or batches of every rank.

        Which rows these are is the same in every epoch, and `skip(n)` has all others.
        """
        return self._of(slice_of(self._stream, 0, self._counted(n, "take")))

    def skip(self, n: int) -> IterableDataset:
        """All but the first `n` rows; after `shard` or `batch`, but the first `n` rows or batches of every rank."""
        return self._of(slice_of(self._stream, self._counted(n, "skip"), self.num_rows))

    def repeat(self, num_times: int) -> IterableDataset:
        """An epoch in which each row comes `num_times` times, shuffled anew each time if it is shuffled."""
        if num_times is None:
            raise UsageError("an epoch has an end: repeat(n), or set_epoch(0), set_epoch(1), ... in a loop without one")
        count = whole_number(num_times, "repeat")
        if self.num_rows * count >= 1 << 62:
            raise UsageError(f"repeat({count}) would make {self.num_rows * count:,} rows; positions end at 2**62")
        return self._of(Repeated(self._stream, count))

    def shard(
        self,
        rank: int | None = None,
        world_size: int | None = None,
        *,
        group: Any = None,
        end: End | None = None,
        num_shards: None = None,
        index: None = None,
    ) -> IterableDataset:
        """This rank's rows only. Without arguments: those of the launcher (module `launch`), else all rows.

        `group` is a torch ProcessGroup, or a DeviceMesh of one dimension: where several ranks hold one model together,
        that of the data-parallel ones (`shard(group=mesh["dp"])`), so that the others read the same rows.
        `end` says what becomes of rows that do not come out even (module `share`); by default all are delivered.
        """
        if num_shards is not None or index is not None:
            raise UsageError(_RANK_FIRST)
        if (rank is None) != (world_size is None) or (group is not None and rank is not None):
            raise UsageError("shard needs both rank and world_size, or a group, or none to take them from the launcher")
        if rank is None or world_size is None:
            place = rank_here(os.environ) if group is None else rank_in(group)
            rank, world_size = place or (0, 1)
        if rank >= max(1, world_size):
            raise UsageError(f"rank must be in [0, world_size), got rank {rank} of {world_size}; {_RANK_FIRST}")
        check_rank(rank, world_size)
        if self._out.dealt and (rank, world_size) != self._rank:
            mine, of = self._rank
            raise UsageError(
                f"these are the rows of rank {mine} of {of} already, and parts of parts are not dealt: say shard once, "
                "of the dataset before it"
            )
        end = self._out.end if end is None else check_end(end)
        return self._handed(rank=rank, world_size=world_size, dealt=True, end=end)

    def batch(
        self,
        batch_size: int,
        by_column: None = None,
        drop_last_batch: bool = False,
        *,
        drop_last: bool = False,
        end: End | None = None,
    ) -> IterableDataset:
        """Dicts of lists of `batch_size` rows of this rank.

        `end` is one of the module `share`: `exact` (a short last batch, maybe not on all ranks), `drop`, `pad`, `mask`.
        `drop_last` is `end="drop"`: no rank reads a short last global batch. After `filter`, a batch is what is left of
        `batch_size` rows; `pad` and `mask` fill it.
        """
        if by_column is not None:
            raise UsageError(
                "batch puts n rows together, not those with one value of a column: leave out by_column, and say "
                "drop_last_batch by its name"
            )
        size = whole_number(batch_size, "batch_size", 1)
        wanted = "drop" if drop_last or drop_last_batch else self._out.end if end is None else check_end(end)
        return self._handed(batch=size, end=wanted)

    def get_batch(self, index: int) -> Any:
        """Batch `index` of this rank in this epoch, wherever an iteration is, which it does not disturb.

        It costs what reading one batch costs, at any index, and is the same each time. Raises IndexError for a batch
        that the epoch does not have.
        """
        if self._out.batch is None:
            raise UsageError("get_batch is about batches: say batch(n) first")
        share, walk, total, number = self._share(0, (0, 1)), self.walk, self.num_rows, operator.index(index)
        if not 0 <= number < share.units(total):
            raise IndexError(f"batch {number} of an epoch of {share.units(total)}")
        if self._single is None:
            out, most_open = self._out, walk.open_shards(share.rank, share.world_size)
            self._single = UnitReader(self._leaves, out.steps, out.given, out.format, most_open)
        return self._single.batch(block_of(walk, share, total, number, number + 1), share, walk, total)

    def iter(self, batch_size: int, drop_last_batch: bool = False) -> Iterator[Any]:
        """The batches of `batch(batch_size, drop_last_batch)`."""
        yield from self.batch(batch_size, drop_last_batch=drop_last_batch)

    # --- where it is ---

    def certify(self, folder: str | os.PathLike[str] | None = None) -> IterableDataset:
        """Keep count of what is handed out, so that `crucible verify-epoch FOLDER` can prove it was all, and once.

        Each process writes a record of its own into `folder`, a few times a second, and the last when the iteration
        ends; without a folder `certificate()` has it. CRUCIBLE_CERTIFICATES does the same for every dataset.
        """
        return self._handed(certify=None if folder is None else os.fspath(folder), proven=True)

    def certificate(self) -> dict[str, Any] | None:
        """The record of what this process was handed out in its last iteration; None before one, or if none is kept."""
        return None if self._proof is None else self._proof.settle(self._progress.units).to_dict()

    # --- iteration ---

    def __iter__(self) -> Iterator[Any]:
        check_split(*self._rank, dealt=self._out.dealt)
        share = self._share(self._next_start(), self._worker())
        self._progress = Progress(share, self.num_rows)
        return self._read(share, self.walk, self._progress)

    @property
    def walk(self) -> Walk:
        """Which row stands at which position in this epoch."""
        if self._walk is None or self._walk[:2] != (self._stream, self._epoch):
            self._walk = (self._stream, self._epoch, self._stream.at(self._epoch))
        return self._walk[2]

    def _read(self, share: Share, walk: Walk, progress: Progress) -> Iterator[Any]:
        out, total = self._out, self.num_rows
        proof = self._proof = self._new_proof(share)
        open_shards = walk.open_shards(share.rank, share.world_size)
        reader = UnitReader(self._leaves, out.steps, out.given, out.format, open_shards, proof)
        feeders = feeders_of(self._leaves, walk, share, total)
        reader.feed(feeders)
        blocks = read_blocks(walk, share, total, reader.block_rows, reader.first_rows)
        if proof is not None:
            blocks = noted(blocks, proof)
        unit, every = 0, 1 if share.unit > 1 else ROWS_BETWEEN
        try:
            if out.batch is None:
                items = reader.rows(blocks, mask=share.end == "mask")
            else:
                items = reader.batches(blocks, share, walk, total)
            for unit, item in enumerate(items, 1):
                progress.units = unit  # before the yield: whoever asks while handling this item has received it
                if proof is not None and not unit % every:
                    proof.received(unit)
                if item is not SKIPPED:
                    yield item
            progress.finish()
        finally:
            if proof is not None:
                proof.close(unit)
            for feeder in feeders.values():
                feeder.close()

    def _new_proof(self, share: Share) -> Proof | None:
        folder = self._out.certify or os.environ.get("CRUCIBLE_CERTIFICATES") or None
        if folder is None and not self._out.proven:
            return None
        from crucible.proof import Proof

        return Proof(None if folder is None else Path(folder), self._stream, self._epoch, share, self._name)

    # --- inside ---

    @property
    def _rank(self) -> tuple[int, int]:
        return self._out.rank, self._out.world_size

    def _worker(self) -> tuple[int, int]:
        return worker()

    def _share(self, start: int, of: tuple[int, int]) -> Share:
        return Share(*self._rank, *of, self._out.batch or 1, start, self._out.end)

    @property
    def _as_stored(self) -> bool:
        return isinstance(self._stream, Source) and self._keeps_rows

    @property
    def _small(self) -> bool:
        """True when all of it is small enough to lie on every node."""
        manifests = self.manifests
        most = max((manifest.local_bytes for manifest in manifests), default=0)
        return all(one.local_everywhere for one in manifests) and sum(one.size for one in manifests) <= most

    def _counted(self, n: int, what: str) -> int:
        """The position behind the first `n` rows, or batches, of all ranks."""
        count = whole_number(n, what)
        if not self._keeps_rows:
            raise UsageError(
                f"{what} counts rows before filters and batched maps: say it before them, or "
                f"take a look at what is left with itertools.islice(dataset, {n})"
            )
        return count * (self._out.batch or 1) * self._out.world_size

    def _of(self, stream: Stream) -> IterableDataset:
        return IterableDataset.of(self._leaves, stream, self._out, self._epoch)

    def _with(self, leaves: tuple[Leaf, ...], out: Delivery) -> IterableDataset:
        made = IterableDataset.__new__(IterableDataset)
        made._begin(leaves, self._stream, out, self._epoch, self._resume_at)
        made._walk = self._walk
        return made

    # --- pickling, and torch ---

    def __reduce__(self) -> tuple[Any, ...]:
        # Maps stay behind: the process that unpickles opens its own.
        place = (self._epoch, self._resume_at, self._progress.position, self._line)
        return _unpickle, (self._leaves, self._stream, self._out, *place)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        self._line.open()
        return torch_class(IterableDataset)


def _unpickle(leaves: tuple[Leaf, ...], stream: Stream, out: Delivery, *place: Any) -> IterableDataset:
    made = IterableDataset.__new__(IterableDataset)
    made._begin(leaves, stream, out, *place)
    return made
