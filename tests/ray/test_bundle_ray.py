"""A bundle from one cluster to another: out of many stores, into one, and on to the others. No Hub on the way."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import crucible
from crucible.cache.store import Store
from crucible.cluster.bundles import import_bundle
from tests.hubserver.faults import FaultyHub
from tests.ray.conftest import empty
from tests.ray.jobs import chat_files

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


def run(*args: str, home: Path, data: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "crucible", *args],
        input=data,
        capture_output=True,
        timeout=120,
        env={**os.environ, "CRUCIBLE_HOME": str(home), **environment},
    )


def test_a_dataset_goes_from_all_nodes_through_a_pipe_into_one_node_and_on_to_the_others(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "repo", files=6, rows=2000))
    nodes = start_nodes(2, hub.endpoint, CRUCIBLE_SHARD_BYTES="524288")
    report = crucible.prefetch("org/chat", split="train", address=nodes.address)
    held = [len(list(Store(home).shards())) for home in nodes.homes]
    assert min(held) > 0
    hub.clear_log()

    sent = run("export", "org/chat", "--split", "train", "--out", "-", home=nodes.homes[0])
    assert sent.returncode == 0, sent.stderr
    assert hub.log == []
    for home in nodes.homes:
        empty(home)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    taken = run("import", "-", "--json", "-q", home=nodes.homes[1], data=sent.stdout)
    assert taken.returncode == 0, taken.stderr
    told = json.loads(taken.stdout)
    assert told["splits"][0]["manifest"] == report.splits[0].manifest
    assert len(list(Store(nodes.homes[1]).shards())) == sum(held)
    assert list(Store(nodes.homes[0]).shards()) == []

    # again, now with news for the cluster: nothing is taken twice, and the other node knows what there is
    (tmp_path / "b.tar").write_bytes(sent.stdout)
    monkeypatch.setenv("CRUCIBLE_HOME", str(nodes.homes[1]))
    assert import_bundle(tmp_path / "b.tar", address=nodes.address).reused == sum(held)
    assert [manifest.id for manifest in Store(nodes.homes[0]).manifests()] == [report.splits[0].manifest]
    spread = crucible.prefetch("org/chat", split="train", replicas=2, address=nodes.address)
    assert spread.copies == sum(held)
    assert spread.splits[0].manifest == report.splits[0].manifest
    assert [len(list(Store(home).shards())) for home in nodes.homes] == [sum(held)] * 2
    ranks = nodes.ranks("org/chat", split="train", epochs=1, HF_HUB_OFFLINE="1")
    made = pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / "repo").iterdir()))
    expected = [hashlib.blake2b(repr(row).encode(), digest_size=12).hexdigest() for row in made.to_pylist()]
    assert Counter(row for rank in ranks for row in rank["epochs"][0]) == Counter(expected)
    assert hub.log == []


def test_a_lock_file_is_prefetched_exactly_by_a_cluster(hub: FaultyHub, tmp_path: Path, start_nodes: Any) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "repo", files=2, rows=100))
    nodes = start_nodes(2, hub.endpoint)
    first = crucible.prefetch("org/chat", split="train", address=nodes.address)
    done = run("export", "org/chat", "--split", "train", "--lock-only", "--out", "-", home=nodes.homes[0])
    assert done.returncode == 0, done.stderr
    lock = tmp_path / "chat.lock.json"
    lock.write_bytes(done.stdout)
    for home in nodes.homes:
        empty(home)
    hub.import_folder("org/chat", chat_files(tmp_path / "later", files=3, rows=100))
    done = run("prefetch", "--lock", str(lock), "--address", nodes.address, "--json", "-q", home=nodes.homes[0])
    assert done.returncode == 0, done.stderr
    told = json.load(io.BytesIO(done.stdout))
    assert (told["commit"], told["splits"][0]["manifest"]) == (first.commit, first.splits[0].manifest)
