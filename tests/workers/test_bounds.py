"""A file is converted in memory that does not depend on its size, or an error says which bound it would need.

Each conversion runs in a process that may not have more than its bound, and says what it had at its peak.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crucible.errors import CorruptFile
from crucible.formats.limits import Limits
from crucible.formats.read import read_file
from crucible.refs import ReadOptions

MIB = 1 << 20

CHILD = """
import json, resource, sys
from pathlib import Path
spec = json.loads(sys.argv[1])
import pyarrow as pa
from crucible.errors import CrucibleError
from crucible.formats.limits import Limits
from crucible.refs import ReadOptions
from crucible.workers.convert import convert
from tests.workers.converting import item_of

def now(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10

paths = [Path(spec["path"])]
pa.array(["x"]).cast(pa.large_string())
start = now("VmRSS:")
bound = now("VmData:") + spec["bound"]
resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
said = {"rows": 0}
try:
    item = item_of(paths, ReadOptions(spec["builder"]), 32 << 20)
    for draft in convert(item, paths, Path(spec["out"]), threads=spec["threads"], limits=Limits(spec["row_bytes"])):
        said["rows"] += draft.rows
        draft.path.unlink()
except CrucibleError as error:
    said |= {"error": type(error).__name__, "says": str(error)}
print(json.dumps({**said, "peak": now("VmHWM:") - start}))
"""


def converted(path: Path, builder: str, bound: int, *, row_bytes: int = 1 << 30, threads: int = 1) -> dict[str, Any]:
    """What the child says of itself. `bound` is what it may have besides what it had before it began."""
    out = path.parent / "out"
    out.mkdir(exist_ok=True)
    spec = {"path": str(path), "out": str(out), "builder": builder, "bound": bound, "row_bytes": row_bytes}
    command = [sys.executable, "-c", CHILD, json.dumps(spec | {"threads": threads})]
    # mimalloc takes address space by the gigabyte ahead, which is no memory, but counts
    child = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=170,
        cwd=Path(__file__).parents[2],
        env={"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "2", "PATH": "/usr/bin:/bin"},
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return dict(json.loads(child.stdout))


def long_gzip(path: Path, size: int) -> int:
    """JSON lines of `size` bytes, packed; gives the number of rows."""
    text, rows = b"x" * 900, 0
    with gzip.open(path, "wb", 1) as file:
        while rows * 920 < size:
            file.write(b"".join(b'{"n": %d, "t": "%s"}\n' % (n, text) for n in range(rows, rows + 1000)))
            rows += 1000
    return rows


def csv_field(path: Path, size: int) -> int:
    with path.open("w") as file:
        file.write('a,b\n1,x\n2,"')
        for _ in range(size // 1000):
            file.write("y" * 990 + ' ""q""\n,\n')
        file.write('"\n3,z\n')
    return 3


def json_row(path: Path, size: int) -> int:
    with path.open("w") as file:
        file.write('{"t": "a"}\n{"t": "')
        for _ in range(size // 1000):
            file.write("z" * 1000)
        file.write('"}\n{"t": "b"}\n')
    return 3


def json_array(path: Path, size: int) -> int:
    with path.open("w") as file:
        file.write('[{"t": "a"},{"t": "')
        for _ in range(size // 1000):
            file.write("z" * 1000)
        file.write('"},{"t": "b"}]')
    return 3


def text_line(path: Path, size: int) -> int:
    with path.open("w") as file:
        file.write("a\n")
        for _ in range(size // 1000):
            file.write("z" * 1000)
        file.write("\nb\n")
    return 3


def row_group(path: Path, size: int) -> int:
    rows = size // 1000
    values = [f"{n:08}" + "v" * 992 for n in range(rows)]
    pq.write_table(pa.table({"n": range(rows), "t": values}), path, row_group_size=rows, use_dictionary=False)
    return rows


def test_a_long_gzip_takes_no_more_memory_than_a_shorter_one(tmp_path: Path) -> None:
    peaks = []
    for size in (40 * MIB, 120 * MIB):
        rows = long_gzip(tmp_path / "a.jsonl.gz", size)
        said = converted(tmp_path / "a.jsonl.gz", "json", 384 * MIB)
        assert said["rows"] == rows, said
        peaks.append(said["peak"])
    assert peaks[1] - peaks[0] < 48 * MIB


@pytest.mark.parametrize("threads", [1, 4])
def test_a_row_group_of_any_size_is_read_in_pieces(threads: int, tmp_path: Path) -> None:
    rows = row_group(tmp_path / "a.parquet", 150 * MIB)
    said = converted(tmp_path / "a.parquet", "parquet", 384 * MIB, threads=threads)
    assert said["rows"] == rows, said
    assert said["peak"] < 300 * MIB


LONG: dict[str, tuple[str, str, Callable[[Path, int], int]]] = {
    "a csv field": ("a.csv", "csv", csv_field),
    "a json line": ("a.jsonl", "json", json_row),
    "an item of a json array": ("a.json", "json", json_array),
    "a line of text": ("a.txt", "text", text_line),
}


@pytest.mark.parametrize("key", LONG)
def test_a_long_row_is_a_row_or_an_error_that_says_which_bound_it_needs(key: str, tmp_path: Path) -> None:
    name, builder, make = LONG[key]
    size = 24 * MIB
    rows = make(tmp_path / name, size)
    assert converted(tmp_path / name, builder, 640 * MIB)["rows"] == rows
    said = converted(tmp_path / name, builder, 640 * MIB, row_bytes=12 * MIB)
    assert said["error"] == "CorruptFile"
    assert name in said["says"]
    assert "set CRUCIBLE_ROW_BYTES higher" in said["says"]


@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
def test_a_long_text_is_bounded_however_it_is_cut(sample_by: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * (30 * MIB) if sample_by == "line" else ("y" * 99 + "\n") * 300_000)
    options = ReadOptions("text", (("sample_by", json.dumps(sample_by)),))
    assert sum(batch.num_rows for batch in read_file(tmp_path / "a.txt", "a.txt", options)) == 1
    with pytest.raises(CorruptFile, match=r"^a\.txt.*set CRUCIBLE_ROW_BYTES higher"):
        list(read_file(tmp_path / "a.txt", "a.txt", options, limits=Limits(MIB)))


@pytest.mark.slow
@pytest.mark.parametrize("key", LONG)
def test_a_row_of_200_megabytes(key: str, tmp_path: Path) -> None:
    """It is held some times over while it is parsed, at most ten times; with a lower limit it costs not even itself."""
    name, builder, make = LONG[key]
    rows = make(tmp_path / name, 200 * MIB)
    assert converted(tmp_path / name, builder, 2500 * MIB)["rows"] == rows
    said = converted(tmp_path / name, builder, 640 * MIB, row_bytes=32 * MIB)
    assert said["error"] == "CorruptFile"
    assert said["peak"] < 400 * MIB


@pytest.mark.slow
def test_a_gzip_of_600_megabytes_and_a_row_group_of_a_gigabyte(tmp_path: Path) -> None:
    rows = long_gzip(tmp_path / "a.jsonl.gz", 600 * MIB)
    assert converted(tmp_path / "a.jsonl.gz", "json", 384 * MIB)["rows"] == rows
    rows = row_group(tmp_path / "a.parquet", 1000 * MIB)
    assert converted(tmp_path / "a.parquet", "parquet", 384 * MIB)["rows"] == rows
