"""Rows of a stream's leaves, brought together and turned into what a training loop receives, a unit at a time.

Two ways lead there. Without functions of the user's everything stays Arrow until the end. With them rows become Python
objects as soon as they are read, and the functions see them in the order of the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from crucible.errors import CorruptFile, SchemaConflict, UsageError
from crucible.feed import Feeder
from crucible.iterate import FIRST_BLOCK_ROWS, ShardSource
from crucible.manifest import Manifest
from crucible.order import Int64s
from crucible.output import SKIPPED, Format, OnBad, Output, shifted
from crucible.share import VALID, Share
from crucible.stepped import Rated, Told, Turn, one_by_one, together, turns
from crucible.steps import LeftOut, Row, Step, as_columns, columns_after
from crucible.streams import Walk
from crucible.view import Split, View, ViewReader, shown_features

if TYPE_CHECKING:
    from crucible.feature_types import Feature
    from crucible.proof import Proof


class Leaf(Split):
    """One split in a stream: where it comes from, which columns of it are read, and what happens to its rows alone."""

    def __init__(self, manifest: Manifest, source: ShardSource, view: View, steps: tuple[Step, ...] = ()) -> None:
        super().__init__(manifest, source, view)
        self.steps = steps

    def _with(self, view: View) -> Leaf:
        return Leaf(self._manifest, self._source, view, self.steps)

    def stepped(self, steps: Sequence[Step]) -> Leaf:
        """With these steps after its own."""
        return Leaf(self._manifest, self._source, self._view, (*self.steps, *steps))

    @property
    def name(self) -> str:
        return f"{self._manifest.repo.repo_id} ({self._manifest.config}, {self._manifest.split})"

    @property
    def read(self) -> dict[str, Feature]:
        """Column to plain feature, under the names and types of the view."""
        return shown_features(self._manifest, self._columns)

    @property
    def shown(self) -> dict[str, Feature] | None:
        """The same after its steps; None when a function makes the columns."""
        read = self.read
        columns = columns_after(list(read), self.steps)
        if columns is None or None in columns.values():
            return None
        return {name: read[source] for name, source in columns.items() if source is not None}

    @property
    def source(self) -> ShardSource:
        return self._source

    def reader(self, most_open: int) -> ViewReader:
        return self._opened(most_open)[0]

    def bad(self, error: CorruptFile, row: int) -> None:
        """Raise the error of a row with its place, or count it."""
        self._bad(error, row)

    def __reduce__(self) -> tuple[Any, ...]:
        return Leaf, (self._manifest, self._source, self._view, self.steps)


_TRIED_ROWS = 16
"""How many rows are looked at together for one that filters let pass."""


class Block(NamedTuple):
    """Consecutive units of one process. All of them have `Share.unit` rows, but maybe the last of the epoch."""

    ids: Int64s
    """Row ids, in delivery order."""
    valid: Any
    """Of each row, False for padding; None where there is none."""
    first_unit: int


def read_blocks(
    walk: Walk, share: Share, total: int, block_rows: int, first_rows: int = FIRST_BLOCK_ROWS
) -> Iterator[Block]:
    """The row ids of `share`, in delivery order, in blocks that grow from `first_rows` to `block_rows` rows."""
    units, done = share.units(total), 0
    ahead = min(first_rows, block_rows)
    while done < units:
        stop = min(units, done + max(1, ahead // share.unit))
        yield block_of(walk, share, total, done, stop)
        done, ahead = stop, min(ahead * 2, block_rows)


def block_of(walk: Walk, share: Share, total: int, first: int, stop: int) -> Block:
    """Units [first, stop) of `share`, of which there is one at least."""
    positions, valid = share.positions(total, first, stop), None
    if share.padded and int(positions.max()) >= total:
        valid, positions = positions < total, positions % total
    return Block(walk.rows(positions), valid, first)


class UnitReader:
    """The rows of some leaves in one format. One for each iteration; not shared by threads.

    `given` is the format in which the first function of the user's sees rows. `most_open` shards stay mapped a leaf.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        steps: Sequence[Step],
        given: Format,
        format_: Format,
        most_open: int,
        proof: Proof | None = None,
    ) -> None:
        self._leaves, self._steps = tuple(leaves), tuple(steps)
        self._given: Format = given
        self._format: Format = format_
        self._readers = [leaf.reader(most_open) for leaf in leaves]
        self._proof = proof
        self._stops = np.cumsum([leaf.num_rows for leaf in leaves])
        self._own_steps = any(leaf.steps for leaf in leaves)
        self._spare: Row | None = None
        if format_ == "arrow" and (self._own_steps or steps) and given == "arrow":
            raise UsageError("map and filter see rows, not tables: with_format('arrow') comes after them")

    @property
    def stepped(self) -> bool:
        return self._own_steps or bool(self._steps)

    @property
    def block_rows(self) -> int:
        return min(reader.block_rows for reader in self._readers)

    @property
    def first_rows(self) -> int:
        """Rows of the first block: enough for a batch that a function is given, where those are not many."""
        steps = [*self._steps, *(step for leaf in self._leaves for step in leaf.steps)]
        return max(FIRST_BLOCK_ROWS, min(_TRIED_ROWS, together(steps)))

    @cached_property
    def _features(self) -> dict[str, Feature]:
        return joined_features([(leaf.name, leaf.read) for leaf in self._leaves])

    @cached_property
    def _schema(self) -> pa.Schema:
        from crucible.feature_types import schema_of

        return self._readers[0].schema if len(self._leaves) == 1 else schema_of(self._features)

    @staticmethod
    def _output(format_: Format, features: Mapping[str, Feature], schema: pa.Schema) -> Output:
        from crucible.decode import decoder
        from crucible.feature_types import dump_features

        return Output(format_, None if format_ == "arrow" else decoder(dump_features(features), schema))

    # --- Arrow all the way ---

    @cached_property
    def _last(self) -> Output:
        return self._output(self._format, self._features, self._schema)

    def feed(self, feeders: Mapping[int, Feeder]) -> None:
        """Have shards fetched by these, each for the leaves with the source of that `id`."""
        for leaf, reader in zip(self._leaves, self._readers):
            reader.feeder = feeders[id(leaf.source)]

    def take(self, ids: Int64s) -> pa.Table:
        """The rows `ids`, in that order, with the columns of all leaves; one that a leaf lacks is null there."""
        table = self._readers[0].take(ids) if len(self._leaves) == 1 else self._joined(ids)
        if table.num_rows != len(ids):  # what is on record as handed out goes by the ids
            raise AssertionError(f"{len(ids)} rows were asked for and {table.num_rows} came; please report this")
        return table

    def _joined(self, ids: Int64s) -> pa.Table:
        from crucible.casts import cast_batch

        found, places = [], []
        for number, here, local in self._by_leaf(ids):
            table = self._readers[number].take(local)
            batches = [cast_batch(batch, self._schema, self._leaves[number].name) for batch in table.to_batches()]
            found.append(pa.Table.from_batches(batches, self._schema))
            places.append(here)
        if not found:
            return self._schema.empty_table()
        order = np.argsort(np.concatenate(places))
        joined = pa.concat_tables(found)
        return joined if len(found) == 1 else joined.combine_chunks().take(pa.array(order))

    def _by_leaf(self, ids: Int64s) -> Iterator[tuple[int, Int64s, Int64s]]:
        """(leaf, places in `ids`, rows of the leaf) for each leaf that has any."""
        which = np.searchsorted(self._stops, ids, side="right")
        for number in np.unique(which).tolist():
            here = np.flatnonzero(which == number)
            yield number, here, ids[here] - self._first(number)

    def _first(self, number: int) -> int:
        return int(self._stops[number - 1]) if number else 0

    def _bad(self, block: Block, unit: int) -> OnBad:
        """Told of row `number` of a block."""

        def bad(number: int, error: CorruptFile) -> None:
            row = int(block.ids[number])
            leaf = int(np.searchsorted(self._stops, row, side="right"))
            self._leaves[leaf].bad(error, row - self._first(leaf))
            if self._proof is not None:
                self._proof.left_out([block.first_unit * max(1, unit) + number], skipped=True)

        return bad

    def rows(self, blocks: Iterable[Block], *, mask: bool) -> Iterator[Any]:
        """One thing for each row of the blocks: the row, or SKIPPED."""
        if not self.stepped:
            return self._last.stream_rows((self._masked(block, mask=mask), self._bad(block, 1)) for block in blocks)
        return (row for block in blocks for row in self._each(block, mask=mask))

    def batches(self, blocks: Iterable[Block], share: Share, walk: Walk, total: int) -> Iterator[Any]:
        """One thing for each unit of the blocks: its rows as a batch, or SKIPPED when none is left of it."""
        if not self.stepped:
            return self._last.stream_batches(part for block in blocks for part in self._parts(block, share))
        return (one for block in blocks for one in self._each_batch(block, share, walk, total))

    def batch(self, block: Block, share: Share, walk: Walk, total: int) -> Any:
        """The batch of a block of one unit; without rows when a filter left none."""
        made = next(self.batches([block], share, walk, total))
        return self._last.collate({}) if made is SKIPPED else made

    def _parts(self, block: Block, share: Share) -> Iterator[tuple[pa.Table, OnBad]]:
        table, bad = self._masked(block, mask=share.end == "mask"), self._bad(block, share.unit)
        for start in range(0, table.num_rows, share.unit):
            yield table.slice(start, share.unit), shifted(bad, start)

    def _each(self, block: Block, *, mask: bool) -> Iterator[Any]:
        finish, at = self._last.finish, 0
        if self._own_steps or mask or together(self._steps) > 1:
            turns_ = self._made(block, 0, mask=mask)
            made: Iterator[tuple[int, Row]] = (one for turn in turns_ for one in zip(turn.made.owners, turn.made.rows))
        else:
            made = one_by_one(self._whole(block), self._told(block, 0))
        for owner, row in made:
            while at < owner:
                yield SKIPPED
                at += 1
            yield finish(row)
            at += 1
        for _ in range(at, len(block.ids)):
            yield SKIPPED

    def _each_batch(self, block: Block, share: Share, walk: Walk, total: int) -> Iterator[Any]:
        mask, size = share.end == "mask", share.unit
        for turn in self._made(block, size, mask=mask):
            rows = turn.made.rows
            if share.padded and len(rows) < size:
                spare = self._padding(walk, total) | ({VALID: False} if mask else {})
                rows = [*rows, *([spare] * (size - len(rows)))]
            if rows:
                yield self._last.collate(as_columns(rows))
            elif share.end == "exact":
                yield SKIPPED
            else:  # all ranks have this batch, so it comes, with nothing in it
                yield self._last.collate(dict.fromkeys(self._padding(walk, total), ()))

    def _masked(self, block: Block, *, mask: bool) -> pa.Table:
        table = self.take(block.ids)
        if not mask:
            return table
        if VALID in table.column_names:
            raise _two_of(VALID)
        valid = np.ones(len(block.ids), dtype=bool) if block.valid is None else block.valid
        return table.append_column(VALID, pa.array(valid))

    # --- with functions of the user's ---

    def _made(self, block: Block, unit: int, *, mask: bool) -> Iterator[Turn]:
        """The rows of a block after all steps, when they are asked for. Their owners are places in the block."""
        ids = block.ids
        if self._own_steps:
            parts = [
                Rated(leaf.steps, self._readers[number].take(local), here, partial(self._python, leaf.read))
                for number, here, local in self._by_leaf(ids)
                for leaf in (self._leaves[number],)
            ]
            made = turns(parts, self._steps, len(ids), unit, self._told(block, unit))
        else:
            made = turns([self._whole(block)], None, len(ids), unit, self._told(block, unit))
        return self._marked(made, block) if mask else made

    def _whole(self, block: Block) -> Rated:
        places = np.arange(len(block.ids))
        return Rated(self._steps, self.take(block.ids), places, partial(self._python, self._features))

    @staticmethod
    def _marked(made: Iterator[Turn], block: Block) -> Iterator[Turn]:
        for turn in made:
            for row, owner in zip(turn.made.rows, turn.made.owners):
                if VALID in row:
                    raise _two_of(VALID)
                row[VALID] = block.valid is None or bool(block.valid[owner])
            yield turn

    def _told(self, block: Block, unit: int) -> Told:
        proof, first = self._proof, block.first_unit * max(1, unit)
        if proof is None:
            return Told(_Place(self._leaves, self._stops, block.ids), self._bad(block, unit), None)
        left_out: LeftOut = lambda owners: proof.left_out([first + one for one in owners], skipped=False)  # noqa: E731
        return Told(_Place(self._leaves, self._stops, block.ids), self._bad(block, unit), left_out)

    def _python(self, features: Mapping[str, Feature], schema: pa.Schema) -> Output:
        """What makes what functions are given, of these columns."""
        return self._output(self._given, {name: features[name] for name in schema.names}, schema)

    def _padding(self, walk: Walk, total: int) -> Row:
        """What fills a batch of which filters left too little: the first row of the epoch that they let pass."""
        for start in range(0, 0 if self._spare else total, _TRIED_ROWS):
            ids = walk.rows(np.arange(start, min(total, start + _TRIED_ROWS)))
            self._proof, proof = None, self._proof  # what is tried here is not handed out
            try:
                made = next(self._made(Block(ids, None, 0), len(ids), mask=False)).made
            finally:
                self._proof = proof
            if made.rows:
                self._spare = made.rows[0]
                break
        if self._spare is None:
            raise UsageError("the filters let no row of the epoch pass, so there is none to fill a batch with")
        return self._spare


