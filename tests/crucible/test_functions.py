"""When functions of the user's are called, what they are told, and what happens where they raise."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import crucible
from crucible.dataset import IterableDataset
from crucible.errors import UsageError
from crucible.proof import epochs_of, read_plan, read_records, verdict
from tests.fakes.shards import number_split

datasets = pytest.importorskip("datasets")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., IterableDataset]:
    """`make([3, 4])`: a dataset with shards of 3 and 4 rows; each call in a folder of its own."""

    def made(rows: list[int]) -> IterableDataset:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return IterableDataset(*number_split(folder, rows))

    return made


class Boom(Exception):
    pass


def failing(at: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def function(row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == at:
            raise Boom("no such luck")
        return {"twice": 2 * row["id"]}

    return function


class TestWhen:
    @pytest.mark.parametrize("composed", [False, True])
    @pytest.mark.parametrize("size", [None, 8])
    def test_a_function_is_called_for_what_is_delivered_next_and_no_more(
        self, make: Callable[..., IterableDataset], size: int | None, composed: bool
    ) -> None:
        called: list[int] = []

        def slow(row: dict[str, Any]) -> None:
            called.append(row["id"])

        stream = make([700, 900]).shuffle(1).map(slow).filter(lambda row: row["id"] % 5)
        if composed:
            stream = crucible.concatenate_datasets([stream, make([3])])
        for number, item in enumerate(stream if size is None else stream.batch(size), 1):
            last = item["id"] if size is None else item["id"][-1]
            assert last in called[-(size or 1) :], "of this row or batch nothing was called after"
            if number == 60:
                break
        assert len(called) <= 60 * (size or 1) * 2

    def test_a_filter_on_columns_is_asked_a_little_ahead(self, make: Callable[..., IterableDataset]) -> None:
        called: list[int] = []

        def odd(number: int) -> bool:
            called.append(number)
            return number % 2 == 1

        for number, row in enumerate(make([3000]).filter(odd, input_columns="id"), 1):
            assert row["id"] == 2 * number - 1
            assert len(called) <= 2 * number + 256
        assert called == list(range(3000))

    def test_batched_functions_see_as_many_rows_as_they_ask_for(self, make: Callable[..., IterableDataset]) -> None:
        sizes: list[int] = []

        def counted(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            sizes.append(len(batch["id"]))
            return {"n": batch["id"]}

        rows = list(make([1000]).map(counted, batched=True, batch_size=50))
        assert [row["n"] for row in rows] == list(range(1000))
        assert max(sizes) == 50
        assert len(sizes) <= 1000 / 50 + 10, "whole batches, but at the ends of what is read together"


class TestRaising:
    @pytest.mark.parametrize("size", [None, 4])
    def test_all_rows_before_are_delivered_and_a_resume_meets_it_again(
        self, make: Callable[..., IterableDataset], size: int | None
    ) -> None:
        def stream() -> IterableDataset:
            rows = make([100, 30, 100]).map(failing(150))
            return rows if size is None else rows.batch(size)

        running, seen = stream(), list[int]()
        with pytest.raises(Boom) as caught:
            seen.extend(number for item in running for number in ([item["id"]] if size is None else item["id"]))
        assert seen == list(range(150 if size is None else 148))
        assert caught.value.__notes__ == ["in map(function) of row 150 of test/split (default, train)"]
        state = json.loads(json.dumps(running.state_dict()))
        assert state["position"] == len(seen)
        again = stream()
        again.load_state_dict(state)
        with pytest.raises(Boom):
            next(iter(again))
        beyond = stream()
        beyond.load_state_dict(beyond.state_after(151 if size is None else 38))
        assert next(iter(beyond))["id"] == (151 if size is None else [152, 153, 154, 155])

    def test_the_note_names_the_split_of_a_mix_and_its_row(self, make: Callable[..., IterableDataset]) -> None:
        mix = crucible.interleave_datasets([make([5]), make([9, 9]).map(failing(7))], stopping_strategy="all_exhausted")
        with pytest.raises(Boom) as caught:
            list(crucible.concatenate_datasets([make([20]), mix]).shuffle(3))
        assert caught.value.__notes__ == ["in map(function) of row 7 of test/split (default, train)"]

    def test_of_a_batch_the_first_row_is_named_and_their_number(self, make: Callable[..., IterableDataset]) -> None:
        def broken(batch: dict[str, list[Any]]) -> list[bool]:
            raise Boom(str(len(batch["id"])))

        with pytest.raises(Boom) as caught:
            list(make([10]).skip(2).filter(broken, batched=True, batch_size=3))
        assert caught.value.__notes__ == [
            "in filter(broken) of row 2 of test/split (default, train) and 2 more that it was given"
        ]


def judged(folder: Path) -> Any:
    (group,) = epochs_of(read_records([folder]))
    return verdict(group, lambda record: read_plan([folder], record))


@pytest.mark.parametrize("end", ["exact", "pad", "mask"])
@pytest.mark.parametrize("size", [None, 8])
def test_what_filters_let_fall_is_counted_once_whichever_way_they_are_asked(
    make: Callable[..., IterableDataset], tmp_path: Path, end: Any, size: int | None
) -> None:
    rows = make([150, 200]).filter(lambda number: number % 7, input_columns="id").filter(lambda row: row["id"] % 11)
    for rank in range(3):
        stream = rows.shuffle(2).certify(tmp_path / "records").shard(rank, 3, end=end)
        list(stream if size is None else stream.batch(size))
    found = judged(tmp_path / "records")
    assert found.proven
    assert found.filtered == sum(1 for number in range(350) if not number % 7 or not number % 11)


class TestIndices:
    """A row's number in its split: what `datasets` counts where it counts over all rows."""

    def test_they_are_those_of_datasets(self, make: Callable[..., IterableDataset]) -> None:
        ours = make([5, 1, 9])
        theirs = datasets.Dataset.from_dict({"id": list(range(15)), "text": [f"row {n}" for n in range(15)]})

        def chain(rows: Any) -> list[Any]:
            one = rows.map(lambda row, at: {"at": at}, with_indices=True)
            many = one.map(lambda batch, at: {"more": at}, True, None, True, 4)
            some = rows.filter(lambda text, at: at % 3 == 1, True, ["text"])
            both = rows.filter(
                lambda batch, at: [one > 12 for one in at], with_indices=True, batched=True, batch_size=2
            )
            return [list(many), list(some), list(both), list(one.skip(3).take(2))]

        assert chain(ours) == chain(theirs.to_iterable_dataset())

    def test_no_order_rank_or_mix_after_them_changes_them(self, make: Callable[..., IterableDataset]) -> None:
        def numbered(rows: list[int]) -> IterableDataset:
            return make(rows).map(lambda row, at: {"at": at}, with_indices=True)

        mix = crucible.interleave_datasets(
            [numbered([9, 8]), numbered([30])], [1, 2], stopping_strategy="all_exhausted"
        )
        mix = mix.shuffle(4).skip(5)
        for rank in range(3):
            for batch in mix.shard(rank, 3).batch(4, end="pad"):
                assert batch["at"] == batch["id"]

    @pytest.mark.parametrize("before", ["shuffle", "take", "skip", "repeat", "filter", "batched"])
    def test_behind_what_counts_anew_they_are_refused(self, make: Callable[..., IterableDataset], before: str) -> None:
        rows = make([5])
        changed = {
            "shuffle": lambda: rows.shuffle(1),
            "take": lambda: rows.take(2),
            "skip": lambda: rows.skip(2),
            "repeat": lambda: rows.repeat(2),
            "filter": lambda: rows.filter(bool),
            "batched": lambda: rows.map(dict, batched=True),
        }[before]()
        with pytest.raises(UsageError, match="say it first, before shuffle, take"):
            changed.map(dict, with_indices=True)


