"""The main job on real raylets, each with its own store: prefetch once, read on plain rank processes, lose things."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import crucible
from crucible.cache.store import Store
from crucible.cluster.connect import cluster
from crucible.hashing import shard_digest
from crucible.report import Progress
from crucible.workers.secret import load_secret
from crucible.workers.serve import read_address
from tests.hubserver.faults import FaultyHub
from tests.oracle import datasets
from tests.ray.jobs import Background, chat_files, file_bytes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def digests(rows: list[dict[str, Any]]) -> list[str]:
    """As the rank processes take them: over the rows' values as Arrow gives them."""
    return [hashlib.blake2b(repr(row).encode(), digest_size=12).hexdigest() for row in rows]


def wrong_shards(home: Path, manifest: Any) -> list[str]:
    store = Store(home)
    return [
        shard.key
        for shard in manifest.shards
        if store.has_shard(shard) and shard_digest(store.shard_path(shard.key)) != shard.digest
    ]


REAL = {
    "gsm8k train": ("gsm8k", {"train": "train.jsonl", "test": "test.jsonl"}, "train", 7473),
    "gsm8k test": ("gsm8k", {"train": "train.jsonl", "test": "test.jsonl"}, "test", 1319),
    "hh-rlhf harmless-base test": ("hh-rlhf", {"test": "harmless-base-test.jsonl.gz"}, "test", 2312),
    "cifar10 test": ("cifar10", {"test": "test-00000-of-00001.parquet"}, "test", 10_000),
}


@pytest.mark.real_data
def test_two_ranks_on_two_nodes_read_real_data_exactly_once_and_the_hub_served_each_byte_once(
    hub: FaultyHub, real_data: Callable[[str], Path], start_nodes: Any
) -> None:
    for name in {name for name, _, _, _ in REAL.values()}:
        hub.import_folder(f"real/{name}", real_data(name))
    nodes = start_nodes(2, hub.endpoint)
    for title, (name, files, split, rows) in REAL.items():
        hub.clear_log()
        repo = f"real/{name}"
        planned = crucible.plan(repo, split=split, nodes=2, batch=32)
        hub.clear_log()
        report = crucible.prefetch(repo, split=split, address=nodes.address)
        assert report.rows == rows, title
        assert planned.rows in (rows, None), title
        assert planned.requests == len(hub.log) == report.counts.requests, title
        size = (real_data(name) / files[split]).stat().st_size
        sent = file_bytes(hub)
        assert sent == size == report.counts.hub_bytes, title

        ranks = nodes.ranks(repo, split=split)
        builder = "parquet" if files[split].endswith("parquet") else "json"
        oracle = datasets.load_dataset(builder, data_files={split: str(real_data(name) / files[split])}, split=split)
        truth = digests(oracle.with_format("arrow")[:].to_pylist())
        assert len(truth) == rows, title
        for epoch in range(2):
            delivered = [rank["epochs"][epoch] for rank in ranks]
            assert sum(map(Counter, delivered), Counter()) == Counter(truth), (title, epoch)
            assert abs(len(delivered[0]) - len(delivered[1])) <= 1, title
        assert ranks[0]["epochs"][0] != ranks[0]["epochs"][1], "epochs differ"
        assert file_bytes(hub) == size, "reading moved no file"
        assert sum(rank["note"]["hub_shards"] for rank in ranks) == 0, title
        # one rank, no shuffle: the source order, as `datasets` yields it
        plain = crucible.load_dataset(repo, split=split, streaming=True).with_format("arrow").batch(500)
        assert digests([row for batch in plain for row in batch.to_pylist()]) == truth, title
        if name == "cifar10":
            images = crucible.load_dataset(repo, split=split, streaming=True)
            assert {row["img"].size for row in images} == {(32, 32)}


