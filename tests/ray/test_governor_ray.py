"""One governor for many processes: real Ray tasks on a Hub with real quotas; dead holders, and a dead governor."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from crucible.config import Settings
from crucible.hub.client import resolve_url
from crucible.hub.governor import DESK, Key
from crucible.hub.server import HubOptions, import_files
from crucible.hub.server.ratelimit import RateLimits
from crucible.refs import RepoRef
from tests.hubserver.counting import CountingHub
from tests.hubserver.faults import Fault
from tests.ray.conftest import Nodes, ray_nodes
from tests.ray.jobs import until

pytestmark = pytest.mark.ray

WINDOW_S = 3
QUOTA = 70
CONNECTIONS = 12
REPO = RepoRef("org/small", "main")


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CountingHub]:
    root = tmp_path_factory.mktemp("strict")
    import_files(root, REPO.repo_id, {"a.txt": b"one line\n"}, durable=False)
    options = HubOptions(limits=RateLimits(resolvers=QUOTA, window_s=WINDOW_S))
    rows = b"".join(b'{"n": %d}\n' % n for n in range(20))
    import_files(root, "org/rows", {"train.jsonl": rows}, durable=False)
    with CountingHub(root, options=options, takes_s=0.01) as hub:
        yield hub


@pytest.fixture(scope="module")
def nodes(strict: CountingHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two raylets; this process is a driver on the first."""
    variables = {"HF_ENDPOINT": strict.endpoint, "CRUCIBLE_CONNECTIONS": str(CONNECTIONS)}
    with ray_nodes(tmp_path_factory.mktemp("nodes"), 2, variables, cpus=2) as started:
        import ray

        ray.init(address=started.address, log_to_driver=False)
        yield started


def settings_of(hub: CountingHub, home: Path) -> Settings:
    return Settings(home, endpoint=hub.endpoint, connections=CONNECTIONS)


def fetch(settings: Settings, url: str, threads: int, each: int) -> list[int]:
    """In a Ray task: so many threads with a client each, one request after the other."""
    from crucible.hub.http import HubHttp
    from crucible.report import Tally
    from crucible.workers.governing import cluster_governor

    def one(_: int) -> list[int]:
        http = HubHttp(settings, Tally(), cluster_governor(settings))
        try:
            return [http.read(url, limit=100).status_code for _ in range(each)]
        finally:
            http.close()

    with ThreadPoolExecutor(threads) as pool:
        return [status for statuses in pool.map(one, range(threads)) for status in statuses]


def run_everywhere(settings: Settings, url: str, *, processes: int, threads: int, each: int) -> list[Any]:
    import ray

    task = ray.remote(num_cpus=4 / processes, max_retries=0, scheduling_strategy="SPREAD")(fetch)
    return [task.remote(settings, url, threads, each) for _ in range(processes)]


def facts() -> dict[str, int]:
    import ray

    from crucible.workers.granting import ensure_governor

    found: dict[str, int] = ray.get(ensure_governor().facts.remote(), timeout=30)
    return found


def test_a_cluster_stays_within_quota_and_connections_although_others_eat_from_it(
    strict: CountingHub, nodes: Nodes, tmp_path: Path
) -> None:
    """Checklist 51 and 54: 64 threads in 8 processes on 2 nodes, and somebody else who eats a window's quota."""
    import ray

    settings, url = settings_of(strict, tmp_path), resolve_url(strict.endpoint, REPO, "a.txt")
    strict.eat(url)
    replies = ray.get(run_everywhere(settings, url, processes=8, threads=8, each=2), timeout=90)
    assert [status for statuses in replies for status in statuses] == [200] * 128
    for refusals, later in strict.refused("resolvers", WINDOW_S).values():
        assert refusals <= CONNECTIONS
        assert later < CONNECTIONS, "what came after the first refusal was in flight when it said no"
    assert 2 <= strict.peak <= CONNECTIONS
    assert facts()["most"] <= CONNECTIONS
    until(lambda: facts()["in_flight"] == facts()["in_line"] == 0, most_s=30)


def test_word_of_an_end_comes_with_the_next_question() -> None:
    """One connection: who asks for the next request has given the last one's back, and waits for no other call."""
    from crucible.workers.granting import GovernorCore

    async def ask() -> None:
        governor, key = GovernorCore(), Key("hub", "cdn")
        assert await governor.turn("a", "a/1", key, 1, 0.0)
        waits = asyncio.ensure_future(governor.turn("b", "b/1", key, 1, 0.0))
        await asyncio.sleep(0)
        asked = asyncio.ensure_future(governor.turn("a", "a/2", key, 1, 0.0, (("a/1", True, (200, {})),)))
        assert await waits, "who came first is first"
        assert (await governor.facts())["in_flight"] == 1
        await governor.told("b", (("b/1", True, (200, {})),))
        assert await asked
        await governor.told("a", (("a/2", False, (200, {})), ("a/2", True, (200, {})), ("a/1", True, None)))
        facts = await governor.facts()
        assert (facts["in_flight"], facts["in_line"], facts["most"]) == (0, 0, 1)

    asyncio.run(asyncio.wait_for(ask(), 30))


