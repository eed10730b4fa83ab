"""Hosts on one machine: namespaces with addresses, names, homes and /dev/shm of their own, on a bridge. Needs root.

A host is one process (`_INIT`) that is the first of a process-id namespace and has network, mount, uts and ipc
namespaces. It lives as long as the pipe to it: when the test process ends, however it ends, the pipe closes, that
process ends, and the kernel ends every process of the host and takes its links away. So there is nothing to sweep:
nothing of this has a name in a file system, and no process of another's is ever touched.

The bridge is in a namespace of its own, so that only one link, ours, is among the machine's: the test process and the
Hub in it are at `Network.here`. Addresses are of 198.18.0.0/15, which is for tests of networks and routed nowhere.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
COMMAND_S = 180
"""Most that one command may take in a host."""
LEAVE_S = 30
_LOST = "02:00:00:00:00:00"
"""An address that no link has: what is sent there gets lost without a word."""

_INIT = """
import os, signal, subprocess, sys
name, shm, *binds = sys.argv[1:]
do = lambda *words: subprocess.run(words, check=True)
do("mount", "--make-rprivate", "/")
do("mount", "-t", "proc", "proc", "/proc")
do("mount", "-t", "tmpfs", "-o", "size=" + shm, "tmpfs", "/dev/shm")
for bind in binds:
    do("mount", "--bind", *bind.split("="))
do("hostname", name)
do("ip", "link", "set", "lo", "up")
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the first process of a system buries all orphans
print("up", flush=True)
sys.stdin.read()
"""


def why_not() -> str:
    """Why there can be no hosts here; empty when there can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    missing = [tool for tool in ("ip", "tc", "ss", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)} (iproute2 and util-linux)"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "true"], capture_output=True)
    return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.decode().strip()}"


