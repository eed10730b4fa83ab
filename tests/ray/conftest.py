"""Real raylets on this machine, each with its own store, all on the loopback address."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's own switch for systems where it runs on the loopback address only; read when Ray is imported."""
RANK_TIMEOUT_S = 150
NOTICE = {"RAY_health_check_initial_delay_ms": "500", "RAY_health_check_period_ms": "500"}
"""A dead node is noticed after about 3 s instead of 15. One that is only slow has its 10 s to answer, as ever."""

_RANK = """
import hashlib, json, sys
import crucible
arguments = json.loads(sys.argv[1])
dataset = crucible.load_dataset(*arguments["load"], split=arguments["split"], streaming=True)
dataset = dataset.shuffle(seed=arguments["seed"]) if arguments["seed"] is not None else dataset
dataset = dataset.shard().with_format("arrow").batch(arguments["batch"])
epochs = []
for epoch in range(arguments["epochs"]):
    dataset.set_epoch(epoch)
    rows = (row for batch in dataset for row in batch.to_pylist())
    epochs.append([hashlib.blake2b(repr(row).encode(), digest_size=12).hexdigest() for row in rows])
assert "ray" not in sys.modules
print(json.dumps({"epochs": epochs, "note": dict(dataset.read_counts())}))
"""


@dataclass
class Nodes:
    """A Ray cluster of raylets with a store each. `nodes[i]` has its store in `homes[i]`."""

    homes: list[Path]
    environment: dict[str, str]
    cluster: Any = None
    nodes: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def start(self, home: Path, cpus: int = 1) -> None:
        node = self.cluster.add_node(
            num_cpus=cpus,
            env_vars={**self.environment, "CRUCIBLE_HOME": str(home)},
            include_dashboard=False,
            object_store_memory=80 << 20,
            wait=not self.nodes,  # for the head; the others start together
        )
        self.nodes.append(node)

    def join(self, home: Path) -> None:
        """One more node, later."""
        self.homes.append(home)
        self.start(home)
        self.cluster.wait_for_nodes()

    def kill_node(self, number: int) -> None:
        """SIGKILL the raylet and all its workers, as a power cut would."""
        self.cluster.remove_node(self.nodes[number], allow_graceful=False)

    def ranks(
        self, *load: str, split: str, seed: int | None = 7, epochs: int = 2, batch: int = 32, **environment: str
    ) -> list[dict[str, Any]]:
        """What one plain process a node delivered: {"epochs": [[row digest, ...], ...], "note": {...}}."""
        arguments = json.dumps({"load": load, "split": split, "seed": seed, "epochs": epochs, "batch": batch})
        processes = []
        for rank, home in enumerate(self.homes):
            own = {**os.environ, **self.environment, **environment, "CRUCIBLE_HOME": str(home)}
            own.update(RANK=str(rank), WORLD_SIZE=str(len(self.homes)))
            command = [sys.executable, "-c", _RANK, arguments]
            processes.append(
                subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        found = []
        try:
            for process in processes:
                out, problem = process.communicate(timeout=RANK_TIMEOUT_S)
                assert process.returncode == 0, problem
                found.append(json.loads(out))
        finally:
            for process in processes:
                process.kill()
                process.wait(10)
        return found


@contextmanager
def ray_nodes(folder: Path, count: int, environment: Mapping[str, str], *, cpus: int = 1) -> Iterator[Nodes]:
    """Start `count` raylets, and end them by their own ids."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, at import and while it starts
        os.environ.update(LOOPBACK)
        import ray
        from ray._private import ray_constants
        from ray.cluster_utils import Cluster

        ray_constants.ENABLE_RAY_CLUSTER = False
        # a short path, for Ray's sockets; not the shared one, where `--address auto` would find a test's cluster
        scratch = tempfile.mkdtemp(prefix="cr-")
        ours = {**NOTICE, "RAY_TMPDIR": scratch}
        before = {name: os.environ.get(name) for name in ours}
        os.environ.update(ours)
        nodes = Nodes([folder / f"node-{number}" for number in range(count)], dict(environment))
        nodes.cluster = Cluster()
        try:
            for home in nodes.homes:
                nodes.start(home, cpus)
            nodes.cluster.wait_for_nodes()
            yield nodes
        finally:
            ray.shutdown()
            nodes.cluster.shutdown()
            for name, value in before.items():
                os.environ.pop(name)
                os.environ.update({} if value is None else {name: value})
            shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def start_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`start_nodes(count, hub.endpoint)` -> Nodes; this process then works as a driver on node 0."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(count: int, endpoint: str, *, cpus: int = 1, **environment: str) -> Nodes:
            variables = {"HF_ENDPOINT": endpoint, "CRUCIBLE_BACKOFF_CAP": "0.2", **environment}
            nodes = stack.enter_context(ray_nodes(tmp_path / "nodes", count, variables, cpus=cpus))
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            monkeypatch.setenv("CRUCIBLE_HOME", str(nodes.homes[0]))
            return nodes

        yield start
