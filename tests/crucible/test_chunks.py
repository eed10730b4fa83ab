"""Where columns lie in a parquet file, as pyarrow says it too; damaged footers and pages end in one error."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.cache.ranges import Ranges
from crucible.errors import CorruptFile, UsageError
from crucible.formats import chunks
from crucible.formats.chunks import Layout, check_chunks, fetches, parse_layout, wanted_ranges
from crucible.formats.thrift import BadThrift, read_struct
from crucible.refs import ByteRange, SourceFile

ROWS = 3000
TABLE = pa.table(
    {
        "id": range(ROWS),
        "tags": [[str(n), None] if n % 3 else None for n in range(ROWS)],
        "deep": [{"a": [{"b": n, "c": b"x" * (n % 7)}], "d": n % 2 == 0} for n in range(ROWS)],
        "text": [None if n % 5 == 0 else f"row {n}" for n in range(ROWS)],
    }
)
WAYS: list[dict[str, Any]] = [
    {},
    {"data_page_version": "2.0", "write_page_checksum": True, "data_page_size": 2000},
    {"compression": "zstd", "use_dictionary": False, "write_page_index": True},
    {"write_page_checksum": True, "data_page_size": 500, "write_statistics": False},
]


def parquet(table: pa.Table = TABLE, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=700, **options)
    return sink.getvalue()


def layout(data: bytes, columns: list[str]) -> Layout:
    found = parse_layout("x.parquet", len(data), data, columns)
    assert isinstance(found, Layout)
    return found


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_chunks_lie_where_pyarrow_says_and_their_pages_are_whole(options: dict[str, Any], tmp_path: Path) -> None:
    data = parquet(**options)
    (tmp_path / "x").write_bytes(data)
    for columns in (["id"], ["deep", "tags"], TABLE.column_names):
        said = pq.read_metadata(io.BytesIO(data))
        groups = [said.row_group(number) for number in range(said.num_row_groups)]
        theirs = []
        for number, group in enumerate(groups):
            for column in (group.column(n) for n in range(group.num_columns)):
                if column.path_in_schema.split(".")[0] in columns:
                    start = column.dictionary_page_offset or column.data_page_offset
                    theirs.append((number, start, start + column.total_compressed_size, column.num_values))
        found = layout(data, columns)
        assert [(c.row_group, c.start, c.stop, c.values) for c in found.chunks] == theirs
        with (tmp_path / "x").open("rb") as file:
            check_chunks("x", file.fileno(), found.chunks)


def test_a_footer_longer_than_what_was_read_is_asked_for_whole() -> None:
    data = parquet()
    length = layout(data, ["id"]).footer_bytes
    assert parse_layout("x", len(data), data[-100:], ["id"]) == ByteRange(len(data) - length, len(data))
    assert isinstance(parse_layout("x", len(data), data[-length:], ["id"]), Layout)
    with pytest.raises(UsageError, match="no column 'ids'; there are: id, tags, deep, text"):
        parse_layout("x", len(data), data, ["ids"])


spans = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 300)), min_size=1, max_size=30)


@settings(deadline=None, max_examples=80)
@given(spans, st.integers(0, 400))
def test_neighbours_come_together_in_few_ranges(spans: list[tuple[int, int]], gap: int) -> None:
    found = chunks._bridged(((start, start + size) for start, size in spans), gap)
    wanted = Ranges.of((start, start + size) for start, size in spans)
    assert all(found.covers(start, stop) for start, stop in wanted), "nothing that is wanted is left out"
    starts, stops = {start for start, _ in wanted}, {stop for _, stop in wanted}
    assert all(start in starts and stop in stops for start, stop in found), "nothing comes at the edges"
    between = [after - before for (_, before), (after, _) in zip(list(found)[:-1], list(found)[1:], strict=True)]
    assert all(distance > gap for distance in between)
    assert found.size - wanted.size <= gap * max(0, len(wanted) - len(found))


def test_a_million_small_chunks_are_a_bounded_number_of_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    data = parquet(pa.table({f"c{n}": range(20_000) for n in range(30)}), use_dictionary=False)
    monkeypatch.setattr(chunks, "GAP_BYTES", 16)
    found = layout(data, ["c3"])
    every = wanted_ranges(found, len(data))
    monkeypatch.setattr(chunks, "MOST_RANGES", 10)
    fewer = wanted_ranges(found, 1 << 40)
    assert every is not None
    assert fewer is not None
    assert len(fewer) <= 10 < len(every) == len(found.chunks)
    assert fewer.size > every.size


def test_what_bringing_columns_takes_counts_no_byte_twice() -> None:
    table = pa.table({f"c{n}": range(20_000) for n in range(60)})
    sink = io.BytesIO()
    pq.write_table(table, sink, use_dictionary=False, compression="none")
    data = sink.getvalue()
    file = SourceFile("x", len(data), "0" * 64, lfs=True)
    found = layout(data, ["c3"])
    tail = ByteRange(len(data) - found.footer_bytes, len(data))
    size, requests = fetches(file, found, [tail], most=1 << 30)
    wanted = wanted_ranges(found, len(data))
    assert wanted is not None
    assert (size, requests) == (found.footer_bytes + wanted.size, 1 + len(wanted))
    first = ByteRange(len(data) - 100, len(data))
    assert fetches(file, found, [first, tail], most=1 << 30) == (size, requests + 1), "no byte comes twice"
    all_of_it = fetches(file, layout(data, [f"c{n}" for n in range(60)]), [tail], most=1 << 30)
    assert all_of_it == (found.footer_bytes + len(data), 2)


def damaged(data: bytes, rng: random.Random, start: int, stop: int) -> bytes:
    body = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 4))):
        body[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(body)


@pytest.mark.parametrize("number", range(4))
def test_damage_ends_in_one_error_or_changes_nothing_that_is_looked_at(number: int, tmp_path: Path) -> None:
    """Footers are read by our own reader alone here: what pyarrow does with them is fuzzed in a process of its own."""
    rng = random.Random(number)
    data = parquet(**WAYS[number])
    right = layout(data, TABLE.column_names)
    end = len(data) - right.footer_bytes
    noticed = 0
    for _ in range(300):
        wrong = damaged(data, rng, end, len(data) - 8)
        try:
            said, _ = read_struct(wrong[end:-8], chunks._FOOTER)
            list(chunks._chunks("x", end, said, TABLE.column_names))
        except (BadThrift, CorruptFile, KeyError, TypeError, ValueError, AttributeError):
            noticed += 1
    assert noticed > 20
    found = []
    for _ in range(150):
        (tmp_path / "x").write_bytes(damaged(data, rng, 4, end))
        with (tmp_path / "x").open("rb") as file:
            try:
                check_chunks("x", file.fileno(), right.chunks)
            except CorruptFile as error:
                found.append(error.where)
    checked = "write_page_checksum" in WAYS[number]
    assert all(where.startswith("column ") for where in found)
    assert len(found) >= (140 if checked else 1), "with CRCs nearly every byte is covered"


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_a_struct_or_an_error(data: bytes) -> None:
    try:
        _, length = read_struct(data, chunks._FOOTER)
    except BadThrift:
        return
    assert 0 < length <= len(data)


def test_structs_inside_each_other_without_end_are_refused() -> None:
    with pytest.raises(BadThrift, match="deep"):
        read_struct(b"\x1c" * 10_000, {})
    with pytest.raises(BadThrift):
        read_struct(b"\x19\xfc\xff\xff\xff\xff\x0f", {1: None})
