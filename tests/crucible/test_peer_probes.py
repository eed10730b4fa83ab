"""What other loaders were seen to lose, repeat or hang on, tried on ours through the public surface.

Each probe names the loader that failed it, as it was measured on the same shape of data.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import crucible

FILES = [137, 100, 100, 37, 63, 1, 199, 63]
TOTAL = sum(FILES)  # 700 rows in 8 uneven files
RANKS = range(4)


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "store"))
    repo = tmp_path / "repo"
    repo.mkdir()
    start = 0
    for number, rows in enumerate(FILES):
        table = pa.table(
            {"id": range(start, start + rows), "text": [f"row {row}" for row in range(start, start + rows)]}
        )
        pq.write_table(table, repo / f"train-{number:05}-of-00008.parquet")
        start += rows
    return crucible.load_dataset(str(repo), split="train", streaming=True)


def ids(rows: Any) -> list[int]:
    return [row["id"] for row in rows]


def flat(batches: Any) -> list[int]:
    return [row for batch in batches for row in batch["id"]]


class TestUnevenFiles:
    """datasets 5.2, `split_dataset_by_node` of 4: 137, 200, 200, 163 rows, and 200, 200, 200, 100 after a shuffle."""

    @pytest.mark.parametrize("shuffled", [False, True])
    def test_ranks_get_as_many_rows_each_once(self, stream: Any, shuffled: bool) -> None:
        whole = stream.shuffle(1, mode="lanes") if shuffled else stream
        parts = [ids(crucible.split_dataset_by_node(whole, rank, 4)) for rank in RANKS]
        assert [len(part) for part in parts] == [175] * 4
        assert sorted(chain(*parts)) == list(range(TOTAL))

    def test_where_rows_do_not_come_out_even_steps_still_do(self, stream: Any) -> None:
        """litdata 0.2.76 with `drop_last=False`: 62 steps on three ranks and 64 on the fourth, which then waits."""
        for end in ("drop", "pad", "mask"):
            batches = [list(stream.shuffle(1, mode="lanes").shard(rank, 4).batch(9, end=end)) for rank in RANKS]
            assert len({len(one) for one in batches}) == 1
            assert {len(batch["id"]) for one in batches for batch in one} == {9}
            delivered = Counter(
                row
                for one in batches
                for batch in one
                for row, valid in zip(batch["id"], batch.get("valid", [True] * 9))
                if valid
            )
            if end == "drop":
                assert set(delivered.values()) == {1}
                assert len(delivered) == TOTAL // 36 * 36
            else:
                assert set(delivered) == set(range(TOTAL))
                assert delivered.total() == TOTAL if end == "mask" else delivered.total() >= TOTAL


class TestResuming:
    @pytest.mark.parametrize("mode", ["lanes", "exact"])
    def test_after_a_shuffle_nothing_is_lost_or_seen_twice(self, stream: Any, mode: str) -> None:
        """datasets 5.2, a shuffle buffer of 200, stopped at 300: 124 rows lost, 24 seen twice."""
        everything = ids(stream.shuffle(1, mode=mode))
        running = stream.shuffle(1, buffer_size=200, mode=mode)
        rows = iter(running)
        seen = [next(rows)["id"] for _ in range(300)]
        fresh = stream.shuffle(1, buffer_size=200, mode=mode)
        fresh.load_state_dict(json.loads(json.dumps(running.state_dict())))
        assert seen + ids(fresh) == everything
        assert sorted(everything) == list(range(TOTAL))

    @pytest.mark.parametrize("world", [1, 2, 3, 16])
    def test_the_states_of_four_ranks_resume_on_any_number(self, stream: Any, world: int) -> None:
        """datasets 5.2, the states of ranks 0 and 1 of 4 loaded on 2 ranks: taken silently, 100 of 700 rows twice."""
        shuffled = stream.shuffle(1, mode="lanes")
        everything = ids(shuffled)
        states, seen = [], []
        for rank in RANKS:
            running = shuffled.shard(rank, 4).batch(5)
            batches = iter(running)
            seen += flat(next(batches) for _ in range(10))
            states.append(running.state_dict())
        assert sorted(seen) == sorted(everything[:200])
        for state in states:  # any one of them will do, for all ranks
            rest = []
            for rank in range(world):
                resumed = shuffled.shard(rank, world).batch(3)
                resumed.load_state_dict(state)
                rest.append(flat(resumed))
            assert sorted([*seen, *chain(*rest)]) == list(range(TOTAL))
            for rank, rows in enumerate(rest):
                assert rows == [everything[position] for position in range(200, TOTAL) if position % world == rank]

    @pytest.mark.torch
    @pytest.mark.filterwarnings("ignore:This DataLoader will create")
    @pytest.mark.parametrize("workers", [0, 1, 4])
    def test_a_loader_of_two_workers_resumes_with_any_number(self, stream: Any, workers: int) -> None:
        """torchdata 0.11's StatefulDataLoader over datasets, 2 to 4 workers: a bare AssertionError."""
        data = pytest.importorskip("torch.utils.data")
        batched = stream.shuffle(1, mode="lanes").batch(8)
        everything = [batch["id"] for batch in batched]
        loader = data.DataLoader(batched, batch_size=None, num_workers=2, timeout=60, collate_fn=dict)
        seen = [batch["id"] for batch, _ in zip(loader, range(31))]
        state = batched.state_after(len(seen))
        resumed = stream.shuffle(1, mode="lanes").batch(8)
        resumed.load_state_dict(state)
        rest = data.DataLoader(
            resumed, batch_size=None, num_workers=workers, timeout=60 if workers else 0, collate_fn=dict
        )
        assert seen + [batch["id"] for batch in rest] == everything