def _namespaces(arguments: Sequence[str], *kinds: str) -> tuple[subprocess.Popen[str], int]:
    """(what holds the pipe, pid of the first process) of new namespaces, in which `_INIT` or the like says "up"."""
    command = ["unshare", *(f"--{kind}" for kind in kinds), "--pid", "--fork", "--kill-child=SIGKILL"]
    process = subprocess.Popen(
        [*command, sys.executable, "-I", "-S", "-c", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n", "a namespace could not be made"
    (first,) = psutil.Process(process.pid).children()
    return process, first.pid


def _end(process: subprocess.Popen[str]) -> None:
    """Close the pipe, wait until the kernel has ended all that lived with it."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(LEAVE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(LEAVE_S)
    if process.stdout is not None:
        process.stdout.close()


class Started:
    """A command that runs in a host."""

    def __init__(self, process: subprocess.Popen[str], what: str) -> None:
        self._process, self._what = process, what

    def end(self, timeout_s: float = COMMAND_S) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) when it has ended; killed when it does not in time."""
        try:
            out, err = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self._process.communicate(timeout=LEAVE_S)
            raise AssertionError(f"{self._what}: not over after {timeout_s:g} s\n{out}\n{err}") from None
        return self._process.returncode, out, err

    def output(self, timeout_s: float = COMMAND_S) -> str:
        """Its stdout; it must succeed."""
        code, out, err = self.end(timeout_s)
        assert code == 0, f"{self._what}: exit code {code}\n{out}\n{err}"
        return out

    def lines(self) -> Iterable[str]:
        """Its stdout as it comes, for one who asks for nothing else."""
        assert self._process.stdout is not None
        return self._process.stdout

    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL the command itself, by its own id: `nsenter` is only its parent."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        self._process.kill()

    def close(self) -> None:
        """Kill it if it still runs, and forget it."""
        if self.running():
            self.kill()
        self._process.wait(LEAVE_S)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                with suppress(ValueError):  # another thread is reading it, and will see its end
                    pipe.close()


@dataclass
class Host:
    """One host. Its commands see its own network, processes, name, /dev/shm and home, and this machine's files."""

    name: str
    address: str
    folder: Path
    """What is its own: `home`, and what it has as /tmp/ray."""
    port: str
    """Its port on the bridge."""
    environment: dict[str, str]
    holder: subprocess.Popen[str] = field(repr=False)
    pid: int
    """Of its first process, as the machine sees it."""
    commands: list[Started] = field(default_factory=list, repr=False)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def store(self) -> Path:
        """Where crucible keeps its store when nobody says otherwise."""
        return self.home / ".cache" / "crucible"

    def start(self, *words: str, **environment: str | None) -> Started:
        """Begin a command. `environment` on top of the host's; None takes a variable away."""
        own = {**self.environment, **environment}
        enter = ["nsenter", "-t", str(self.pid), "--net", "--mount", "--uts", "--ipc", "--pid", f"--wd={self.home}"]
        process = subprocess.Popen(
            [*enter, *words],
            env={name: value for name, value in own.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.commands.append(started := Started(process, f"{self.name}: {' '.join(words)[:200]}"))
        return started

    def run(self, *words: str, timeout_s: float = COMMAND_S, **environment: str | None) -> str:
        """The stdout of a command, which must succeed."""
        return self.start(*words, **environment).output(timeout_s)

    def python(self, code: str, *arguments: str, **environment: str | None) -> Started:
        return self.start(sys.executable, "-c", code, *arguments, **environment)

    def crucible(self, *words: str, **environment: str | None) -> Started:
        return self.start(sys.executable, "-m", "crucible", *words, **environment)

    def ray(self, *words: str, **environment: str | None) -> Started:
        return self.start(str(Path(sys.executable).with_name("ray")), *words, **environment)

    def processes(self) -> list[psutil.Process]:
        """All of the host, but the first."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children(recursive=True) + self._entered()
        return []

    def _entered(self) -> list[psutil.Process]:
        # what came in by nsenter is the child of nsenter, until that is over
        found = []
        for command in self.commands:
            with suppress(psutil.NoSuchProcess):
                found += psutil.Process(command._process.pid).children(recursive=True)
        return found

    def called(self, *titles: str) -> list[psutil.Process]:
        """Processes of the host whose command line has one of `titles`."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if any(title in line for title in titles):
                    found.append(process)
        return found

    def listening(self) -> dict[str, list[str]]:
        """process name -> the addresses that it accepts TCP connections on."""
        found: dict[str, list[str]] = {}
        for line in self.run("ss", "-Hltnp").splitlines():
            address, owner = line.split()[3], line.partition('(("')[2].partition('"')[0]
            found.setdefault(owner, []).append(address)
        return found

    def off(self) -> None:
        """As if the power were cut: every process ends, and the links go."""
        self.close_commands()
        _end(self.holder)

    def close_commands(self, but: Started | None = None) -> None:
        """End what was begun in this host, all but one."""
        for command in self.commands:
            if command is not but:
                command.close()
        self.commands = [command for command in self.commands if command is but]


@dataclass
class Network:
    """Hosts on a bridge. `with Network(folder, ["alpha", "beta"], environment) as network:` ends them all."""

    folder: Path
    names: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    shm: str = "256m"
    """Size of a host's /dev/shm."""
    hosts: list[Host] = field(default_factory=list)
    here: str = ""
    """The address of this process, which is no host."""

    def __enter__(self) -> Network:
        self._tag = secrets.token_hex(3)
        self._net = _free_net()
        self.here = f"{self._net}.1"
        bridge = "import sys\nprint('up', flush=True)\nsys.stdin.read()"
        self._holder, self._switch = _namespaces([bridge], "net")
        try:
            self._on_switch("ip", "link", "add", "br0", "type", "bridge", "stp_state", "0", "forward_delay", "0")
            self._on_switch("ip", "link", "set", "br0", "up")
            link = f"cr{self._tag}"
            _do("ip", "link", "add", link, "type", "veth", "peer", "name", "here", "netns", str(self._switch))
            self._plug("here")
            _do("ip", "addr", "add", f"{self.here}/24", "dev", link)
            _do("ip", "link", "set", link, "up")
            table = [f"{self._address(number)} {name}" for number, name in enumerate(self.names)]
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *table, ""]))
            for name in self.names:
                self.hosts.append(self._host(name))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.off()
        _try(["ip", "link", "del", f"cr{self._tag}"])  # it would go by itself, but some time after its namespace
        _end(self._holder)

    def __getitem__(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)

    def _address(self, number: int) -> str:
        return f"{self._net}.{11 + number}"

    def _host(self, name: str) -> Host:
        folder = self.folder / name
        for part in ("home", "ray"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)  # only to have something to hide
        address, port = self._address(self.names.index(name)), f"port-{name}"[:15]
        binds = [f"{folder / 'ray'}=/tmp/ray", f"{self.folder / 'hosts'}=/etc/hosts"]
        holder, pid = _namespaces([_INIT, f"{name}-{self._tag}", self.shm, *binds], "net", "mount", "uts", "ipc")
        environment = {**_plain_environment(), **self.environment, "HOME": str(folder / "home")}
        host = Host(name, address, folder, port, environment, holder, pid)
        self._on_switch("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self._plug(port)
        for words in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            _do("nsenter", "-t", str(pid), "--net", "ip", *words)
        return host

    def reboot(self, name: str) -> Host:
        """A host that went off comes up again: its disk as it was, no process of before."""
        self[name].off()
        new = self._host(name)
        self.hosts = [new if host.name == name else host for host in self.hosts]
        return new

    # --- what happens to links

    def cut(self, host: Host) -> None:
        """The bridge takes and gives nothing on this host's port; the host still believes to be connected."""
        self._on_switch("ip", "link", "set", host.port, "nomaster")

    def heal(self, host: Host) -> None:
        self._plug(host.port)

    def restore(self, host: Host) -> None:
        """A link as it was at first, whatever has been done to it; no delay, whose own undoing must be called."""
        self._plug(host.port)
        _try(["nsenter", "-t", str(host.pid), "--net", "tc", "qdisc", "del", "dev", "eth0", "root"])
        _try(["nsenter", "-t", str(self._switch), "--net", "tc", "qdisc", "del", "dev", host.port, "root"])
        _try(["nsenter", "-t", str(host.pid), "--net", "ip", "neigh", "flush", "dev", "eth0", "nud", "permanent"])

    def unplug(self, host: Host) -> None:
        """The host sees that its link has gone down."""
        self._on_switch("ip", "link", "set", host.port, "down")

    def mute(self, host: Host, *addresses: str) -> None:
        """What `host` sends to these addresses gets lost; what they send arrives. It is told nothing."""
        for address in addresses:
            _in(host, "ip", "neigh", "replace", address, "lladdr", _LOST, "dev", "eth0", "nud", "permanent")

    def unmute(self, host: Host, *addresses: str) -> None:
        for address in addresses:
            _in(host, "ip", "neigh", "del", address, "dev", "eth0")

    def limit(self, host: Host, bits: str | None) -> None:
        """What a host sends, and what it is sent, at most `bits` ("8mbit") a second each; None: as fast as can be."""
        how = ["replace", "dev"] if bits else ["del", "dev"]
        rate = ["tbf", "rate", bits, "burst", "64kb", "latency", "500ms"] if bits else []
        _in(host, "tc", "qdisc", *how, "eth0", "root", *rate)
        self._on_switch("tc", "qdisc", *how, host.port, "root", *rate)

    def delay(self, host: Host, each_way_s: float) -> Callable[[], None]:
        """Frames from and to a host come later by so much. Call what is returned to have it as it was.

        netem where the kernel has it, else a process that carries frames between the port and the bridge.
        """
        name = f"{host.port}-b"[-15:]
        lag = f"{each_way_s * 1e3:g}ms"
        netem = ["root", "netem", "delay", lag, "limit", "100000"]
        if _try(["nsenter", "-t", str(host.pid), "--net", "tc", "qdisc", "add", "dev", "eth0", *netem]):
            self._on_switch("tc", "qdisc", "add", "dev", host.port, *netem)

            def undo() -> None:
                _in(host, "tc", "qdisc", "del", "dev", "eth0", "root")
                self._on_switch("tc", "qdisc", "del", "dev", host.port, "root")

            return undo
        self.cut(host)
        self._on_switch("ip", "link", "add", "far", "type", "veth", "peer", "name", name)
        self._on_switch("ip", "link", "set", "far", "up")
        self._plug(name)
        enter = ["nsenter", "-t", str(self._switch), "--net", sys.executable]
        carrier = subprocess.Popen(
            [*enter, str(Path(__file__).with_name("frames.py")), host.port, "far", str(each_way_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert carrier.stdout is not None
        assert carrier.stdout.readline() == "up\n", "frames are not carried"

        def stop() -> None:
            _end(carrier)
            self._on_switch("ip", "link", "del", "far")
            self.heal(host)

        return stop

    def _plug(self, port: str) -> None:
        self._on_switch("ip", "link", "set", port, "master", "br0", "up")

    def _on_switch(self, *words: str) -> None:
        _do("nsenter", "-t", str(self._switch), "--net", *words)


def _in(host: Host, *words: str) -> None:
    _do("nsenter", "-t", str(host.pid), "--net", *words)


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}"


def _try(words: Sequence[str]) -> bool:
    return subprocess.run(words, capture_output=True, timeout=30).returncode == 0


def _free_net() -> str:
    """The first three numbers of a network that no link of this machine is in."""
    listed = subprocess.run(["ip", "-4", "-br", "addr"], capture_output=True, text=True, timeout=30).stdout
    taken = [ipaddress.ip_interface(word).network for line in listed.splitlines() for word in line.split()[2:3]]
    while True:
        net = f"198.{18 + secrets.randbelow(2)}.{secrets.randbelow(254)}"
        if not any(one.overlaps(ipaddress.ip_network(f"{net}.0/24")) for one in taken):
            return net


def _plain_environment() -> dict[str, str]:
    """As after a login, but for where this checkout's Python code is."""
    return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PYTHONPATH": str(ROOT), "USER": "root", "TERM": "dumb"}


def eventually(what: str, true: Callable[[], Any], within_s: float = 60) -> Any:
    """What `true` gives once it gives anything true; a failure that says `what` if it never does in time."""
    deadline = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < deadline, f"not after {within_s:g} s: {what}"
        time.sleep(0.05)
    return found


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
