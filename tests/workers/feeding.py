"""A node that has everything, agents of it in processes of their own, and nodes that have nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crucible.cache.store import Store
from crucible.config import Settings
from crucible.data_files import data_request
from crucible.manifest import Manifest
from crucible.refs import NodeId
from crucible.session import local_job
from crucible.workers.secret import ensure_secret, keep_secret
from crucible.workers.serve import AgentAddress, write_address

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60.0
AGENT = """
import sys
from pathlib import Path
from crucible.cache.store import Store
from crucible.refs import NodeId
from crucible.workers.secret import ensure_secret
from crucible.workers.serve import AgentServer
store = Store(Path(sys.argv[1]))
server = AgentServer(store, ensure_secret(store), NodeId("full"), "127.0.0.1", 0, lambda _: [])
print(server.url, flush=True)
sys.stdin.read()
server.close()
"""
NOWHERE = "http://127.0.0.1:9"
"""Where no agent answers."""


@dataclass
class Agent:
    """An agent in a process of its own."""

    url: str
    process: subprocess.Popen[str]

    def stop(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGSTOP:  # one of its threads has to see it before the others stand still, too
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


@contextmanager
def agents_of(home: Path, count: int) -> Iterator[list[Agent]]:
    """So many agents that serve the store at `home`."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", AGENT, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(count)
    ]
    try:
        agents = []
        for process in processes:
            assert process.stdout is not None
            agents.append(Agent(process.stdout.readline().strip(), process))
        yield agents
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=WAIT_S)


def write_repo(folder: Path, files: int, rows: int, row_bytes: int) -> None:
    """Parquet files of noise, which nothing makes smaller; `id` counts from 0."""
    folder.mkdir()
    noise = np.random.default_rng(5)
    for number in range(files):
        data = [row.tobytes() for row in noise.integers(0, 256, (rows, row_bytes), dtype=np.uint8)]
        table = pa.table({"id": np.arange(number * rows, (number + 1) * rows), "noise": data})
        pq.write_table(table, folder / f"train-{number:05d}.parquet", compression="none", row_group_size=64)


def full_node(repo: str, settings: Settings) -> Manifest:
    """Bring the only split of a repo into the store of `settings`."""
    return local_job(data_request(repo, None, split="train", revision=None, columns=None), settings)[0][0]


def empty_node(full: Settings, home: Path, *peers: str) -> Settings:
    """A node with nothing, that knows the cluster's secret and these peers."""
    store = Store(home)
    keep_secret(store, ensure_secret(Store(full.home)))
    write_address(store, AgentAddress(NOWHERE, NodeId("empty"), 0, peers))
    return replace(full, home=home)


def environment(settings: Settings) -> dict[str, str]:
    """Of a process that reads with these settings."""
    return {
        **os.environ,
        "CRUCIBLE_HOME": str(settings.home),
        "HF_ENDPOINT": settings.endpoint,
        "CRUCIBLE_SHARD_BYTES": str(settings.shard_bytes),
    }
