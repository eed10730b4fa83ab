"""A dataset whose copies live in the workers of a torch DataLoader: epochs, loaded states, and what is left behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from crucible.dataset import IterableDataset
from crucible.torching import Line
from tests.fakes.shards import number_split

ROWS = [50, 1, 30, 7, 100, 5]
TOTAL = sum(ROWS)
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:This DataLoader will create")]


@pytest.fixture
def data() -> Any:
    return pytest.importorskip("torch.utils.data")


@pytest.fixture
def stream(tmp_path: Path) -> IterableDataset:
    return IterableDataset(*number_split(tmp_path, ROWS, batch_rows=16)).select_columns("id").shuffle(3)


def batches(rows: Any) -> list[list[int]]:
    return [list(batch["id"]) for batch in rows]


def epoch(of: IterableDataset, number: int) -> list[list[int]]:
    """What a reader alone gets in this epoch."""
    alone = of.batch(8)
    alone.set_epoch(number)
    return batches(alone)


def left() -> tuple[list[str], list[Any], int]:
    """What outlives a loop when it should not: names in /dev/shm, children, threads."""
    return sorted(os.listdir("/dev/shm")), multiprocessing.active_children(), threading.active_count()


class TestEpochs:
    @pytest.mark.parametrize(("context", "workers"), [("fork", 3), ("spawn", 1)])
    def test_workers_that_persist_see_new_epochs_and_loaded_states(
        self, data: Any, stream: IterableDataset, context: str, workers: int
    ) -> None:
        before = left()
        mine = stream.batch(8)
        mine.load_state_dict(mine.state_after(20))
        loader = data.DataLoader(
            mine,
            batch_size=None,
            num_workers=workers,
            persistent_workers=True,
            multiprocessing_context=context,
            timeout=60,
        )
        assert batches(loader) == epoch(stream, 0)[20:]
        assert batches(loader) == epoch(stream, 0), "a loaded position is for one iteration"
        for number in (1, 2, 0):
            mine.set_epoch(number)
            assert batches(loader) == epoch(stream, number)
        mine.set_epoch(5)
        mine.load_state_dict(mine.state_after(3))
        mine.set_epoch(5)
        assert batches(loader) == epoch(stream, 5)[3:]
        mine.set_epoch(5)
        assert batches(loader) == epoch(stream, 5)
        mine.load_state_dict(mine.state_after(3))
        mine.set_epoch(6)
        assert batches(loader) == epoch(stream, 6), "another epoch drops the position"
        del loader
        assert left() == before

    def test_an_epoch_set_during_another_begins_with_the_next(self, data: Any, stream: IterableDataset) -> None:
        """The workers have begun when they are asked for: no matter how late they look."""
        mine = stream.batch(8)
        loader = data.DataLoader(mine, batch_size=None, num_workers=2, persistent_workers=True)
        for number in range(3):
            running = iter(loader)
            mine.set_epoch(number + 1)
            assert batches(running) == epoch(stream, number)

    def test_new_workers_each_epoch_take_a_loaded_position_once(self, data: Any, stream: IterableDataset) -> None:
        mine = stream.batch(8)
        mine.load_state_dict(mine.state_after(3))
        copy = mine.batch(8)
        for one in (mine, copy):
            loader = data.DataLoader(one, batch_size=None, num_workers=2)
            assert batches(loader) == epoch(stream, 0)[3:]
            assert batches(loader) == epoch(stream, 0)
            one.set_epoch(0)
            assert batches(loader) == epoch(stream, 0)
            assert batches(one) == epoch(stream, 0), "nor does this process take it again"

    def test_a_position_that_was_taken_here_is_not_taken_by_workers(self, data: Any, stream: IterableDataset) -> None:
        mine = stream.batch(8)
        loader = data.DataLoader(mine, batch_size=None, num_workers=1, persistent_workers=True)
        assert batches(loader) == epoch(stream, 0)
        mine.load_state_dict(mine.state_after(3))
        assert batches(mine) == epoch(stream, 0)[3:]
        assert batches(loader) == epoch(stream, 0)

    def test_a_transform_has_an_epoch_of_its_own(self, data: Any, stream: IterableDataset) -> None:
        mine = stream.batch(8)
        loader = data.DataLoader(mine, batch_size=None, num_workers=1, persistent_workers=True)
        for number in range(2):
            stream.set_epoch(number)
            mine.batch(8).set_epoch(number)
            assert batches(loader) == epoch(stream, 0)

    def test_a_forked_rank_tells_its_own_workers_alone(self, data: Any, stream: IterableDataset) -> None:
        """As where a notebook starts ranks: they have their dataset from one process, and each its own epoch."""
        mine = stream.batch(8)
        loader = data.DataLoader(mine, batch_size=None, num_workers=1, persistent_workers=True)
        assert isinstance(mine, data.IterableDataset)
        context = multiprocessing.get_context("fork")
        found: Any = context.SimpleQueue()

        def rank(number: int) -> None:
            seen = []
            for turn in range(3):
                mine.set_epoch(number + turn)
                seen.append(batches(loader))
            found.put((number, seen))

        ranks = [context.Process(target=rank, args=(number,)) for number in (0, 10)]
        for one in ranks:
            one.start()
        seen = dict(found.get() for _ in ranks)
        for one in ranks:
            one.join(60)
        assert seen == {number: [epoch(stream, number + turn) for turn in range(3)] for number in (0, 10)}

    def test_nothing_is_shared_until_torch_looks(self, stream: IterableDataset) -> None:
        line = Line()
        assert pickle.loads(pickle.dumps(line)).board is None
        line.open()
        assert line.board is not None
        assert pickle.loads(pickle.dumps(line)).board is None, "only a process that is being started gets it"
