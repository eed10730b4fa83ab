"""What readers of a running job are told, and what they do when it fails, dies or ends: without Ray, over real HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import crucible
from crucible import errors
from crucible.cache.store import Store
from crucible.cluster.drive import build_manifests
from crucible.cluster.early import early_manifests
from crucible.cluster.jobs import REMEMBERED, Jobs
from crucible.cluster.opening import open_early
from crucible.cluster.prepare import prepare
from crucible.config import Settings
from crucible.errors import CorruptFile
from crucible.refs import DataRequest, NodeId, RepoRef, WorkItem
from crucible.report import ItemResult, Tally
from crucible.workers import early
from crucible.workers.asking import request_from_json
from crucible.workers.secret import ensure_secret
from crucible.workers.serve import AgentAddress, AgentServer, write_address
from crucible.workers.work import Workplace, run_item
from tests.crucible.test_early import FILES, ROWS, chat, whole_files
from tests.hubserver.faults import FaultyHub

__all__ = ["chat"]
REQUEST = DataRequest(RepoRef("org/chat"), split="train")


class Coordinator:
    """A coordinator's jobs, behind a real agent. What they make is made here, item by item, when told to."""

    def __init__(self, folder: Path) -> None:
        self.settings = replace(Settings.from_env(), home=folder)
        self.store = Store(folder)
        self.jobs = Jobs()
        self.prepared = prepare(REQUEST, self.settings, self.store, Tally())
        self.items = [item for part in self.prepared.items for item in part]
        self.begin("one")
        self.asked: list[dict[str, Any]] = []
        self.lost = False

    def begin(self, name: str) -> None:
        self.job = self.jobs.add(name, REQUEST, self.settings.endpoint, None)
        assert self.job is not None
        self.job.readers.begin(
            self.prepared, lambda: early_manifests(self.prepared, self.settings, self.store, Tally())
        )

    def ask(self, what: str, question: Any) -> Any:
        """As the agent's actor passes it on."""
        if self.lost:
            return None
        if what == "opening":
            return self.jobs.opening(request_from_json(question["request"]), question["endpoint"])
        self.asked.append(question)
        job = self.jobs.get(question["job"])
        return {"state": "unknown"} if job is None else job.readers.wish(question["keys"])

    def make(self, item: WorkItem, store: Store) -> ItemResult:
        """Do an item on another node, and let this node's readers find it: as if it had been copied."""
        result = run_item(item, Workplace(store, replace(self.settings, home=store.home), NodeId("other")))
        assert self.job is not None
        self.job.readers.done(result)
        return result


@contextmanager
def agent_of(coordinator: Coordinator, store: Store, home: Path) -> Iterator[AgentServer]:
    """The agent of the node whose readers use `home`; it serves `store`, another node's."""
    secret = ensure_secret(Store(home))
    server = AgentServer(store, secret, NodeId("n"), "127.0.0.1", 0, lambda _: [server.url], coordinator.ask)
    write_address(Store(home), AgentAddress(server.url, NodeId("n"), 1, (server.url,)))
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def cluster(chat: FaultyHub, tmp_path: Path) -> Iterator[tuple[Coordinator, Store]]:
    """A job that has begun, and the store of the node on which its items are done."""
    coordinator = Coordinator(tmp_path / "coordinator")
    other = Store(tmp_path / "other")
    with agent_of(coordinator, other, Settings.from_env().home):
        chat.clear_log()
        yield coordinator, other


