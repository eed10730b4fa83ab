"""`partial` in a cluster: the ranges of some columns leave the Hub once, and what ranks read is on their nodes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import crucible
from tests.hubserver.faults import FaultyHub
from tests.ray.jobs import Background, file_bytes
from tests.workers.partial_cases import COLUMNS, ROWS, parquet, table, wanted_bytes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

WAIT_S = 60
STREAMS, PART = 1, 64_000
BIG = 100_000
ASKED: dict[str, Any] = {"columns": list(COLUMNS), "partial": True}


def test_two_nodes_cost_the_hub_the_ranges_of_one(hub: FaultyHub, start_nodes: Any) -> None:
    files = {f"train-{number:05d}-of-00004.parquet": parquet(table(seed=number)) for number in range(4)}
    hub.import_files("org/chat", dict(files))
    wanted = sum(wanted_bytes(data) for data in files.values())
    nodes = start_nodes(2, hub.endpoint, CRUCIBLE_STALL="60")
    planned = crucible.plan("org/chat", nodes=2, split="train", **ASKED)
    hub.clear_log()
    report = crucible.prefetch("org/chat", split="train", address=nodes.address, **ASKED)
    assert file_bytes(hub) == wanted == report.counts.hub_bytes == sum(node.hub_bytes for node in planned.nodes)
    assert report.counts.requests == planned.requests == len(hub.log)
    assert (report.rows, report.partial, report.counts.verified_files) == (4 * ROWS, True, 0)
    assert len(report.nodes) > 1
    found = crucible.session.locate("org/chat", split="train", address=nodes.address, **ASKED)
    assert sum(shard.rows for shard in found) == 4 * ROWS
    assert all(shard.urls for shard in found)
    hub.clear_log()
    again = crucible.prefetch("org/chat", split="train", address=nodes.address, **ASKED)
    assert file_bytes(hub) == 0
    assert again.splits == report.splits
    loaded = crucible.load_dataset("org/chat", split="train", streaming=True, **ASKED)
    assert isinstance(loaded, crucible.IterableDataset)
    texts = [row["text"] for row in loaded]
    assert texts == [f"row {row} of {seed}" for seed in range(4) for row in range(ROWS)]
    assert file_bytes(hub) == 0, "what another node has comes from there"


@pytest.mark.slow
def test_a_node_that_dies_with_ranges_of_a_file_costs_the_hub_what_was_in_flight(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    files = {
        f"train-{number:05d}-of-00003.parquet": parquet(table(BIG, seed=number), row_group_size=BIG // 4)
        for number in range(3)
    }
    hub.import_files("org/chat", dict(files))
    wanted = sum(wanted_bytes(data) for data in files.values())
    options = {"CRUCIBLE_PART_BYTES": str(PART), "CRUCIBLE_STREAMS": str(STREAMS), "CRUCIBLE_STALL": "60"}
    nodes = start_nodes(3, hub.endpoint, **options)
    hub.add("slow", origin="cdn", piece=16 << 10, wait=0.1)  # ten seconds and more a file: longer than a kill takes
    job = Background(nodes.address, **ASKED)
    deadline = time.monotonic() + WAIT_S
    while not midway(nodes.homes[2]) and time.monotonic() < deadline:
        time.sleep(0.02)
    nodes.kill_node(2)
    assert not list((nodes.homes[2] / "shards").rglob("*.arrow")), "too late: it has the whole file"
    hub.clear_faults()
    report = job.report()
    assert report.rows == 3 * BIG
    assert wanted <= hub.bytes_sent() <= wanted + 2 * STREAMS * PART
    loaded = crucible.load_dataset("org/chat", split="train", streaming=True, **ASKED)
    assert isinstance(loaded, crucible.IterableDataset)
    assert [row["text"] for row in loaded] == [f"row {row} of {seed}" for seed in range(3) for row in range(BIG)]


def midway(home: Path) -> bool:
    """True when the journal in a store has several finished ranges."""
    journals = [path.read_bytes() for path in (home / "raw").glob("*.journal.incomplete")]
    return any(journal.count(b"\n") > 4 for journal in journals)
