"""Coordinators that were replaced, restarted without their driver, or have lost sight of an agent: on real raylets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import crucible
import crucible.session
from crucible.cache.store import Store
from crucible.cluster.connect import cluster
from crucible.config import Settings
from crucible.errors import StaleCoordinator
from crucible.hub.server import HubOptions, User
from crucible.refs import DataRequest, ReadOptions, RepoRef, WorkItem
from crucible.workers.serve import read_address
from tests.hubserver.faults import FaultyHub
from tests.ray.conftest import Nodes, ray_nodes
from tests.ray.jobs import Background, chat_files, file_bytes, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def processes(title: str, home: Path) -> list[psutil.Process]:
    """Processes below this one whose title has `title`, on the node with that store; the oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()) and process.environ().get("CRUCIBLE_HOME") == str(home):
                found.append(process)
        except psutil.Error:
            continue  # it has ended meanwhile
    return sorted(found, key=lambda process: float(process.create_time()))


def jobs(nodes: Nodes) -> dict[str, dict[str, Any]]:
    return {str(job["job"]): job for job in crucible.session.status(nodes.address)["jobs"]}


@pytest.mark.slow  # Ray waits five times ten seconds for a raylet that does not answer but is there
def test_a_coordinator_that_wakes_after_another_has_taken_over_is_refused_and_nothing_is_done_twice(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=12, rows=2000))
    nodes: Nodes = start_nodes(3, hub.endpoint)
    hub.add("slow", origin="cdn", piece=20_000, wait=0.1)
    with cluster(nodes.address):
        job = Background(nodes.address, coordinator_on=nodes.nodes[2].node_id)
        until(lambda: any(progress.items_done for progress in job.seen))
        (older,) = processes("ray::CoordinatorCore", nodes.homes[2])
        (raylet,) = nodes.nodes[2].all_processes["raylet"]
        try:
            for pid in (older.pid, raylet.process.pid):
                os.kill(pid, signal.SIGSTOP)
            until(lambda: len(nodes.alive()) == 2, most_s=150)
            until(lambda: any(processes("ray::CoordinatorCore", home) for home in nodes.homes[:2]))
            until(lambda: [one for one in jobs(nodes).values() if one["phase"] != "resolve"])
            os.kill(older.pid, signal.SIGCONT)  # its raylet sleeps on, and cannot end it
            hub.clear_faults()
            report = job.report()
            logs = [*nodes.scratch.rglob(f"*{older.pid}.err"), *nodes.scratch.rglob(f"*{older.pid}.out")]
            until(lambda: any(b"has taken over" in path.read_bytes() for path in logs))
        finally:
            nodes.kill_node(2)
    assert report.rows == 24_000
    ids = [row["id"] for row in crucible.load_dataset("org/chat", split="train", streaming=True)]
    assert ids == list(range(24_000))
    biggest = max(path.stat().st_size for path in (tmp_path / "data").iterdir())
    lost = sum(1 for _ in Store(nodes.homes[2]).item_keys())
    assert file_bytes(hub) - report.source_bytes <= (lost + 3) * biggest, "what was lost with the node, or in flight"


def test_of_two_coordinators_at_once_the_younger_goes_on_with_the_jobs_and_the_older_stops(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from crucible.cluster.coordinator import Coordinator, reach_coordinator
    from crucible.workers.tasks import JobOptions

    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=24, rows=2000))
    nodes: Nodes = start_nodes(2, hub.endpoint)
    hub.add("slow", origin="cdn", piece=40_000, wait=0.5)  # 25 s in all: none of them ends the job alone
    with cluster(nodes.address):
        older = reach_coordinator(embedded=False)
        job = Background(nodes.address)
        until(lambda: any(progress.phase == "items" for progress in job.seen) and hub.bytes_sent() > 100_000)
        (name,) = [name for name, one in jobs(nodes).items() if one["phase"] == "items"]
        # as if Ray had forgotten that there is one: on the other node, which knows of the job what its agent was told
        there = NodeAffinitySchedulingStrategy(nodes.nodes[1].node_id, soft=False)
        younger = Coordinator.options(name="another", namespace="crucible", memory=1, scheduling_strategy=there).remote(
            False
        )
        until(lambda: {one["job"] for one in ray.get(younger.jobs.remote(), timeout=60)} >= {name})
        until(lambda: replaced(older) and outcome(older, name) is not None)
        assert isinstance(outcome(older, name), (StaleCoordinator, str))
        request, options = DataRequest(RepoRef("org/chat")), JobOptions.of(Settings.from_env())
        with pytest.raises((StaleCoordinator, ray.exceptions.RayActorError)):
            ray.get(older.submit.remote("late", request, options, 1, None, None), timeout=60)
        hub.clear_faults()
        # the driver looks for one of the usual name, finds none, and starts it: that is the third, and the youngest
        assert job.report().rows == 48_000
        until(lambda: outcome(younger, name) == "left")
        assert jobs(nodes)[name]["phase"] == "finished"
    ids = [row["id"] for row in crucible.load_dataset("org/chat", split="train", streaming=True)]
    assert ids == list(range(48_000))
    biggest = max(path.stat().st_size for path in (tmp_path / "data").iterdir())
    size = sum(path.stat().st_size for path in (tmp_path / "data").iterdir())
    assert file_bytes(hub) - size <= 4 * biggest, "what two coordinators had in flight when they left"


