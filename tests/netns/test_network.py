"""The hosts themselves: a test that says "the link was cut" must have cut it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.netns.hosts import ROOT, Host, alive, eventually
from tests.netns.network import Network

_ECHO = """
import socket
server = socket.create_server(("", 7000))
print("up", flush=True)
while True:
    with server.accept()[0] as one:
        while data := one.recv(1 << 16):
            one.sendall(data)
"""
_ASK = """
import socket, sys, threading, time
began = time.monotonic()
size = int(sys.argv[2])
try:
    with socket.create_connection((sys.argv[1], 7000), 1.5) as one:
        one.settimeout(5)
        threading.Thread(target=one.sendall, args=(bytes(size),), daemon=True).start()
        got = 0
        while got < size:
            got += len(one.recv(1 << 20))
    print(time.monotonic() - began)
except OSError:
    print("lost")
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Network, Host, Host]]:
    with Network(tmp_path_factory.mktemp("hosts"), ["one", "two"]) as network:
        one, two = network.hosts
        assert next(iter(two.python(_ECHO).lines())) == "up\n"
        yield network, one, two


def asked(one: Host, two: Host, size: int = 2) -> float | None:
    """Seconds until `size` bytes came back; None when they did not."""
    said = one.python(_ASK, two.address, str(size)).output().strip()
    return None if said == "lost" else float(said)


def test_a_host_has_an_address_a_name_a_home_and_shared_memory_of_its_own(two: tuple[Network, Host, Host]) -> None:
    network, one, other = two
    assert one.run("hostname").startswith("one-")
    assert one.run("sh", "-c", "echo ~").strip() == str(one.home) != str(other.home)
    assert one.address in one.run("ip", "-br", "addr", "show", "eth0")
    one.run("sh", "-c", "echo here > /dev/shm/cr-mine")
    assert other.run("ls", "/dev/shm") == ""
    assert not Path("/dev/shm/cr-mine").exists()
    assert "echo" not in other.run("ps", "ax", "-o", "comm")
    assert [process.pid for process in other.called("7000")] == [p.pid for p in other.processes()]
    assert network.here not in (one.address, other.address)


def test_links_are_cut_and_healed_both_ways_and_one_way(two: tuple[Network, Host, Host]) -> None:
    network, one, other = two
    assert asked(one, other) is not None
    network.cut(other)
    assert asked(one, other) is None
    network.heal(other)
    assert asked(one, other) is not None
    network.unplug(other)
    assert asked(one, other) is None
    network.heal(other)
    for deaf, silent in ((one, other), (other, one)):
        network.mute(silent, deaf.address)
        assert asked(one, other) is None
        network.restore(silent)
        assert asked(one, other) is not None


def test_links_are_made_slow_and_late(two: tuple[Network, Host, Host]) -> None:
    network, one, other = two
    size = 500_000
    network.limit(other, "4mbit")
    slow = asked(one, other, size)
    network.restore(other)
    assert slow is not None
    assert slow >= size * 8 / 4e6 / 2, "no less than half of what the rate says: a bucket is full at first"
    undo = network.delay(other, 0.1)
    late = asked(one, other)
    undo()
    again = asked(one, other)
    assert late is not None
    assert late >= 0.4, "two round trips, one of them the handshake's"
    assert again is not None


def test_a_host_that_goes_off_takes_all_with_it_and_comes_up_with_its_disk(tmp_path: Path) -> None:
    with Network(tmp_path, ["one"]) as network:
        one = network["one"]
        one.run("sh", "-c", "echo kept > ~/file; sleep 999 >/dev/null 2>&1 &")
        (orphan,) = one.called("sleep 999")
        one.off()
        assert not alive([orphan])
        again = network.reboot("one")
        assert again.run("cat", str(again.home / "file")) == "kept\n"
        assert again.run("hostname")


def test_nothing_is_left_of_a_test_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from tests.netns.network import Network\n"
        "network = Network(pathlib.Path(sys.argv[1]), ['one']).__enter__()\n"
        "network.hosts[0].run('sh', '-c', 'setsid sleep 999 >/dev/null 2>&1 &')\n"
        "print(network._tag, flush=True)\n"
        "time.sleep(999)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        link = f"cr{process.stdout.readline().strip()}"
        began = psutil.Process(process.pid).children(recursive=True)
        assert any("sleep" in " ".join(one.cmdline()) for one in began)
        assert link in links()
        process.kill()
    eventually("no process is left", lambda: not alive(began), 30)
    eventually("no link is left", lambda: link not in links(), 30)


def links() -> str:
    time.sleep(0.01)
    return subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, timeout=10).stdout
