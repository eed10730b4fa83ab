"""torchdata's StatefulDataLoader over a dataset: exact at every position, and on another number of workers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible.dataset import IterableDataset
from crucible.errors import StateMismatch, UsageError
from crucible.loaders import state_of_loader
from tests.fakes.shards import number_split

ROWS = [9, 1, 30, 7, 0, 5]
TOTAL = sum(ROWS)
unhurried = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def stream(tmp_path: Path) -> IterableDataset:
    return IterableDataset(*number_split(tmp_path, ROWS, batch_rows=16)).select_columns("id").shuffle(3)


def batches(rows: Any) -> list[list[int]]:
    return [list(batch["id"]) for batch in rows]


def _place(worker: int, workers: int) -> tuple[int, int]:
    return worker, workers


class Team:
    """What a StatefulDataLoader does with its workers, without the processes: it asks them in turn."""

    def __init__(self, dataset: IterableDataset, workers: int, state: Any = None) -> None:
        self.workers = workers
        self.turn = 0
        self.copies, self.running = [], []
        for worker in range(workers):
            copy = dataset.batch(dataset._out.batch) if dataset._out.batch else dataset.select_columns("id")
            copy._worker = partial(_place, worker, workers)  # type: ignore[method-assign]
            if state is not None:
                copy.load_state_dict(state["_snapshot"]["_worker_snapshots"][f"worker_{worker}"]["dataset_state"])
                self.turn = state["_snapshot"]["turn"]
            self.copies.append(copy)
            self.running.append(iter(copy))

    def take(self, count: int) -> list[Any]:
        taken: list[Any] = []
        live = set(range(self.workers))
        while live and len(taken) < count:
            worker = self.turn % self.workers
            self.turn += 1
            if worker in live:
                try:
                    taken.append(next(self.running[worker]))
                except StopIteration:
                    live.discard(worker)
        return taken

    def state(self) -> dict[str, Any]:
        told = {f"worker_{number}": {"dataset_state": copy.state_dict()} for number, copy in enumerate(self.copies)}
        return {"_snapshot": {"_worker_snapshots": told, "turn": self.turn}, "_steps_since_snapshot": 0}


@unhurried
@given(st.data())
def test_any_number_of_workers_and_ranks_goes_on_from_the_state_of_a_loader(
    stream: IterableDataset, data: st.DataObject
) -> None:
    """Stop and go on: once as the same workers, then as others on other ranks, from the state of any one rank."""
    end = data.draw(st.sampled_from(["exact", "drop", "pad", "mask"]))
    seen: list[int] = []
    state = stream.state_after(0)
    for _ in range(data.draw(st.integers(1, 3))):
        world, size, workers, count = (data.draw(st.integers(1, most)) for most in (3, 5, 4, 4))
        ranks = [stream.shard(rank, world).batch(size, end=end) for rank in range(world)]  # type: ignore[arg-type]
        for mine in ranks:
            mine.load_state_dict(state)
        teams = [Team(mine, workers) for mine in ranks]
        for _ in range(2):
            seen += [row for team in teams for batch in team.take(count) for row in batch["id"]]
            states = [team.state() for team in teams]
            teams = [Team(mine, workers, told) for mine, told in zip(ranks, states)]
        told = [state_of_loader(one) for one in states]
        assert all(one == told[0] for one in told), "any rank's state is that of all"
        state = told[0]
    position = state["position"]
    everything = [row["id"] for row in stream]
    if end == "drop" and position == TOTAL:
        assert len(set(seen)) == len(seen)
    elif end in ("exact", "drop"):
        assert sorted(seen) == sorted(everything[:position])
    else:
        assert set(seen) >= set(everything[:position])
        assert position == TOTAL or len(seen) == position, "only the end is padded"


@unhurried
@given(st.data())
def test_one_rank_of_seven_with_three_workers_restores_any_other_cluster(
    stream: IterableDataset, data: st.DataObject
) -> None:
    """What all ranks read after it, put in the order of positions, is the rest of the uninterrupted epoch."""
    everything = [row["id"] for row in stream]
    rank, size, turns = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 8))
    team = Team(stream.shard(rank, 7).batch(size), 3)
    team.take(turns)
    state = state_of_loader(team.state())
    start = state["position"]
    assert start == min(TOTAL, 7 * size * turns)
    for world in (1, 2, 5, 16):
        size, workers = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        rest: dict[int, int] = {}
        for other in range(world):
            mine = stream.shard(other, world).batch(size)
            mine.load_state_dict(state)
            rows = [row for batch in Team(mine, workers).take(TOTAL) for row in batch["id"]]
            first = start + (other - start) % world
            rest |= {first + world * number: row for number, row in enumerate(rows)}
        assert [rest[position] for position in sorted(rest)] == everything[start:]


@pytest.mark.parametrize("start", [0, 5])
def test_batches_counted_since_a_state_make_the_next(stream: IterableDataset, start: int) -> None:
    """What a loop over a plain DataLoader does, whose dataset does not move: here on 2, then 3, then 1 ranks."""
    stream.set_epoch(4)
    everything = [row["id"] for row in stream]
    state = stream.state_after(start)
    seen = []
    for world, size, count in ((2, 3, 2), (3, 4, 1), (1, 50, 1)):
        for rank in range(world):
            mine = stream.shard(rank, world).batch(size)
            mine.load_state_dict(state)
            seen += [row for _, batch in zip(range(count), mine) for row in batch["id"]]
        state = stream.shard(0, world).batch(size).state_after(count, state)
        assert state["epoch"] == 4
        assert sorted(seen) == sorted(everything[start : state["position"]])
    assert state["position"] == TOTAL


def test_the_state_of_one_worker_is_for_that_worker(stream: IterableDataset) -> None:
    mine = stream.batch(4)
    team = Team(mine, 2)
    team.take(3)
    states = [copy.state_dict() for copy in team.copies]
    with pytest.raises(StateMismatch, match="state_of_loader"):
        mine.load_state_dict(states[0])
    for other in (Team(mine, 3), Team(stream.batch(5), 2)):
        with pytest.raises(StateMismatch, match="0 of 2 with turns of 4"):
            other.copies[0].load_state_dict(states[0])


def test_workers_that_did_not_deliver_in_turn_have_no_state_in_common(stream: IterableDataset) -> None:
    rows = Team(stream, 2)
    rows.take(3)
    assert state_of_loader(rows.state())["position"] == 3
    next(rows.running[0])  # as a loader does that makes batches of rows itself
    with pytest.raises(UsageError, match="batch_size=None"):
        state_of_loader(rows.state())
    with pytest.raises(UsageError, match="snapshot_every_n_steps"):
        state_of_loader(rows.state() | {"_steps_since_snapshot": 1})
    with pytest.raises(UsageError, match="no state of a crucible dataset"):
        state_of_loader({"dataset_state": None})


def test_a_rank_that_reads_all_rows_is_told_so_once(
    stream: IterableDataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be meant, in a validation; and the ranks of one model have the same rows."""
    next(iter(stream))
    for rank, said in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        next(iter(stream))
        for dealt in (stream.shard(), stream.shard(0, 1)):
            next(iter(dealt.batch(4)))
        assert len(caplog.messages) == said
        caplog.clear()