def reading(stream: Any) -> Any:
    """Its ids, read by a thread."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(lambda: [row["id"] for row in stream])
    pool.shutdown(wait=False)
    return future


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_reader_follows_a_job_and_the_hub_hears_nothing_of_it(
    chat: FaultyHub, cluster: tuple[Coordinator, Store]
) -> None:
    coordinator, other = cluster
    stream = crucible.load_dataset("org/chat", split=f"train[{ROWS}:]", streaming=True)
    assert len(stream) == (FILES - 1) * ROWS
    assert not stream.manifest.complete
    footers = len(chat.log)
    assert all(record.range is not None for record in chat.requests(origin="cdn"))
    ids = reading(stream)
    for number in (3, 1, 4, 0, 2, 5):
        until(lambda: coordinator.asked)
        assert not ids.done()
        coordinator.make(coordinator.items[number], other)
    assert ids.result(60) == list(range(ROWS, FILES * ROWS))
    assert len(chat.requests("*", origin="hub")) <= footers + FILES, "the job's own"
    assert whole_files(chat) == FILES, "those of the job"
    first = next(question["keys"] for question in coordinator.asked if question["keys"])
    assert first[0] == coordinator.items[1].key, "what it needs first"
    assert len(set(first)) > 1, "and what it will need"
    assert coordinator.items[0].key not in {key for question in coordinator.asked for key in question["keys"]}
    assert stream.read_counts()["hub_shards"] == 0


def test_a_job_that_fails_ends_its_readers_with_its_name_and_its_cause(
    chat: FaultyHub, cluster: tuple[Coordinator, Store]
) -> None:
    coordinator, other = cluster
    stream = crucible.load_dataset("org/chat", split="train", streaming=True)
    coordinator.make(coordinator.items[0], other)
    ids = reading(stream)
    until(lambda: any(coordinator.items[1].key in question["keys"] for question in coordinator.asked))
    job = coordinator.job
    assert job is not None
    job.error = CorruptFile("data/train-1.parquet", "the footer", "not parquet")
    coordinator.jobs.ended(job)
    with pytest.raises(errors.PrefetchFailed, match=r"job one.*CorruptFile.*data/train-1\.parquet"):
        ids.result(60)
    # who comes now finds no job, and brings it itself
    assert coordinator.jobs.opening(REQUEST, chat.endpoint) == {"state": "none"}
    again = crucible.load_dataset("org/chat", split="train", streaming=True)
    assert [row["id"] for row in again] == list(range(FILES * ROWS))


def test_another_coordinator_goes_on_with_the_readers_of_the_one_before(
    chat: FaultyHub, cluster: tuple[Coordinator, Store]
) -> None:
    coordinator, other = cluster
    stream = crucible.load_dataset("org/chat", split="train", streaming=True)
    ids = reading(stream)
    until(lambda: coordinator.asked)
    coordinator.lost = True
    coordinator.make(coordinator.items[0], other)
    coordinator.jobs = Jobs()
    coordinator.lost = False
    count = len(coordinator.asked)
    until(lambda: len(coordinator.asked) > count + 1)  # it is told that there is no such job, and asks on
    coordinator.begin("one")
    for item in coordinator.items:
        coordinator.make(item, other)
    assert ids.result(60) == list(range(FILES * ROWS))
    assert whole_files(chat) == FILES


@pytest.mark.parametrize("how", ["no job", "no answer", "no agent"])
def test_when_a_job_is_gone_for_good_the_reader_brings_the_rest_itself(
    chat: FaultyHub, cluster: tuple[Coordinator, Store], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(early, "LOST_S", 0.3)
    coordinator, other = cluster
    stream = crucible.load_dataset("org/chat", split="train", streaming=True)
    coordinator.make(coordinator.items[0], other)
    rows = iter(stream)
    assert next(rows)["id"] == 0
    if how == "no job":
        coordinator.jobs = Jobs()
    elif how == "no answer":
        coordinator.lost = True
    else:
        write_address(Store(Settings.from_env().home), AgentAddress("http://127.0.0.1:9", NodeId("n"), 1, ()))
    assert [row["id"] for row in rows] == list(range(1, FILES * ROWS))


@pytest.mark.parametrize("fails", [False, True])
def test_readers_of_what_footers_do_not_tell_wait_for_the_end_of_the_job(
    chat: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr("crucible.cluster.early.MOST_FOOTERS", 0)
    coordinator = Coordinator(tmp_path / "coordinator")
    other = Store(tmp_path / "other")
    with agent_of(coordinator, other, Settings.from_env().home):
        opened = ThreadPoolExecutor(1).submit(crucible.load_dataset, "org/chat", split="train", streaming=True)
        job = coordinator.job
        assert job is not None
        until(lambda: (job.readers.opening(REQUEST) or {}).get("state") == "whole")
        assert not opened.done()
        if fails:
            job.error = CorruptFile("data/train-1.parquet", "the footer", "not parquet")
            coordinator.jobs.ended(job)
            with pytest.raises(errors.PrefetchFailed, match=r"job one.*CorruptFile"):
                opened.result(60)
            return
        results = {item.index: coordinator.make(item, other) for item in coordinator.items}
        job.readers.finish(build_manifests(coordinator.prepared, results))
        coordinator.jobs.ended(job)
        stream = opened.result(60)
        assert stream.manifest.complete
        assert [row["id"] for row in stream] == list(range(FILES * ROWS))
        assert whole_files(chat) == FILES


def test_a_job_is_about_a_request_if_it_has_its_splits_and_reads_them_alike(chat: FaultyHub, tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path / "coordinator")
    jobs, commit = coordinator.jobs, coordinator.prepared.repo.revision

    def state(request: DataRequest, endpoint: str = chat.endpoint) -> str:
        until(lambda: jobs.opening(REQUEST, chat.endpoint)["state"] != "soon")
        return str(jobs.opening(request, endpoint)["state"])

    same = [
        REQUEST,
        replace(REQUEST, repo=RepoRef("org/chat", commit)),
        replace(REQUEST, config="default"),
        replace(REQUEST, split="train[:10]"),
        replace(REQUEST, split=None),
    ]
    others = [
        replace(REQUEST, repo=RepoRef("org/chat", "v1")),
        replace(REQUEST, repo=RepoRef("org/other")),
        replace(REQUEST, config="socratic"),
        replace(REQUEST, split="train+test"),
        replace(REQUEST, columns=("id",)),
        replace(REQUEST, features="{}"),
    ]
    assert [state(request) for request in same] == ["early"] * len(same)
    assert [state(request) for request in others] == ["none"] * len(others)
    assert state(REQUEST, "http://another.hub") == "none"
    assert all(request_from_json(asdict(request)) == request for request in same + others)


def test_a_coordinator_remembers_only_a_few_ended_jobs(chat: FaultyHub, tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path / "coordinator")
    for number in range(REMEMBERED + 1):
        job = coordinator.jobs.add(f"job {number}", REQUEST, chat.endpoint, None)
        assert job is not None
        job.readers.begin(coordinator.prepared, lambda: None)
        job.readers.finish(())
        coordinator.jobs.ended(job)
    known = coordinator.jobs.all()
    first, last = known["job 0"].readers, known[f"job {REMEMBERED}"].readers
    assert first.wish(()) == {"state": "unknown"}
    assert last.wish(())["state"] == "done"


def test_wishes_reach_the_job_once_and_in_order(chat: FaultyHub, tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path / "coordinator")
    assert coordinator.job is not None
    readers, keys = coordinator.job.readers, [item.key for item in coordinator.items]
    readers.wish([keys[4], "0" * 64, keys[1]])
    readers.wish([keys[2]])
    assert list(readers.wishes()) == [(4, 1), (2,)]
    assert list(readers.wishes()) == []


def test_threads_that_wait_for_one_shard_ask_as_often_as_one(cluster: tuple[Coordinator, Store]) -> None:
    coordinator, other = cluster
    opened = open_early(REQUEST, Settings.from_env(), lambda _: ())
    manifest = opened.manifests[0]
    with ThreadPoolExecutor(8) as pool:
        paths = [pool.submit(opened.source.path, manifest, manifest.shards[0]) for _ in range(8)]
        until(lambda: len(coordinator.asked) > 2)
        assert all(question["keys"] == [coordinator.items[0].key] for question in coordinator.asked)
        coordinator.make(coordinator.items[0], other)
        assert len({path.result(60) for path in paths}) == 1


def test_an_agent_without_a_coordinator_says_so(tmp_path: Path) -> None:
    import httpx

    store = Store(tmp_path)
    server = AgentServer(store, "s" * 64, NodeId("n"), "127.0.0.1", 0, lambda _: [], lambda *_: None)
    try:
        headers = {"authorization": "Bearer " + "s" * 64}
        for what in ("opening", "wishes"):
            assert httpx.post(f"{server.url}/v1/{what}", json={}, timeout=10).status_code == 401
            assert httpx.post(f"{server.url}/v1/{what}", headers=headers, json={}, timeout=10).status_code == 503
            bad = httpx.post(f"{server.url}/v1/{what}", headers=headers, content=b"{", timeout=10)
            assert bad.status_code == 400
    finally:
        server.close()
