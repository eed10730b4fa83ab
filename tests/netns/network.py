"""The bridge that hosts are on, and what happens to their links: cut, healed, one way only, slow, late.

The bridge is in a namespace of its own, so that only one link, ours, is among the machine's: the test process and the
Hub in it are at `Network.here`. Addresses are of 198.18.0.0/15, which is for tests of networks and routed nowhere.
"""

from __future__ import annotations

import ipaddress
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.netns.hosts import INIT, Host, attempt, do, end, inside, namespaces, plain_environment

_LOST = "02:00:00:00:00:00"
"""An address that no link has: what is sent there gets lost without a word."""


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
        self._holder, self._switch = namespaces([bridge], "net")
        try:
            self._on_switch("ip", "link", "add", "br0", "type", "bridge", "stp_state", "0", "forward_delay", "0")
            self._on_switch("ip", "link", "set", "br0", "up")
            link = f"cr{self._tag}"
            do("ip", "link", "add", link, "type", "veth", "peer", "name", "here", "netns", str(self._switch))
            self._plug("here")
            do("ip", "addr", "add", f"{self.here}/24", "dev", link)
            do("ip", "link", "set", link, "up")
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
        attempt(["ip", "link", "del", f"cr{self._tag}"])  # it would go by itself, but some time after its namespace
        end(self._holder)

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
        holder, pid = namespaces([INIT, f"{name}-{self._tag}", self.shm, *binds], "net", "mount", "uts", "ipc")
        environment = {**plain_environment(), **self.environment, "HOME": str(folder / "home")}
        host = Host(name, address, folder, port, environment, holder, pid)
        self._on_switch("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self._plug(port)
        for words in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            do("nsenter", "-t", str(pid), "--net", "ip", *words)
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
        attempt(["nsenter", "-t", str(host.pid), "--net", "tc", "qdisc", "del", "dev", "eth0", "root"])
        attempt(["nsenter", "-t", str(self._switch), "--net", "tc", "qdisc", "del", "dev", host.port, "root"])
        attempt(["nsenter", "-t", str(host.pid), "--net", "ip", "neigh", "flush", "dev", "eth0", "nud", "permanent"])

    def unplug(self, host: Host) -> None:
        """The host sees that its link has gone down."""
        self._on_switch("ip", "link", "set", host.port, "down")

    def mute(self, host: Host, *addresses: str) -> None:
        """What `host` sends to these addresses gets lost; what they send arrives. It is told nothing."""
        for address in addresses:
            inside(host, "ip", "neigh", "replace", address, "lladdr", _LOST, "dev", "eth0", "nud", "permanent")

    def unmute(self, host: Host, *addresses: str) -> None:
        for address in addresses:
            inside(host, "ip", "neigh", "del", address, "dev", "eth0")

    def limit(self, host: Host, bits: str | None) -> None:
        """What a host sends, and what it is sent, at most `bits` ("8mbit") a second each; None: as fast as can be."""
        how = ["replace", "dev"] if bits else ["del", "dev"]
        rate = ["tbf", "rate", bits, "burst", "64kb", "latency", "500ms"] if bits else []
        inside(host, "tc", "qdisc", *how, "eth0", "root", *rate)
        self._on_switch("tc", "qdisc", *how, host.port, "root", *rate)

    def delay(self, host: Host, each_way_s: float) -> Callable[[], None]:
        """Frames from and to a host come later by so much. Call what is returned to have it as it was.

        netem where the kernel has it, else a process that carries frames between the port and the bridge.
        """
        name = f"{host.port}-b"[-15:]
        lag = f"{each_way_s * 1e3:g}ms"
        netem = ["root", "netem", "delay", lag, "limit", "100000"]
        if attempt(["nsenter", "-t", str(host.pid), "--net", "tc", "qdisc", "add", "dev", "eth0", *netem]):
            self._on_switch("tc", "qdisc", "add", "dev", host.port, *netem)

            def undo() -> None:
                inside(host, "tc", "qdisc", "del", "dev", "eth0", "root")
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
            end(carrier)
            self._on_switch("ip", "link", "del", "far")
            self.heal(host)

        return stop

    def _plug(self, port: str) -> None:
        self._on_switch("ip", "link", "set", port, "master", "br0", "up")

    def _on_switch(self, *words: str) -> None:
        do("nsenter", "-t", str(self._switch), "--net", *words)


def _free_net() -> str:
    """The first three numbers of a network that no link of this machine is in."""
    listed = subprocess.run(["ip", "-4", "-br", "addr"], capture_output=True, text=True, timeout=30).stdout
    taken = [ipaddress.ip_interface(word).network for line in listed.splitlines() for word in line.split()[2:3]]
    while True:
        net = f"198.{18 + secrets.randbelow(2)}.{secrets.randbelow(254)}"
        if not any(one.overlaps(ipaddress.ip_network(f"{net}.0/24")) for one in taken):
            return net