ADDED = {"shuffle": ["mode", "reshuffle", "lanes", "window"], "batch": ["drop_last", "end"]}


SHARED = """
map filter shuffle take skip repeat batch with_format set_epoch iter cast cast_column select_columns remove_columns
rename_column rename_columns interleave_datasets concatenate_datasets load_state_dict
"""


@pytest.mark.parametrize("name", SHARED.split())
def test_arguments_have_the_names_and_the_order_of_datasets(name: str) -> None:
    ours, theirs = (
        list(inspect.signature(getattr(module, name, None) or getattr(module.IterableDataset, name)).parameters)
        for module in (crucible, datasets)
    )
    theirs = [{"state_dict": "state"}.get(one, one) for one in theirs]
    assert ours == theirs + ADDED.get(name, [])


def refused(rows: Any) -> list[tuple[Callable[[], Any], str]]:
    mix, join = crucible.interleave_datasets, crucible.concatenate_datasets
    return [
        (lambda: rows.map(dict, drop_last_batch=True), r"say batch\(n, end='drop'\)"),
        (lambda: rows.map(dict, features={"id": None}), "cast before it"),
        (lambda: rows.map(dict, batched=True, batch_size=None), "batch_size is a whole number from 1 on, not None"),
        (lambda: rows.batch(4).map(dict), r"say them before batch\(n\)"),
        (lambda: rows.batch(4).filter(bool), r"say them before batch\(n\)"),
        (lambda: rows.shuffle(generator=np.random.default_rng(1)), r"say shuffle\(seed=...\)"),
        (lambda: rows.shuffle(1.5), "seed is a whole number from 0 on, not 1.5"),
        (lambda: rows.shard(num_shards=4, index=1), r"take or skip"),
        (lambda: rows.shard(4, 1), "has the rank first"),
        (lambda: rows.shard(0, 4).batch(2).shard(1, 2), "rows of rank 0 of 4 already"),
        (lambda: crucible.split_dataset_by_node(rows.shard(0, 1), 1, 2), "rows of rank 0 of 1 already"),
        (lambda: rows.batch(4, "id"), "leave out by_column"),
        (lambda: rows.batch("4"), "batch_size is a whole number from 1 on, not '4'"),
        (lambda: rows.batch(0), "batch_size must be 1 or more, got 0"),
        (lambda: rows.take(2.5), "take is a whole number"),
        (lambda: rows.set_epoch(1.5), "epoch is a whole number"),
        (lambda: rows.repeat(None), r"set_epoch\(1\)"),
        (lambda: mix([rows, rows], info=datasets.DatasetInfo()), "takes no info"),
        (lambda: mix([rows, rows], split=datasets.Split.TRAIN), "takes no split"),
        (lambda: join([rows, rows], axis=1), "map adds columns"),
    ]


