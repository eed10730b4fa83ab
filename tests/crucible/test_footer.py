"""A parquet file's rows and schema from its last bytes alone."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible.errors import CorruptFile
from crucible.feature_types import features_of, parse_features
from crucible.formats.footer import ParquetFooter, footer_tail, parse_footer
from crucible.formats.read import read_schema
from crucible.refs import ByteRange, ReadOptions
from tests.oracle import datasets


def footer_of(path: Path, tail_bytes: int | None = None) -> tuple[ParquetFooter, int]:
    """The footer as a client would get it, and how many reads that took."""
    content = path.read_bytes()
    want: ByteRange | ParquetFooter = footer_tail(len(content))
    if tail_bytes is not None:
        want = ByteRange(len(content) - tail_bytes, len(content))
    reads = 0
    while isinstance(want, ByteRange):
        reads += 1
        want = parse_footer(path.name, len(content), content[want.start : want.stop])
    return want, reads


def test_rows_groups_and_schema_come_from_the_tail(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"a": list(range(2500)), "d": pa.array(["x"] * 2500).dictionary_encode()}), path, row_group_size=1000
    )
    footer, reads = footer_of(path)
    assert (footer.rows, [rows for rows, _ in footer.row_groups], reads) == (2500, [1000, 1000, 500], 1)
    assert 0 < sum(size for _, size in footer.row_groups) <= path.stat().st_size
    assert footer.features is None
    assert footer.schema.equals(read_schema(path, "x", ReadOptions("parquet")), check_metadata=True)


def test_the_features_of_datasets_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    features = datasets.Features({"l": datasets.ClassLabel(names=["x", "y"]), "i": datasets.Image()})
    datasets.Dataset.from_dict({"l": [0], "i": [None]}, features=features).to_parquet(path)
    footer, _ = footer_of(path)
    assert footer.features is not None
    assert parse_features(footer.features) == features.to_dict() == features_of(footer.schema)


def test_a_footer_bigger_than_the_tail_asks_for_the_right_range(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({f"column {n}": [n] for n in range(3000)}), path)
    footer, reads = footer_of(path)
    assert (footer.rows, len(footer.schema), reads) == (1, 3000, 2)
    assert footer_of(path, 8) == (footer, 2)


@pytest.mark.parametrize(
    ("size", "tail"),
    [
        (0, b""),
        (4, b"PAR1"),
        (100, b"x" * 100),
        (100, b"\xff\xff\xff\xffPAR1"),
        (100, b"\x04\x00\x00\x00PAR1"),
        (99, b"\x00" * 95 + b"PARE"),
    ],
)
def test_what_is_no_footer_is_named(size: int, tail: bytes) -> None:
    if size == 100 and len(tail) == 8 and tail[0] == 4:
        tail = b"junk" + tail
    with pytest.raises(CorruptFile, match=r"a\.parquet at the footer"):
        parse_footer("a.parquet", size, tail)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_footer_gives_a_footer_a_range_or_corrupt_file(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    if not path.exists():
        pq.write_table(pa.table({"a": [1, 2], "t": ["x", "y"]}), path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(max(0, len(content) - 600), len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    try:
        found = parse_footer("a.parquet", len(content), bytes(content))
    except CorruptFile:
        return
    assert isinstance(found, (ParquetFooter, ByteRange))
