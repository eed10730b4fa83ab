"""Images decoded ahead: the same rows, errors and states as without, whatever the number of threads."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest

from crucible import threads
from crucible.config import MOST_DECODERS, decoders
from crucible.dataset import Dataset, IterableDataset
from crucible.errors import CorruptFile, UsageError
from crucible.feature_types import schema_of
from tests.fakes.shards import write_split

ROWS = 900
BAD = (3, 130, 131, 512, 899)
FEATURES = {"image": {"_type": "Image"}, "n": {"dtype": "int64", "_type": "Value"}}


def picture(number: int) -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), (number % 256, number // 256, 7)).save(out, "PNG")
    return out.getvalue()


def table(bad: tuple[int, ...]) -> pa.Table:
    rows = [
        {"image": {"bytes": b"no image" if row in bad else picture(row), "path": f"{row}.png"}, "n": row}
        for row in range(ROWS)
    ]
    return pa.Table.from_pylist(rows, schema=schema_of(FEATURES))


@pytest.fixture(params=[0, 1, 4])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> threads.Pool:
    made = threads.Pool(request.param, most_bytes=3_000)  # 62 of these pictures
    monkeypatch.setattr(threads, "_pool", made)
    return made


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., IterableDataset]:
    def made(bad: tuple[int, ...] = ()) -> IterableDataset:
        whole = table(bad)
        parts = [whole.slice(0, 500), whole.slice(500)]
        return IterableDataset(*write_split(tmp_path, parts, batch_rows=100))

    return made


def value(row: dict[str, Any]) -> int:
    """The row's number, as its pixels have it."""
    red, green, blue = np.asarray(row["image"])[0, 0].tolist()
    assert blue == 7
    return int(red + 256 * green)


@pytest.mark.parametrize("format_", [None, "numpy"])
def test_rows_and_batches_come_in_order(make: Callable[..., Any], pool: threads.Pool, format_: str | None) -> None:
    stream = make().with_format(format_)
    assert [value(row) for row in stream] == [row["n"] for row in stream] == list(range(ROWS))
    for batch, start in zip(stream.batch(70), range(0, ROWS, 70)):
        values = [value({"image": image}) for image in batch["image"]]
        assert values == list(batch["n"]) == list(range(start, min(ROWS, start + 70)))
    shuffled = stream.shuffle(1)
    assert [value(row) for row in shuffled] == [row["n"] for row in shuffled.decode(False)]
    assert pool.held == 0


@pytest.mark.parametrize("format_", [None, "numpy"])
def test_rows_that_cannot_be_decoded_are_left_out_and_counted(
    make: Callable[..., Any], pool: threads.Pool, format_: str | None
) -> None:
    stream = make(BAD).with_format(format_).decode(on_error="skip")
    expected = [row for row in range(ROWS) if row not in BAD]
    assert [value(row) for row in stream] == expected
    assert stream.skipped == len(BAD)
    batches = [list(batch["n"]) for batch in stream.batch(64)]
    assert [row for batch in batches for row in batch] == expected
    assert len(batches[0]) == 63


@pytest.mark.parametrize("size", [None, 25])
def test_an_error_comes_in_its_place_and_names_row_and_file(
    make: Callable[..., Any], pool: threads.Pool, size: int | None
) -> None:
    stream = make((130,)) if size is None else make((130,)).batch(size)
    items = iter(stream)
    for _ in range(130 // (size or 1)):
        next(items)
    with pytest.raises(CorruptFile, match=r"130\.png.*row 130.*column 'image'"):
        next(items)
    del items
    end = time.monotonic() + 60
    while pool.held or any(thread.name == "crucible-decode" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_state_counts_what_was_delivered_and_not_what_lies_ready(
    make: Callable[..., Any], pool: threads.Pool
) -> None:
    stream = make().shuffle(1)
    everything = [value(row) for row in stream]
    running = make().shuffle(1)
    rows = iter(running)
    for done in range(1, 40):
        assert value(next(rows)) == everything[done - 1]
        resumed = make().shuffle(1)
        resumed.load_state_dict(running.state_dict())
        assert value(next(iter(resumed))) == everything[done]


def test_columns_that_are_not_asked_for_are_not_decoded(make: Callable[..., Any], pool: threads.Pool) -> None:
    broken = make(tuple(range(ROWS)))
    assert [row["n"] for row in broken.select_columns("n")] == list(range(ROWS))


def test_a_mapped_dataset_decodes_slices_and_rows(tmp_path: Path, pool: threads.Pool) -> None:
    mapped = Dataset(*write_split(tmp_path, [table(())]))
    assert value(mapped[400]) == 400
    assert [value({"image": image}) for image in mapped[100:300]["image"]] == list(range(100, 300))
    assert [value(row) for row in mapped] == list(range(ROWS))


def test_a_rank_takes_its_share_of_the_cores_unless_it_is_told() -> None:
    cores = len(os.sched_getaffinity(0))
    assert decoders({}) == min(MOST_DECODERS, cores)
    assert decoders({"LOCAL_WORLD_SIZE": str(2 * cores)}) == 1
    assert decoders({"SLURM_NTASKS_PER_NODE": "1"}) == decoders({})
    assert decoders({"CRUCIBLE_DECODERS": "13", "LOCAL_WORLD_SIZE": "4"}) == 13
    for wrong in ("0", "many"):
        with pytest.raises(UsageError, match="CRUCIBLE_DECODERS"):
            decoders({"CRUCIBLE_DECODERS": wrong})


def threads_here(_batch: Any) -> int:
    return threads.process_pool().threads


@pytest.mark.torch
def test_workers_of_a_loader_share_the_threads_of_their_rank(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker decodes itself, so one that has a single thread's share needs no other."""
    data = pytest.importorskip("torch.utils.data")
    monkeypatch.setenv("CRUCIBLE_DECODERS", "4")
    for workers, each in ((1, 3), (2, 1)):
        loader = data.DataLoader(make().batch(300), batch_size=None, num_workers=workers, collate_fn=threads_here)
        assert set(loader) == {each}
