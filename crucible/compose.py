"""Datasets made of datasets: one after the other, or mixed. And a rank's share of one, by the name `datasets` has."""

from __future__ import annotations

from collections.abc import Sequence

from crucible.dataset import IterableDataset
from crucible.errors import UsageError
from crucible.mix import MixSpec, Stop
from crucible.output import Format
from crucible.reading import Leaf, joined_features
from crucible.shaping import Delivery
from crucible.streams import Mixed, Stream, Sum, lanes_of


def concatenate_datasets(
    dsets: Sequence[IterableDataset], info: None = None, split: None = None, axis: int = 0
) -> IterableDataset:
    """The rows of `dsets` one dataset after the other; `shuffle` then shuffles all of them together.

    The columns are those of all of them; one that a dataset lacks is null there. Raises SchemaConflict, naming both
    datasets, when a column has two types.
    """
    _unused("concatenate_datasets", info=info, split=split)
    if axis != 0:
        raise UsageError("concatenate_datasets puts rows one after the other (axis=0); map adds columns to rows")
    leaves, streams, out = _joined(dsets, "concatenate_datasets")
    # Sums of sums are one, or a loop that adds a dataset at a time would make a tree as deep as it is long.
    flat = [part for stream in streams for part in (stream.parts if isinstance(stream, Sum) else (stream,))]
    return IterableDataset.of(leaves, Sum(tuple(flat)), out)


def interleave_datasets(
    datasets: Sequence[IterableDataset],
    probabilities: Sequence[float] | None = None,
    seed: int | None = None,
    info: None = None,
    split: None = None,
    stopping_strategy: Stop = "first_exhausted",
) -> IterableDataset:
    """The rows of `datasets` in turn, or mixed by `probabilities`: weights, which need not add up to 1.

    `stopping_strategy` is that of `datasets`: `first_exhausted` ends with the first dataset that ends;
    `all_exhausted` with the last, the others beginning again (in another order, if they are shuffled);
    `all_exhausted_without_replacement` gives each row once.

    The mix is a function of (weights, seed, epoch, position): each block of rows (1,024, or 256 a lane of the shuffled
    ones) has every dataset's share, in an order drawn for that block, so that a state goes on in it anywhere. Columns
    are as those of `concatenate_datasets`.
    """
    _unused("interleave_datasets", info=info, split=split)
    leaves, streams, out = _joined(datasets, "interleave_datasets")
    lengths = tuple(stream.total for stream in streams)
    weights = None if probabilities is None else tuple(float(one) for one in probabilities)
    lanes = tuple(lanes_of(stream) for stream in streams)
    spec = MixSpec(lengths, weights, 0 if seed is None else seed, stopping_strategy, lanes)
    return IterableDataset.of(leaves, Mixed(streams, spec), out)


def split_dataset_by_node(dataset: IterableDataset, rank: int, world_size: int) -> IterableDataset:
    """`dataset.shard(rank, world_size)`: the rows of this rank, balanced to a row."""
    _check([dataset], "split_dataset_by_node")
    return dataset.shard(rank, world_size)


def _unused(what: str, **given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{what} takes no {name}: the result is named by what it is made of; leave it out")


def _joined(dsets: Sequence[IterableDataset], what: str) -> tuple[list[Leaf], tuple[Stream, ...], Delivery]:
    _check(dsets, what)
    leaves: list[Leaf] = []
    streams: list[Stream] = []
    rows = 0
    for one in dsets:
        out = one._out
        if out.world_size != 1 or out.batch is not None:
            raise UsageError(f"{what} comes before shard() and batch(): the ranks share what comes out of it")
        if out.format != dsets[0]._out.format:
            raise UsageError(f"{what}: one dataset has the format {dsets[0]._out.format!r}, another {out.format!r}")
        streams.append(one._stream.shifted(rows))
        leaves += [leaf.stepped(out.steps) for leaf in one._leaves]
        rows += sum(leaf.num_rows for leaf in one._leaves)
    shown = [(leaf.name, leaf.shown) for leaf in leaves]
    joined_features([(name, features) for name, features in shown if features is not None])  # a conflict is told here
    first = dsets[0]._out
    stepped: list[Format] = [one._out.given for one in dsets if one._stepped]
    given = stepped[0] if stepped else first.format
    return leaves, tuple(streams), Delivery(format=first.format, given=given, end=first.end)


def _check(dsets: Sequence[IterableDataset], what: str) -> None:
    if not dsets:
        raise UsageError(f"{what} needs at least one dataset")
    for one in dsets:
        if not isinstance(one, IterableDataset):
            raise UsageError(
                f"{what} is for streams (load_dataset(..., streaming=True), or dataset.to_iterable()); got "
                f"{type(one).__name__}"
            )
