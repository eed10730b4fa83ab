"""The datasets a training script holds: order, sharding, batches, formats, state, pickling, DataLoader."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from crucible.dataset import Dataset, DatasetDict, IterableDataset
from crucible.errors import StateMismatch, UsageError
from tests.fakes.shards import number_split, write_split

ROWS = [50, 1, 30, 7, 100, 5]
TOTAL = sum(ROWS)


@pytest.fixture
def stream(tmp_path: Path) -> IterableDataset:
    return IterableDataset(*number_split(tmp_path, ROWS, batch_rows=16))


@pytest.fixture
def table(tmp_path: Path) -> Dataset:
    return Dataset(*number_split(tmp_path, ROWS, batch_rows=16))


def ids(rows: Any) -> list[int]:
    return [row["id"] for row in rows]


def batch_ids(batches: Any) -> list[list[int]]:
    return [list(batch["id"]) for batch in batches]


def flat_ids(batches: Any) -> list[int]:
    return [number for batch in batches for number in batch["id"]]


class TestOrder:
    def test_unshuffled_rows_come_as_in_the_source(self, stream: IterableDataset) -> None:
        assert list(stream) == [{"id": number, "text": f"row {number}"} for number in range(TOTAL)]

    def test_a_shuffle_delivers_each_row_once_and_the_same_way_each_time(self, stream: IterableDataset) -> None:
        shuffled = stream.shuffle(seed=3)
        once = ids(shuffled)
        assert sorted(once) == list(range(TOTAL)) != once
        assert ids(shuffled) == once == ids(stream.shuffle(3, buffer_size=10))
        assert ids(stream.shuffle(4)) != once
        assert ids(stream.shuffle()) == ids(stream.shuffle(0))

    def test_a_small_split_is_shuffled_as_datasets_does(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        small = IterableDataset(*number_split(tmp_path, ROWS, local_bytes=1 << 20)).shuffle(42)
        theirs = datasets.Dataset.from_dict({"id": list(range(TOTAL))}).shuffle(seed=42)
        assert ids(small) == list(theirs["id"])
        small.set_epoch(1)
        assert ids(small) != list(theirs["id"])

    def test_set_epoch_reaches_the_next_iteration(self, stream: IterableDataset) -> None:
        shuffled = stream.shuffle(3)
        first = ids(shuffled)
        shuffled.set_epoch(1)
        second = ids(shuffled)
        assert sorted(second) == sorted(first)
        assert second != first
        shuffled.set_epoch(0)
        assert ids(shuffled) == first

    def test_transforms_leave_the_original_alone(self, stream: IterableDataset) -> None:
        stream.shuffle(1).shard(0, 2).batch(3).with_format("numpy").select_columns("id").set_epoch(4)
        assert ids(stream) == list(range(TOTAL))
        assert stream.epoch == 0

    def test_ranks_read_every_second_position_whatever_the_batch(self, stream: IterableDataset) -> None:
        everything = ids(stream.shuffle(3))
        for rank in range(2):
            mine = stream.shuffle(3).shard(rank, 2)
            assert ids(mine) == everything[rank::2]
            for size in (1, 4, 7, 1000):
                assert flat_ids(mine.batch(size)) == everything[rank::2]
            assert len(mine) == len(everything[rank::2])

    def test_dropping_the_last_batch_gives_all_ranks_as_many(self, stream: IterableDataset) -> None:
        counts = [len(list(stream.shard(rank, 5).batch(8, drop_last=True))) for rank in range(5)]
        assert counts == [TOTAL // 40] * 5 == [len(stream.shard(rank, 5).batch(8, drop_last=True)) for rank in range(5)]

    def test_the_launcher_says_which_rank_this_is(
        self, stream: IterableDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert ids(stream.shard()) == list(range(1, TOTAL, 3))
        monkeypatch.delenv("RANK")
        monkeypatch.delenv("WORLD_SIZE")
        assert ids(stream.shard()) == list(range(TOTAL))

    def test_arguments_that_make_no_sense_are_refused_at_once(self, stream: IterableDataset) -> None:
        calls: list[Callable[[], object]] = [
            lambda: stream.shard(rank=1),
            lambda: stream.shard(2, 2),
            lambda: stream.batch(0),
            lambda: stream.with_format("tensorflow"),
            lambda: stream.select_columns(["id", "nope"]),
            lambda: stream.shuffle(-1),
        ]
        for wrong in calls:
            with pytest.raises(UsageError):
                wrong()

    def test_an_empty_split_has_no_rows(self, tmp_path: Path) -> None:
        manifest, source = write_split(tmp_path, [pa.table({"id": pa.array([], pa.int64())})])
        assert list(IterableDataset(manifest, source).shuffle(1)) == []
        assert list(IterableDataset(manifest, source).batch(3)) == []
        assert list(Dataset(manifest, source)) == []


class TestState:
    @pytest.mark.parametrize("size", [None, 8])
    def test_restoring_at_every_position_continues_exactly(self, stream: IterableDataset, size: int | None) -> None:
        def made() -> IterableDataset:
            mine = stream.shuffle(5).shard(1, 2)
            mine.set_epoch(2)
            return mine if size is None else mine.batch(size)

        everything = list(made())
        running = made()
        states = [running.state_dict(), *(running.state_dict() for _ in running)]
        assert len(states) == len(everything) + 1
        for done, state in enumerate(states):
            resumed = stream.shuffle(5).shard(1, 2) if size is None else stream.shuffle(5).shard(1, 2).batch(size)
            resumed.load_state_dict(json.loads(json.dumps(state)))
            assert list(resumed) == everything[done:]

    def test_a_second_and_a_third_resume_work(self, stream: IterableDataset) -> None:
        everything = ids(stream.shuffle(5))
        state, seen = stream.shuffle(5).state_dict(), []
        for count in (10, 0, 33, TOTAL):
            resumed = stream.shuffle(5)
            resumed.load_state_dict(state)
            for row, _ in zip(resumed, range(count)):
                seen.append(row["id"])
                state = resumed.state_dict()
        assert seen == everything

    def test_any_rank_restores_all_ranks_of_another_world(self, stream: IterableDataset) -> None:
        everything = ids(stream.shuffle(5))
        for rank in range(7):
            running = stream.shuffle(5).shard(rank, 7).batch(2)
            iterator = iter(running)
            for _ in range(3):
                next(iterator)
            state = running.state_dict()
            assert state["position"] == 42
            rest = []
            for other in range(5):
                resumed = stream.shuffle(5).shard(other, 5)
                resumed.load_state_dict(state)
                rest += ids(resumed)
            assert sorted(rest) == sorted(everything[42:])

    def test_a_finished_epoch_starts_again(self, stream: IterableDataset) -> None:
        shuffled = stream.shuffle(5)
        once = ids(shuffled)
        assert shuffled.state_dict()["position"] == TOTAL
        assert ids(shuffled) == once
        shuffled.load_state_dict(shuffled.state_dict())
        assert ids(shuffled) == []  # the state of a finished epoch has nothing left
        assert ids(shuffled) == once

    def test_setting_the_epoch_of_the_state_keeps_its_position(self, stream: IterableDataset) -> None:
        shuffled = stream.shuffle(5)
        shuffled.set_epoch(3)
        everything = ids(shuffled)
        state = shuffled.state_after(20)
        resumed = stream.shuffle(5)
        resumed.load_state_dict(state)
        resumed.set_epoch(3)
        assert ids(resumed) == everything[20:]
        resumed.load_state_dict(state)
        resumed.set_epoch(4)
        assert len(ids(resumed)) == TOTAL

    def test_transforms_after_loading_go_on_from_the_state(self, stream: IterableDataset) -> None:
        everything = ids(stream.shuffle(5))
        resumed = stream.shuffle(5)
        resumed.load_state_dict(resumed.state_after(20))
        assert flat_ids(resumed.batch(10)) == everything[20:]

    @pytest.mark.parametrize("size", [1, 3, 8])
    def test_each_worker_goes_on_from_the_state_of_its_copy(
        self, stream: IterableDataset, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        """What torchdata's StatefulDataLoader does: a state a worker, each loaded into that worker's new copy."""
        mine = stream.shuffle(5).shard(1, 2).batch(size)
        for worker in range(3):
            monkeypatch.setattr("crucible.dataset.worker", lambda: (worker, 3))  # noqa: B023
            everything = batch_ids(mine)
            running = iter(mine)
            for done in range(len(everything) + 1):
                resumed = stream.shuffle(5).shard(1, 2).batch(size)
                resumed.load_state_dict(mine.state_dict())
                assert batch_ids(resumed) == everything[done:]
                next(running, None)

    def test_a_state_is_small_json(self, stream: IterableDataset) -> None:
        shuffled = stream.shuffle(2**64)
        shuffled.set_epoch(10**6)
        assert len(json.dumps(shuffled.state_dict())) < 1024

    def test_a_state_of_something_else_is_refused_by_name(self, stream: IterableDataset, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        other = IterableDataset(*number_split(tmp_path / "other", [3]))
        state = stream.shuffle(1).state_dict()
        for dataset, wrong, field in (
            (other.shuffle(1), state, "manifest"),
            (stream.shuffle(2), state, "seed"),
            (stream, state, "order"),
            (stream.shuffle(1), state | {"format": 99}, "format"),
            (stream.shuffle(1), state | {"position": TOTAL + 1}, "position"),
            (stream.shuffle(1), {**state, "lanes": "x"}, "fields"),
            (stream.shuffle(1), {name: state[name] for name in state if name != "window"}, "fields"),
        ):
            with pytest.raises(StateMismatch) as caught:
                dataset.load_state_dict(wrong)
            assert caught.value.field == field

    def test_a_state_keeps_its_lanes_when_the_default_changes(
        self, stream: IterableDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        everything = ids(stream.shuffle(1))
        state = stream.shuffle(1).state_after(10)
        monkeypatch.setattr("crucible.order.LANES", 5)
        monkeypatch.setattr("crucible.order.WINDOW", 2)
        resumed = stream.shuffle(1)
        resumed.load_state_dict(state)
        assert ids(resumed) == everything[10:]


class TestForms:
    def test_batches_are_dicts_of_lists(self, stream: IterableDataset) -> None:
        assert next(iter(stream.batch(2))) == {"id": [0, 1], "text": ["row 0", "row 1"]}

    def test_arrow_rows_are_tables_and_unshuffled_batches_are_not_copied(self, stream: IterableDataset) -> None:
        arrow = stream.with_format("arrow")
        before = pa.total_allocated_bytes()
        batches = list(arrow.batch(50))
        assert pa.total_allocated_bytes() == before
        assert pa.concat_tables(batches).column("id").to_pylist() == list(range(TOTAL))
        assert [row.num_rows for row in arrow] == [1] * TOTAL

    @pytest.mark.parametrize("name", ["numpy", pytest.param("torch", marks=pytest.mark.torch)])
    def test_numbers_and_lists_have_the_types_datasets_gives(self, tmp_path: Path, name: str) -> None:
        if name == "torch":
            pytest.importorskip("torch")
        datasets = pytest.importorskip("datasets")
        values = pa.table(
            {
                "int": pa.array([1, 2, 3], pa.int32()),
                "float": pa.array([0.5, 1.5, 2.5], pa.float64()),
                "bool": pa.array([True, False, True]),
                "block": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int64())),
                "ragged": pa.array([[1.0], [], [2.0, 3.0]], pa.list_(pa.float32())),
                "deep": pa.array([[[1, 2]], [[3, 4]], [[5, 6]]], pa.list_(pa.list_(pa.int64()))),
            }
        )
        ours = next(iter(IterableDataset(*write_split(tmp_path, [values])).with_format(name).batch(3)))
        theirs = datasets.Dataset(values).with_format(name)[:]
        for column in values.column_names:
            mine, wanted = ours[column], theirs[column]
            assert type(mine) is type(wanted), column
            if column == "ragged":
                assert [one.tolist() for one in mine] == [one.tolist() for one in wanted]
                assert [one.dtype for one in mine] == [one.dtype for one in wanted]
            else:
                assert mine.dtype == wanted.dtype, column
                assert mine.tolist() == wanted.tolist()

    def test_numpy_rows_hold_one_value_each(self, stream: IterableDataset) -> None:
        row = next(iter(stream.with_format("numpy")))
        assert row["id"] == 0
        assert isinstance(row["id"], np.int64)
        assert row["text"] == "row 0"

    def test_images_are_decoded(self, tmp_path: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        packed = io.BytesIO()
        image.new("RGB", (3, 2), (10, 20, 30)).save(packed, "PNG")
        features = json.dumps({"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}})
        media = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        rows = pa.table({"image": pa.array([{"bytes": packed.getvalue(), "path": None}] * 2, media), "label": [1, 2]})
        manifest, source = write_split(tmp_path, [rows], features=features)
        stream, mapped = IterableDataset(manifest, source), Dataset(manifest, source)
        for row in (next(iter(stream)), mapped[0], {"image": mapped[:1]["image"][0], "label": 1}):
            assert row["image"].size == (3, 2)
            assert row["image"].getpixel((0, 0)) == (10, 20, 30)
        blocks = next(iter(stream.with_format("numpy").batch(2)))["image"]
        assert blocks.shape == (2, 2, 3, 3)
        assert blocks.dtype == np.uint8
        assert next(iter(stream.select_columns("label").batch(2))) == {"label": [1, 2]}


class TestMapped:
    def test_it_is_indexed_like_a_list(self, table: Dataset) -> None:
        assert len(table) == table.num_rows == TOTAL
        numbers: list[Any] = [0, 49, 50, 51, TOTAL - 1, -1, -TOTAL, np.int64(3)]
        for index in numbers:
            assert table[index]["id"] == range(TOTAL)[index]
        for key in (slice(45, 60), slice(None, None, 40), slice(None, None, -1), slice(10, 5), slice(-3, None)):
            assert table[key]["id"] == list(range(TOTAL)[key])
        assert table[[5, 1, -1]]["id"] == [5, 1, TOTAL - 1]
        assert table["text"][-1] == f"row {TOTAL - 1}"
        assert ids(table) == list(range(TOTAL))

    @pytest.mark.parametrize("index", [TOTAL, -TOTAL - 1, [0, TOTAL]])
    def test_an_index_outside_raises(self, table: Dataset, index: Any) -> None:
        with pytest.raises(IndexError):
            table[index]

    def test_an_unknown_column_raises(self, table: Dataset) -> None:
        with pytest.raises(KeyError):
            table["nope"]

    def test_it_says_what_it_is(self, table: Dataset) -> None:
        assert table.column_names == ["id", "text"]
        assert table.features["id"] == {"dtype": "int64", "_type": "Value"}
        assert "200" not in repr(table)
        assert f"{TOTAL} rows of id, text" in repr(table)
        both = DatasetDict(train=table, test=table.select_columns("id"))
        assert both.num_rows == {"train": TOTAL, "test": TOTAL}
        assert both.column_names == {"train": ["id", "text"], "test": ["id"]}

    def test_it_becomes_a_stream_of_the_same_rows(self, table: Dataset) -> None:
        assert list(table.select_columns("id").to_iterable()) == [{"id": number} for number in range(TOTAL)]
