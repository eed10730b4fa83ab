# ruff: noqa: E501  # the YAML and the scripts below are lines of their own
"""Conversion keeps every row in order, gives the same bytes everywhere, and shards that `datasets` can read."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible.casts import cast_batch, unify
from crucible.cluster.resolve import resolve
from crucible.decode import decoder
from crucible.errors import CorruptFile, DiskFull, SchemaConflict, StoreReadOnly, UsageError
from crucible.feature_types import features_of
from crucible.refs import ReadOptions, SourceFile, WorkItem
from crucible.workers.canonical import canonical, canonical_batch
from crucible.workers.convert import DraftShard, convert, schema_of_item
from tests.oracle import datasets
from tests.workers.convert_cases import REPOS
from tests.workers.converting import REPO, item_of, run


def read_back(shards: Sequence[DraftShard]) -> pa.Table:
    """All shards under one schema, checked on the way: what a reader of the manifest does."""
    schema = unify([(str(shard.path), shard.schema) for shard in shards])
    batches = []
    for shard in shards:
        content = shard.path.read_bytes()
        assert (len(content), blake3(content).hexdigest()) == (shard.size, shard.digest)
        with pa.ipc.open_file(pa.py_buffer(content)) as reader:
            assert reader.schema.equals(shard.schema, check_metadata=True)
            table = reader.read_all()
        table.validate(full=True)
        assert table.num_rows == shard.rows > 0
        batches += [cast_batch(batch, schema) for batch in table.to_batches()]
    return pa.Table.from_batches(batches, schema)


def rows_of(shards: Sequence[DraftShard]) -> list[dict[str, Any]]:
    table = read_back(shards)
    decode = decoder(None, table.schema) or (lambda row: row)
    return [decode(row) for row in table.to_pylist()]


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


JSON = ReadOptions("json")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.lists(st.text(max_size=200), max_size=30), min_size=1, max_size=4),
    shard_bytes=st.integers(1, 3000),
)
def test_shards_hold_every_row_once_in_order(
    files: list[list[str]], shard_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("c")
    rows = [{"t": f"x{text}"} for texts in files for text in texts]
    paths = [jsonl(folder / f"{n}.jsonl", [{"t": f"x{t}"} for t in texts]) for n, texts in enumerate(files)]
    shards = run(paths, JSON, folder / "out", shard_bytes)
    assert [shard.number for shard in shards] == list(range(len(shards)))
    assert [shard.path.name for shard in shards] == [f"{shard.number}.arrow" for shard in shards]
    assert (rows_of(shards) if shards else []) == rows


def test_shards_come_close_to_their_size(tmp_path: Path) -> None:
    table = pa.table({"t": [f"{number:01000}" for number in range(5000)]})
    pq.write_table(table, tmp_path / "a.parquet")
    shards = run([tmp_path / "a.parquet"], ReadOptions("parquet"), tmp_path / "out", 1 << 20)
    assert len(shards) == 5
    assert all(abs(shard.size - (1 << 20)) < 50_000 for shard in shards[:-1])


def everything() -> pa.Table:
    """A column of every layout, with nulls over bytes that must not show."""
    image = [{"bytes": b"\x01" * n, "path": None} for n in range(40)]
    return pa.table(
        {
            "i": pa.array([None if n % 3 == 0 else n for n in range(40)], pa.int16()),
            "b": pa.array([None if n % 5 == 0 else n % 2 == 0 for n in range(40)]),
            "t": pa.array([None if n % 4 == 0 else "é" * n for n in range(40)]),
            "l": pa.array([None if n % 7 == 0 else list(range(n % 5)) for n in range(40)]),
            "ll": pa.array([[[n], None, []] for n in range(40)], pa.large_list(pa.list_(pa.int8()))),
            "s": pa.array([None if n % 6 == 0 else {"a": n, "b": None} for n in range(40)]),
            "f": pa.array([None if n % 6 == 0 else [n, n + 1] for n in range(40)], pa.list_(pa.int32(), 2)),
            "img": pa.array(image, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            "d": pa.array([None if n % 2 else n for n in range(40)], pa.decimal128(10, 2)),
            "w": pa.array([n * 10**9 for n in range(40)], pa.timestamp("ns", "UTC")),
            "n": pa.nulls(40),
            "m": pa.array([[("k", n)] if n % 2 else None for n in range(40)], pa.map_(pa.string(), pa.int8())),
        }
    )


def test_the_canonical_layout_keeps_every_value_and_forgets_the_slice() -> None:
    table = everything()
    whole = table.to_batches()[0]
    twice = pa.concat_tables([table, table]).combine_chunks().to_batches()[0]
    for start, length in ((0, 40), (3, 11), (7, 1), (5, 0)):
        ours, other = (canonical_batch(batch.slice(at, length)) for batch, at in ((whole, start), (twice, 40 + start)))
        ours.validate(full=True)
        assert ours.equals(whole.slice(start, length))
        for column, twin in zip(ours.columns, other.columns, strict=True):
            assert _buffers(column) == _buffers(twin)


def _buffers(array: Any) -> list[bytes | None]:
    return [None if buffer is None else buffer.to_pybytes() for buffer in array.buffers()]


def test_what_lies_under_a_null_does_not_show() -> None:
    mask = pa.py_buffer(np.packbits([1, 0, 1], bitorder="little").tobytes())
    dirty = pa.Array.from_buffers(pa.int32(), 3, [mask, pa.py_buffer(np.array([1, 99, 3], "i4").tobytes())])
    text = pa.Array.from_buffers(
        pa.string(), 3, [mask, pa.py_buffer(np.array([0, 1, 6, 7], "i4").tobytes()), pa.py_buffer(b"asecretb"[:7])]
    )
    assert text.to_pylist()[1] is None
    lists = pa.ListArray.from_arrays(
        pa.array([0, 1, 6, 7], pa.int32()), pa.array(range(7)), mask=pa.array([False, True, False])
    )
    for array in (dirty, text, lists):
        clean = canonical(array)
        clean.validate(full=True)
        assert clean.equals(array)
        assert _buffers(clean) == _buffers(canonical(pa.array(array.to_pylist(), array.type)))


SCRIPT = """
import sys
from pathlib import Path
from crucible.refs import ReadOptions
from tests.workers.converting import run
for shard in run([Path(sys.argv[1])], ReadOptions(sys.argv[2]), Path(sys.argv[3]), 5000): print(shard.digest)
"""


@pytest.mark.parametrize("builder", ["parquet", "json", "csv", "text", "arrow"])
def test_another_process_writes_the_same_bytes(builder: str, tmp_path: Path) -> None:
    path = tmp_path / "source"
    rows = [{"a": n, "t": None if n % 3 else "x" * (n % 50), "l": [n] * (n % 4)} for n in range(600)]
    if builder == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=77)
    elif builder == "arrow":
        with pa.ipc.new_stream(path, pa.Table.from_pylist(rows).schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows), max_chunksize=50)
    elif builder == "json":
        jsonl(path, rows)
    else:
        path.write_text("a,t\n" + "".join(f"{row['a']},{row['t'] or ''}\n" for row in rows))
    here = [shard.digest for shard in run([path], ReadOptions(builder), tmp_path / "here", 5000)]
    again = [shard.digest for shard in run([path], ReadOptions(builder), tmp_path / "again", 5000)]
    root = Path(__file__).parents[2]
    there = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), builder, str(tmp_path / "there")],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={
            **os.environ,
            "PYTHONPATH": str(root),
            "PYTHONHASHSEED": "7",
            "OMP_NUM_THREADS": "1",
            "MALLOC_PERTURB_": "165",
        },
    ).stdout.split()
    assert len(here) > 1
    assert here == again == there


def test_files_are_joined_under_a_schema_that_holds_all(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "1.jsonl", [{"a": 1, "b": None}])
    two = jsonl(tmp_path / "2.jsonl", [{"a": 2.5, "b": "x", "c": [1]}])
    for shard_bytes in (1, 1 << 20):
        shards = run([one, two], JSON, tmp_path / f"out{shard_bytes}", shard_bytes)
        assert rows_of(shards) == [{"a": 1.0, "b": None, "c": None}, {"a": 2.5, "b": "x", "c": [1]}]


def test_files_that_disagree_are_both_named(tmp_path: Path) -> None:
    one, two = jsonl(tmp_path / "1.jsonl", [{"a": 1}]), jsonl(tmp_path / "2.jsonl", [{"a": "x"}])
    with pytest.raises(SchemaConflict, match=r"2\.jsonl.*1\.jsonl"):
        run([one, two], JSON, tmp_path / "out")


def test_declared_features_decide_and_travel_with_the_shard(tmp_path: Path) -> None:
    features = {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}, "n": {"dtype": "float32", "_type": "Value"}}
    path = jsonl(tmp_path / "a.jsonl", [{"n": 1, "label": "yes"}, {"label": "no"}])
    options = ReadOptions("json", features=json.dumps(features))
    shards = run([path], options, tmp_path / "out")
    ours = datasets.load_dataset("arrow", data_files=[str(shard.path) for shard in shards], split="train")
    theirs = datasets.load_dataset(
        "json", data_files=str(path), split="train", features=datasets.Features.from_dict(features)
    )
    assert ours.features == theirs.features
    assert ours.to_list() == theirs.to_list() == [{"label": 1, "n": 1.0}, {"label": 0, "n": None}]


def test_only_the_chosen_columns_are_converted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"a": 1, "b": 2, "c": 3}])
    features = json.dumps({name: {"dtype": "int8", "_type": "Value"} for name in "abc"})
    for options in (
        ReadOptions("json", columns=("c", "a")),
        ReadOptions("json", columns=("c", "a"), features=features),
    ):
        assert rows_of(run([path], options, tmp_path / "out")) == [{"c": 3, "a": 1}]
    with pytest.raises(UsageError, match=r"'z'.*a, b, c"):
        run([path], ReadOptions("json", columns=("z",)), tmp_path / "out")


def test_an_item_without_rows_gives_no_shard_but_a_schema(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n")
    options = ReadOptions("csv")
    assert run([tmp_path / "a.csv"], options, tmp_path / "out") == []
    schema = schema_of_item(item_of([tmp_path / "a.csv"], options), [tmp_path / "a.csv"], tmp_path)
    assert schema is not None
    assert schema.names == ["a", "b"]
    empty = jsonl(tmp_path / "e.jsonl", [])
    assert run([empty], JSON, tmp_path / "out") == []
    assert schema_of_item(item_of([empty], JSON), [empty], tmp_path) is None
    declared = ReadOptions("json", features=json.dumps({"x": {"_type": "Image"}}))
    assert schema_of_item(item_of([empty], declared), [empty], tmp_path).names == ["x"]  # type: ignore[union-attr]


def test_an_empty_file_among_others_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "0.csv").write_text("a,b\n")
    (tmp_path / "1.csv").write_text("a,b\n1,x\n")
    shards = run([tmp_path / "0.csv", tmp_path / "1.csv"], ReadOptions("csv"), tmp_path / "out")
    assert rows_of(shards) == [{"a": 1, "b": "x"}]


def test_a_corrupt_file_is_named_after_the_shards_before_it(tmp_path: Path) -> None:
    good = jsonl(tmp_path / "good.jsonl", [{"a": n} for n in range(1000)])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n{"a"')
    (tmp_path / "out").mkdir()
    shards: list[DraftShard] = []
    with pytest.raises(CorruptFile, match=r"bad\.jsonl at row 1"):
        shards.extend(convert(item_of([good, bad], JSON, 1000), [good, bad], tmp_path / "out"))
    assert sum(shard.rows for shard in shards) >= 800


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EROFS, StoreReadOnly), (errno.EACCES, StoreReadOnly)],
)
def test_a_disk_that_refuses_is_named(
    number: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    path = jsonl(tmp_path / "a.jsonl", [{"a": 1}])
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(error, match=r"0\.arrow"):
        run([path], JSON, tmp_path / "out")


def test_a_really_full_disk_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"a": "x" * 1000}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.arrow").symlink_to("/dev/full")
    with pytest.raises(DiskFull):
        run([path], JSON, tmp_path / "out")


def test_memory_stays_bounded_while_a_big_row_group_is_converted(tmp_path: Path) -> None:
    """300 MB in one row group, converted by a process that may not grow by half of it."""
    path = tmp_path / "a.parquet"
    table = pa.table({"b": [os.urandom(64) * 4096 for _ in range(1200)]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, row_group_size=1200)
    code = (
        "import resource, sys; from pathlib import Path; from crucible.refs import ReadOptions\n"
        "from tests.workers.converting import item_of; from crucible.workers.convert import convert\n"
        "paths = [Path(sys.argv[1])]; Path(sys.argv[2]).mkdir()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rows = sum(s.rows for s in convert(item_of(paths, ReadOptions('parquet'), 16 << 20), paths, Path(sys.argv[2])))\n"
        "print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    ).stdout.split()
    assert int(out[0]) == 1200
    assert int(out[1]) < 150


@pytest.mark.parametrize("case", REPOS, ids=str)
def test_a_repo_resolved_and_converted_is_what_datasets_loads(case: str, tmp_path: Path) -> None:
    files, yaml = REPOS[case]
    repo = tmp_path / "repo"
    for name, text in files.items():
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text(text)
    card = f"---\n{yaml}\n---\n" if yaml else None
    if card:
        (repo / "README.md").write_text(card)
    theirs = datasets.load_dataset(str(repo))
    listed = [SourceFile(name, len(text), "0" * 40, False) for name, text in files.items()]
    (config,) = resolve(REPO, listed, card)
    assert [split.name for split in config.splits] == list(theirs)
    for split in config.splits:
        paths = [repo / file.path for file in split.files]
        for shard_bytes in (1, 1 << 20):
            item = WorkItem(0, REPO, split.files, split.options, shard_bytes)
            out = tmp_path / f"{split.name}-{shard_bytes}"
            out.mkdir()
            shards = list(convert(item, paths, out))
            assert rows_of(shards) == list(theirs[split.name])
            ours = features_of(unify([("", shard.schema) for shard in shards]))
            assert ours == json.loads(json.dumps(theirs[split.name].features.to_dict()))


REAL = [
    ("cifar10/test-00000-of-00001.parquet", "parquet"),
    ("gsm8k/test.jsonl", "json"),
    ("hh-rlhf/harmless-base-test.jsonl.gz", "json"),
]


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "builder"), REAL)
def test_real_data_is_what_datasets_loads(name: str, builder: str, tmp_path: Path) -> None:
    path = Path(os.environ.get("CRUCIBLE_REAL_DATA", Path(__file__).parents[3] / "shared/data")) / name
    if not path.exists():
        pytest.skip(f"{path} is not there; set CRUCIBLE_REAL_DATA to the real data folder")
    shards = run([path], ReadOptions(builder), tmp_path / "out", 1 << 20)
    ours = datasets.load_dataset("arrow", data_files=[str(shard.path) for shard in shards], split="train")
    theirs = datasets.load_dataset(builder, data_files=str(path), split="train")
    assert len(shards) > 1 or name.startswith("gsm8k")
    assert ours.features == theirs.features
    assert ours.data.table.combine_chunks().equals(theirs.data.table.combine_chunks())
