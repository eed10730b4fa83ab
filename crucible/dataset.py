"""What a training script holds: `IterableDataset` streams a split; `Dataset`, of the module `mapped`, indexes it.

Both read one manifest through a `ShardSource`, and are cheap to make, copy and pickle: shards are opened when the first
row is asked for, in the process that asks. Transforms return a new object; only epoch and position change in place.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from crucible.config import Settings
from crucible.errors import CorruptFile, StateMismatch, UsageError
from crucible.iterate import Block, ShardSource, Share, read_blocks
from crucible.manifest import Manifest
from crucible.mapped import Dataset, DatasetDict
from crucible.order import EpochOrder, OrderSpec, check_rank, shard_rows, shuffled_spec
from crucible.output import SKIPPED, OnBad, Output, shifted
from crucible.view import Split, View

__all__ = ["Dataset", "DatasetDict", "IterableDataset"]

STATE_FORMAT = 1
"""Version of a state dict and of the order's arithmetic. A state of another version is refused."""


class _Progress:
    """Where an iteration is. A new iteration gets a new one, so a loop that was left cannot move its successor's."""

    __slots__ = ("_share", "_total", "units")

    def __init__(self, share: Share, total: int) -> None:
        self._share, self._total = share, total
        self.units = 0
        """Rows or batches delivered. Only this is written per row; the arithmetic waits until a state is asked for."""

    @property
    def position(self) -> int:
        """Global position when all ranks have delivered as much."""
        return self._share.position_after(self._total, self.units)

    def finish(self) -> None:
        """The epoch is over, for a rank with one row less than others too."""
        self._share, self.units = Share(start=self._total), 0

    @classmethod
    def at(cls, position: int) -> _Progress:
        """Nothing delivered yet, from `position` on."""
        return cls(Share(start=position), position)


