"""Who converts while others download: a turn is for decoding, and nobody waits for a disk with it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import crucible
from crucible.cluster import drive
from crucible.errors import CorruptFile
from crucible.refs import ReadOptions
from crucible.workers import convert as converting
from crucible.workers.convert import convert
from tests.workers.converting import item_of

JSON = ReadOptions("json")


def rows_at(path: Path, count: int, text: str = "") -> Path:
    path.write_text(
        "".join(json.dumps({"n": number} | ({"text": text} if text else {})) + "\n" for number in range(count))
    )
    return path


@pytest.mark.parametrize("shards", [1, 3])
def test_a_turn_is_given_back_before_the_last_shard_is_waited_for(
    shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        seen.append("sync")
        sync(descriptor)

    @contextmanager
    def turn() -> Iterator[int]:
        seen.append("in")
        yield 1000  # so many at work that this one gets one thread
        seen.append("out")

    path = rows_at(tmp_path / "a.jsonl", 1000)
    monkeypatch.setattr(os, "fsync", noted)
    made = list(convert(item_of([path], JSON, 8001 // shards), [path], tmp_path, turn=turn()))
    assert [sum(shard.rows for shard in made), len(made)] == [1000, shards]
    assert seen == ["in", *["sync"] * (shards - 1), "out", "sync"]


def test_a_turn_is_given_back_by_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    free = threading.Semaphore(1)

    @contextmanager
    def turn() -> Iterator[int]:
        with free:
            yield 1

    path = tmp_path / "bad.jsonl"
    path.write_text('{"n"')
    with pytest.raises(CorruptFile):
        list(convert(item_of([path], JSON), [path], tmp_path, turn=turn()))
    assert free.acquire(blocking=False)


def test_without_ray_no_more_items_are_converted_at_a_time_than_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of six, although all six are under way: each writes down how many read rows while it does."""
    at_once: list[int] = []
    reading, lock = 0, threading.Lock()
    read = converting.read_item

    def slowly(*arguments: object) -> Iterator[object]:
        nonlocal reading
        with lock:
            reading += 1
            at_once.append(reading)
        time.sleep(0.05)
        yield from read(*arguments)  # type: ignore[arg-type]
        with lock:
            reading -= 1

    (tmp_path / "repo").mkdir()
    for number in range(6):
        rows_at(tmp_path / "repo" / f"train-{number}.jsonl", 200, f"{number}" * 2000)  # too big to share an item
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(drive, "MOST_LOCAL", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(converting, "read_item", slowly)
    assert len(crucible.load_dataset(str(tmp_path / "repo"), split="train")) == 1200
    assert len(at_once) == 6
    assert max(at_once) == 2
