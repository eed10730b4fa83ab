"""A dataset in other processes: pickled, in DataLoader workers, in an interpreter without torch."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crucible.dataset import Dataset, IterableDataset
from tests.fakes.shards import number_split

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


class TestProcesses:
    def test_a_pickled_stream_goes_on_where_its_state_was(self, stream: IterableDataset) -> None:
        shuffled = stream.shuffle(5).shard(0, 2).batch(4)
        everything = batch_ids(shuffled)
        shuffled.load_state_dict(shuffled.state_after(3))
        copy = pickle.loads(pickle.dumps(shuffled))
        assert type(copy) is IterableDataset
        assert batch_ids(copy) == everything[3:]

    def test_a_pickled_table_reads_the_same(self, table: Dataset) -> None:
        table[0]
        assert list(pickle.loads(pickle.dumps(table))) == list(table)

    def test_reading_imports_neither_torch_nor_ray(self, tmp_path: Path, table: Dataset) -> None:
        packed = tmp_path / "stream.pickle"
        packed.write_bytes(pickle.dumps(table.to_iterable().shuffle(1)))
        code = (
            "import pickle, sys; rows = list(pickle.load(open(sys.argv[1], 'rb')));"
            "sys.exit(len(rows) != int(sys.argv[2]) or bool({'torch', 'ray'} & set(sys.modules)))"
        )
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run([sys.executable, "-c", code, str(packed), str(TOTAL)], cwd=root, timeout=60)
        assert done.returncode == 0


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
class TestDataLoader:
    @pytest.mark.parametrize("workers", [0, 1, 3])
    def test_batches_come_in_the_same_order_for_any_number_of_workers(
        self, stream: IterableDataset, workers: int
    ) -> None:
        data = pytest.importorskip("torch.utils.data")
        mine = stream.shuffle(3).shard(1, 2).batch(7)
        everything = batch_ids(mine)
        loader = data.DataLoader(mine, batch_size=None, num_workers=workers)
        assert len(loader) == len(everything)
        assert batch_ids(loader) == everything
        assert batch_ids(loader) == everything

    def test_rows_too(self, stream: IterableDataset) -> None:
        data = pytest.importorskip("torch.utils.data")
        loader = data.DataLoader(stream.shuffle(3), batch_size=None, num_workers=3)
        assert ids(loader) == ids(stream.shuffle(3))

    def test_spawned_workers_resume_and_give_tensors(self, stream: IterableDataset) -> None:
        torch = pytest.importorskip("torch")
        mine = stream.select_columns("id").with_format("torch").shuffle(3).batch(16)
        everything = batch_ids(mine)
        mine.load_state_dict(mine.state_after(4))
        loader = torch.utils.data.DataLoader(
            mine, batch_size=None, num_workers=2, multiprocessing_context="spawn", timeout=60
        )
        got = list(loader)
        assert all(isinstance(batch["id"], torch.Tensor) for batch in got)
        assert batch_ids(got) == everything[4:]

    def test_a_stream_made_before_torch_was_imported_is_iterable_style(self, stream: IterableDataset) -> None:
        data = pytest.importorskip("torch.utils.data")
        assert isinstance(stream, data.IterableDataset)
        assert isinstance(stream, IterableDataset)

    def test_a_mapped_dataset_is_indexed_by_the_loader(self, table: Dataset) -> None:
        data = pytest.importorskip("torch.utils.data")
        loader = data.DataLoader(table, batch_size=4, num_workers=0)
        assert next(iter(loader))["id"].tolist() == [0, 1, 2, 3]

    def test_arrow_batches_take_nothing_along_but_their_rows(self, tmp_path: Path) -> None:
        """A slice of a mapped shard, pickled as it is, holds the whole record batch."""
        data = pytest.importorskip("torch.utils.data")
        mine = IterableDataset(*number_split(tmp_path, [20_000])).with_format("arrow").batch(10)
        loader = data.DataLoader(mine, batch_size=None, num_workers=1, collate_fn=pickle.dumps)
        packed = next(iter(loader))
        assert len(packed) < 5_000
        assert pickle.loads(packed).to_pydict() == next(iter(mine)).to_pydict()
