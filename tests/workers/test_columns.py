"""`partial`: only the ranges of some columns come. What they cost and give, and what happens when they are wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner

import crucible
from crucible.cache.store import Store
from crucible.cli.app import cli
from crucible.config import Settings
from crucible.errors import CorruptFile, CrucibleError, OfflineMode, UsageError
from crucible.formats.footer import TAIL_BYTES
from crucible.formats.thrift import read_struct
from crucible.manifest import Manifest, manifest_from_json
from crucible.refs import CONVERSION_VERSION, DataRequest, ReadOptions, RepoRef, SourceFile, WorkItem, digest_of
from crucible.report import Counts
from crucible.session import local_job
from tests.hubserver.faults import Fault, FaultyHub
from tests.oracle import datasets
from tests.workers.partial_cases import COLUMNS, GROUP, ROWS, layout, parquet, table, wanted_bytes

DATA = parquet()
ASKED: dict[str, Any] = {"columns": list(COLUMNS), "partial": True}


@pytest.fixture(autouse=True)
def _no_hedges(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hedge on a slow machine would be one request more than a test counts."""
    monkeypatch.setenv("CRUCIBLE_STALL", "60")


@pytest.fixture
def wide(hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> FaultyHub:
    """A Hub with DATA as the only file of `org/wide`; faults on it pass soon."""
    hub.import_files("org/wide", {"train.parquet": DATA})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("CRUCIBLE_BACKOFF_CAP", "0.05")
    return hub


def job(**asked: Any) -> tuple[crucible.Dataset, Counts]:
    """What `load_dataset` gives, with what it counted."""
    from crucible.data_files import data_request

    request = data_request("org/wide", None, split="train", revision=None, **{**ASKED, **asked})
    report = local_job(request, Settings.from_env())[1]
    loaded = crucible.load_dataset("org/wide", split="train", **{**ASKED, **asked})
    assert isinstance(loaded, crucible.Dataset)
    return loaded, report.counts


def rows_of(dataset: crucible.Dataset) -> pa.Table:
    return pa.concat_tables(list(dataset.tables())).combine_chunks()


def expected() -> pa.Table:
    return table().select(list(COLUMNS))


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_two_of_twenty_columns_cost_their_ranges_and_are_what_datasets_reads(wide: FaultyHub, tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(DATA)
    planned = crucible.plan("org/wide", nodes=2, **ASKED)
    wide.clear_log()
    loaded, counts = job()
    assert wide.bytes_sent() == wanted_bytes(DATA) == counts.hub_bytes == sum(node.hub_bytes for node in planned.nodes)
    assert wanted_bytes(DATA) < len(DATA) / 3
    assert (
        counts.requests == planned.requests == len(wide.log) - 1
    )  # the second look at the revision is `load_dataset`'s
    assert (planned.rows, planned.rows_from, planned.partial) == (ROWS, "footers", True)
    assert counts.verified_files == 0
    theirs = datasets.load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), columns=list(COLUMNS))
    assert rows_of(loaded).to_pylist() == theirs["train"].data.table.to_pylist() == expected().to_pylist()
    assert list((Settings.from_env().home / "raw").iterdir()) == [], "what was staged is gone"


def test_partial_data_is_another_dataset_than_the_verified_one_and_says_so(wide: FaultyHub) -> None:
    partial, _ = job()
    assert Settings.from_env().home.joinpath("shards").exists()
    wide.clear_log()
    verified, counts = job(partial=False)
    assert wide.bytes_sent() == counts.hub_bytes == len(DATA), "nothing partial was taken for the file"
    assert counts.verified_files == 1
    first, second = partial.manifest, verified.manifest
    assert (first.partial, second.partial) == (True, False)
    assert first.id != second.id
    assert not {shard.key for shard in first.shards} & {shard.key for shard in second.shards}
    assert [shard.digest for shard in first.shards] == [shard.digest for shard in second.shards]
    assert '"partial"' not in second.to_json().decode(), "manifests of whole files are what they were"
    wide.clear_log()
    assert job()[0].manifest == first
    assert wide.bytes_sent() == 0
    told = {one["manifest"]: one["partial"] for one in run("status", "--json")["manifests"]}
    assert told == {first.id: True, second.id: False}
    arguments = ("org/wide", "--columns", ",".join(COLUMNS))
    assert run("data", "schema", *arguments, "--partial", "--json", "-q")["partial"] is True
    assert run("data", "schema", *arguments, "--json", "-q")["partial"] is False
    assert run("plan", *arguments, "--partial", "--json")["partial"] is True
    assert "(partial)" in CliRunner().invoke(cli, ["status"]).output


