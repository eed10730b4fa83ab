"""How the tinker cookbook walks through its datasets: an order that is a function of (epoch, index), batch by batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import crucible
from crucible.dataset import IterableDataset
from crucible.errors import UsageError
from tests.fakes.shards import number_split

datasets = pytest.importorskip("datasets")

ROWS = [37, 5, 61, 20]
TOTAL = sum(ROWS)


@pytest.fixture
def stream(tmp_path: Path) -> IterableDataset:
    return IterableDataset(*number_split(tmp_path, ROWS, local_bytes=1 << 30))


@pytest.fixture
def theirs() -> Any:
    return datasets.Dataset.from_dict({"id": list(range(TOTAL)), "text": [f"row {n}" for n in range(TOTAL)]})


class Supervised:
    """As the cookbook's: `set_epoch` shuffles the original with that seed, `get_batch(i)` is a slice of it."""

    def __init__(self, base: IterableDataset, batch_size: int) -> None:
        self.base, self.batch_size = base, batch_size
        self.set_epoch(0)

    def set_epoch(self, seed: int) -> None:
        self.now = self.base.shuffle(seed, mode="exact").batch(self.batch_size, end="drop")

    def get_batch(self, index: int) -> list[int]:
        found: list[int] = self.now.get_batch(index)["id"]
        return found

    def __len__(self) -> int:
        return len(self.now)


def test_supervised_batches_are_those_that_slices_of_a_shuffled_dataset_are(stream: Any, theirs: Any) -> None:
    ours = Supervised(stream, 16)
    for epoch in range(3):
        ours.set_epoch(epoch)
        shuffled = theirs.shuffle(seed=epoch)
        assert len(ours) == TOTAL // 16
        for index in (0, 5, 2, 5, len(ours) - 1):  # in any order, and again
            wanted = shuffled.select(range(index * 16, (index + 1) * 16))["id"]
            assert ours.get_batch(index) == list(wanted)
    with pytest.raises(IndexError, match=f"batch {len(ours)} of an epoch of {len(ours)}"):
        ours.get_batch(len(ours))


def test_a_builder_that_shuffles_and_skips_first_is_composed_with_the_shuffle_of_each_epoch(
    stream: Any, theirs: Any
) -> None:
    test, train = stream.shuffle(0, mode="exact").take(20), stream.shuffle(0, mode="exact").skip(20)
    their_test, their_train = theirs.shuffle(seed=0).select(range(20)), theirs.shuffle(seed=0).select(range(20, TOTAL))
    assert [row["id"] for row in test] == list(their_test["id"])
    ours = Supervised(train, 7)
    for epoch in range(2):
        ours.set_epoch(epoch)
        assert ours.get_batch(3) == list(their_train.shuffle(seed=epoch)["id"][21:28])


def test_resuming_at_batch_k_reads_what_an_uninterrupted_run_reads(stream: Any) -> None:
    for mode in ("exact", "lanes"):
        epochs = stream.shuffle(3, mode=mode).batch(9, end="drop")
        for epoch in range(2):
            epochs.set_epoch(epoch)
            whole = [batch["id"] for batch in epochs]
            for start in (0, 1, len(whole) - 1):
                assert [epochs.get_batch(index)["id"] for index in range(start, len(epochs))] == whole[start:]
                resumed = stream.shuffle(3, mode=mode).batch(9, end="drop")
                resumed.load_state_dict(epochs.state_after(start))
                assert [batch["id"] for batch in resumed] == whole[start:]


def test_a_batch_is_had_while_an_iteration_goes_on_and_does_not_disturb_it(stream: Any) -> None:
    epochs = stream.shuffle(3).batch(10)
    iterator = iter(epochs)
    first = next(iterator)
    state = epochs.state_dict()
    assert epochs.get_batch(0) == first
    epochs.get_batch(7)
    assert epochs.state_dict() == state
    assert next(iterator) == epochs.get_batch(1)


def test_ranks_share_a_global_batch(stream: Any) -> None:
    whole = stream.shuffle(3).batch(12)
    for index in range(TOTAL // 12):
        parts = [stream.shuffle(3).shard(rank, 3).batch(4).get_batch(index)["id"] for rank in range(3)]
        assert sorted(itertools.chain(*parts)) == sorted(whole.get_batch(index)["id"])


def test_rows_that_are_removed_after_slicing_shrink_the_batch(stream: Any) -> None:
    """As in the RL datasets, where a bad row is left out of the batch that it is in."""
    kept = stream.filter(lambda row: row["id"] % 10 != 3).batch(10)
    assert kept.get_batch(0)["id"] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert stream.filter(lambda row: row["id"] > 50).batch(10).get_batch(0) == {}


def test_a_mix_is_entered_at_any_batch(stream: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = IterableDataset(*number_split(tmp_path / "other", [50]))
    mix = crucible.interleave_datasets([stream.shuffle(1), other.shuffle(2)], [2, 1], stopping_strategy="all_exhausted")
    epochs = mix.batch(8)
    whole = list(epochs)
    assert [epochs.get_batch(index) for index in reversed(range(len(epochs)))] == whole[::-1]


@pytest.mark.parametrize("index", [-1, 99])
def test_a_batch_that_is_not_there_is_an_index_error(stream: Any, index: int) -> None:
    with pytest.raises(IndexError):
        stream.batch(8).get_batch(index)
    with pytest.raises(UsageError, match=r"say batch\(n\) first"):
        stream.get_batch(0)


@pytest.mark.parametrize("world", [1, 3, TOTAL, 1000])
def test_any_number_of_ranks_reads_every_row_once(tmp_path: Path, world: int) -> None:
    """Ranks beyond the rows, shards of one row: all make as many steps, and the rows that are valid are all rows."""
    split = number_split(tmp_path, [1] * 20 + ROWS)
    whole = IterableDataset(*split).shuffle(3, mode="lanes")
    got = [list(whole.shard(rank, world).batch(2, end="mask")) for rank in range(world)]
    assert len({len(batches) for batches in got}) == 1
    flat = [pair for batches in got for batch in batches for pair in zip(batch["id"], batch["valid"])]
    assert sorted(number for number, valid in flat if valid) == list(range(TOTAL + 20))
    assert np.mean([valid for _, valid in flat]) == (TOTAL + 20) / len(flat)
