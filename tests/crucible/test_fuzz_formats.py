"""Damaged files of every format end in rows or in an error of ours that names the file.

Never in another exception, a hang, the end of the interpreter, or memory that has nothing to do with the file's size:
the readers run in a process of their own, which is watched.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.crucible.reading import Outcome, Reader
from tests.workers.media_cases import npy, png, tar, zipped

ROWS = 40
MOST_GROWTH = 256 << 20
TABLE = pa.table(
    {
        "n": list(range(ROWS)),
        "t": [f"row {n} é" for n in range(ROWS)],
        "f": [n / 3 if n % 5 else None for n in range(ROWS)],
        "l": [[n] * (n % 3) for n in range(ROWS)],
        "s": [{"x": n, "y": str(n)} for n in range(ROWS)],
        "d": pa.array(["a", "b"] * (ROWS // 2)).dictionary_encode(),
    }
)


def parquet(**settings: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(TABLE, out, row_group_size=15, **settings)
    return out.getvalue()


def arrow(make: Any, compression: str | None = None) -> bytes:
    out = io.BytesIO()
    with make(out, TABLE.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(TABLE, max_chunksize=15)
    return out.getvalue()


def compressed(ending: str, content: bytes) -> bytes:
    if ending in ("zst", "lz4"):
        return bytes(pa.Codec({"zst": "zstd", "lz4": "lz4"}[ending]).compress(content, asbytes=True))
    made = {"gz": lambda: gzip.compress(content, mtime=0), "bz2": lambda: bz2.compress(content)}
    return made.get(ending, lambda: lzma.compress(content))()


JSONL = b"".join(
    json.dumps({"n": n, "t": f"row {n}", "l": [None, n][: n % 3], "o": {"x": n, "y": ["a"] * (n % 2)}}).encode() + b"\n"
    for n in range(ROWS)
)
ARRAY = json.dumps([{"n": n, "t": f"row {n} é", "o": {"x": [n]}} for n in range(20)], indent=1).encode()
CSV = b"n,t,f\n" + b"".join(b'%d,"row, ""%d""",%d.5\n' % (n, n, n) for n in range(ROWS))
TEXT = "".join(f"líne {n}\n" for n in range(ROWS)).encode()
FIELDS = [("png", png()), ("json", b'{"a": 1}'), ("cls", "3"), ("npy", npy([1, 2])), ("txt.gz", gzip.compress(b"x"))]
TAR = tar([(f"{'é' * 60}{n}.{ending}", content) for n in range(4) for ending, content in FIELDS])
IMAGES = {"metadata.csv": b"file_name,x\n1.png,1\n2.png,2\n", "1.png": png(1), "2.png": png(2)}


@dataclass(frozen=True)
class Case:
    name: str
    content: bytes
    builder: str
    params: dict[str, Any] = field(default_factory=dict)
    how: str = "file"
    whole: bool = False
    """True where a file that was cut short is known for it by its format."""