def test_names_from_before_partial_was_there_are_what_they_were() -> None:
    files = (SourceFile("a.parquet", 3, "f" * 64, True),)
    old = {"builder": "parquet", "params": (), "features": None, "columns": ("a",)}
    inputs = {"version": CONVERSION_VERSION, "files": [["f" * 64, 3]], "options": old, "shard_bytes": 9}
    item = WorkItem(0, RepoRef("org/x", "0" * 40), files, ReadOptions(**old), 9)
    assert item.key == digest_of(inputs)
    manifest = Manifest(item.repo, "default", "train", None, "", (), (item,), ())
    told = json.loads(manifest.to_json())
    assert "partial" not in told["items"][0]["options"]
    assert manifest_from_json(manifest.to_json(), manifest.id) == manifest
    ranges = WorkItem(0, item.repo, files, ReadOptions(**old, partial=True), 9)
    assert ranges.key != item.key
    other = Manifest(item.repo, "default", "train", None, "", (), (ranges,), ())
    assert manifest_from_json(other.to_json(), other.id).partial
    assert DataRequest(item.repo).variant == ""
    assert DataRequest(item.repo, columns=("a",), partial=True).variant != ""


def test_a_reader_may_begin_before_the_ranges_are_there(wide: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUCIBLE_SHARD_BYTES", "500000")
    rows = crucible.load_dataset("org/wide", split="train", streaming=True, **ASKED)
    assert isinstance(rows, crucible.IterableDataset)
    assert wide.bytes_sent() < wanted_bytes(DATA) / 2
    assert [row["text"] for row in rows] == expected()["text"].to_pylist()
    assert wide.bytes_sent() <= wanted_bytes(DATA) + TAIL_BYTES, (
        "the footer came twice, for the rows and for the ranges"
    )
    loaded, _ = job()
    assert rows_of(loaded).equals(expected())
    assert wide.bytes_sent() <= wanted_bytes(DATA) + TAIL_BYTES


def test_a_lost_shard_is_made_again_from_the_ranges(wide: FaultyHub) -> None:
    loaded, _ = job()
    store = Store(Settings.from_env().home)
    for shard in loaded.manifest.shards:
        store.shard_path(shard.key).unlink()
    wide.clear_log()
    again = crucible.load_dataset("org/wide", split="train", streaming=True, **ASKED)
    assert isinstance(again, crucible.IterableDataset)
    assert sum(1 for _ in again) == ROWS
    assert 0 < wide.bytes_sent() <= wanted_bytes(DATA)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (parquet(), 50_000),
        (parquet(table().replace_schema_metadata({"note": "n" * 200_000})), 1 << 20),  # longer than is asked for first
        (parquet(data_page_version="2.0", write_page_checksum=True), 1 << 20),
    ],
    ids=["small parts", "long footer", "crc"],
)
def test_the_plan_of_a_partial_run_is_what_the_run_counts(
    hub: FaultyHub, monkeypatch: pytest.MonkeyPatch, data: bytes, part: int
) -> None:
    small = parquet(table(100))
    hub.import_files("org/wide", {"train-0.parquet": data, "train-1.parquet": small})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("CRUCIBLE_PART_BYTES", str(part))
    planned = crucible.plan("org/wide", **ASKED)
    hub.clear_log()
    loaded, counts = job()
    assert planned.requests == counts.requests
    assert planned.nodes[0].hub_bytes == counts.hub_bytes == hub.bytes_sent() < len(data) / 2
    assert planned.rows == loaded.num_rows
    assert counts.verified_files == 1, "the small one came whole"


