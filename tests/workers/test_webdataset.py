"""Tar archives become the rows, fields and types that `datasets` makes of them; damaged ones end in typed errors."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible.errors import ConversionError, CorruptFile
from crucible.formats.limits import Limits
from crucible.formats.read import read_file
from crucible.formats.webdataset import read_webdataset
from crucible.refs import ReadOptions
from tests.workers.media_cases import Content, npy, png, tar
from tests.workers.preparing import features, lay_out, ours, theirs

WDS = ReadOptions("webdataset")


def several(*ends: str, rows: int = 3) -> list[tuple[str, Content]]:
    """`rows` samples with a field for each of `ends`."""
    made: dict[str, Content] = {"png": png(), "txt": "hi\n", "cls": " 7\n", "json": '{"k": 1, "l": ["x"]}'}
    return [(f"d/{row:03}.{end}", made.get(end.rpartition(".")[2], b"\x00\xff")) for row in range(rows) for end in ends]


def link(name: str, kind: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
    return info.tobuf()


CASES: dict[str, dict[str, Content]] = {
    "images with captions and classes": {"a.tar": tar(several("png", "txt", "cls", "json"))},
    "one row": {"a.tar": tar(several("png", "cls", rows=1))},
    "many rows": {"a.tar": tar(several("cls", "txt", rows=2500))},
    "bytes, and an image of two suffixes": {"a.tar": tar(several("bin", "seg.png", "JPG"))},
    "compressed fields": {
        "a.tar": tar(
            [
                ("1.json.gz", gzip.compress(b'{"a": 1}')),
                ("1.txt.bz2", bz2.compress(b"x")),
                ("1.bin.xz", lzma.compress(b"y")),
                ("2.json.gz", gzip.compress(b'{"a": 2}')),
                ("2.txt.bz2", bz2.compress(b"z")),
                ("2.bin.xz", lzma.compress(b"")),
            ]
        )
    },
    "numpy arrays": {
        "a.tar": tar(
            [
                ("1.npy", npy(np.arange(6, dtype="int16").reshape(2, 3))),
                ("1.x.npy", npy(np.arange(3, dtype="float32"))),
                ("1.s.npy", npy(np.float64(3))),
            ]
        )
    },
    "a compressed archive": {"a.tar.gz": tar([("1.txt", "a"), ("2.txt", "b")], "w:gz")},
    "hidden names, no field and folders with dots": {
        "a.tar": tar(
            [
                ("._1.txt", "a"),
                ("x/.1.txt", "b"),
                ("1.txt", "c"),
                ("noext", "z"),
                (".d/2.txt", "e"),
                ("3.tar/3.txt", "e"),
                ("./4.txt", "f"),
            ]
        )
    },
    "json of many kinds": {
        "a.tar": tar(
            [
                *(("1.json", "[1, 2]"), ("1.x.json", '"q"'), ("1.y.json", '{"a": null}')),
                *(("2.json", "[]"), ("2.x.json", "null"), ("2.y.json", '{"a": 1}')),
            ]
        )
    },
    "several archives and splits": {
        "train-00.tar": tar([("1.txt", "a"), ("0.txt", "z")]),
        "train-01.tar": tar([("1.txt", "b"), ("0.txt", "c")]),
        "test-00.tar": tar([("9.txt", "b"), ("8.txt", "b")]),
    },
    "a field that is missing later": {
        "a.tar": tar([*several("cls", "txt", rows=6), ("z.cls", "1"), ("zz.cls", "1"), ("zz.txt", "1")])
    },
    "declared features": {
        "a.tar": tar([("1.png", png()), ("1.cls", "1"), ("1.txt", "x"), ("1.dat", png())]),
        "README.md": "---\ndataset_info:\n  features:\n  - {name: dat, dtype: image}\n  - name: cls\n    dtype:\n"
        "      class_label:\n        names: {'0': dog, '1': cat}\n  - {name: absent, dtype: string}\n---\n",
    },
    "links and folders": {
        "a.tar": tar([("1.txt", "a")])[:1024]
        + link("d", tarfile.DIRTYPE)
        + link("2.txt", tarfile.SYMTYPE)
        + tar([("3.txt", "b")])
    },
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_archives_become_the_rows_of_datasets(case: str, tmp_path: Path) -> None:
    repo = lay_out(tmp_path / "repo", CASES[case])
    expected = theirs(repo)
    for shard_bytes in (1, 1 << 20) if case != "many rows" else (1 << 20,):
        found = ours(repo, tmp_path / f"home{shard_bytes}", shard_bytes=shard_bytes)
        assert list(found) == list(expected)
        for split, table in expected.items():
            assert features(found[split]) == features(table)
            assert found[split].column_names == table.column_names
            rows, wanted = found[split].to_pylist(), table.to_pylist()
            for row in wanted:
                if "__url__" in row:  # theirs is a place on this machine
                    row["__url__"] = str(Path(row["__url__"]).relative_to(repo))
            assert rows == wanted


def batches(folder: Path, content: bytes, limits: Limits | None = None) -> list[pa.RecordBatch]:
    (folder / "a").write_bytes(content)
    return list(read_webdataset(folder / "a", "a.tar", WDS, limits))


def test_a_field_that_comes_late_or_widens_is_kept(tmp_path: Path) -> None:
    """`datasets` looks at five rows: later fields are dropped there, and 1.5 becomes 1."""
    repo = lay_out(
        tmp_path / "r", {"a.tar": tar([*((f"{n}.json", "1") for n in range(9)), ("9.json", "1.5"), ("9.txt", "late")])}
    )
    table = ours(repo, tmp_path / "home", shard_bytes=1)["train"]
    assert table.column_names == ["json", "__key__", "__url__", "txt"]
    assert table["json"].to_pylist() == [1.0] * 9 + [1.5]
    assert table["txt"].to_pylist() == [None] * 9 + ["late"]


def test_the_name_of_an_archive_is_part_of_its_shards_keys(tmp_path: Path) -> None:
    from tests.workers.preparing import prepared

    content = tar(several("txt"))
    repo = lay_out(tmp_path / "r", {"a/x.tar": content, "b/x.tar": content})
    other = lay_out(tmp_path / "s", {"a/y.tar": content, "b/x.tar": content})
    keys = [
        item.key for n, folder in enumerate((repo, other)) for item in prepared(folder, tmp_path / f"h{n}").items[0]
    ]
    assert len(set(keys)) == len(keys)


def test_every_cut_and_every_flipped_header_is_an_error_or_whole_rows(tmp_path: Path) -> None:
    content = tar(several("txt", "json", rows=4))
    whole = [row for batch in batches(tmp_path, content) for row in batch.to_pylist()]
    for cut in range(0, len(content), 128):
        try:
            rows = [row for batch in batches(tmp_path, content[:cut]) for row in batch.to_pylist()]
        except ConversionError:
            continue
        # cut where a file ended: nothing says that more was to come
        assert cut % 512 == 0 or cut > 8 * 1024
        assert [row["__key__"] for row in rows] == [row["__key__"] for row in whole][: len(rows)]
    for header in range(0, len(content) - 10240, 1024):
        bad = bytearray(content)
        bad[header + 10] ^= 0xFF
        if header < 8 * 1024:
            with pytest.raises(CorruptFile, match=r"a\.tar"):
                batches(tmp_path, bytes(bad))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_ends_in_typed_errors(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(tar([*several("txt", "json", "npy", rows=2), ("x.npy", npy(np.arange(4)))], "w"))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ConversionError):
        batches(tmp_path, bytes(content))


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([("1.txt", "a"), ("1.txt", "b")], "a second 'txt'"),
        ([("1.cls", "x")], "not what its name says"),
        ([("1.json", "{")], "not what its name says"),
        ([("1.txt", b"\xff")], "not what its name says"),
        ([("1.json", "1"), ("2.json", '"x"')], "no common type"),
        ([("1.json", str(1 << 70))], "no common type"),
        ([("1.json", "[" * 100_000)], "not what its name says"),
        ([("1.npy", npy(np.array([{}], dtype=object)))], "never unpickled"),
        ([("1.npy", npy(np.arange(4))[:-1])], "does not fit its size"),
        ([("1.npy", npy(np.arange(4)).replace(b"(4,)", b"(9" + b"9" * 0 + b",)"))], "does not fit its size"),
        ([("1.txt.gz", gzip.compress(b"x" * 100)[:-9])], "compressed data"),
        ([("1.txt.gz", gzip.compress(b"x" * 5000))], "CRUCIBLE_ROW_BYTES"),
        ([("1.txt", "x" * 5000)], "CRUCIBLE_ROW_BYTES"),
        ([("1.txt", "x" * 3000), ("1.a.txt", "x" * 3000)], "CRUCIBLE_ROW_BYTES"),
        ([(f"{n}.txt", "x" * 3000) for n in range(5)], "CRUCIBLE_UNPACKED_BYTES"),
    ],
)
def test_what_cannot_be_a_row_is_named(members: list[tuple[str, Content]], problem: str, tmp_path: Path) -> None:
    limits = Limits(row_bytes=4096, unpacked_bytes=12_000) if "CRUCIBLE" in problem else None
    with pytest.raises(CorruptFile, match=problem):
        batches(tmp_path, tar(members), limits)


@pytest.mark.parametrize("end", ["pth", "npz", "msg", "ten", "cbor", "tb", "mp"])
def test_a_field_that_another_library_reads_is_carried_as_its_bytes(end: str, tmp_path: Path) -> None:
    (batch,) = batches(tmp_path, tar([(f"1.{end}", b"\x80x"), ("1.txt", "t")]))
    assert batch.to_pylist() == [{end: b"\x80x", "txt": "t", "__key__": "1", "__url__": "a.tar"}]


def test_a_tar_under_the_name_of_a_compression_that_it_is_not_is_told(tmp_path: Path) -> None:
    batches(tmp_path, tar([("1.txt", "x")]))
    with pytest.raises(ConversionError):
        list(read_file(tmp_path / "a", "a.tar.zst", WDS))


def test_a_header_that_claims_gigabytes_is_refused_before_they_are_read(tmp_path: Path) -> None:
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE):
        info = tarfile.TarInfo("1.txt")
        info.size, info.type = 1 << 32, kind
        with pytest.raises(CorruptFile, match="allowed"):
            batches(tmp_path, info.tobuf() + b"x" * 4096)
