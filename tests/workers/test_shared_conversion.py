"""One file's conversion is shared by threads: the shards are the same bytes, errors the same errors, memory bounded."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible.errors import CorruptFile, SchemaConflict
from crucible.formats import ahead, parquet
from crucible.formats import json as json_format
from crucible.formats.ahead import made_in_order, streams_in_order
from crucible.refs import ReadOptions
from crucible.workers import convert as convert_module
from crucible.workers import drafts
from crucible.workers.convert import convert, usable_threads
from tests.workers.converting import item_of

ROOT = Path(__file__).parents[2]
PARQUET, JSON = ReadOptions("parquet"), ReadOptions("json")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a file of some hundred kilobytes goes the way of one of gigabytes."""
    monkeypatch.setattr(convert_module, "SHARED_BYTES", 1)
    monkeypatch.setattr(convert_module, "WRITE_BYTES", 30_000)
    monkeypatch.setattr(drafts, "WAITING_BYTES", 60_000)
    monkeypatch.setattr(parquet, "_SHARE", 10_000)
    monkeypatch.setattr(json_format, "CHUNK", 20_000)
    monkeypatch.setattr(ahead, "LANE_BYTES", 30_000)


def rows(count: int, first: int = 0) -> list[dict[str, object]]:
    return [
        {"id": n, "text": None if n % 7 == 3 else f"row {n} " * (n % 9), "tags": [{"k": n % 3}] * (n % 4)}
        for n in range(first, first + count)
    ]


def write_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(rows(6000)), path, row_group_size=170)
    return path


def write_lines(path: Path, lines: list[dict[str, object]]) -> Path:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in lines)
    return path


def made(paths: list[Path], options: ReadOptions, folder: Path, threads: int) -> list[tuple[int, int, str, str]]:
    folder.mkdir()
    item = item_of(paths, options, 100_000)
    return [(s.number, s.rows, s.digest, str(s.schema)) for s in convert(item, paths, folder, threads=threads)]


def files(kind: str, folder: Path) -> tuple[list[Path], ReadOptions]:
    if kind == "parquet":
        return [write_parquet(folder / "a.parquet"), write_parquet(folder / "b.parquet")], PARQUET
    if kind == "columns of one file":
        return [write_parquet(folder / "a.parquet")], ReadOptions("parquet", columns=("tags", "id"))
    if kind == "lines":
        return [write_lines(folder / "a.jsonl", rows(4000))], JSON
    if kind == "packed lines":
        return [write_lines(folder / "a.jsonl.gz", rows(4000))], JSON
    if kind == "lines whose types widen":
        odd = [{**row, "id": row["id"] + 0.5, "new": "x"} for row in rows(500, 1500)]  # type: ignore[operator]
        return [
            write_lines(folder / f"{n}.jsonl", part) for n, part in enumerate((rows(1500), odd, rows(300), odd))
        ], JSON
    mixed = [{**row, "any": {"a": 1} if row["id"] == 2100 else n} for n, row in enumerate(rows(4000))]
    return [write_lines(folder / "a.jsonl", mixed)], JSON


KINDS = (
    "parquet",
    "columns of one file",
    "lines",
    "packed lines",
    "lines whose types widen",
    "lines that turn out mixed",
)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads_makes_the_same_shards(kind: str, tmp_path: Path) -> None:
    paths, options = files(kind, tmp_path)
    alone = made(paths, options, tmp_path / "1", 1)
    assert len(alone) > 1
    for threads in (2, 4):
        assert made(paths, options, tmp_path / str(threads), threads) == alone


def test_a_shard_whose_schema_changes_late_holds_what_went_to_the_disk_before(tmp_path: Path) -> None:
    paths, options = files("lines whose types widen", tmp_path)
    (tmp_path / "out").mkdir()
    item = item_of(paths, options, 1 << 30)
    (shard,) = convert(item, paths, tmp_path / "out", threads=4)
    table = pa.ipc.open_file(shard.path).read_all()
    assert table.schema.field("id").type == pa.float64()
    assert table["id"].to_pylist()[1498:1502] == [1498.0, 1499.0, 1500.5, 1501.5]
    assert table["new"].null_count == 1800
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0.arrow"]


@pytest.mark.parametrize("threads", [1, 4])
def test_damage_is_met_at_the_same_place_after_the_same_shards(threads: int, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", rows(4000)).read_bytes().splitlines(keepends=True)
    lines[3000] = b'{"id": 3000, "text": \n'
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "out").mkdir()
    item, done = item_of([tmp_path / "a.jsonl"], JSON, 50_000), []
    with pytest.raises(CorruptFile, match=r"a\.jsonl.*row 3,?000"):  # noqa: PT012 - the shards before it count
        for shard in convert(item, [tmp_path / "a.jsonl"], tmp_path / "out", threads=threads):
            done += [shard.number]
    assert done == list(range(len(done)))