def test_columns_that_make_up_the_file_bring_it_whole_and_verified(wide: FaultyHub) -> None:
    everything = table().column_names
    planned = crucible.plan("org/wide", columns=everything, partial=True)
    loaded, counts = job(columns=everything)
    assert counts.verified_files == 1
    assert counts.hub_bytes == planned.nodes[0].hub_bytes == len(DATA) + TAIL_BYTES
    assert counts.requests == planned.requests
    assert rows_of(loaded).equals(table())


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "cut", "after": 1000},
        {"kind": "wrong-range", "by": 7},
        {"kind": "expired", "skip": 2},
        {"kind": "status", "status": 503, "skip": 1},
        {"kind": "reset", "skip": 1},
        {"kind": "wrong-length", "by": -5, "skip": 1},
        {"kind": "retry-after", "status": 429, "wait": 0, "skip": 1},
    ],
    ids=lambda fault: fault["kind"],
)
def test_what_passes_is_gone_on_with(wide: FaultyHub, fault: dict[str, Any]) -> None:
    made = wide.add(Fault(**fault, origin="cdn", times=1))
    loaded, counts = job()
    assert wide.hits(made) == 1
    assert rows_of(loaded).equals(expected())
    assert counts.hub_bytes <= wanted_bytes(DATA) + TAIL_BYTES


def test_a_source_without_ranges_brings_the_whole_file_and_it_is_verified(wide: FaultyHub) -> None:
    wide.add("ignore-range", origin="cdn")
    loaded, counts = job()
    assert counts.verified_files == 1
    assert rows_of(loaded).equals(expected())


def page_of(data: bytes, number: int = 1) -> int:
    """Where the chunk of the first column in some row group begins: with the header of its first page."""
    return next(chunk.start for chunk in layout(data).chunks if chunk.row_group == number)


CHECKED = parquet(write_page_checksum=True)
PACKED = parquet(compression="zstd", row_group_size=GROUP)
FOOTER = len(DATA) - layout(DATA).footer_bytes


@pytest.mark.parametrize(
    ("data", "at", "where"),
    [
        (DATA, len(DATA) - 1, "the footer"),
        (DATA, len(DATA) - 6, "the footer"),
        (DATA, FOOTER + 2, "the footer"),
        (DATA, page_of(DATA), "column 'c03', row group 1"),
        (CHECKED, page_of(CHECKED) + 5000, "column 'c03', row group 1"),
    ],
    ids=["magic", "length", "thrift", "page header", "crc"],
)
def test_a_wrong_byte_that_structure_shows_names_file_column_and_row_group(
    hub: FaultyHub, monkeypatch: pytest.MonkeyPatch, data: bytes, at: int, where: str
) -> None:
    hub.import_files("org/wide", {"train.parquet": data})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    broken = hub.add("flip-byte", origin="cdn", after=at)
    with pytest.raises(CorruptFile) as caught:
        job()
    assert caught.value.path == "train.parquet"
    assert caught.value.where.startswith(where)
    assert list((Settings.from_env().home / "raw").iterdir()) == []
    once = hub.hits(broken) // 2
    hub.clear_faults()
    passing = hub.add("flip-byte", origin="cdn", after=at, times=once)
    assert rows_of(job()[0]).equals(expected()), "one wrong byte may be the network's: it is asked for once more"
    assert hub.hits(passing) > 0


