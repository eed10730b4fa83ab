"""What the Hub pays when nodes are cold, and when one dies in the middle of a big file. Real raylets, a store each."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import crucible
from crucible.cache.store import Store
from crucible.refs import RepoRef
from tests.hubserver.faults import FaultyHub
from tests.ray.jobs import Background, chat_files, file_bytes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PART = 1 << 20
STREAMS = 4
ROWS = 10_000
WAIT_S = 90


def test_cold_nodes_cost_the_hub_the_bytes_of_one_and_calls_that_do_not_grow_with_them(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=12, rows=2000))
    calls = {}
    for count in (2, 4):
        nodes = start_nodes(count, hub.endpoint)
        hub.clear_log()
        report = crucible.prefetch("org/chat", split="train", address=nodes.address)
        assert len(report.nodes) == count, "every node did some of it"
        calls[count] = Counter((record.origin, record.method, record.path) for record in hub.log)
        ranks = nodes.ranks("org/chat", split="train", epochs=1)
        assert sum(len(rank["epochs"][0]) for rank in ranks) == 24_000
        assert file_bytes(hub) == report.source_bytes == report.counts.hub_bytes
    assert calls[2] == calls[4]


def test_a_node_that_joins_later_knows_what_was_prefetched_before(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=2, rows=500))
    nodes = start_nodes(2, hub.endpoint)
    crucible.prefetch("org/chat", split="train", address=nodes.address)
    nodes.join(tmp_path / "late")
    assert len(crucible.session.nodes(nodes.address)) == 3
    late = Store(nodes.homes[2])
    deadline = time.monotonic() + WAIT_S
    while not late.find_manifests(RepoRef("org/chat", "main"), "default") and time.monotonic() < deadline:
        time.sleep(0.05)
    nodes.homes.reverse()  # rank 0, on the late node, with nobody but the other nodes to ask
    hub.clear_log()
    ranks = nodes.ranks("org/chat", split="train", epochs=1, HF_HUB_OFFLINE="1")
    assert sum(len(rank["epochs"][0]) for rank in ranks) == 1000
    assert ranks[0]["note"]["peer_shards"] > 0
    assert hub.log == []


def big_files(folder: Path, files: int, rows: int) -> Path:
    """Parquet files of about `rows` KiB each, which do not compress."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(7)
    for number in range(files):
        data = [row.tobytes() for row in noise.integers(0, 256, (rows, 1024), dtype=np.uint8)]
        table = pa.table({"id": np.arange(number * rows, (number + 1) * rows), "noise": data})
        path = folder / f"train-{number:05d}-of-{files:05d}.parquet"
        pq.write_table(table, path, compression="none", use_dictionary=False)
    return folder


def test_a_node_that_dies_with_a_big_file_costs_the_hub_what_was_in_flight(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    folder = big_files(tmp_path / "data", files=3, rows=ROWS)
    total = sum(path.stat().st_size for path in folder.iterdir())
    hub.import_folder("org/chat", folder)
    options = {"CRUCIBLE_PART_BYTES": str(PART), "CRUCIBLE_STREAMS": str(STREAMS), "CRUCIBLE_STALL": "60"}
    nodes = start_nodes(3, hub.endpoint, **options)
    hub.add("slow", origin="cdn", piece=32 << 10, wait=0.15)  # a file takes over 10 s: longer than a kill does
    job = Background(nodes.address)
    deadline = time.monotonic() + WAIT_S
    while not midway(nodes.homes[2], nodes.homes[:2]) and time.monotonic() < deadline:
        time.sleep(0.02)
    nodes.kill_node(2)
    left = [path for path in (nodes.homes[2] / "raw").glob("*") if path.name.endswith(".incomplete")]
    assert left
    assert not list((nodes.homes[2] / "shards").rglob("*.arrow")), "too late: it has the whole file"
    hub.clear_faults()
    report = job.report()
    assert report.rows == 3 * ROWS
    # not "more than the total": a node may die between two ranges, with nothing in flight
    assert total <= hub.bytes_sent() <= total + STREAMS * PART
    for home in nodes.homes[:2]:
        assert [path.name for path in (home / "raw").glob("*") if "journal" not in path.name] == []
    ids = [row["id"] for row in crucible.load_dataset("org/chat", split="train", streaming=True)]
    assert ids == list(range(3 * ROWS))


def midway(home: Path, others: list[Path]) -> bool:
    """True when several ranges of a file are finished in a store, and have come to another one too."""
    spares = [lines(other) for other in others]
    return any(count > 4 and any(spare[oid] > 4 for spare in spares) for oid, count in lines(home).items())


def lines(home: Path) -> Counter[str]:
    """How long the journal of each file is that is on its way into a store: a line, and one for each range."""
    found = Counter[str]()
    for path in (home / "raw").glob("*.journal.incomplete"):
        with suppress(FileNotFoundError):  # its file has just become whole
            found[path.name.partition(".")[0]] = path.read_bytes().count(b"\n")
    return found