def test_shards_lie_on_both_nodes_and_readers_take_the_rest_from_the_peer(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=8, rows=2000))
    nodes = start_nodes(2, hub.endpoint)
    seen: list[Progress] = []
    report = crucible.prefetch("org/chat", split="train", address=nodes.address, on_progress=seen.append)
    assert len(report.nodes) == 2
    assert all(shards >= 2 for _, shards, _ in report.nodes), "both nodes did work"
    assert [p.bytes_done for p in seen] == sorted(p.bytes_done for p in seen)
    assert (seen[-1].phase, seen[-1].items_done, seen[-1].bytes_done) == ("finished", 8, report.source_bytes)

    located = crucible.session.locate("org/chat", split="train", address=nodes.address)
    assert [len(shard.urls) for shard in located] == [1] * 8
    found = crucible.session.nodes(nodes.address)
    assert sorted(node["shards"] for node in found) == sorted(shards for _, shards, _ in report.nodes)
    assert {node["home"] for node in found} == {str(home) for home in nodes.homes}

    ranks = nodes.ranks("org/chat", split="train")
    for rank in ranks:
        assert rank["note"]["disk_shards"] + rank["note"]["peer_shards"] == 8
        assert rank["note"]["disk_shards"] >= 2
        assert rank["note"]["peer_shards"] >= 2
    manifest = crucible.load_dataset("org/chat", split="train", streaming=True).manifest
    assert [wrong_shards(home, manifest) for home in nodes.homes] == [[], []]
    # the next job finds everything done: one request, to ask where `main` points
    hub.clear_log()
    again = crucible.prefetch("org/chat", split="train", address=nodes.address)
    assert (again.rows, again.counts.requests, len(hub.log)) == (report.rows, 1, 1)
    assert again.splits[0].manifest == report.splits[0].manifest


def test_a_killed_node_costs_readers_nothing_but_time(hub: FaultyHub, tmp_path: Path, start_nodes: Any) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=6, rows=1000))
    nodes = start_nodes(3, hub.endpoint)
    crucible.prefetch("org/chat", split="train", address=nodes.address)
    truth = digests(crucible.load_dataset("org/chat", split="train").with_format("arrow")[:].to_pylist())
    for path in (nodes.homes[0] / "shards").rglob("*.arrow"):
        path.unlink()  # what node 0 has just pulled from the others would hide the loss
    nodes.kill_node(2)
    hub.clear_log()
    ranks = nodes.ranks("org/chat", split="train", epochs=1)
    assert sum((Counter(rank["epochs"][0]) for rank in ranks), Counter()) == Counter(truth)
    assert sum(rank["note"]["hub_shards"] for rank in ranks) > 0, "the lost shards were made again from the Hub"


def test_two_replicas_survive_a_killed_node_without_the_hub(hub: FaultyHub, tmp_path: Path, start_nodes: Any) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=4, rows=1000))
    nodes = start_nodes(3, hub.endpoint)
    report = crucible.prefetch("org/chat", split="train", address=nodes.address, replicas=2)
    assert report.copies == report.splits[0].shards >= 2
    assert report.counts.hub_bytes == report.source_bytes, "replicas come from peers"
    nodes.kill_node(2)
    hub.clear_log()
    ranks = nodes.ranks("org/chat", split="train", epochs=1)
    delivered = Counter(row for rank in ranks for row in rank["epochs"][0])
    assert (delivered.total(), len(delivered)) == (4000, 4000)
    assert hub.bytes_sent() == 0


def test_a_coordinator_that_dies_with_its_node_is_replaced_however_late_ray_notices(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=6, rows=2000))
    nodes = start_nodes(3, hub.endpoint)
    hub.add("slow", origin="cdn", piece=4_000, wait=0.05)
    with cluster(nodes.address):
        job = Background(nodes.address, coordinator_on=nodes.nodes[2].node_id)
        deadline = time.monotonic() + 60
        while hub.bytes_sent() < 100_000 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert home_of("ray::CoordinatorCore") == nodes.homes[2]
        nodes.kill_node(2)
        hub.clear_faults()
        assert job.report().rows == 12_000
        assert home_of("ray::CoordinatorCore") == nodes.homes[0]


def test_a_killed_worker_and_a_node_lost_midway_do_not_stop_the_job(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=10, rows=2000))
    nodes = start_nodes(3, hub.endpoint)
    hub.add("slow", origin="cdn", piece=20_000, wait=0.2)
    job = Background(nodes.address)
    deadline = time.monotonic() + 60
    while hub.bytes_sent() < 100_000 and time.monotonic() < deadline:
        time.sleep(0.05)
    children("ray::item")[0].kill()
    assert home_of("ray::CoordinatorCore") == nodes.homes[0], "it began where the driver is"
    nodes.kill_node(2)
    hub.clear_faults()
    assert job.report().rows == 20_000
    ids = [row["id"] for row in crucible.load_dataset("org/chat", split="train", streaming=True)]
    assert ids == list(range(20_000))
    for home in nodes.homes[:2]:
        assert [p for p in (home / "tmp").rglob("*") if p.is_file()] == []