CASES = {
    "parquet": Case("a.parquet", parquet(), "parquet", whole=True),
    "parquet as it is": Case("a.parquet", parquet(compression="NONE", use_dictionary=False), "parquet", whole=True),
    "parquet 2": Case("a.parquet", parquet(compression="zstd", data_page_version="2.0"), "parquet", whole=True),
    "arrow file": Case("a.arrow", arrow(pa.ipc.new_file), "arrow", whole=True),
    "arrow stream": Case("a.arrow", arrow(pa.ipc.new_stream), "arrow", whole=True),
    "arrow stream, lz4": Case("a.arrow", arrow(pa.ipc.new_stream, "lz4"), "arrow", whole=True),
    "json lines": Case("a.jsonl", JSONL, "json"),
    "json array": Case("a.json", ARRAY, "json", whole=True),
    "json field": Case("a.json", b'{"data":' + ARRAY + b"}", "json", {"field": "data"}, whole=True),
    "json in utf-16": Case("a.jsonl", JSONL.decode().encode("utf-16"), "json", {"encoding": "utf-16"}),
    "csv": Case("a.csv", CSV, "csv"),
    "tsv": Case("a.tsv", CSV.replace(b",", b"\t"), "csv", {"sep": "\t"}),
    "csv in latin": Case("a.csv", CSV, "csv", {"encoding": "latin-1"}),
    "text": Case("a.txt", TEXT, "text"),
    "paragraphs": Case("a.txt", TEXT.replace(b"3\n", b"3\n\n"), "text", {"sample_by": "paragraph"}),
    **{
        f"json lines, {end}": Case(f"a.jsonl.{end}", compressed(end, JSONL), "json", whole=True)
        for end in ("gz", "bz2", "xz", "zst", "lz4")
    },
    "csv, gz": Case("a.csv.gz", compressed("gz", CSV), "csv", whole=True),
    "text, zst": Case("a.txt.zst", compressed("zst", TEXT), "text", whole=True),
    "zip": Case("a.zip", zipped({"a.csv": CSV, "b.csv": CSV}), "csv", how="item", whole=True),
    "zip of gz": Case("a.zip", zipped({"a.jsonl.gz": compressed("gz", JSONL)}, 0), "json", how="item", whole=True),
    "tar": Case("a.tar", TAR, "webdataset", how="item"),
    "tar.gz": Case("a.tar.gz", gzip.compress(TAR), "webdataset", how="item", whole=True),
    "images in a zip": Case("a.zip", zipped(IMAGES), "imagefolder", {"metadata": True}, how="item", whole=True),
}

