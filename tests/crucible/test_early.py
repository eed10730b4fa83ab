"""A reader that does not wait for a split to be brought whole: same rows, same order, same state, each byte once."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import crucible
from crucible import errors
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.features import Value
from tests.hubserver.faults import FaultyHub

FILES, ROWS = 6, 2500


def texts(start: int, rows: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() * 2 for number in range(start, start + rows)]


def parquet_files(folder: Path, files: int = FILES, rows: int = ROWS) -> dict[str, Path]:
    """Files of about 350 kB, each an item of its own with about four shards."""
    made = {}
    for number in range(files):
        ids = range(number * rows, (number + 1) * rows)
        path = folder / f"{number}.parquet"
        pq.write_table(
            pa.table({"id": ids, "text": texts(ids.start, rows)}), path, row_group_size=700, compression="none"
        )
        made[f"data/train-{number:05d}-of-{files:05d}.parquet"] = path
    return made


@pytest.fixture
def chat(hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FaultyHub:
    hub.import_files("org/chat", dict(parquet_files(tmp_path)))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("CRUCIBLE_SHARD_BYTES", "100000")
    monkeypatch.setenv("CRUCIBLE_BACKOFF_CAP", "0.05")
    monkeypatch.setenv("CRUCIBLE_AHEAD", "0")
    return hub


def whole_files(hub: FaultyHub) -> int:
    """Source files that were asked for from their beginning, and not only for their ends."""
    return sum(record.origin == "cdn" and (record.range is None or "=0-" in record.range) for record in hub.log)


def eventually(look: Callable[[], Any]) -> Any:
    """What `look` gives, once it gives something: a file's last shard can be read before the file is done with."""
    deadline = time.monotonic() + 60
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def test_the_first_rows_come_before_the_other_files_do(chat: FaultyHub) -> None:
    stream = crucible.load_dataset("org/chat", split="train", streaming=True)
    assert whole_files(chat) == 0
    assert (stream.num_rows, stream.column_names, stream.manifest.complete) == (FILES * ROWS, ["id", "text"], False)
    assert len(stream.manifest.shards) > 2 * FILES
    rows = iter(stream)
    assert next(rows)["id"] == 0
    assert 1 <= whole_files(chat) < FILES
    assert [row["id"] for row in rows] == list(range(1, FILES * ROWS))
    assert whole_files(chat) == FILES


def test_the_footers_cost_a_read_of_each_file_once_a_node(chat: FaultyHub) -> None:
    crucible.load_dataset("org/chat", split="train", streaming=True)
    ends = len(chat.requests("*.parquet*", origin="cdn"))
    assert ends == FILES
    crucible.load_dataset("org/chat", split="train", streaming=True)
    assert len(chat.requests("*.parquet*", origin="cdn")) == ends


@pytest.mark.parametrize("mode", [None, "lanes"])
def test_order_and_state_are_those_of_the_complete_split(
    chat: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    early = crucible.load_dataset("org/chat", split="train", streaming=True).shuffle(seed=3, mode=mode).batch(32)
    assert not early.manifest.complete
    rows = iter(early)
    first = [next(rows)["id"] for _ in range(5)]
    state = json.loads(json.dumps(early.state_dict()))
    home = Settings.from_env().home
    rest = [batch["id"] for batch in rows]

    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "other"))
    complete = crucible.load_dataset("org/chat", split="train").manifest
    assert complete.complete
    assert (complete.order_id, complete.local_everywhere) == (early.manifest.order_id, early.manifest.local_everywhere)
    late = crucible.load_dataset("org/chat", split="train", streaming=True).shuffle(seed=3, mode=mode).batch(32)
    assert late.manifest.complete
    assert [batch["id"] for batch in late] == first + rest
    assert sorted(number for batch in first + rest for number in batch) == list(range(FILES * ROWS))
    late.load_state_dict(state)
    assert [batch["id"] for batch in late] == rest
    # who read the last shard keeps the manifest, and it is the one that a job makes
    assert eventually(lambda: [manifest.id for manifest in Store(home).manifests()]) == [complete.id]