class IterableDataset(Split):
    """The rows of a split as this rank reads them: in source order, or after `shuffle` in the order of (seed, epoch).

    Iterating after an epoch has ended, or was left, starts the same epoch again; `set_epoch` moves to another one. In a
    torch DataLoader use `batch(n)` here and `batch_size=None` there: workers then take whole batches in turn, and the
    consumer sees the same batches in the same order for any number of workers.

    Concurrency: one iteration at a time; processes hold copies.
    """

    def __init__(self, manifest: Manifest, source: ShardSource) -> None:
        super().__init__(manifest, source, View())
        self._spec = OrderSpec()
        self._order: EpochOrder | None = None
        self._progress = _Progress.at(0)
        self._resume_at: int | None = None
        """Where the next iteration starts, set by `load_state_dict`."""

    # --- transforms ---

    def shuffle(self, seed: int | None = None, buffer_size: int | None = None) -> IterableDataset:  # noqa: ARG002
        """Rows in an order that depends on (seed, epoch). `seed` None is 0; `buffer_size` has no meaning here.

        A split small enough to lie on every node gets an exact permutation, in epoch 0 that of `datasets`.
        """
        made = self._with(self._view)
        made._spec = shuffled_spec(self._manifest, 0 if seed is None else operator.index(seed), epoch=self._spec.epoch)
        made._order, made._resume_at, made._progress = None, None, _Progress.at(0)
        return made

    def shard(self, rank: int | None = None, world_size: int | None = None) -> IterableDataset:
        """This rank's rows only. Without arguments: RANK and WORLD_SIZE of the launcher, else all rows."""
        if (rank is None) != (world_size is None):
            raise UsageError("shard needs both rank and world_size, or neither to take them from the launcher")
        if rank is None or world_size is None:
            settings = Settings.from_env()
            rank = 0 if settings.rank is None else settings.rank
            world_size = 1 if settings.world_size is None else settings.world_size
        check_rank(rank, world_size)
        return self._with(replace(self._view, rank=rank, world_size=world_size))

    def batch(self, batch_size: int, drop_last: bool = False) -> IterableDataset:
        """Dicts of lists of `batch_size` rows of this rank. `drop_last`: no rank reads a short last global batch."""
        if batch_size < 1:
            raise UsageError(f"batch_size must be 1 or more, got {batch_size}")
        return self._with(replace(self._view, batch=batch_size, drop_last=drop_last))

    def _with(self, view: View) -> IterableDataset:
        made = IterableDataset(self._manifest, self._source)
        made._view, made._spec, made._order = view, self._spec, self._order
        made._resume_at, made._progress = self._resume_at, _Progress.at(self._progress.position)
        return made

    # --- where it is ---

    @property
    def epoch(self) -> int:
        return self._spec.epoch

    @property
    def order(self) -> EpochOrder:
        """The order of this epoch."""
        if self._order is None or self._order.spec != self._spec:
            self._order = EpochOrder(shard_rows(self._manifest), self._spec)
        return self._order

    def set_epoch(self, epoch: int) -> None:
        """Iterate `epoch` from its start. Setting the epoch it is in already keeps the position of a loaded state."""
        if epoch != self._spec.epoch:
            self._spec = replace(self._spec, epoch=epoch)
            self._resume_at, self._progress = None, _Progress.at(0)

    def state_dict(self) -> dict[str, Any]:
        """Where this rank is, in a few hundred bytes of JSON. Any rank's state restores all ranks, at any world size.

        It counts rows as delivered when the loop has received them. In a DataLoader with workers the copies in the
        workers move, not this object: use a StatefulDataLoader there, or `state_after(batches)`.
        """
        return self._state(self._progress.position)

    def state_after(self, count: int) -> dict[str, Any]:
        """The state in which every rank has delivered `count` batches (rows without `batch`) of this epoch."""
        return self._state(self._share(0, (0, 1)).position_after(self.num_rows, count))

    def _state(self, position: int) -> dict[str, Any]:
        spec = self._spec
        return {
            "format": STATE_FORMAT,
            "manifest": self._manifest.id,
            "mode": spec.mode,
            "seed": spec.seed,
            "epoch": spec.epoch,
            "lanes": spec.lanes,
            "window": spec.window,
            "reshuffle": spec.reshuffle,
            "position": position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on from `state`, at its epoch and with its lanes.

        Raises StateMismatch if it is of another dataset, or of another seed.
        """
        for field, mine in (("format", STATE_FORMAT), ("manifest", self._manifest.id)):
            if state.get(field) != mine:
                raise StateMismatch(field, str(mine), str(state.get(field)))
        shuffled, was_shuffled = self._spec.mode != "source", state.get("mode") != "source"
        if shuffled != was_shuffled:
            raise StateMismatch("order", *("shuffled" if one else "source order" for one in (shuffled, was_shuffled)))
        if state.get("seed") != self._spec.seed:
            raise StateMismatch("seed", str(self._spec.seed), str(state.get("seed")))
        try:
            names = ("mode", "seed", "epoch", "lanes", "window", "reshuffle")
            spec, position = OrderSpec(**{name: state[name] for name in names}), operator.index(state["position"])
        except (KeyError, TypeError, UsageError) as error:
            raise StateMismatch("fields", "a complete state", f"none ({error})") from error
        if not 0 <= position <= self.num_rows:
            raise StateMismatch("position", f"{self.num_rows:,} rows", f"{position:,}")
        self._spec, self._resume_at, self._progress = spec, position, _Progress.at(position)

    # --- iteration ---

    def __len__(self) -> int:
        """Rows, or batches, that this rank delivers in a whole epoch."""
        return self._share(0, (0, 1)).units(self.num_rows)

    def __iter__(self) -> Iterator[Any]:
        start = 0 if self._resume_at is None else self._resume_at
        self._resume_at = None
        share = self._share(start, _worker())
        self._progress = _Progress(share, self.num_rows)
        return self._read(share, self.order, self._progress)

    def _share(self, start: int, worker: tuple[int, int]) -> Share:
        view = self._view
        return Share(view.rank, view.world_size, *worker, view.batch or 1, start, view.drop_last)

    def _read(self, share: Share, order: EpochOrder, progress: _Progress) -> Iterator[Any]:
        reader, output = self._opened(order.open_shards(share.rank, share.world_size))
        for block in read_blocks(reader, order, share):
            bad = partial(self._bad_of, order, share, block.first_unit)
            items = (
                output.rows(block.table, bad) if self._view.batch is None else _batches(block, share.unit, output, bad)
            )
            for unit, item in enumerate(items, block.first_unit + 1):
                progress.units = unit  # before the yield: whoever asks while handling this item has received it
                if item is not SKIPPED:
                    yield item
        progress.finish()

    def _bad_of(self, order: EpochOrder, share: Share, first_unit: int, number: int, error: CorruptFile) -> None:
        """Row `number` of the block that begins with `first_unit` cannot be decoded."""
        unit, inside = divmod(number, share.unit)
        positions = share.positions(order.total, first_unit + unit, first_unit + unit + 1)
        self._bad(error, int(order.rows(positions[inside : inside + 1])[0]))

    # --- pickling, and torch ---

    def __reduce__(self) -> tuple[Any, ...]:
        # Maps stay behind: the process that unpickles opens its own.
        state = (self._view, self._spec, self._resume_at, self._progress.position)
        return _unpickle, (self._manifest, self._source, *state)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """As `isinstance` sees it: once torch is loaded, also a torch IterableDataset.

        DataLoader chooses how to read by `isinstance`. A base class would mean importing torch; `datasets` changes
        `__bases__` when a dataset is made, which misses one that was made before torch was imported.
        """
        torch_data = sys.modules.get("torch.utils.data")
        return IterableDataset if torch_data is None else _torch_class(torch_data.IterableDataset)


def _batches(block: Block, size: int, output: Output, bad: OnBad) -> Iterator[Any]:
    for start in range(0, block.table.num_rows, size):
        yield output.batch(block.table.slice(start, size), shifted(bad, start))


def _worker() -> tuple[int, int]:
    """(worker, workers) of the torch DataLoader worker this process is, else (0, 1). Never imports torch."""
    torch_data = sys.modules.get("torch.utils.data")
    info = None if torch_data is None else torch_data.get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


_torch_classes: dict[type, type] = {}


def _torch_class(base: type) -> type:
    if base not in _torch_classes:
        _torch_classes[base] = type("IterableDataset", (IterableDataset, base), {"__module__": __name__})
    return _torch_classes[base]


def _unpickle(
    manifest: Manifest, source: ShardSource, view: View, spec: OrderSpec, resume_at: int | None, position: int
) -> IterableDataset:
    made = IterableDataset(manifest, source)
    made._view, made._spec, made._resume_at, made._progress = view, spec, resume_at, _Progress.at(position)
    return made