JUNK = (
    *(b"\0", b"\0" * 16, b"\xff", b"\xff" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x40", b'"', b"\n", b"\r", b"{", b"["),
    *(b"]", b"}", b",", b"\\", b'"\\ud800"', b"\xed\xa0\x80", b"\xef\xbb\xbf", b"1e999", b"[" * 2000, b"9" * 400),
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        near_an_end = st.one_of(st.integers(0, min(64, len(made))), st.integers(max(0, len(made) - 64), len(made)))
        at = draw(st.one_of(st.integers(0, len(made)), near_an_end))
        what = draw(st.sampled_from(("cut", "byte", "bit", "insert", "over", "again", "drop", "swap")))
        size = draw(st.integers(1, 200))
        if what == "cut":
            del made[at:]
        elif what == "byte":
            made[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif what == "bit" and at < len(made):
            made[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "insert":
            made[at:at] = draw(st.one_of(st.sampled_from(JUNK), st.binary(max_size=20)))
        elif what == "over":
            junk = draw(st.sampled_from(JUNK))
            made[at : at + len(junk)] = junk
        elif what == "again":
            made[at:at] = made[at : at + size]
        elif what == "drop":
            del made[at : at + size]
        elif what == "swap":
            made = made[at:] + made[:at]
    return bytes(made)


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.close()


def read(reader: Reader, folder: Path, case: Case, content: bytes, threads: int = 1) -> Outcome:
    path = folder / case.name
    path.write_bytes(content)
    params = {**case.params, **({"rows": [0, None]} if case.builder == "imagefolder" else {})}
    found = reader.read([path], case.builder, params, how=case.how, threads=threads)
    assert found.error is None or case.name in found.says, f"{found.error} names no file: {found.says}"
    assert found.grew < MOST_GROWTH
    return found


def fuzz(reader: Reader, folder: Path, key: str, examples: int) -> None:
    case = CASES[key]

    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(content=damaged(case.content), threads=st.sampled_from((1, 3)))
    def check(content: bytes, threads: int) -> None:
        read(reader, folder, case, content, threads)

    check()


@pytest.mark.parametrize("key", CASES)
def test_damage_gives_rows_or_an_error_that_names_the_file(key: str, reader: Reader, tmp_path: Path) -> None:
    assert read(reader, tmp_path, CASES[key], CASES[key].content).error is None
    fuzz(reader, tmp_path, key, 25)


@pytest.mark.slow
@pytest.mark.parametrize("key", CASES)
def test_much_damage_gives_rows_or_an_error_that_names_the_file(key: str, reader: Reader, tmp_path: Path) -> None:
    fuzz(reader, tmp_path, key, 4000)


@pytest.mark.parametrize("key", CASES)
def test_a_file_that_was_cut_short_gives_no_row_it_did_not_have(key: str, reader: Reader, tmp_path: Path) -> None:
    """Where the format can tell, it is an error; where it cannot, the rows but the last are those of the whole."""
    case = CASES[key]
    whole = read(reader, tmp_path, case, case.content)
    for at in range(8, len(case.content), len(case.content) // 30):  # of fewer bytes nobody can tell what it was
        cut = read(reader, tmp_path, case, case.content[:at])
        if case.whole:
            assert cut.error is not None or (cut.rows, cut.shown) == (whole.rows, whole.shown), at
        assert cut.rows <= whole.rows
        if case.builder != "csv":  # a column of numbers may have become one of text where it was cut
            same = max(0, cut.rows - 1)
            assert cut.shown[:same] == whole.shown[:same]


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\xff" * 5000, b"PK\x03\x04", b"\x1f\x8b\x08", png()])
def test_what_is_no_such_file_at_all(content: bytes, reader: Reader, tmp_path: Path) -> None:
    for case in CASES.values():
        read(reader, tmp_path, case, content)


def test_a_file_under_the_name_of_another_format(reader: Reader, tmp_path: Path) -> None:
    for case in CASES.values():
        for other in ("parquet", "arrow stream", "json lines", "csv", "text", "zip", "tar", "json lines, gz"):
            read(reader, tmp_path, case, CASES[other].content)


DAMAGED = {
    "text that is not UTF-8": ("json lines", b'{"t": "a"}\n{"t": "\xff"}\n', "row 1: not UTF-8"),
    "a name that is not UTF-8": ("json lines", b'{"t": 1, "\xc4": 2}\n', "not UTF-8"),
    "half a surrogate in an array": ("json field", b'{"data": [{"\\ud800": 1}]}', "row 0: not UTF-8"),
    "a value deeper than anybody writes": ("json lines", b'{"a":' + b"[" * 5000 + b"\n", "a.jsonl"),
    "an array whose header breaks off": ("tar", tar([("1.npy", npy([1]).replace(b"}", b" "))]), "not what its name"),
    "an empty name in a zip": ("zip", zipped({"Q": "a\n1\n"}, 0).replace(b"Q", b"\0"), "a.zip"),
}


@pytest.mark.parametrize("key", DAMAGED)
def test_what_was_found(key: str, reader: Reader, tmp_path: Path) -> None:
    case, content, says = DAMAGED[key]
    found = read(reader, tmp_path, CASES[case], content)
    assert found.error in ("CorruptFile", "UnsafePath")
    assert says in found.says


def test_parquet_text_that_is_not_utf8_is_told(reader: Reader, tmp_path: Path) -> None:
    case = CASES["parquet as it is"]
    found = read(reader, tmp_path, case, case.content.replace(b"row 20 \xc3\xa9", b"row 20 \xff\xa9"))
    assert found.error == "CorruptFile"
    assert "row group 1, after row 0: " in found.says


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (b'null\n{"a": 1}\n', ["{'a': None}", "{'a': 1}"]),
        (b' \r\n null\n{"a": [null, 1], "s": {"b": 2}}', ["{'a': None, 's': None}", "{'a': [None, 1], 's': {'b': 2}}"]),
        (b"null", []),  # no row can have no columns
        (b"null\n" * 3, []),
        (b'{"a": 1}\nnull\n', ["{'a': 1}", "{'a': None}"]),
    ],
)
def test_a_null_that_is_the_first_row_is_a_row_of_nulls(
    content: bytes, shown: list[str], reader: Reader, tmp_path: Path
) -> None:
    """pyarrow ends the process for it."""
    found = read(reader, tmp_path, CASES["json lines"], content)
    assert (found.error, found.shown) == (None, shown)
    broken = read(reader, tmp_path, CASES["json lines"], content.rstrip() + b'\n{"a": }')
    assert broken.error == "CorruptFile"
    assert f"row {len(content.split())}" in broken.says or b"{" in content


def test_two_columns_of_one_name_are_told(reader: Reader, tmp_path: Path) -> None:
    table = pa.table([[1], ["x"]], names=["a", "a"])
    out = io.BytesIO()
    pq.write_table(table, out)
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    for key, content in (("parquet", out), ("arrow stream", stream)):
        found = read(reader, tmp_path, CASES[key], content.getvalue())
        assert (found.error, "two columns are called 'a'" in found.says) == ("CorruptFile", True)


def test_no_byte_of_a_parquet_footer_ends_the_process(reader: Reader, tmp_path: Path) -> None:
    """pyarrow ends it where `column(n)` is asked for on some of these."""
    out = io.BytesIO()
    pq.write_table(pa.table({"l": [["a"], []]}), out)
    content = out.getvalue()
    for at in range(len(content) - 8 - int.from_bytes(content[-8:-4], "little"), len(content)):
        changed = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
        read(reader, tmp_path, CASES["parquet"], changed, threads=3)


@pytest.mark.parametrize("key", ["parquet", "json lines", "csv, gz", "tar", "zip", "json array"])
def test_a_folder_with_a_damaged_file_opens_or_tells(key: str, reader: Reader, tmp_path: Path) -> None:
    case = CASES[key]
    folder = tmp_path / "repo"
    folder.mkdir()

    @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(content=damaged(case.content))
    def check(content: bytes) -> None:
        (folder / case.name).write_bytes(content)
        found = reader.read([folder], "", how="load")
        assert found.error is None or case.name in found.says or "repo" in found.says

    check()


LEAK = """
import sys
from pathlib import Path
from crucible.errors import CorruptFile
from crucible.formats.read import read_file
from crucible.refs import ReadOptions

def taken():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) << 10

for rounds in (20, 100):
    before = taken()
    for _ in range(rounds):
        try:
            list(read_file(Path(sys.argv[1]), "a.txt.zst", ReadOptions("text")))
        except CorruptFile:
            continue
        sys.exit("it was read")
print(taken() - before)
"""


def test_a_damaged_stream_leaves_nothing_behind(tmp_path: Path) -> None:
    """It left what it was to be read into, which after 20,000 files was all the memory that a process may have."""
    (tmp_path / "a.txt.zst").write_bytes(compressed("zst", TEXT)[:-9])
    child = subprocess.run(
        [sys.executable, "-c", LEAK, str(tmp_path / "a.txt.zst")], capture_output=True, text=True, timeout=60
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 4 << 20


def bombs() -> dict[str, tuple[str, bytes]]:
    zeros = bytes(80 << 20)
    once = gzip.compress(zeros, 1)
    return {
        "a gzip in a tar": ("tar", tar([("1.txt.gz", once)])),
        "a gzip of a gzip in a tar": ("tar.gz", gzip.compress(tar([("1.txt.gz", gzip.compress(once))]))),
        "a file in a zip": ("images in a zip", zipped({**IMAGES, "1.png": zeros})),
        "a file in a tar.gz": ("tar.gz", gzip.compress(tar([("1.txt", zeros)]), 1)),
    }


def test_bombs_stay_packed(reader: Reader, tmp_path: Path) -> None:
    for name, (key, content) in bombs().items():
        found = read(reader, tmp_path, CASES[key], content)
        assert found.error == "CorruptFile" or "of a gzip" in name