def test_a_byte_that_only_decoding_shows_names_the_column_too(hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    data = parquet(compression="zstd")
    hub.import_files("org/wide", {"train.parquet": data})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    (header,) = (chunk.start for chunk in layout(data, ["text"]).chunks if chunk.row_group == 1)
    hub.add("flip-byte", origin="cdn", after=read_struct(data, {}, header)[1])
    with pytest.raises(CorruptFile, match=r"train\.parquet at column 'text', row group 1"):
        job()


_CHILD = """
import crucible
crucible.load_dataset("org/wide", split="train", columns=["c03", "text"], partial=True)
"""


def test_after_a_kill_only_what_was_in_flight_is_asked_for_again(
    wide: FaultyHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 40_000
    monkeypatch.setenv("CRUCIBLE_PART_BYTES", str(part))
    monkeypatch.setenv("CRUCIBLE_STREAMS", "1")
    wide.add("stall", origin="cdn", after=1000, skip=6)
    child = subprocess.Popen([sys.executable, "-c", _CHILD], env={**os.environ, "CRUCIBLE_STALL": "60"})
    try:
        deadline = time.monotonic() + 60
        while len(wide.requests(origin="cdn")) < 6 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        child.kill()
        child.wait(20)
    wide.clear_faults()
    served = wide.bytes_sent()
    assert 0 < served < wanted_bytes(DATA)
    loaded, counts = job()
    assert rows_of(loaded).equals(expected())
    assert counts.hub_bytes <= wanted_bytes(DATA) - (served - 2 * part)


def test_offline_says_that_it_is_not_here(wide: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    job(partial=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wide.clear_log()
    with pytest.raises(OfflineMode, match="not on this disk"):
        crucible.load_dataset("org/wide", split="train", **ASKED)
    assert wide.log == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    job()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = crucible.load_dataset("org/wide", split="train", **ASKED)
    assert isinstance(again, crucible.Dataset)
    assert rows_of(again).equals(expected())


def test_a_file_of_the_hub_cache_is_used_whole_and_checked(wide: FaultyHub) -> None:
    crucible.session.pull("org/wide")
    wide.clear_log()
    loaded, counts = job()
    assert (counts.cached_bytes, counts.hub_bytes) == (len(DATA), 0)
    assert rows_of(loaded).equals(expected())


def test_what_makes_no_sense_is_refused_by_name(
    wide: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide.import_files("org/lines", {"train.csv": b"a,b\n1,2\n"})
    card = "---\nconfigs:\n- config_name: default\n  data_files: '*.parquet'\n  filters: [[c00, '>', 0.5]]\n---\n"
    wide.import_files("org/some", {"README.md": card.encode(), "train.parquet": DATA})
    asked: list[tuple[dict[str, Any], str]] = [
        ({"path": "org/some", "columns": ["c03"], "partial": True}, "read by filters"),
        ({"path": "org/wide", "columns": ["c03"], "partial": True, "filters": [["c00", ">", 0.5]]}, "read by filters"),
        ({"path": "org/wide", "partial": True}, "name them with columns="),
        ({"path": "org/lines", "columns": ["a"], "partial": True}, "of csv files"),
        ({"path": "org/wide", "columns": ["zz"], "partial": True}, "no column 'zz'; there are: c00, c01"),
    ]
    for arguments, problem in asked:
        with pytest.raises(UsageError, match=problem):
            crucible.load_dataset(**arguments)
    with pytest.raises(UsageError, match="no column 'zz'"):
        crucible.plan("org/wide", columns=["zz"], partial=True)
    with pytest.raises(UsageError, match="keep_raw"):
        crucible.prefetch("org/wide", keep_raw=True, **ASKED)
    assert CliRunner().invoke(cli, ["plan", "org/wide", "--partial"]).exit_code == 2
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "train.parquet").write_bytes(DATA)
    loaded = crucible.load_dataset(str(tmp_path / "repo"), split="train", **ASKED)
    assert isinstance(loaded, crucible.Dataset)
    assert not loaded.manifest.partial, "the files of a folder are there, and are all checked"
    assert issubclass(UsageError, CrucibleError)