def test_an_end_that_no_question_follows_is_told_soon(strict: CountingHub, nodes: Nodes, tmp_path: Path) -> None:
    """And not only when what a process no longer speaks of expires. One of some tries: the machine may be busy."""
    from crucible.workers.governing import cluster_governor
    from crucible.workers.granting import EXPIRY_S

    took: list[float] = []
    while len(took) < 5 and min(took, default=EXPIRY_S) >= EXPIRY_S:
        until(lambda: facts()["in_flight"] == 0, most_s=30)
        began = time.monotonic()
        with cluster_governor(settings_of(strict, tmp_path)).request("cdn") as replied:
            replied(200, {})
            assert facts()["in_flight"] == 1
        until(lambda: facts()["in_flight"] == 0, most_s=30)
        took.append(time.monotonic() - began)
    assert min(took) < EXPIRY_S


def hold_and_die(settings: Settings, count: int) -> None:
    """In a Ray task: take so many permits, and go without giving them back."""
    from crucible.workers.governing import cluster_governor

    held = [cluster_governor(settings).request("cdn") for _ in range(count)]
    for one in held:
        one.__enter__()
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_dead_process_held_is_free_again(strict: CountingHub, nodes: Nodes, tmp_path: Path) -> None:
    """Checklist 54 when a holder is killed: its connections come back."""
    import ray

    from crucible.workers.governing import cluster_governor

    settings = settings_of(strict, tmp_path)
    before = facts()["most"]
    dying = ray.remote(num_cpus=0, max_retries=0)(hold_and_die).remote(settings, CONNECTIONS // 2)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(dying, timeout=60)
    held = [cluster_governor(settings).request("cdn") for _ in range(CONNECTIONS)]
    for one in held:
        one.__enter__()(200, {})  # the last of them wait until the dead one's are free
    assert facts()["in_flight"] == CONNECTIONS
    assert facts()["most"] == max(before, CONNECTIONS)
    for one in held:
        one.__exit__(None, None, None)
    until(lambda: facts()["in_flight"] == 0, most_s=30)


def test_a_quiet_time_outlives_the_governor_that_was_told_it(strict: CountingHub, nodes: Nodes, tmp_path: Path) -> None:
    """Checklist 51 while the governor is killed: those who wait remember, the next one is told, and all get through."""
    import ray

    from crucible.workers.governing import cluster_governor
    from crucible.workers.granting import ensure_governor

    settings = settings_of(strict, tmp_path)
    governor = cluster_governor(settings)
    with governor.request("pages") as replied:
        began = time.monotonic()
        replied(429, {"ratelimit": '"pages";r=0;t=6', "ratelimit-policy": '"fixed window";"pages";q=70;w=300'})
    passed: list[float] = []

    def wait_for_it() -> None:
        with governor.request("pages") as reply:
            passed.append(time.monotonic() - began)
            reply(200, {})

    threads = [threading.Thread(target=wait_for_it, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: governor.waiting() is not None, most_s=10)
    seen = governor.waiting()
    assert seen is not None
    assert (seen.bucket, seen.reason) == ("pages", "0 of 70 left")
    # a beat brings the quiet time to this process
    until(lambda: DESK.quiet(Key(governor.account, "pages")) > 0, most_s=5)
    first = ray.get(ensure_governor().pid.remote(), timeout=30)
    os.kill(first, signal.SIGKILL)
    for thread in threads:
        thread.join(40)
    assert len(passed) == 3
    assert min(passed) >= 6, "nobody sent before the Hub said"
    until(lambda: ray.get(ensure_governor().pid.remote(), timeout=30) != first, most_s=30)
    with governor.request("pages") as replied:  # and the new one is used
        replied(200, {})
    until(lambda: facts()["processes"] > 0, most_s=20)


def test_prefetch_says_that_a_task_on_some_node_waits_for_the_hub(strict: CountingHub, nodes: Nodes) -> None:
    strict.faults.add(Fault("429", path="*/org/rows/resolve/*", wait=3))
    command = [sys.executable, "-m", "crucible", "prefetch", "org/rows", "--address", nodes.address]
    variables = {**os.environ, **nodes.environment, "CRUCIBLE_HOME": str(nodes.homes[0])}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    strict.faults.clear()
    assert done.returncode == 0, done.stderr
    assert re.search(r"org/rows: Hub asks to wait: \d s \(resolvers, 0 of 500 left\)", done.stderr)


class SlowCoordinator:
    """Answers the first that asks when a second one asks too, or after a while."""

    def __init__(self) -> None:
        self.asked = 0

    async def credential(self, job: str) -> str:
        self.asked += 1
        for _ in range(40):
            if self.asked > 1:
                break
            await asyncio.sleep(0.1)
        return f"{job} with {self.asked} at once"


def ask_for_the_token(asked: Any) -> str:
    from unittest.mock import patch

    from crucible.config import node_settings
    from crucible.workers import tasks

    with patch.object(tasks, "coordinator", lambda: asked):  # this process goes on with other tests
        return str(tasks.asked_first(tasks.JobOptions.of(node_settings()), "x")[0].token)


def test_a_task_that_asks_for_the_token_keeps_its_cpu(nodes: Nodes) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    first, slow = (ray.remote(num_cpus=0)(SlowCoordinator).remote() for _ in range(2))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # each is all of its node: one that began while another waits would be a third process on two CPUs
    task = ray.remote(num_cpus=2, max_retries=0, scheduling_strategy=here)(ask_for_the_token)
    ray.get([task.options(num_cpus=1).remote(first) for _ in range(2)], timeout=120)  # two processes are there then
    told = ray.get([task.remote(slow) for _ in range(2)], timeout=120)
    assert sorted(told) == ["x with 1 at once", "x with 2 at once"]
