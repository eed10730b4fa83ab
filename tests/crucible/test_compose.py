"""Datasets made of datasets, and functions over rows: against `datasets`, under sharding, and from any state."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import crucible
from crucible.dataset import Dataset, IterableDataset
from crucible.errors import SchemaConflict, StateMismatch, UsageError
from crucible.share import End
from tests.fakes.shards import number_split, write_split

datasets = pytest.importorskip("datasets")
unhurried = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., IterableDataset]:
    """`make([3, 4])`: a dataset with shards of 3 and 4 rows; each call in a folder of its own."""

    def made(rows: list[int], **options: Any) -> IterableDataset:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return IterableDataset(*number_split(folder, rows, **options))

    return made


def theirs(count: int) -> Any:
    rows = {"id": list(range(count)), "text": [f"row {number}" for number in range(count)]}
    return datasets.Dataset.from_dict(rows).to_iterable_dataset()


def ids(rows: Any) -> list[int]:
    return [row["id"] for row in rows]


def length(row: dict[str, Any]) -> dict[str, Any]:
    return {"length": len(row["text"]), "id": row["id"] * 10}


def even(row: dict[str, Any]) -> bool:
    return bool(row["id"] % 2 == 0)


def twice(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"id": [number for number in batch["id"] for _ in range(2)]}


CHAINS: dict[str, Callable[[Any], Any]] = {
    "map": lambda ds: ds.map(length),
    "map then select": lambda ds: ds.map(length).select_columns(["length"]),
    "map, columns removed": lambda ds: ds.map(length, remove_columns=["text"]),
    "map, input columns": lambda ds: ds.map(lambda text: {"n": len(text)}, input_columns=["text"]),
    "batched map": lambda ds: ds.map(lambda b: {"n": [len(t) for t in b["text"]]}, batched=True, batch_size=3),
    "map with keywords": lambda ds: ds.map(lambda row, by: {"id": row["id"] + by}, fn_kwargs={"by": 5}),
    "filter": lambda ds: ds.filter(even),
    "filter on a column": lambda ds: ds.filter(lambda number: number > 4, input_columns="id"),
    "batched filter": lambda ds: ds.filter(lambda b: [n % 3 == 0 for n in b["id"]], batched=True),
    "filter after map": lambda ds: ds.map(length).filter(lambda row: row["id"] > 50),
    "map after filter": lambda ds: ds.filter(even).map(length),
    "rename after map": lambda ds: ds.map(length).rename_column("length", "n"),
    "remove after map": lambda ds: ds.map(length).remove_columns(["text"]),
    "take": lambda ds: ds.take(7),
    "take too many": lambda ds: ds.take(700),
    "skip": lambda ds: ds.skip(4),
    "skip too many": lambda ds: ds.skip(700),
    "skip, take": lambda ds: ds.skip(3).take(5),
    "take, map": lambda ds: ds.take(6).map(length),
    "repeat": lambda ds: ds.repeat(3),
    "take, repeat": lambda ds: ds.take(2).repeat(2),
}


@pytest.mark.parametrize("name", CHAINS)
def test_transforms_give_what_datasets_gives(make: Callable[..., IterableDataset], name: str) -> None:
    chain = CHAINS[name]
    assert list(chain(make([5, 1, 9]))) == list(chain(theirs(15)))


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_share_them_and_any_state_goes_on(make: Callable[..., IterableDataset], name: str, ranks: int) -> None:
    whole = CHAINS[name](make([5, 1, 9]).shuffle(3, mode="lanes", lanes=4, window=2))
    everything = list(whole)
    step = [list(whole.shard(rank, ranks).batch(2, end="mask")) for rank in range(ranks)]
    assert len({len(batches) for batches in step}) == 1
    seen = [row for batches in step for batch in batches for row in rows_of(batch)]
    wanted = [row | {"valid": True} for row in everything]
    assert sorted(map(repr, (row for row in seen if row["valid"]))) == sorted(map(repr, wanted))
    for rank in range(ranks):
        running = whole.shard(rank, ranks).batch(2)
        batches, states = [], [running.state_dict()]
        for batch in running:
            batches.append(batch)
            states.append(running.state_dict())
        for done, state in enumerate(states):
            resumed = CHAINS[name](whole_of(whole)).shard(rank, ranks).batch(2)
            resumed.load_state_dict(json.loads(json.dumps(state)))
            assert list(resumed) == batches[done:]
        assert len(json.dumps(states[-1])) < 1024


def whole_of(chained: IterableDataset) -> IterableDataset:
    """The dataset under a chain, new."""
    leaf = chained._leaves[0]
    return IterableDataset(leaf.manifest, leaf.source).shuffle(3, mode="lanes", lanes=4, window=2)


def rows_of(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values)) for values in zip(*batch.values())]


class TestTogether:
    def test_concatenated_rows_come_one_dataset_after_the_other(self, make: Callable[..., IterableDataset]) -> None:
        one, other = make([3, 4]), make([2])
        joined = crucible.concatenate_datasets([one, other])
        assert ids(joined) == [*range(7), *range(2)]
        assert list(joined) == list(datasets.concatenate_datasets([theirs(7), theirs(2)]))
        assert joined.num_rows == len(joined) == 9
        shuffled = joined.shuffle(5, mode="exact")
        assert ids(shuffled) == [([*range(7), *range(2)])[p] for p in np.random.default_rng(5).permutation(9).tolist()]

    def test_a_column_that_one_lacks_is_null_there_and_two_types_are_refused(self, tmp_path: Path) -> None:
        tables = [pa.table({"a": [1, 2]}), pa.table({"a": [3], "b": ["x"]}), pa.table({"a": ["text"]})]
        parts, rivals = [], []
        for number, table in enumerate(tables):
            (tmp_path / str(number)).mkdir()
            parts.append(IterableDataset(*write_split(tmp_path / str(number), [table])))
            rivals.append(datasets.Dataset(table).to_iterable_dataset())
        joined = crucible.concatenate_datasets(parts[:2])
        assert list(joined) == list(datasets.concatenate_datasets(rivals[:2]))
        assert joined.column_names == ["a", "b"]
        assert joined.features is not None
        assert joined.features["b"] == {"dtype": "string", "_type": "Value"}
        assert list(joined.select_columns(["b"])) == [{"b": None}, {"b": None}, {"b": "x"}]
        with pytest.raises(SchemaConflict, match="a"):
            crucible.concatenate_datasets([parts[0], parts[2]])

    @pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"])
    @pytest.mark.parametrize("sizes", [(3, 5), (5, 3), (4, 4), (1, 6)])
    def test_taking_turns_is_what_datasets_does(
        self, make: Callable[..., IterableDataset], stop: Any, sizes: tuple[int, int]
    ) -> None:
        ours = crucible.interleave_datasets([make([size]) for size in sizes], stopping_strategy=stop)
        rivals = datasets.interleave_datasets([theirs(size) for size in sizes], stopping_strategy=stop)
        assert list(ours) == list(rivals)

    def test_a_mix_has_the_shares_that_its_weights_say(self, make: Callable[..., IterableDataset]) -> None:
        parts = [make([9000]), make([9000]).map(lambda row: {"id": row["id"] + 10_000})]
        mix = crucible.interleave_datasets(parts, [0.75, 0.25], seed=1)
        seen = ids(mix)
        first = sum(number < 10_000 for number in seen[:8192])
        assert first == 6144
        assert [number for number in seen if number < 10_000] == list(range(9000))
        assert seen != ids(crucible.interleave_datasets(parts, [0.75, 0.25], seed=2))
        mix.set_epoch(1)
        assert ids(mix) != seen

    @unhurried
    @given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
    def test_any_ranks_state_restores_a_mix_with_filters_and_padding_on_other_ranks(
        self, tmp_path: Path, before: int, after: int, batch: int, data: st.DataObject
    ) -> None:
        folders = [tmp_path / name for name in ("a", "b")]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        splits = [number_split(folder, rows) for folder, rows in zip(folders, ([20, 13], [9, 9, 9]))]

        def made() -> IterableDataset:
            one, other = (IterableDataset(*split).shuffle(4, mode="lanes", lanes=3) for split in splits)
            parts = [one.filter(even), other.map(lambda row: {"id": row["id"] + 1000})]
            mix = crucible.interleave_datasets(parts, [2, 1], seed=3, stopping_strategy="all_exhausted")
            mix.set_epoch(2)
            return mix.filter(lambda row: row["id"] % 7 != 0)

        everything = list(made())
        steps = len(made().shard(0, before).batch(batch, end="mask"))
        stop = data.draw(st.integers(0, steps))
        seen, states = [], []
        for rank in range(before):
            running = made().shard(rank, before).batch(batch, end="mask")
            iterator = iter(running)
            seen += [row for _ in range(stop) for row in rows_of(next(iterator))]
            states.append(running.state_dict())
        assert all(state == states[0] for state in states), "any one of them will do"
        for rank in range(after):
            resumed = made().shard(rank, after).batch(batch, end="mask")
            resumed.load_state_dict(states[0])
            seen += [row for one in resumed for row in rows_of(one)]
        assert sorted(row["id"] for row in seen if row["valid"]) == sorted(row["id"] for row in everything)

    def test_a_state_of_another_mix_is_refused_by_name(self, make: Callable[..., IterableDataset]) -> None:
        one, other = make([5]), make([6])
        mix = crucible.interleave_datasets([one, other], [1, 2])
        for wrong in (
            crucible.interleave_datasets([one, other], [1, 3]),
            crucible.interleave_datasets([other, one], [1, 2]),
            one.shuffle(1),
        ):
            with pytest.raises(StateMismatch) as caught:
                wrong.load_state_dict(mix.state_dict())
            assert caught.value.field == "manifest"

    def test_a_copy_in_another_process_is_the_same(self, make: Callable[..., IterableDataset]) -> None:
        mix = crucible.interleave_datasets([make([5]).map(length), make([6])], [1, 2]).shuffle(1).filter(even)
        assert list(pickle.loads(pickle.dumps(mix))) == list(mix)

    def test_what_makes_no_sense_is_refused_at_once(self, make: Callable[..., IterableDataset], tmp_path: Path) -> None:
        one = make([5])
        table = Dataset(*number_split(tmp_path, [3]))
        calls: dict[str, Callable[[], object]] = {
            "before shard": lambda: crucible.concatenate_datasets([one.shard(0, 2), one]),
            "at least one": lambda: crucible.interleave_datasets([]),
            "to_iterable": lambda: crucible.concatenate_datasets([table]),  # type: ignore[list-item]
            "before filters": lambda: one.filter(even).take(2),
            "before map and filter": lambda: one.map(length).decode(False),
            "a function": lambda: one.map("length"),  # type: ignore[arg-type]
            "batch_size": lambda: one.map(twice, batched=True, batch_size=0),
            "no column 'nope'": lambda: one.filter(even).remove_columns("nope"),
            "not tables": lambda: one.with_format("arrow").map(length),
            "format": lambda: crucible.concatenate_datasets([one, one.with_format("numpy")]),
            "0 or more": lambda: one.take(-1),
        }
        for said, wrong in calls.items():
            with pytest.raises(UsageError, match=said):
                wrong()


class TestFunctions:
    def test_a_batched_map_may_make_more_rows_of_a_batch(self, make: Callable[..., IterableDataset]) -> None:
        batches = list(make([5]).map(twice, batched=True, remove_columns=["text"]).batch(2))
        assert [batch["id"] for batch in batches] == [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4]]
        with pytest.raises(UsageError, match=r"in batches"):
            list(make([5]).map(twice, batched=True, remove_columns=["text"]))
        with pytest.raises(UsageError, match="remove_columns"):
            list(make([5]).map(twice, batched=True).batch(2))

    def test_what_a_function_returns_is_checked_and_named(self, make: Callable[..., IterableDataset]) -> None:
        def broken(_: Any) -> Any:
            return [1]

        for wrong in (make([3]).map(broken), make([3]).map(broken, batched=True)):
            with pytest.raises(UsageError, match="broken"):
                list(wrong)
        with pytest.raises(UsageError, match="answered for 1"):
            list(make([3]).filter(broken, batched=True))

    def test_a_function_that_returns_nothing_changes_nothing(self, make: Callable[..., IterableDataset]) -> None:
        """As over a `datasets.Dataset`; over an iterable one it is an error there, which names neither."""
        assert (
            list(make([3]).map(lambda _: None)) == list(make([3]).map(lambda _: None, batched=True)) == list(make([3]))
        )

    def test_formats_hold_for_what_functions_make(self, make: Callable[..., IterableDataset]) -> None:
        made = make([4]).map(lambda row: {"vector": [row["id"], 1]}, remove_columns=["text"])
        numpy = next(iter(made.with_format("numpy").batch(3)))
        assert numpy["vector"].tolist() == [[0, 1], [1, 1], [2, 1]]
        assert numpy["vector"].dtype == np.int64
        table = next(iter(made.with_format("arrow").batch(3)))
        assert table.column("vector").to_pylist() == [[0, 1], [1, 1], [2, 1]]
        seen = []
        list(make([2]).with_format("numpy").map(lambda row: seen.append(type(row["id"]))))
        assert seen == [np.int64, np.int64]

    def test_a_filter_that_names_its_columns_is_shown_nothing_else(self, make: Callable[..., IterableDataset]) -> None:
        seen: list[Any] = []

        def keep(number: int, text: str) -> bool:
            seen.append((number, text))
            return number > 1

        assert ids(make([4]).filter(keep, input_columns=["id", "text"])) == [2, 3]
        assert seen == [(number, f"row {number}") for number in range(4)]
        with pytest.raises(UsageError, match="no column 'nope'; there are: id, text"):
            list(make([4]).filter(keep, input_columns=["nope", "text"]))

    def test_columns_are_known_until_a_function_makes_them(self, make: Callable[..., IterableDataset]) -> None:
        one = make([3])
        assert one.filter(even).rename_column("id", "n").column_names == ["n", "text"]
        assert one.filter(even).select_columns("id").features == {"id": {"dtype": "int64", "_type": "Value"}}
        assert one.map(length).column_names is None
        assert one.map(length).features is None
        assert one.map(length).select_columns(["length"]).column_names == ["length"]
        assert "3 rows of columns" in repr(one.map(length))


class TestEnds:
    @pytest.mark.parametrize("ranks", [1, 2, 5, 40])
    @pytest.mark.parametrize("end", ["drop", "pad", "mask"])
    def test_all_ranks_make_as_many_steps(self, make: Callable[..., IterableDataset], ranks: int, end: Any) -> None:
        whole = make([7, 1, 9]).shuffle(2)
        got = [list(whole.shard(rank, ranks).batch(3, end=end)) for rank in range(ranks)]
        assert {len(batches) for batches in got} == {len(whole.shard(0, ranks).batch(3, end=end))}
        assert {len(batch["id"]) for batches in got for batch in batches} <= {3}
        rows = [row for batches in got for batch in batches for row in rows_of(batch)]
        if end == "drop":
            assert len(rows) == 17 // (3 * ranks) * 3 * ranks
        elif end == "pad":
            assert {row["id"] for row in rows} == set(range(17))
            padded = sum(whole.shard(rank, ranks).batch(3, end=end).padded_rows for rank in range(ranks))
            assert len(rows) - 17 == padded
        else:
            assert sorted(row["id"] for row in rows if row["valid"]) == list(range(17))

    def test_rows_one_by_one_are_padded_too(self, make: Callable[..., IterableDataset]) -> None:
        got = [list(make([5]).shard(rank, 3, end="mask")) for rank in range(3)]
        assert [[(row["id"], row["valid"]) for row in rows] for rows in got] == [
            [(0, True), (3, True)],
            [(1, True), (4, True)],
            [(2, True), (0, False)],
        ]

    def test_an_empty_dataset_has_no_steps(self, make: Callable[..., IterableDataset], tmp_path: Path) -> None:
        empty = IterableDataset(*write_split(tmp_path, [pa.table({"id": pa.array([], pa.int64())})]))
        for end in get_args(End):
            assert list(empty.batch(2, end=end)) == list(make([3]).take(0).batch(2, end=end)) == []

    def test_filters_leave_the_steps_of_all_ranks_equal(self, make: Callable[..., IterableDataset]) -> None:
        whole = make([12]).filter(lambda row: row["id"] == 5)
        sizes_of: dict[End, set[int]] = {"drop": {0, 1}, "pad": {2}, "mask": {2}}
        for end, sizes in sizes_of.items():
            got = [list(whole.shard(rank, 3).batch(2, end=end)) for rank in range(3)]
            assert [len(batches) for batches in got] == [2, 2, 2]
            assert {len(batch["id"]) for batches in got for batch in batches} == sizes
        assert [batch["id"] for batch in whole.batch(2)] == [[5]]
        with pytest.raises(UsageError, match="no row"):
            list(make([4]).filter(lambda _: False).batch(2, end="pad"))

    def test_a_column_of_that_name_is_not_overwritten(self, make: Callable[..., IterableDataset]) -> None:
        for clash in (make([3]).rename_column("text", "valid"), make([3]).map(lambda _: {"valid": 1})):
            with pytest.raises(UsageError, match="rename it"):
                list(clash.batch(2, end="mask"))