class _Place:
    """The rows of a block, by their places in it."""

    def __init__(self, leaves: Sequence[Leaf], stops: Int64s, ids: Int64s) -> None:
        self._leaves, self._stops, self._ids = leaves, stops, ids

    def _at(self, owner: int) -> tuple[Leaf, int]:
        row = int(self._ids[owner])
        number = int(np.searchsorted(self._stops, row, side="right"))
        return self._leaves[number], row - (int(self._stops[number - 1]) if number else 0)

    def index(self, owner: int) -> int:
        return self._at(owner)[1]

    def said(self, owners: Sequence[int]) -> str:
        leaf, row = self._at(owners[0])
        more = f" and {len(owners) - 1} more that it was given" if len(owners) > 1 else ""
        return f"row {row:,} of {leaf.name}{more}"


def _two_of(name: str) -> UsageError:
    return UsageError(f"end='mask' adds a column {name!r}, and there is one: rename it first")


def joined_features(parts: Sequence[tuple[str, Mapping[str, Feature]]]) -> dict[str, Feature]:
    """The columns of all parts, each (name, features), in order of first appearance, as `datasets` aligns them.

    Raises SchemaConflict, naming both, when two have a column of one name and other types; nulls fit any type.
    """
    found: dict[str, tuple[str, Feature]] = {}
    for part, features in parts:
        for name, feature in features.items():
            known = found.get(name)
            if known is None or _is_null(known[1]):
                found[name] = (part, feature)
            elif known[1] != feature and not _is_null(feature):
                raise SchemaConflict(name, part, _said(feature), known[0], _said(known[1]))
    return {name: feature for name, (_, feature) in found.items()}


def _is_null(feature: Feature) -> bool:
    return bool(feature.get("_type") == "Value" and feature.get("dtype") == "null")


def _said(feature: Feature) -> str:
    return str(feature.get("dtype") or feature.get("_type") or "a struct")
