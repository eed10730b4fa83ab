"""A Ray cluster with one node a host, Ray's token authentication on, and a Hub beside it that all hosts can reach."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.hubserver.faults import FaultyHub
from tests.netns.hosts import Host, Started, eventually
from tests.netns.network import Network

PORT = 6379
HEALTH = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
"""A node that answers nothing is dead after about ten seconds; by default it takes Ray a minute."""
DEAD_AFTER_S = 10
ENVIRONMENT = {
    **HEALTH,
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # it kills workers for the memory that others on this machine take
    "CRUCIBLE_BACKOFF_CAP": "0.5",
    "CRUCIBLE_STALL": "1.5",
}
NODE = ("--num-cpus", "1", "--object-store-memory", str(80 << 20), "--include-log-monitor", "false")

_WATCH = """
import json, sys, time
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
known = None
while True:
    try:
        table = GcsClient(address=sys.argv[1]).get_all_node_info()
    except Exception:
        time.sleep(0.2)
        continue
    alive = {n.node_manager_address: i.hex() for i, n in table.items() if n.state == GcsNodeInfo.GcsNodeState.ALIVE}
    if alive != known:
        print(json.dumps(alive), flush=True)
        known = alive
    time.sleep(0.1)
"""


@dataclass
class Fleet:
    """The hosts of `network`, the first of which is the head."""

    network: Network
    hub: FaultyHub
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    watch: Started | None = None
    alive: dict[str, str] = field(default_factory=dict)
    """Address -> node id, of the nodes that Ray believes to be alive."""

    @property
    def head(self) -> Host:
        return self.network.hosts[0]

    @property
    def others(self) -> list[Host]:
        return self.network.hosts[1:]

    @property
    def address(self) -> str:
        return f"{self.head.address}:{PORT}"

    def start(self) -> None:
        """Start Ray on every host that has none, the head first, and wait until all know each other."""
        for host in self.network.hosts:
            self.give_token(host)
        if not self.head.called("gcs_server"):
            for host in self.network.hosts:
                self.stop_ray(host)
            own = f"--node-ip-address={self.head.address}"
            self.head.ray("start", "--head", own, f"--port={PORT}", "--include-dashboard=false", *NODE).output()
            self._watch()
        missing = [host for host in self.others if host.address not in self.alive or not host.called("raylet/raylet")]
        begun = []
        for host in missing:
            self.stop_ray(host)
            own = f"--node-ip-address={host.address}"
            begun.append(host.ray("start", f"--address={self.address}", own, *NODE))
        for command in begun:
            command.output()
        self.wait_for(*self.network.hosts)

    def _watch(self) -> None:
        if self.watch is not None:
            self.watch.kill()
        self.alive.clear()
        self.watch = self.head.python(_WATCH, self.address)
        lines = self.watch.lines()

        def follow() -> None:
            for line in lines:
                self.alive = json.loads(line)

        threading.Thread(target=follow, daemon=True).start()

    def wait_for(self, *hosts: Host, within_s: float = 90) -> None:
        """Until exactly these hosts have a node that is alive."""
        addresses = {host.address for host in hosts}
        eventually(f"alive are {sorted(addresses)}", lambda: self.alive.keys() == addresses, within_s)

    def give_token(self, host: Host) -> None:
        path = host.home / ".ray" / "auth_token"
        path.parent.mkdir(exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(self.token)

    def stop_ray(self, host: Host) -> None:
        """SIGKILL all of Ray in a host, by its processes' own ids: the commands of a test are no children of its."""
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(host.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        eventually(f"no Ray on {host.name}", lambda: not psutil.Process(host.pid).children())

    def empty(self) -> None:
        """Take the data out of all stores; what belongs to a node's daemons stays."""
        for host in self.network.hosts:
            for path in host.store.rglob("*"):
                if (path.is_file() or path.is_symlink()) and path.name not in ("VERSION", "agent.json", "secret"):
                    path.unlink(missing_ok=True)
            shutil.rmtree(host.home / ".cache" / "huggingface", ignore_errors=True)

    # --- what people run

    def prefetch(self, host: Host, repo: str, *words: str, **environment: str | None) -> Started:
        own = {"HF_ENDPOINT": self.hub.endpoint, **environment}
        command = ["prefetch", repo, "--split", "train", "--address", self.address, "--json", *words]
        return host.crucible(*command, **own)

    def rank(
        self,
        host: Host,
        repo: str,
        rank: int = 0,
        world: int = 1,
        seed: int | None = 7,
        stop_at: int = -1,
        gate: Path | None = None,
        **environment: str | None,
    ) -> Started:
        asked = {"load": [repo], "split": "train", "seed": seed, "batch": 100, "stop_at": stop_at, "gate": str(gate)}
        own = {"HF_ENDPOINT": self.hub.endpoint, "RANK": str(rank), "WORLD_SIZE": str(world), **environment}
        program = str(Path(__file__).with_name("rank.py"))
        return host.start(sys.executable, program, json.dumps(asked), **own)

    def nodes(self) -> list[dict[str, Any]]:
        """What `crucible nodes` says."""
        said = self.others[0].crucible("nodes", "--address", self.address, "--json").output()
        return [json.loads(line) for line in said.splitlines()]

    def shards(self) -> dict[str, set[str]]:
        """Host -> keys of the shards in its store."""
        return {h.name: {path.stem for path in (h.store / "shards").rglob("*.arrow")} for h in self.network.hosts}


def result(command: Started) -> dict[str, Any]:
    """What a command with --json, or a rank, printed: one object and nothing else."""
    (line,) = command.output().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found
