"""The suite's cluster: three raylets with a store each, a private Hub, and the verbs that break and mend them.

Node 0 is the head's. A node that is killed takes its workers along, and comes back as another Ray node with the store
it had, or with an empty one. Stores can be full or read-only for a while where the tests run as root: each is then a
small file system of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from crucible.hub.server import HubOptions, User
from crucible.workers.tasks import COORDINATOR, NAMESPACE
from tests.chaos.schedule import SLOTS
from tests.hubserver.faults import Fault, FaultyHub
from tests.ray.conftest import Nodes, empty, ray_nodes

TOKEN = "hf_chaos_token_that_only_the_hub_may_see"
WAIT_S = 90
STORE_BYTES = 96 << 20
STREAMS, PART = 2, 64 << 10
CONNECTIONS = 8
SETTINGS = {
    "CRUCIBLE_BACKOFF_CAP": "0.2", "CRUCIBLE_SHARD_BYTES": "120000", "CRUCIBLE_PART_BYTES": str(PART),
    "CRUCIBLE_STREAMS": str(STREAMS), "CRUCIBLE_CONNECTIONS": str(CONNECTIONS), "CRUCIBLE_STALL": "1",
    "HF_HUB_DOWNLOAD_TIMEOUT": "4", "CRUCIBLE_TRIES": "24",
}  # fmt: skip

NODES = {"HF_ENDPOINT": "http://127.0.0.1:9", "CRUCIBLE_REPAIR_AFTER": "2"}
"""What the nodes have in their environment: no Hub of their own, no token, and little patience with a lost node."""


class Stage:
    """What a story is played on. Used by one thread."""

    def __init__(self, nodes: Nodes, hub: FaultyHub, *, mounts: bool) -> None:
        self.ray_nodes, self.hub, self.mounts = nodes, hub, mounts
        self.points = nodes.failpoints
        self.points.mkdir(exist_ok=True)
        self.homes = list(nodes.homes)
        self._up: list[Any] = list(nodes.nodes)
        """Slot -> Ray's node, None while it is down."""
        self._mending: list[tuple[float, Callable[[], None]]] = []
        self.environment = {**SETTINGS, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN}
        """Of drivers and ranks. The nodes' own has neither the Hub nor the token."""

    @property
    def address(self) -> str:
        return self.ray_nodes.address

    def up(self) -> list[int]:
        """The slots that have a node now."""
        return [slot for slot, node in enumerate(self._up) if node is not None]

    def node_id(self, slot: int) -> str:
        return str(self._up[slot].node_id)

    # --- processes

    def processes(self, slot: int, title: str) -> list[psutil.Process]:
        """The workers of a node that Ray has given a title with `title`, the newest first."""
        if self._up[slot] is None:
            return []
        found = []
        with suppress(psutil.NoSuchProcess):
            for child in self._raylet(slot).children(recursive=True):
                with suppress(psutil.Error):
                    if title in " ".join(child.cmdline()):
                        found.append(child)
        return sorted(found, key=lambda child: -child.pid)

    def anywhere(self, title: str) -> list[psutil.Process]:
        return [one for slot in self.up() for one in self.processes(slot, title)]

    def _raylet(self, slot: int) -> psutil.Process:
        (raylet,) = self._up[slot].all_processes["raylet"]
        return psutil.Process(raylet.process.pid)

    # --- nodes

    def kill_node(self, slot: int) -> None:
        """SIGKILL the raylet and its workers, as a power cut would. The disk keeps what it has."""
        assert slot > 0, "the head's node cannot be spared"
        raylet = self._raylet(slot)
        for each in (raylet, *raylet.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.kill()
        self.ray_nodes.cluster.remove_node(self._up[slot], allow_graceful=False)
        self._up[slot] = None

    def start_node(self, slot: int) -> None:
        """A node in this slot again, on the store that is there."""
        if self._up[slot] is None:
            self.ray_nodes.start(self.homes[slot])
            self._up[slot] = self.ray_nodes.nodes[-1]

    # --- disks

    def lose_disk(self, slot: int) -> None:
        for path in self.homes[slot].iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def fill_disk(self, slot: int) -> Callable[[], None]:
        """Leave no room on a store's file system. Returns what gives it back."""
        ballast = self.homes[slot].parent / f"{self.homes[slot].name}.disk" / "ballast"
        with ballast.open("wb", 0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        return lambda: ballast.unlink(missing_ok=True)

    def freeze_disk(self, slot: int) -> Callable[[], None] | None:
        """Make a store read-only. Returns what undoes it; None if somebody has a file open for writing just now."""
        home = str(self.homes[slot])
        for _ in range(20):
            if not _mount("-o", "remount,ro,bind", home):
                return lambda: _must(_mount("-o", "remount,rw,bind", home))
            time.sleep(0.02)
        return None

    def shift_clock(self, slot: int, by_s: float) -> int:
        """Let what lies around in a store look as old, or new, as a clock that jumped would. Returns how many."""
        touched = 0
        for name in ("raw", "leases", "locks", "tmp", "early"):
            for path in (self.homes[slot] / name).rglob("*"):
                with suppress(OSError):
                    when = path.stat().st_mtime + by_s
                    os.utime(path, (when, when))
                    touched += 1
        return touched

    def flip_a_byte(self, slot: int, dice: float) -> str | None:
        """Change one byte somewhere in a shard on a disk; its key, or None if the store has no shard."""
        shards = sorted((self.homes[slot] / "shards").rglob("*.arrow"))
        if not shards:
            return None
        path = shards[int(dice * len(shards))]
        with path.open("r+b") as file:
            size = path.stat().st_size
            file.seek(int(size * dice))
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 0x20]))
        return path.stem

    def arm(self, point: str, times: int) -> None:
        """Let whoever passes a failpoint the `times`-th time die there."""
        (self.points / point).write_text(str(times))

    def reached(self) -> list[str]:
        """Failpoints at which somebody has died since the last `reset`."""
        return [path.name.removesuffix(".reached") for path in self.points.glob("*.reached")]

    def disarm(self) -> None:
        """Nobody dies at a failpoint any more; which were reached stays."""
        for path in self.points.iterdir():
            if not path.name.endswith(".reached"):
                path.unlink(missing_ok=True)

    # --- mending

    def later(self, seconds: float, mend: Callable[[], None]) -> None:
        """Undo a fault after a while; `tick` does it."""
        self._mending.append((time.monotonic() + seconds, mend))

    def tick(self, *, all_of_it: bool = False) -> None:
        """Mend what is due, or everything."""
        now = time.monotonic()
        due = [mend for when, mend in self._mending if all_of_it or when <= now]
        self._mending = [] if all_of_it else [(when, mend) for when, mend in self._mending if when > now]
        for mend in due:
            mend()

    def stop(self, process: psutil.Process, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later."""
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGSTOP)
            self.later(seconds, lambda: _go_on(process))

    def whole(self) -> None:
        """Nothing is broken any more, all nodes are there, and Ray knows it."""
        self.tick(all_of_it=True)
        self.disarm()
        self.hub.clear_faults()
        for slot in range(SLOTS):
            self.start_node(slot)
        self.ray_nodes.cluster.wait_for_nodes()
        wanted = {self.node_id(slot) for slot in range(SLOTS)}
        deadline = time.monotonic() + WAIT_S
        while set(self.ray_nodes.alive()) != wanted:
            assert time.monotonic() < deadline, "Ray does not notice which nodes are dead"
            time.sleep(0.05)

    def reset(self) -> None:
        """Whole again, with empty stores and an empty log, and nobody who remembers what they held."""
        self.whole()
        self._end_coordinator()
        for home in (*self.homes, self.ray_nodes.hf_home):
            empty(home)
        for path in self.points.iterdir():
            path.unlink()
        self.hub.clear_log()

    def _end_coordinator(self) -> None:
        """The next job starts one that knows nothing. First what it has begun comes to its end."""
        import ray

        deadline = time.monotonic() + WAIT_S
        with suppress(ValueError):  # there is none of that name
            while True:
                ray.kill(ray.get_actor(COORDINATOR, namespace=NAMESPACE))
                assert time.monotonic() < deadline, "a killed coordinator stays"
                time.sleep(0.05)
        while self.anywhere("ray::item") or self.anywhere("ray::copy"):
            assert time.monotonic() < deadline, "a task of the last story does not end"
            time.sleep(0.05)


@contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    """Start everything; at the end nothing is left of it."""
    _sweep_mounts()
    homes = [folder / f"node-{slot}" for slot in range(SLOTS)]
    mounted: list[Path] = []
    try:
        mounts = os.geteuid() == 0
        for home in homes:
            mounts = mounts and _own_disk(home, mounted)
        options = HubOptions(tokens={TOKEN: User("ann")})
        with (
            FaultyHub(folder / "hub", options=options) as hub,
            ray_nodes(folder, SLOTS, NODES) as nodes,
            _driver(nodes.address, homes[0]),
        ):
            made = Stage(nodes, hub, mounts=mounts)
            try:
                yield made
            finally:
                made.tick(all_of_it=True)
    finally:
        for path in reversed(mounted):
            subprocess.run(["umount", "-l", str(path)], timeout=20, check=False)


@contextmanager
def _driver(address: str, home: Path) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        import ray

        before = os.environ.get("CRUCIBLE_HOME")
        os.environ["CRUCIBLE_HOME"] = str(home)
        ray.init(address=address, log_to_driver=False, configure_logging=False)
        try:
            yield
        finally:
            ray.shutdown()
            os.environ.pop("CRUCIBLE_HOME")
            if before is not None:
                os.environ["CRUCIBLE_HOME"] = before


def _own_disk(home: Path, mounted: list[Path]) -> bool:
    """Put a store on a small file system of its own, where it is a mount that can be made read-only."""
    disk = home.parent / f"{home.name}.disk"
    disk.mkdir(parents=True)
    if _mount("-t", "tmpfs", "-o", f"size={STORE_BYTES}", f"chaos-{os.getpid()}", str(disk)):
        return False
    mounted.append(disk)
    (disk / "store").mkdir()
    home.mkdir()
    if _mount("--bind", str(disk / "store"), str(home)):
        return False
    mounted.append(home)
    return True


def _mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], capture_output=True, timeout=20, check=False).returncode


def _must(code: int) -> None:
    assert code == 0, "a read-only store could not be made writable again"


def _go_on(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGCONT)


def _sweep_mounts() -> None:
    """What a run that was killed has left mounted."""
    if sys.platform != "linux" or os.geteuid():
        return
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        device, path = line.split(" ")[:2]
        owner = device.removeprefix("chaos-")
        if device.startswith("chaos-") and owner.isdigit() and not psutil.pid_exists(int(owner)):
            subprocess.run(["umount", "-l", path.encode().decode("unicode_escape")], timeout=20, check=False)


def fault_of(what: str, times: int, seconds: float) -> list[Fault]:
    """A Hub fault by its name in a story."""
    match what:
        case "429":
            return [Fault("429", path="*/resolve/*", origin="hub", wait=max(1.0, seconds))]
        case "503" | "500":
            return [Fault("status", status=int(what), times=2 * times)]
        case "flip":
            return [Fault("flip", origin="cdn", after=20_000, times=1)]
        case "cut" | "stall":
            return [Fault(what, origin="cdn", after=20_000, times=times)]
        case "drip":
            return [Fault("slow", origin="cdn", piece=4000, wait=0.1, times=times)]
        case "down":
            return [Fault("reset")]
        case "reset":
            return [Fault("reset", times=2 * times)]
    return [Fault(what, origin="cdn", times=times)]  # type: ignore[arg-type]
