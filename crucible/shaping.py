"""What is made of each row: the columns, types and formats of a dataset, and the functions of the user's.

The part of `IterableDataset` that has nothing to do with order. A transform that only chooses, renames or casts stored
columns changes what is read; after a function it is a step of its own (module `steps`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from crucible.errors import UsageError
from crucible.output import Format, check_format
from crucible.reading import Leaf, joined_features
from crucible.share import End, whole_number
from crucible.steps import Call, Filter, Map, Pick, Rename, Step, columns_after, keeps_rows
from crucible.view import OnError

if TYPE_CHECKING:
    from crucible.feature_classes import Features

Names = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class Delivery:
    """How rows are handed out, and to whom."""

    rank: int = 0
    world_size: int = 1
    dealt: bool = False
    """Whether `shard` was said, be it for one rank."""
    batch: int | None = None
    end: End = "exact"
    format: Format = "python"
    given: Format = "python"
    """The format when the first function was added: in it the functions see the rows."""
    steps: tuple[Step, ...] = ()
    certify: str | None = None
    """Folder for the records of what was handed out."""
    proven: bool = False
    """They are kept, in a folder or not."""


class Shaped:
    """The columns and functions of a dataset of some leaves."""

    _leaves: tuple[Leaf, ...]
    _out: Delivery

    def _with(self, leaves: tuple[Leaf, ...], out: Delivery) -> Self:
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        raise NotImplementedError

    @property
    def column_names(self) -> list[str] | None:
        """None after a `map`, which may add any."""
        columns = self._columns
        return None if columns is None else list(columns)

    @property
    def features(self) -> Features | None:
        """Column to feature, as `datasets` has them; None after a `map`."""
        from crucible.feature_classes import Features

        columns = self._columns
        if columns is None or None in columns.values():
            return None
        known = joined_features([(leaf.name, leaf.shown or {}) for leaf in self._leaves])
        return Features({name: known[source] for name, source in columns.items() if source is not None})

    @property
    def num_columns(self) -> int:
        return len(self.column_names or ())

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.num_columns

    # --- rows ---

    def map(
        self,
        function: Callable[..., Any],
        with_indices: bool = False,
        input_columns: Names | None = None,
        batched: bool = False,
        batch_size: int = 1000,
        drop_last_batch: bool = False,
        remove_columns: Names | None = None,
        features: None = None,
        fn_kwargs: Mapping[str, Any] | None = None,
    ) -> Self:
        """What `function` returns for a row is added to it, when the row is read.

        It is given the row as a dict, or with `input_columns` these as arguments; `batched`, a dict of lists of at most
        `batch_size` rows that are read together, which never reach over the end of a batch. A batched function may make
        another number of rows; then the dataset is read in batches, each the rows made of `batch(n)`'s n. After these
        it is given, `with_indices`, the number of the row in its split (or a list of them), which no shuffle changes.
        """
        if drop_last_batch:
            raise UsageError("map has no drop_last_batch: it leaves out no rows; say batch(n, end='drop') after it")
        if features is not None:
            raise UsageError(
                "map takes no features: values keep the types that the function gives them; cast before it"
            )
        call = self._call(function, batched, batch_size, input_columns, fn_kwargs, with_indices)
        return self._step(Map(call, names_of(remove_columns)))

    def filter(
        self,
        function: Callable[..., Any],
        with_indices: bool = False,
        input_columns: Names | None = None,
        batched: bool = False,
        batch_size: int = 1000,
        fn_kwargs: Mapping[str, Any] | None = None,
    ) -> Self:
        """Only rows for which `function` returns something true. With `input_columns` only these are read to decide.

        It is called as that of `map`. Positions, and so states, batches and steps, are counted before rows are left
        out: a batch of n is what is left of n rows, the same for any number of ranks.
        """
        return self._step(Filter(self._call(function, batched, batch_size, input_columns, fn_kwargs, with_indices)))

    def with_format(self, type: str | None = None) -> Self:
        """Rows and batches as Python objects (None), `numpy`, `torch`, `jax` or `arrow` (tables, maybe mapped)."""
        return self._handed(format=check_format(type))

    def select_columns(self, column_names: Names) -> Self:
        """Only these columns are read, in this order."""
        names = names_of(column_names)
        if self._stepped:
            return self._step(Pick({name: self._known(name) for name in names}))
        return self._views("select_columns", names, lambda leaf, here: leaf.select_columns(here))

    def remove_columns(self, column_names: Names) -> Self:
        """All columns but these."""
        names = names_of(column_names)
        if self._stepped:
            return self._step(Rename({self._known(name): None for name in names}))
        return self._views("remove_columns", names, lambda leaf, here: leaf.remove_columns(here))

    def rename_column(self, original_column_name: str, new_column_name: str) -> Self:
        return self.rename_columns({original_column_name: new_column_name})

    def rename_columns(self, column_mapping: Mapping[str, str]) -> Self:
        """The same columns under other names: `{old: new}`. Raises UsageError for a name that would be there twice."""
        mapping = column_mapping
        if self._stepped:
            return self._step(Rename({self._known(old): new for old, new in mapping.items()}))
        names = tuple(mapping)
        return self._views(
            "rename_columns", names, lambda leaf, here: leaf.rename_columns({old: mapping[old] for old in here})
        )

    def cast(self, features: Mapping[str, Any]) -> Self:
        """The same values under other features, which name exactly the columns that there are."""
        return self._views("cast", None, lambda leaf, _: leaf.cast(features))

    def cast_column(self, column: str, feature: Any) -> Self:
        """One column under another feature: `ds.cast_column("image", Image(mode="RGB"))`."""
        return self._views("cast_column", (column,), lambda leaf, _: leaf.cast_column(column, feature))

    def decode(self, enable: bool = True, on_error: OnError = "raise") -> Self:
        """Whether media columns are decoded; if not, they are `{bytes, path}`.

        `on_error` says what happens to a row that cannot be: `raise` CorruptFile, which names row and file; or `skip`
        it while iterating, and count it in `skipped`. Ranks then no longer deliver equally many rows.
        """
        return self._views("decode", None, lambda leaf, _: leaf.decode(enable, on_error))

    # --- inside ---

    @property
    def _as_stored(self) -> bool:
        """Whether it is one split in source order, of which nothing is left out."""
        raise NotImplementedError

    def _call(
        self,
        function: Callable[..., Any],
        batched: bool,
        batch_size: int,
        columns: Names | None,
        keywords: Mapping[str, Any] | None,
        indices: bool,
    ) -> Call:
        if self._out.batch is not None:
            raise UsageError(
                "map and filter are told rows: say them before batch(n), with batched=True for many at once"
            )
        if not callable(function):
            raise UsageError(f"a function is needed, got {type(function).__name__}")
        size = whole_number(batch_size, "batch_size", 1)
        if indices and not self._as_stored:
            raise UsageError(
                "with_indices tells a row's number in its split: say it first, before shuffle, take, skip, repeat, "
                "filters, batched maps and mixes"
            )
        picked = None if columns is None else names_of(columns)
        return Call(function, picked, dict(keywords or {}), size if batched else None, indices)

    def _handed(self, **changes: Any) -> Self:
        return self._with(self._leaves, replace(self._out, **changes))

    @property
    def _name(self) -> str:
        return " + ".join(dict.fromkeys(leaf.name for leaf in self._leaves))

    @property
    def _stepped(self) -> bool:
        return bool(self._out.steps) or any(leaf.steps for leaf in self._leaves)

    @property
    def _keeps_rows(self) -> bool:
        """True when each position gives one row, as far as can be said without calling a function."""
        return all(keeps_rows(steps) for steps in (self._out.steps, *(leaf.steps for leaf in self._leaves)))

    @property
    def _columns(self) -> dict[str, str | None] | None:
        """Shown name to the name under which `joined_features` has it, as `steps.columns_after` says it."""
        shown = [(leaf.name, leaf.shown) for leaf in self._leaves]
        if any(features is None for _, features in shown):
            return columns_after(None, self._out.steps)
        return columns_after(list(joined_features([(name, one or {}) for name, one in shown])), self._out.steps)

    def _known(self, name: str) -> str:
        columns = self._columns
        if columns is not None and name not in columns:
            raise UsageError(f"no column {name!r}; there are: {', '.join(columns)}")
        return name

    def _step(self, step: Step) -> Self:
        given = self._out.given if self._stepped else self._out.format
        if given == "arrow" and isinstance(step, (Map, Filter)):
            raise UsageError("map and filter see rows, not tables: with_format('arrow') comes after them")
        return self._handed(steps=(*self._out.steps, step), given=given)

    def _views(self, what: str, names: tuple[str, ...] | None, change: Callable[[Leaf, tuple[str, ...]], Leaf]) -> Self:
        """Every leaf with `change`, which is told those of `names` that the leaf has."""
        if self._stepped:
            raise UsageError(f"{what} is about what is stored: say it before map and filter")
        if len(self._leaves) == 1 or names is None:
            return self._with(tuple(change(leaf, names or ()) for leaf in self._leaves), self._out)
        for name in names:
            self._known(name)
        made = []
        for leaf in self._leaves:
            here = tuple(name for name in names if name in leaf.column_names)
            made.append(change(leaf, here) if here or what == "select_columns" else leaf)
        return self._with(tuple(made), self._out)


def names_of(columns: Names | None) -> tuple[str, ...]:
    """One column or several as a tuple; None is no column."""
    return () if columns is None else (columns,) if isinstance(columns, str) else tuple(columns)
