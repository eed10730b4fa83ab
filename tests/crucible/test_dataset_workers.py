"""A dataset whose copies live in the workers of a torch DataLoader: epochs, loaded states, and what is left behind."""

from __future__ import annotations

import gc
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from crucible.dataset import Dataset, IterableDataset
from crucible.torching import Line
from tests.fakes.shards import number_split, write_split

ROWS = [50, 1, 30, 7, 100, 5]
TOTAL = sum(ROWS)
pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*use of fork.*:DeprecationWarning"),
]


@pytest.fixture
def data() -> Any:
    return pytest.importorskip("torch.utils.data")


@pytest.fixture
def stream(tmp_path: Path) -> IterableDataset:
    return IterableDataset(*number_split(tmp_path, ROWS, batch_rows=16)).select_columns("id").shuffle(3)


def images(folder: Path, count: int) -> IterableDataset:
    """Images in one colour, whose red is the number of the row."""
    image = pytest.importorskip("PIL.Image")
    rows = []
    for number in range(count):
        packed = io.BytesIO()
        image.new("RGB", (8, 6), (number, 0, 0)).save(packed, "PNG")
        rows.append({"bytes": packed.getvalue(), "path": None})
    media = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = json.dumps({"image": {"_type": "Image"}, "n": {"dtype": "int64", "_type": "Value"}})
    table = pa.table({"image": pa.array(rows, media), "n": list(range(count))})
    return IterableDataset(*write_split(folder, [table.slice(0, 70), table.slice(70)], features=features))


def batches(rows: Any) -> list[list[int]]:
    return [list(batch["id"]) for batch in rows]


def epoch(of: IterableDataset, number: int) -> list[list[int]]:
    """What a reader alone gets in this epoch."""
    alone = of.batch(8)
    alone.set_epoch(number)
    return batches(alone)


def shared() -> set[str]:
    """Names of memory in /dev/shm that nobody will take away: their process is this one, or is no more."""
    named = {name: re.match(r"(?:torch_|pym-)(\d+)", name) for name in os.listdir("/dev/shm")}
    pids = {name: int(match[1]) for name, match in named.items() if match}
    return {name for name, pid in pids.items() if pid == os.getpid() or not Path(f"/proc/{pid}").exists()}


def left() -> tuple[set[str], list[Any], int]:
    """What outlives a loop when it should not: shared memory, children, threads."""
    return shared(), multiprocessing.active_children(), threading.active_count()


def settled(before: tuple[set[str], list[Any], int]) -> bool:
    """Nothing is left but what was there. The threads of a queue end a moment after it is closed.

    Less may be left: what other tests have begun, here or in a process beside this one, comes to its end meanwhile.
    """

    def no_more() -> bool:
        names, children, threads = left()
        return names <= before[0] and children == before[1] and threads <= before[2]

    return eventually(no_more)


def eventually(true: Callable[[], bool]) -> bool:
    """Does it come true within a minute?"""
    until = time.monotonic() + 60
    while not true() and time.monotonic() < until:
        gc.collect()
        time.sleep(0.02)
    return true()


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
        assert settled(before), left()

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

    def test_a_dataset_inside_another_hears_too(self, data: Any, stream: IterableDataset) -> None:
        class Wrapped(data.IterableDataset):  # type: ignore[misc]
            def __init__(self) -> None:
                self.inner = stream.batch(8)

            def __iter__(self) -> Any:
                return iter(self.inner)

        wrapped = Wrapped()
        loader = data.DataLoader(wrapped, batch_size=None, num_workers=2, persistent_workers=True)
        for number in range(2):
            wrapped.inner.set_epoch(number)
            assert batches(loader) == epoch(stream, number)

    def test_only_a_process_that_is_being_started_has_the_page_in_common(self, data: Any) -> None:
        line = Line()
        line.open()
        assert line.board is not None
        assert pickle.loads(pickle.dumps(line)).board is None