def outcome(coordinator: Any, job: str) -> Any:
    """How the job ended for that coordinator; a word if it has left."""
    import ray

    try:
        return ray.get(coordinator.result.remote(job, 0.0), timeout=60)
    except ray.exceptions.RayActorError:
        return "left"


def replaced(coordinator: Any) -> bool:
    import ray

    try:
        return not ray.get(coordinator.answers.remote(), timeout=60)
    except (StaleCoordinator, ray.exceptions.RayActorError):
        return True


def test_nobody_does_what_the_coordinator_of_an_older_epoch_says(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    import ray

    from crucible.cluster.roster import agent_name
    from crucible.workers.fencing import Epoch
    from crucible.workers.tasks import NAMESPACE, JobOptions, run_item_task, session_name

    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=1, rows=10))
    nodes: Nodes = start_nodes(2, hub.endpoint)
    crucible.prefetch("org/chat", split="train", address=nodes.address)
    options = JobOptions.of(Settings.from_env())
    (file,) = crucible.load_dataset("org/chat", split="train", streaming=True).manifest.items[0].files
    hub.clear_log()
    item = WorkItem(0, RepoRef("org/chat"), (file,), ReadOptions("parquet", columns=("id",)), 1 << 20)
    with cluster(nodes.address):
        older = Epoch(session_name(), 0, "from before")
        for node in nodes.alive():
            agent = ray.get_actor(agent_name(node), namespace=NAMESPACE)
            with pytest.raises(StaleCoordinator):
                ray.get(agent.obey.remote(older, "set_peers", []), timeout=60)
        with pytest.raises(StaleCoordinator) as refused:
            ray.get(run_item_task.remote(item, replace(options, epoch=older), "job"), timeout=60)
    assert (refused.value.epoch, refused.value.newest) >= (0, 1)
    assert hub.log == [], "it was not even begun"
    for home in nodes.homes:
        address = read_address(Store(home))
        assert address is not None
        assert len(address.peers) == 1, "what it knew of its peers stands"


@pytest.mark.parametrize(
    "names", [("ours",), pytest.param(("ours too", "hers"), marks=pytest.mark.slow)], ids=lambda names: names[-1]
)  # 20 s are waited for a driver and its token
def test_jobs_go_on_without_their_driver_but_not_without_the_token_that_only_it_had(
    names: tuple[str, ...], tmp_path: Path, start_nodes: Any
) -> None:
    import ray

    from crucible.cluster.coordinator import reach_coordinator
    from crucible.workers.tasks import JobOptions

    options = HubOptions(tokens={"hf_only_the_driver_has_it": User("ann")})
    with FaultyHub(tmp_path / "hub", options=options) as hub:
        hub.import_folder("org/chat", chat_files(tmp_path / "data", files=6, rows=2000))
        hub.import_folder("ann/chat", chat_files(tmp_path / "data", files=6, rows=2000), private=True)
        nodes: Nodes = start_nodes(2, hub.endpoint)
        hub.add("slow", origin="cdn", piece=20_000, wait=1.0)
        with cluster(nodes.address):
            coordinator = reach_coordinator(embedded=False)
            asked = JobOptions.of(Settings.from_env(), revision="main")
            for job in names:
                Store(nodes.homes[0]).write_small("token-of-hers", b"hf_only_the_driver_has_it", mode=0o600)
                given = str(nodes.homes[0] / "token-of-hers") if job == "hers" else None
                request = DataRequest(RepoRef("ann/chat" if given else "org/chat"), split="train")
                ray.get(coordinator.submit.remote(job, request, asked, 1, None, given), timeout=60)
            until(lambda: all(one["commit"] for name, one in jobs(nodes).items() if name in names))
            epoch = jobs(nodes)[names[0]]["epoch"]
            (running,) = [one for home in nodes.homes for one in processes("ray::CoordinatorCore", home)]
            running.kill()
            hub.clear_faults()

            def ended() -> bool:
                try:
                    found = jobs(nodes)
                except ray.exceptions.RayError:  # it is being started again
                    return False
                return all(found[job]["ended"] for job in names)

            until(ended)
        found = jobs(nodes)
        assert found[names[0]]["phase"] == "finished"
        assert found[names[0]]["epoch"] > epoch
        assert found[names[0]]["bytes_done"] == found[names[0]]["bytes"] > 0
        if "hers" in names:
            assert found["hers"]["phase"] == "failed"
            assert "memory only" in found["hers"]["error"]
            assert "HF_TOKEN" in found["hers"]["error"]
        files = [path for home in nodes.homes for path in (home / "coordinator").iterdir() if path.suffix != ".lock"]
        assert {".journal", ".epoch", ""} <= {path.suffix for path in files if not path.name.startswith(".")}
        assert [path for path in files if b"hf_only_the_driver" in path.read_bytes()] == []


