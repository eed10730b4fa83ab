"""What the tests of jobs on Ray make and count."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import crucible
from crucible.report import JobReport, Progress
from tests.hubserver.faults import FaultyHub


def file_bytes(hub: FaultyHub) -> int:
    """Bytes of files that the Hub and its CDN sent; the bodies of redirects are not among them."""
    files = [record for record in hub.log if record.status in (200, 206)]
    return sum(record.sent for record in files if record.origin == "cdn" or "/resolve/" in record.path)


def chat_files(folder: Path, files: int, rows: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        ids = list(range(number * rows, (number + 1) * rows))
        texts = [hashlib.sha256(str(i).encode()).hexdigest() * 4 for i in ids]
        pq.write_table(pa.table({"id": ids, "text": texts}), folder / f"train-{number:05d}-of-{files:05d}.parquet")
    return folder


def until(true: Callable[[], Any], what: str = "it did not happen", *, most_s: float = 90) -> None:
    """Wait for it, with a bound."""
    deadline = time.monotonic() + most_s
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Background:
    """A prefetch of `org/chat` in a thread, for a test that breaks something meanwhile."""

    def __init__(self, address: str, coordinator_on: str | None = None, **asked: Any) -> None:
        self.seen: list[Progress] = []
        if coordinator_on is not None:
            start_coordinator_on(coordinator_on)
        self._asked = asked
        self._future: Future[JobReport] = Future()
        threading.Thread(target=self._run, args=(address,), daemon=True).start()

    def _run(self, address: str) -> None:
        try:
            report = crucible.prefetch(
                "org/chat", split="train", address=address, on_progress=self.seen.append, **self._asked
            )
            self._future.set_result(report)
        except BaseException as error:
            self._future.set_exception(error)

    def report(self) -> JobReport:
        return self._future.result(timeout=150)


def start_coordinator_on(node: str) -> None:
    """Start the coordinator where the product would not, in place of the one there is. Ray may restart it elsewhere."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from crucible.cluster.coordinator import COORDINATOR, NAMESPACE, Coordinator

    deadline = time.monotonic() + 30
    known = ray.remote(num_cpus=0, memory=1)(lambda: True)
    while True:  # our raylet may not have heard of a node that is new
        try:
            ray.get(known.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote())
            break
        except ray.exceptions.RayError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    with suppress(ValueError):  # Ray knows no actor of that name any more
        while time.monotonic() < deadline:
            ray.kill(ray.get_actor(COORDINATOR, namespace=NAMESPACE))
            time.sleep(0.1)
    there = NodeAffinitySchedulingStrategy(node, soft=True)
    options = {"name": COORDINATOR, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    actor = Coordinator.options(**options, memory=1, scheduling_strategy=there).remote(False)
    ray.get(actor.answers.remote(), timeout=30)