def test_a_parquet_file_that_is_damaged_in_the_middle_is_named_by_any_thread(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = os.urandom(2000)
    path.write_bytes(content)
    for threads in (1, 4):
        with pytest.raises(CorruptFile, match=r"a\.parquet.*row group"):
            made([path], PARQUET, tmp_path / str(threads), threads)


def test_who_leaves_early_leaves_no_thread_and_no_open_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    (tmp_path / "out").mkdir()
    shards = convert(item_of([path], PARQUET, 60_000), [path], tmp_path / "out", threads=4)
    next(shards)
    shards.close()
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("crucible-decode", "crucible-write"))]


def test_a_conflict_ends_the_conversion_with_the_files_names(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "a.jsonl", rows(2000))
    other = write_lines(tmp_path / "b.jsonl", [{"id": [1]}])
    with pytest.raises(SchemaConflict, match=r"b\.jsonl"):
        made([one, other], JSON, tmp_path / "out", 4)


def test_a_file_gets_fewer_threads_while_other_items_are_at_work() -> None:
    cores = len(os.sched_getaffinity(0))
    assert usable_threads(cores) == usable_threads(10 * cores) == 1
    assert usable_threads(0) == usable_threads(1) == min(4, cores)


def test_wide_or_long_rows_are_decoded_by_fewer_threads(tmp_path: Path) -> None:
    wide = pa.table({f"c{n}": np.random.default_rng(n).random(200_000) for n in range(40)})
    pq.write_table(wide, tmp_path / "wide.parquet", row_group_size=100_000)
    pq.write_table(pa.table({"x": range(10)}), tmp_path / "small.parquet", row_group_size=5)
    afford = parquet._affordable
    assert afford(pq.read_metadata(tmp_path / "wide.parquet"), range(2), 4) < 4
    assert afford(pq.read_metadata(tmp_path / "small.parquet"), range(2), 4) == 4


@given(st.lists(st.lists(st.integers(0, 40_000), max_size=5), max_size=8), st.integers(1, 5))
def test_streams_keep_the_order_of_their_works(works: list[list[int]], threads: int) -> None:
    calls = [partial(iter, work) for work in works]
    assert list(streams_in_order(calls, threads, lambda item: item)) == [item for work in works for item in work]


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 4))
def test_what_fails_fails_after_all_that_came_before_it(count: int, bad: int, threads: int) -> None:
    def items() -> Iterator[int]:
        yield from range(min(count, bad))
        if bad < count:
            raise KeyError(bad)

    got: list[int] = []

    def take() -> None:
        for item, result in made_in_order(items(), lambda n: n * n, threads):
            assert result() == item * item
            got.append(item)

    if bad < count:
        with pytest.raises(KeyError):
            take()
    else:
        take()
    assert got == list(range(min(count, bad)))


CHILD = """
import json, resource, sys; from pathlib import Path; from crucible.refs import ReadOptions
from tests.workers.converting import item_of; from crucible.workers.convert import convert
path, out = Path(sys.argv[1]), Path(sys.argv[2]); out.mkdir()
rows = sum(s.rows for s in convert(item_of([path], ReadOptions(sys.argv[3])), [path], out, threads=4))
peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
print(json.dumps([rows, peak // 1024]))
"""


def huge(kind: str, path: Path) -> int:
    """Write a file that unpacks to far more than a worker may hold; its rows."""
    if kind == "one huge row group":
        content = os.urandom(16 << 10).hex()
        table = pa.table({"text": [content[k:] + content[:k] for k in range(20_000)]})  # 650 MB
        pq.write_table(table, path, compression="zstd", use_dictionary=False, row_group_size=20_000)
        return 20_000
    with gzip.open(path, "wt", compresslevel=1) as file:
        line = json.dumps({"messages": [{"role": "user", "content": "some words " * 90}] * 4}) + "\n"
        for _ in range(150):
            file.write(line * 1000)  # 600 MB
    return 150_000


@pytest.mark.parametrize(
    ("kind", "name", "builder"),
    [("one huge row group", "a.parquet", "parquet"), ("lines that unpack a hundredfold", "a.jsonl.gz", "json")],
    ids=str,
)
def test_a_worker_holds_less_than_512_mb_of_any_file(kind: str, name: str, builder: str, tmp_path: Path) -> None:
    count = huge(kind, tmp_path / name)
    out = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / name), str(tmp_path / "out"), builder],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout
    found, peak = json.loads(out)
    assert found == count
    assert peak < 512