def test_after_the_last_shard_the_split_is_known_like_any_other(
    chat: FaultyHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for row in crucible.load_dataset("org/chat", split="train", streaming=True):
        assert row["text"]
    assert eventually(lambda: list(Store(Settings.from_env().home).manifests()))
    chat.clear_log()
    again = crucible.load_dataset("org/chat", split="train", streaming=True)
    assert again.manifest.complete
    assert len(chat.log) == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(crucible.load_dataset("org/chat", split="train")) == FILES * ROWS


def test_a_rank_brings_only_what_it_reads(chat: FaultyHub) -> None:
    part = crucible.load_dataset("org/chat", split=f"train[{2 * ROWS}:{2 * ROWS + 10}]", streaming=True)
    assert [row["id"] for row in part] == list(range(2 * ROWS, 2 * ROWS + 10))
    assert whole_files(chat) == 1


def test_columns_features_and_copies_in_other_processes(chat: FaultyHub) -> None:
    stream = crucible.load_dataset("org/chat", split="train", columns=["text", "id"], streaming=True)
    assert not stream.manifest.complete
    copy = pickle.loads(pickle.dumps(stream))
    assert copy.column_names == stream.column_names
    assert [row["id"] for row in copy] == list(range(FILES * ROWS))
    features = {"id": Value("int32"), "text": Value("string")}
    cast = crucible.load_dataset("org/chat", split="train", features=features, streaming=True)
    assert not cast.manifest.complete
    assert cast.with_format("arrow").batch(7).__iter__().__next__().schema.field("id").type == pa.int32()
    part = crucible.load_dataset("org/chat", split="train", columns=["id"], partial=True, streaming=True)
    assert not part.manifest.complete
    assert [row["id"] for row in part] == list(range(FILES * ROWS))
    with pytest.raises(errors.UsageError, match="no column 'txet'"):
        crucible.load_dataset("org/chat", split="train", columns=["txet"], streaming=True)


def test_rows_that_the_card_counts_otherwise_are_an_error_before_anything_moves(
    chat: FaultyHub, tmp_path: Path
) -> None:
    card = "---\ndataset_info:\n  splits:\n  - name: train\n    num_examples: 7\n---\n"
    chat.import_files("org/chat", {**parquet_files(tmp_path), "README.md": card.encode()})
    for _ in range(2):  # and again where the footers are known
        with pytest.raises(errors.RowsMismatch, match="train"):
            crucible.load_dataset("org/chat", split="train", streaming=True)
    assert whole_files(chat) == 0


RANK = """
import crucible, json, sys
stream = crucible.load_dataset("org/chat", split="train", streaming=True).shuffle(seed=1)
print(json.dumps([row["id"] for row in stream.shard(int(sys.argv[1]), 3)]))
"""


def test_ranks_of_one_node_bring_each_file_once_between_them(chat: FaultyHub) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    try:
        told = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(10)
    assert sorted(number for ids in told for number in ids) == list(range(FILES * ROWS))
    assert whole_files(chat) == FILES
    # nobody of them may have seen all shards: whoever comes next finds that they are all there
    assert crucible.load_dataset("org/chat", split="train", streaming=True).manifest.complete


def test_a_file_that_comes_wrong_is_an_error_where_its_rows_are_read(chat: FaultyHub) -> None:
    stream = crucible.load_dataset("org/chat", split="train", streaming=True)
    chat.add("flip", origin="cdn", after=1000)
    rows = iter(stream)
    with pytest.raises(errors.ChecksumMismatch):
        next(rows)
    chat.clear_faults()
    assert [row["id"] for row in stream] == list(range(FILES * ROWS)), "and once it comes right it is read"


def test_what_footers_cannot_tell_is_brought_whole_first(
    chat: FaultyHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = parquet_files(tmp_path)
    odd = tmp_path / "odd.parquet"
    pq.write_table(pa.table({"id": pa.array(range(300), pa.int32()), "text": texts(0, 300)}), odd)
    chat.import_files("org/odd", {**files, "data/train-00009-of-00010.parquet": odd})
    lines = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts(0, 2000)))
    chat.import_files("org/lines", {"train.jsonl": lines.encode()})
    with caplog.at_level("INFO", "crucible.opening"):
        assert crucible.load_dataset("org/odd", split="train", streaming=True).manifest.complete
        assert crucible.load_dataset("org/lines", split="train", streaming=True).manifest.complete
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["org/odd@main", "org/lines@main"]
