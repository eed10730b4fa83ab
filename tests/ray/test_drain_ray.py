"""A node that is drained while a prefetch works on it: it goes, and nothing is lost nor brought twice. Real raylets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
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


@dataclass
class Busy:
    nodes: Any
    job: Background
    held: list[psutil.Process]
    """Of each node a process that is stopped in the middle of an item."""


@pytest.fixture
def busy(hub: FaultyHub, tmp_path: Path, start_nodes: Any) -> Iterator[Busy]:
    """Three nodes, each at work on an item, and the job that waits for them."""
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=6, rows=4000))
    # who is stopped for a while is not to ask for the same bytes again
    nodes = start_nodes(3, hub.endpoint, CRUCIBLE_STALL="100", HF_HUB_DOWNLOAD_TIMEOUT="100")
    hub.add("slow", origin="cdn", piece=4_000, wait=0.05)  # four seconds a file
    job, held = Background(nodes.address), dict[int, psutil.Process]()

    def all_held() -> bool:
        for number in range(3):
            if number not in held and (found := at_work(nodes, number)):
                found[0].suspend()
                if found[0] in at_work(nodes, number):
                    held[number] = found[0]
                else:  # it has just ended
                    found[0].resume()
        return len(held) == 3

    try:
        until(all_held, "each node is at work")
        hub.clear_faults()
        yield Busy(nodes, job, [held[number] for number in range(3)])
    finally:
        for process in held.values():
            with suppress(psutil.NoSuchProcess):
                process.resume()


def node_id(nodes: Any, number: int) -> str:
    agent = read_address(Store(nodes.homes[number]))
    assert agent is not None
    return agent.node


def test_a_drain_waits_for_what_runs_and_then_the_node_may_go_before_the_job_has_ended(
    hub: FaultyHub, busy: Busy
) -> None:
    nodes = busy.nodes
    busy.held[0].resume()
    told = care("start_drain", [node_id(nodes, 2)])
    until(lambda: "org/chat" in care("operation", told["operation"])["waiting_for"], "it says what it waits for")
    busy.held[2].resume()
    done = care("operation", told["operation"], WAIT_S)
    assert (done["phase"], done["left"], done["moved"], done["problems"]) == ("done", 0, 0, [])
    assert done["copied"] >= 1, "no manifest names it yet"
    assert not at_work(nodes, 2)
    nodes.kill_node(2)
    busy.held[1].resume()
    manifest = Store(nodes.homes[0]).get_manifest(busy.job.report().splits[0].manifest)
    assert copies(nodes.homes[:2], manifest) == [1] * 6
    assert file_bytes(hub) == sum(item.size for item in manifest.items), "each byte once"


def test_what_outlasts_the_grace_is_ended_there_and_done_by_others(hub: FaultyHub, busy: Busy) -> None:
    nodes, worker = busy.nodes, busy.held[2]
    told = care("operation", care("start_drain", [node_id(nodes, 2)], 0.5)["operation"], WAIT_S)
    assert told["phase"] == "done"
    assert told["moved"] >= 1
    for process in busy.held:
        process.resume()
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "its process is ended")
    manifest = Store(nodes.homes[0]).get_manifest(busy.job.report().splits[0].manifest)
    assert 0 not in copies(nodes.homes, manifest)
    assert len(list(Store(nodes.homes[2]).item_keys())) <= told["left"] + told["copied"], "it was given nothing more"
    once = sum(item.size for item in manifest.items)
    assert file_bytes(hub) <= once + max(item.size for item in manifest.items)
