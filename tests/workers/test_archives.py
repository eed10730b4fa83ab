"""Zip archives are read as `datasets` reads them; hostile and broken ones end in typed errors."""

from __future__ import annotations

import gzip
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible.errors import CorruptFile, CrucibleError, NoDataFiles, UnsafePath, UnsupportedFormat
from crucible.formats.archives import names_inside, open_zip
from crucible.formats.limits import Limits
from tests.workers.media_cases import Content, zipped
from tests.workers.preparing import features, lay_out, ours, prepared, theirs

INSIDE: dict[str, Content] = {
    "b.csv": "a,b\n1,2\n",
    "sub/a.csv": "a,b\n3,4\n",
    "a/z.csv": "a,b\n5,6\n",
    "a/a/y.csv": "a,b\n9,6\n",
    "a.csv": "a,b\n7,8\n",
    "__MACOSX/b.csv": "junk",
    ".x.csv": "junk",
    "__x/y.csv": "junk",
    ".d/y.csv": "junk",
}
CASES: dict[str, dict[str, Content]] = {
    "csv files in folders": {"a.zip": zipped(INSIDE)},
    "stored": {"a.zip": zipped(INSIDE, zipfile.ZIP_STORED)},
    "bzip2 and lzma": {
        "train.zip": zipped({"a.csv": "a\n1\n"}, zipfile.ZIP_BZIP2),
        "test.zip": zipped({"a.csv": "a\n2\n"}, zipfile.ZIP_LZMA),
    },
    "json lines": {"a.zip": zipped({"b.jsonl": '{"a": 1}\n', "a.jsonl": '{"a": 2}\n'})},
    "text": {"a.zip": zipped({"a.txt": "one\ntwo\n", "b/c.txt": "three"})},
    "tabs": {"a.zip": zipped({"a.tsv": "a\tb\n1\tx\n"})},
    "compressed files inside": {"a.zip": zipped({"a.csv.gz": gzip.compress(b"a\n1\n")})},
    "the name says what is inside": {"a.csv.zip": zipped({"a.csv": "a\n1\n"})},
    "files and archives": {"b.txt": "l3\n", "a.zip": zipped({"b.txt": "l1\nl2\n"}), "c.txt": "l4\n"},
    "a config": {
        "x/1.zip": zipped({"a.csv": "a;b\n1;2\n"}),
        "README.md": "---\nconfigs:\n- config_name: m\n  sep: ';'\n  data_files: x/1.zip\n---\n",
    },
    "twelve archives": {f"{n:02}.zip": zipped({f"{n}.jsonl": f'{{"n": {n}}}\n'}) for n in range(12)},
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_archives_are_read_as_datasets_reads_them(case: str, tmp_path: Path) -> None:
    repo = lay_out(tmp_path / "repo", CASES[case])
    expected = theirs(repo)
    for shard_bytes in (1, 1 << 20):
        found = ours(repo, tmp_path / f"home{shard_bytes}", shard_bytes=shard_bytes)
        assert list(found) == list(expected)
        for split, table in expected.items():
            assert features(found[split]) == features(table)
            assert found[split].to_pylist() == table.to_pylist()
        assert not list((tmp_path / f"home{shard_bytes}").rglob("unpacked"))


def test_an_archive_of_nothing_known_is_no_data(tmp_path: Path) -> None:
    for content in ({}, {"a.xyz": "x"}, {"a": "x"}):
        repo = lay_out(tmp_path / "repo", {"a.zip": zipped(content)})
        with pytest.raises(NoDataFiles):
            prepared(repo, tmp_path / "home")


def test_what_is_inside_is_found_by_reading_the_end(tmp_path: Path) -> None:
    content = zipped({"big.bin": bytes(5_000_000), **{f"{n}.csv": "a" for n in range(300)}}, zipfile.ZIP_STORED)
    (tmp_path / "a").write_bytes(content)
    asked = []

    def read(start: int, stop: int) -> bytes:
        asked.append(stop - start)
        return content[start:stop]

    found = names_inside(read, len(content), "a.zip")
    with open_zip(tmp_path / "a", "a.zip", Limits()) as archive:
        assert found == archive.names
    assert len(found) == 301
    assert len(asked) <= 4
    assert sum(asked) < 300_000


def opened(folder: Path, content: bytes, limits: Limits | None = None) -> list[bytes]:
    (folder / "a").write_bytes(content)
    with open_zip(folder / "a", "a.zip", limits or Limits()) as archive:
        return [archive.read(name) for name in archive.names]


def test_a_bomb_is_refused_by_what_it_says_it_unpacks_to(tmp_path: Path) -> None:
    content = zipped({f"{n}.csv": bytes(1 << 20) for n in range(4)})
    assert len(content) < 10_000
    with pytest.raises(CorruptFile, match="CRUCIBLE_UNPACKED_BYTES"):
        opened(tmp_path, content, Limits(unpacked_bytes=3 << 20))
    with pytest.raises(CorruptFile, match="CRUCIBLE_ROW_BYTES"):
        opened(tmp_path, content, Limits(row_bytes=1 << 19))
    assert len(opened(tmp_path, content, Limits(unpacked_bytes=4 << 20))) == 4


def test_a_bomb_that_lies_about_its_size_is_no_more_than_it_says(tmp_path: Path) -> None:
    content = zipped({"a.csv": bytes(1 << 20)})
    size = (1 << 20).to_bytes(4, "little")
    with pytest.raises(CorruptFile, match=r"a\.csv"):
        opened(tmp_path, content.replace(size, (100).to_bytes(4, "little")), Limits(row_bytes=1000))


def test_a_directory_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    content = bytearray(zipped({"a.csv": "a"}))
    end = content.rindex(b"PK\x05\x06")
    content[end + 12 : end + 16] = (1 << 30).to_bytes(4, "little")
    with pytest.raises(CorruptFile):
        opened(tmp_path, bytes(content))
    with pytest.raises(CorruptFile, match="directory"):
        claims(content)


def claims(content: bytearray) -> None:
    """The same with so much before it that the claim could be true."""
    before = (1 << 30) + len(content)

    def read(start: int, stop: int) -> bytes:
        return bytes(max(0, min(stop, before) - start)) + bytes(content[max(0, start - before) : max(0, stop - before)])

    names_inside(read, before + len(content), "a.zip")


@pytest.mark.parametrize("name", ["../a.csv", "/etc/a.csv", "x/../../a.csv", "x//a.csv"])
def test_names_that_lead_out_are_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    repo = lay_out(tmp_path / "deep" / "repo", {"a.zip": zipped({name: "a\n1\n"})})
    with pytest.raises(UnsafePath):
        ours(repo, tmp_path / "home")
    assert [path.name for path in tmp_path.rglob("a.csv")] == []


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_ends_in_typed_errors(data: st.DataObject, tmp_path: Path) -> None:
    method = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
    content = bytearray(zipped({"a.csv": "a,b\n1,2\n" * 20, "d/b.csv": "a\n"}, method))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    with suppress(CrucibleError):
        opened(tmp_path, bytes(content[:cut] if data.draw(st.booleans()) else content))


def test_arrow_files_and_streams_are_read_beside_each_other(tmp_path: Path) -> None:
    schema = pa.schema([("a", pa.int64()), ("t", pa.string())])
    (tmp_path / "repo").mkdir()
    for number, made in enumerate([pa.ipc.new_stream, pa.ipc.new_file, pa.ipc.new_stream]):
        with made(tmp_path / "repo" / f"{number}.arrow", schema) as writer:
            for batch in range(3):
                writer.write_batch(pa.record_batch({"a": [number, batch], "t": ["x", None]}, schema))
    expected = theirs(tmp_path / "repo")["train"]
    found = ours(tmp_path / "repo", tmp_path / "home")["train"]
    assert features(found) == features(expected)
    assert found.to_pylist() == expected.to_pylist()
    assert found.num_rows == 18


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.arrow.gz", "parquet.zip", "arrow.zip"])
def test_parquet_and_arrow_that_are_packed_are_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    """`datasets` takes such a file for the parquet or Arrow file itself, and fails."""
    kind = "arrow" if "arrow" in name else "parquet"
    made = gzip.compress(b"PAR1") if name.endswith(".gz") else zipped({f"a.{kind}": "PAR1"})
    repo = lay_out(tmp_path / "repo", {name: made})
    with pytest.raises(UnsupportedFormat, match=rf"(?i){re.escape(name)} \({kind} packed with \w+\).*unpack it"):
        ours(repo, tmp_path / "home")