def test_a_driver_whose_coordinator_dies_gives_its_token_again(
    tmp_path: Path, start_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = HubOptions(tokens={"hf_only_the_driver_has_it": User("org")})
    with FaultyHub(tmp_path / "hub", options=options) as hub:
        hub.import_folder("org/chat", chat_files(tmp_path / "data", files=6, rows=2000), private=True)
        nodes: Nodes = start_nodes(2, hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_only_the_driver_has_it")
        hub.add("slow", origin="cdn", piece=20_000, wait=0.1)
        job = Background(nodes.address)
        until(lambda: any(progress.items_done for progress in job.seen))
        (running,) = [one for home in nodes.homes for one in processes("ray::CoordinatorCore", home)]
        running.kill()
        hub.clear_faults()
        assert job.report().rows == 12_000


def test_an_agent_that_dies_while_nothing_runs_is_known_by_its_new_address(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=1, rows=10))
    nodes: Nodes = start_nodes(2, hub.endpoint)
    crucible.prefetch("org/chat", split="train", address=nodes.address)
    before = read_address(Store(nodes.homes[1]))
    assert before is not None
    for agent in processes("ray::AgentCore", nodes.homes[1]):
        agent.kill()

    def told() -> bool:
        here, there = (read_address(Store(home)) for home in nodes.homes)
        assert here is not None
        return there is not None and there.url != before.url and there.url in here.peers

    until(told)


@pytest.mark.slow  # two clusters of its own
def test_a_cluster_that_is_started_again_on_its_stores_goes_on_with_what_it_had_not_done(
    hub: FaultyHub, tmp_path: Path
) -> None:
    import ray

    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=8, rows=2000))
    hub.add("slow", origin="cdn", piece=20_000, wait=0.2)
    environment = {"HF_ENDPOINT": hub.endpoint, "CRUCIBLE_BACKOFF_CAP": "0.2"}
    code = (
        "import crucible, sys\n"
        "crucible.prefetch('org/chat', split='train', address=sys.argv[1], endpoint=sys.argv[2])\n"
    )
    with ray_nodes(tmp_path / "nodes", 2, environment) as nodes:
        command = [sys.executable, "-c", code, nodes.address, hub.endpoint]
        driver = subprocess.Popen(command, env={**os.environ, **environment, "CRUCIBLE_HOME": str(nodes.homes[0])})
        try:
            until(lambda: sum(len(list(Store(home).item_keys())) for home in nodes.homes) >= 2)
        finally:
            driver.kill()
            driver.wait(10)
    done = sum(len(list(Store(home).item_keys())) for home in nodes.homes)
    assert 2 <= done < 8
    before = file_bytes(hub)
    hub.clear_faults()
    hub.clear_log()
    with ray_nodes(tmp_path / "nodes", 2, environment) as nodes:
        ray.init(address=nodes.address, log_to_driver=False, configure_logging=False)
        assert len(crucible.session.nodes(nodes.address)) == 2  # whatever asks first starts the coordinator
        until(lambda: all(one["ended"] for one in jobs(nodes).values()) and jobs(nodes))
        (job,) = jobs(nodes).values()
        assert (job["phase"], job["error"]) == ("finished", "")
    sizes = [path.stat().st_size for path in (tmp_path / "data").iterdir()]
    assert file_bytes(hub) <= sum(sizes) - done * min(sizes), "what was done was not brought again"
    assert before + file_bytes(hub) - sum(sizes) <= 3 * max(sizes), "what was in flight when it ended"
    assert sum(len(list(Store(home).item_keys())) for home in nodes.homes) == 8