class TestLoaders:
    def test_workers_start_while_this_process_decodes(
        self, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A fork has the iterator of this process in its memory, and none of its threads."""
        monkeypatch.setenv("CRUCIBLE_DECODERS", "3")
        monkeypatch.setattr("crucible.threads._pool", None)
        mine = images(tmp_path, 160).with_format("torch").shuffle(1).batch(8)
        running = iter(mine)
        seen = [next(running) for _ in range(3)]
        assert any(thread.name == "crucible-decode" for thread in threading.enumerate())
        for _ in range(2):
            loader = data.DataLoader(mine, batch_size=None, num_workers=2, timeout=60)
            found = {int(n): int(image[0, 0, 0]) for batch in loader for n, image in zip(batch["n"], batch["image"])}
            assert found == {n: n for n in range(160)}
            seen.append(next(running))
        seen += running
        assert sorted(int(n) for batch in seen for n in batch["n"]) == list(range(160))

    def test_a_loader_may_make_the_batches(self, data: Any, stream: IterableDataset) -> None:
        """Each row comes once; a batch is of one worker's rows, which are every second one here."""
        alone = [row["id"] for row in stream]
        seen = [batch["id"].tolist() for batch in data.DataLoader(stream, batch_size=8, num_workers=2)]
        assert seen[:4] == [alone[0:16:2], alone[1:16:2], alone[16:32:2], alone[17:32:2]]
        assert sorted(row for batch in seen for row in batch) == sorted(alone)

    def test_a_rank_asked_for_in_a_worker_is_the_rank(
        self, data: Any, stream: IterableDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "3")

        class Wrapped(data.IterableDataset):  # type: ignore[misc]
            def __iter__(self) -> Any:
                return iter(stream.shard().batch(8))

        seen = batches(data.DataLoader(Wrapped(), batch_size=None, num_workers=2))
        assert seen == batches(stream.shard(1, 3).batch(8))

    def test_a_table_has_a_distributed_sampler(self, data: Any, tmp_path: Path) -> None:
        table = Dataset(*number_split(tmp_path, ROWS, batch_rows=16))
        sampler = pytest.importorskip("torch.utils.data.distributed").DistributedSampler
        seen: list[int] = []
        for rank in range(2):
            mine = sampler(table, num_replicas=2, rank=rank, shuffle=True, seed=1, drop_last=True)
            loader = data.DataLoader(table, batch_size=8, sampler=mine, num_workers=1)
            seen += [row for batch in loader for row in batch["id"].tolist()]
        assert len(seen) == len(set(seen)) == TOTAL // 2 * 2


_LOOP = """
import pickle, sys
import torch.utils.data as data
rows = pickle.load(open(sys.argv[1], "rb")).with_format("torch").batch(8)
loader = data.DataLoader(rows, batch_size=None, num_workers=2, persistent_workers=True)
while True:
    for number, batch in enumerate(loader):
        if number == 3:
            print(*(worker.pid for worker in loader._iterator._workers), flush=True)
"""


class TestLeftBehind:
    def test_a_loop_that_is_left_leaves_nothing(self, data: Any, stream: IterableDataset) -> None:
        before = left()
        tensors = stream.with_format("torch").batch(8)
        for _ in data.DataLoader(tensors, batch_size=None, num_workers=2):
            break
        running = iter(data.DataLoader(tensors, batch_size=None, num_workers=2, persistent_workers=True))
        next(running)
        del running
        running = (batch["no such column"] for batch in data.DataLoader(tensors, batch_size=None, num_workers=2))
        with pytest.raises(KeyError):
            next(running)
        del running
        alone = iter(tensors)
        next(alone)
        del alone
        assert settled(before), left()

    def test_ctrl_c_leaves_nothing(self, data: Any, stream: IterableDataset, tmp_path: Path) -> None:
        """It goes to all processes of a terminal: the loop and its workers."""
        packed = tmp_path / "stream.pickle"
        packed.write_bytes(pickle.dumps(stream))
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-c", _LOOP, str(packed)]
        before = shared()
        with subprocess.Popen(
            command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as loop:
            try:
                assert loop.stdout is not None
                workers = [int(pid) for pid in loop.stdout.readline().split()]
                assert len(workers) == 2
                os.killpg(loop.pid, signal.SIGINT)
                said = loop.communicate(timeout=60)[1]
            finally:
                loop.kill()
        assert loop.returncode != 0
        assert "KeyboardInterrupt" in said
        assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
        assert eventually(lambda: shared() <= before)