@pytest.mark.parametrize("number", range(20))
def test_what_cannot_be_done_says_what_to_do(make: Callable[..., IterableDataset], number: int) -> None:
    call, said = refused(make([5]))[number]
    with pytest.raises(UsageError, match=said):
        call()


class TestExtremes:
    """Numbers that somebody will give: they cost what the rows cost, or are refused."""

    def test_a_batch_may_hold_more_than_there_is(self, make: Callable[..., IterableDataset]) -> None:
        rows = make([5, 8])
        assert [batch["id"] for batch in rows.batch(10**12)] == [list(range(13))]
        assert [batch["id"] for batch in rows.shard(1, 2).batch(10**12)] == [list(range(1, 13, 2))]
        assert list(rows.batch(10**12, end="drop")) == []
        assert list(rows.shard(14, 20).batch(10**12)) == []

    def test_datasets_may_be_joined_one_at_a_time(self, make: Callable[..., IterableDataset]) -> None:
        one = make([2])
        joined = one
        for _ in range(400):
            joined = crucible.concatenate_datasets([joined, one])
        assert [row["id"] for row in joined] == [0, 1] * 401
        assert len(list(joined.shuffle(3))) == 802
        at_once = crucible.concatenate_datasets([one] * 401)
        assert joined.state_after(7) == at_once.state_after(7)

    def test_what_no_machine_can_hold_is_refused(self, make: Callable[..., IterableDataset]) -> None:
        rows = make([5])
        with pytest.raises(UsageError, match="lanes must be 1,048,576 or less"):
            rows.shuffle(1, mode="lanes", lanes=10**9)
        with pytest.raises(UsageError, match="positions end at"):
            rows.repeat(10**18)
        with pytest.raises(UsageError, match="a state is what state_dict"):
            rows.load_state_dict(None)  # type: ignore[arg-type]
