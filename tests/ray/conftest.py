"""Real raylets on this machine, each with its own store, all on the loopback address.

To start a raylet takes 3 s of two cores, a coordinator, an agent or a worker 1.5 s each. So the tests share one cluster
of two nodes (`start_nodes`), with empty stores for each test; what a test kills is a node that joined for it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import FOREIGN

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's own switch for systems where it runs on the loopback address only; read when Ray is imported."""
RANK_TIMEOUT_S = 150
WAIT_S = 60
SHARED = 2
NOWHERE = "http://127.0.0.1:9"
"""The Hub of a shared node's own environment: a job brings its own, and what asks this one is a bug that shows."""
PAIR = {"HF_ENDPOINT": NOWHERE, "CRUCIBLE_REPAIR_AFTER": "off"}
"""In the environment of the shared nodes. What one test loses, none is to see coming back minutes later."""
STAYS = ("VERSION", "agent.json", "secret")
"""What the daemons of a node have in its store; the rest is data."""
NOTICE = {"RAY_health_check_initial_delay_ms": "500", "RAY_health_check_period_ms": "500"}
"""A dead node is noticed after about 3 s instead of 15. One that is only slow has its 10 s to answer, as ever."""
NICE = {"RAY_worker_niceness": "0"}
"""Ray starts its workers with a niceness of 15: beside anything else that is busy, a thirtieth of a core."""

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
    scratch: Path
    """Where Ray keeps its sessions and logs."""
    cluster: Any = None
    nodes: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    @property
    def hf_home(self) -> Path:
        """HF_HOME of all nodes: they are on one machine."""
        return self.scratch / "hf"

    @property
    def failpoints(self) -> Path:
        """Where the processes of all nodes look whether they have to die; see `crucible.failpoints`."""
        return self.scratch / "failpoints"

    def start(self, home: Path, cpus: int = 1, **how: Any) -> None:
        """One raylet; `how` are more of Ray's own arguments for it.

        Neither the autoscaler's monitor nor the one that forwards logs, which nobody here asks.
        """
        with starting(self.scratch):
            node = self.cluster.add_node(
                num_cpus=cpus,
                env_vars={
                    **self.environment,
                    "CRUCIBLE_HOME": str(home),
                    "CRUCIBLE_FAILPOINTS": str(self.failpoints),
                },
                include_dashboard=False,
                include_log_monitor=False,
                no_monitor=True,
                object_store_memory=80 << 20,
                wait=not self.nodes,  # for the head; the others start together
                **how,
            )
        self.nodes.append(node)

    def join(self, home: Path, **how: Any) -> None:
        """One more node, later."""
        self.homes.append(home)
        self.start(home, **how)
        self.cluster.wait_for_nodes()

    def kill_node(self, number: int) -> None:
        """SIGKILL the raylet and all its workers, as a power cut would.

        The workers too: on a busy machine they take seconds to notice that their raylet is gone, and work on.
        """
        assert number >= SHARED, "the others need this one after this test"
        node = self.nodes[number]
        (raylet,) = node.all_processes["raylet"]
        process = psutil.Process(raylet.process.pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.kill()
        self.cluster.remove_node(node, allow_graceful=False)

    def leave(self) -> None:
        """Kill the nodes that joined, those that are left of them, and wait until Ray knows."""
        for node in self.nodes[SHARED:]:
            if node in self.cluster.worker_nodes:
                self.cluster.remove_node(node, allow_graceful=False)
        deadline = time.monotonic() + WAIT_S
        while len(self.alive()) > SHARED:
            assert time.monotonic() < deadline, "Ray does not notice that a node is dead"
            time.sleep(0.05)

    def alive(self) -> list[str]:
        """Ids of the nodes that Ray believes to be alive."""
        table = self.cluster.global_state.node_table()
        return [str(node["NodeID"]) for node in table if node["Alive"]]

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
def starting(scratch: Path) -> Iterator[None]:
    """The environment in which a raylet starts, and which its workers inherit; this process's own again afterwards.

    Ray's folder is not the shared one, where `--address auto` would find a test's cluster.
    """
    before = dict(os.environ)
    for name in [name for name in before if name.startswith(FOREIGN)]:
        del os.environ[name]
    os.environ.update({**NOTICE, **NICE, "RAY_TMPDIR": str(scratch), "HF_HOME": str(scratch / "hf")})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


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
        scratch = Path(tempfile.mkdtemp(prefix="cr-"))  # a short path, for Ray's sockets
        nodes = Nodes([folder / f"node-{number}" for number in range(count)], dict(environment), scratch)
        nodes.cluster = Cluster()
        try:
            for home in nodes.homes:
                nodes.start(home, cpus)
            nodes.cluster.wait_for_nodes()
            yield nodes
        finally:
            ray.shutdown()
            nodes.cluster.shutdown()
            shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture(autouse=True)
def _not_after_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the Ray that a command of a test embeds."""
    for name, value in NICE.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """The two nodes that all tests share."""
    with ray_nodes(tmp_path_factory.mktemp("pair"), SHARED, PAIR) as nodes:
        yield nodes


@pytest.fixture(scope="module", autouse=True)
def _no_driver_left() -> Iterator[None]:
    """A module's connection to its cluster ends with it."""
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture
def start_nodes(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`start_nodes(count, hub.endpoint, **settings)` -> Nodes with empty stores; this process is a driver on node 0.

    Two of them are the ones that all tests share; those with a higher number joined for this test, which may kill them.
    """
    made: list[Nodes] = []

    def start(count: int, endpoint: str, **environment: str) -> Nodes:
        shared: Nodes = request.getfixturevalue("pair")
        variables = {"HF_ENDPOINT": endpoint, "CRUCIBLE_BACKOFF_CAP": "0.2", **environment}
        nodes = replace(shared, homes=[*shared.homes], nodes=[*shared.nodes], environment=variables)
        made.append(nodes)
        for home in (*nodes.homes, nodes.hf_home):
            empty(home)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("CRUCIBLE_HOME", str(nodes.homes[0]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own
            import ray

            if not ray.is_initialized():  # one connection for a module: every new one starts its own workers
                ray.init(address=nodes.address, log_to_driver=False, configure_logging=False)
            for number in range(SHARED, count):
                nodes.join(tmp_path / f"node-{number}")
        return nodes

    yield start
    for nodes in reversed(made):
        nodes.leave()


def empty(home: Path) -> None:
    """Take all data out of a store; the folders stay, and so does what belongs to the node's daemons."""
    for path in home.rglob("*"):
        if (path.is_file() or path.is_symlink()) and path.name not in STAYS:
            with suppress(FileNotFoundError):
                path.unlink()