def children(title: str) -> list[Any]:
    """Processes below this one whose title Ray has set to something with `title`; there must be one."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue  # it has ended meanwhile
    assert found, f"no process is called {title}"
    return found


def home_of(title: str) -> Path:
    """The store of the node on which the newest such process runs."""
    process = max(children(title), key=lambda process: float(process.create_time()))
    return Path(process.environ()["CRUCIBLE_HOME"])


def test_two_drivers_that_want_the_same_at_once_cost_the_hub_one(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=8, rows=1000))
    nodes = start_nodes(2, hub.endpoint)
    hub.add("slow", origin="cdn", piece=10_000, wait=0.05)
    code = (
        "import crucible, json\n"
        f"report = crucible.prefetch('org/chat', split='train', address={nodes.address!r})\n"
        "print(json.dumps([report.rows, report.counts.hub_bytes, report.splits[0].manifest]))\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        report = Background(nodes.address).report()
        out, problem = other.communicate(timeout=120)
        assert other.returncode == 0, problem
    finally:
        other.kill()
        other.wait(10)
    rows, paid, manifest = json.loads(out)
    assert (rows, report.rows) == (8000, 8000)
    assert manifest == report.splits[0].manifest
    assert file_bytes(hub) == report.source_bytes == paid + report.counts.hub_bytes


def test_a_killed_coordinator_is_replaced_and_finished_work_is_not_done_again(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=8, rows=2000))
    nodes = start_nodes(2, hub.endpoint)
    hub.add("slow", origin="cdn", piece=20_000, wait=0.15)
    job = Background(nodes.address)
    deadline = time.monotonic() + 90
    while not any(progress.items_done >= 2 for progress in job.seen) and time.monotonic() < deadline:
        time.sleep(0.02)
    children("ray::CoordinatorCore")[0].kill()
    hub.clear_faults()
    report = job.report()
    assert report.rows == 16_000
    assert report.reused_items >= 2
    assert report.counts.hub_bytes < report.source_bytes, "what was finished was not fetched again"
    # the agents are those of before, and ask the new coordinator
    store = Store(nodes.homes[0])
    agent, secret = read_address(store), load_secret(store)
    elsewhere = {key for key, _ in Store(nodes.homes[1]).shards()}
    assert agent is not None
    assert elsewhere
    for key in elsewhere:
        reply = httpx.get(f"{agent.url}/v1/locate/{key}", headers={"authorization": f"Bearer {secret}"}, timeout=10)
        assert reply.json()["urls"], "the agent does not know who has what"
    assert [row["id"] for row in crucible.load_dataset("org/chat", split="train", streaming=True)] == list(
        range(16_000)
    )


def test_a_users_own_cluster_and_workers_modules_change_nothing(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=2, rows=100))
    nodes = start_nodes(2, hub.endpoint)
    folder = tmp_path / "user"
    folder.mkdir()
    for name in ("cluster", "workers", "hub", "cache"):
        (folder / f"{name}.py").write_text("raise SystemExit('the user module was imported instead of ours')")
    (folder / "train.py").write_text(
        "import crucible\n"
        f"report = crucible.prefetch('org/chat', split='train', address={nodes.address!r})\n"
        "rows = list(crucible.load_dataset('org/chat', split='train', streaming=True))\n"
        "print(report.rows, len(rows))\n"
    )
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split() == ["200", "200"], done.stderr


def test_a_repo_of_which_the_driver_alone_has_the_token_is_fetched_by_all_nodes(
    tmp_path: Path, start_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crucible.hub.server import HubOptions, User

    options = HubOptions(tokens={"hf_very_secret_token": User("ann")})
    with FaultyHub(tmp_path / "private", options=options) as hub:
        hub.import_folder("ann/chat", chat_files(tmp_path / "data", files=4, rows=100), private=True)
        nodes = start_nodes(2, hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_very_secret_token")
        report = crucible.prefetch("ann/chat", split="train", address=nodes.address)
        assert report.rows == 400
        assert not any(record.had_token for record in hub.requests(origin="cdn"))
        monkeypatch.delenv("HF_TOKEN")
        with FaultyHub(tmp_path / "other") as other:  # the same coordinator, another Hub: it must not see the token
            other.import_folder("eve/chat", chat_files(tmp_path / "data2", files=2, rows=50))
            crucible.prefetch("eve/chat", split="train", address=nodes.address, endpoint=other.endpoint)
            assert other.log
            assert not any(record.had_token for record in other.log)
    logs = [path for kind in ("log", "out", "err") for path in nodes.scratch.rglob(f"*.{kind}")]
    assert any("worker" in path.name for path in logs), "Ray's logs are elsewhere: this would show nothing"
    logs += [path for home in nodes.homes for path in home.rglob("*.json")]
    leaks = [str(path) for path in logs if b"hf_very_secret_token" in path.read_bytes()]
    assert leaks == []
    assert not list(nodes.homes[0].glob("token-*")), "the hand-over file is gone"