@pytest.mark.torch
def test_accelerate_may_split_what_is_whole_and_not_what_is_split(stream: IterableDataset) -> None:
    shard = pytest.importorskip("accelerate.data_loader").IterableDatasetShard
    data = pytest.importorskip("torch.utils.data")
    parts = [shard(stream, batch_size=4, num_processes=2, process_index=rank) for rank in range(2)]
    seen = [row["id"] for part in parts for row in part]
    assert set(seen) == set(range(TOTAL))
    assert len(seen) < TOTAL + 8
    for part in parts:
        part.dataset = stream.shard(part.process_index, 2)
        with pytest.raises(UsageError, match=r"leave this DataLoader out of Accelerator\.prepare"):
            next(iter(part))
        with pytest.raises(UsageError, match=r"rank . of 2 has its rows from shard"):
            next(iter(data.DataLoader(part, batch_size=None)))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:'set_vital' is deprecated")
class TestStateful:
    @pytest.mark.parametrize(("workers", "stops"), [(0, range(13)), (1, (0, 5)), (2, (1, 5, 6, 13)), (3, (4, 7))])
    def test_a_loader_goes_on_again_and_again(self, stream: IterableDataset, workers: int, stops: Any) -> None:
        stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
        mine = stream.batch(4)
        everything = batches(mine)
        for stop in stops:
            loader = stateful(stream.batch(4), batch_size=None, num_workers=workers)
            seen = []
            for _ in range(3):  # a first, a second and a third resume
                running = iter(loader)
                seen += batches(batch for _, batch in zip(range(stop), running))
                state = loader.state_dict()
                assert state_of_loader(state)["position"] == min(TOTAL, 4 * len(seen))
                loader = stateful(stream.batch(4), batch_size=None, num_workers=workers)
                loader.load_state_dict(state)
                if len(seen) >= len(everything):
                    break
            else:
                seen += batches(loader)
            assert seen == everything

    def test_another_number_of_workers_goes_on_from_its_state(self, stream: IterableDataset) -> None:
        stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
        everything = batches(stream.batch(4))
        seen: list[list[int]] = []
        state = None
        for workers in (2, 4, 1, 0):
            mine = stream.batch(4)
            if state is not None:
                mine.load_state_dict(state)
            loader = stateful(mine, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
            seen += batches(batch for _, batch in zip(range(3), loader))
            state = state_of_loader(loader.state_dict())
        mine = stream.batch(4)
        mine.load_state_dict(state or {})
        assert seen + batches(mine) == everything

    def test_one_rank_of_seven_restores_two(self, stream: IterableDataset) -> None:
        torchdata = pytest.importorskip("torchdata.stateful_dataloader")
        loader = torchdata.StatefulDataLoader(stream.shard(3, 7).batch(2), batch_size=None, num_workers=3)
        assert len([batch for _, batch in zip(range(2), loader)]) == 2
        state = state_of_loader(loader.state_dict())
        assert state["position"] == 28
        rest = []
        for rank in range(2):
            mine = stream.shard(rank, 2).batch(3)
            mine.load_state_dict(state)
            rest += batches(torchdata.StatefulDataLoader(mine, batch_size=None, num_workers=2))
        assert sorted(row for batch in rest for row in batch) == sorted([row["id"] for row in stream][28:])

    def test_an_epoch_that_was_gone_on_with_is_followed_by_the_next(self, stream: IterableDataset) -> None:
        """The workers load their states themselves; what their dataset is told later reaches them all the same."""
        stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
        mine = stream.batch(4)
        mine.set_epoch(1)
        loader = stateful(mine, batch_size=None, num_workers=2)
        first = batches(batch for _, batch in zip(range(3), loader))
        state = loader.state_dict()
        again = stream.batch(4)
        loader = stateful(again, batch_size=None, num_workers=2, persistent_workers=True)
        loader.load_state_dict(state)
        for number in (1, 2, 3):
            again.set_epoch(number)
            mine.set_epoch(number)
            assert first + batches(loader) == batches(mine)
            first = []
