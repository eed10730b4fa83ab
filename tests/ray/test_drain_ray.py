"""A node that is drained while a prefetch works on it: it goes, and nothing is lost nor brought twice. Real raylets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from crucible.cache.store import Store
from crucible.workers.serve import read_address
from tests.hubserver.faults import FaultyHub
from tests.ray.jobs import Background, chat_files, file_bytes, until
from tests.ray.test_upkeep_ray import WAIT_S, care, copies

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def at_work(nodes: Any, number: int) -> list[psutil.Process]:
    """Processes that do items on a node."""
    (raylet,) = nodes.nodes[number].all_processes["raylet"]
    found = []
    for process in psutil.Process(raylet.process.pid).children(recursive=True):
        try:
            if process.cmdline()[0].startswith("ray::item"):
                found.append(process)
        except (psutil.Error, IndexError):
            continue  # it has ended meanwhile
    return found


@pytest.fixture
def busy(hub: FaultyHub, tmp_path: Path, start_nodes: Any) -> tuple[Any, Background]:
    """Three nodes, each at work on an item of several seconds, and the job that waits for them."""
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=6, rows=4000))
    # who is stopped for a while is not to ask for the same bytes again
    nodes = start_nodes(3, hub.endpoint, CRUCIBLE_STALL="100", HF_HUB_DOWNLOAD_TIMEOUT="100")
    hub.add("slow", origin="cdn", piece=4_000, wait=0.05)
    job = Background(nodes.address)
    until(lambda: all(at_work(nodes, number) for number in range(3)))
    return nodes, job


def node_id(nodes: Any, number: int) -> str:
    agent = read_address(Store(nodes.homes[number]))
    assert agent is not None
    return agent.node


def test_a_drain_waits_for_what_runs_and_then_the_node_may_go_before_the_job_has_ended(
    hub: FaultyHub, busy: tuple[Any, Background]
) -> None:
    nodes, job = busy
    held = [*at_work(nodes, 1), *at_work(nodes, 2)]
    for process in held:
        process.suspend()
    try:
        hub.clear_faults()
        told = care("start_drain", [node_id(nodes, 2)])
        until(lambda: "org/chat" in care("operation", told["operation"])["waiting_for"], "it says what it waits for")
        for process in held[-1:]:
            process.resume()
        done = care("operation", told["operation"], WAIT_S)
        assert (done["phase"], done["left"], done["moved"], done["problems"]) == ("done", 0, 0, [])
        assert done["copied"] >= 1, "no manifest names it yet"
        assert not at_work(nodes, 2)
        nodes.kill_node(2)
    finally:
        for process in held:
            if process.is_running():
                process.resume()
    report = job.report()
    manifest = Store(nodes.homes[0]).get_manifest(report.splits[0].manifest)
    assert copies(nodes.homes[:2], manifest) == [1] * 6
    assert file_bytes(hub) == sum(item.size for item in manifest.items), "each byte once"


def test_what_outlasts_the_grace_is_ended_there_and_done_by_others(
    hub: FaultyHub, busy: tuple[Any, Background]
) -> None:
    nodes, job = busy
    (worker,) = at_work(nodes, 2)
    worker.suspend()
    hub.clear_faults()
    try:
        told = care("operation", care("start_drain", [node_id(nodes, 2)], 0.5)["operation"], WAIT_S)
    finally:
        worker.resume()
    assert told["phase"] == "done"
    assert told["moved"] >= 1
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "its process is ended")
    manifest = Store(nodes.homes[0]).get_manifest(job.report().splits[0].manifest)
    assert 0 not in copies(nodes.homes, manifest)
    assert len(list(Store(nodes.homes[2]).item_keys())) <= told["left"] + told["copied"], "it was given nothing more"
    once = sum(item.size for item in manifest.items)
    assert once < file_bytes(hub) <= once + max(item.size for item in manifest.items)
