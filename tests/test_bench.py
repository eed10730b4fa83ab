"""The transfer benchmark still runs, at sizes that say nothing about speed, and its relay delays what it carries."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "scripts" / "bench"
TINY = ["--rounds", "1", "--big-mb", "3", "--small-files", "10", "--peer-mb", "2", "--rtt-ms", "4", "--json"]
RTT_S = 0.04


def start(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *argv], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(tmp_path: Path, *argv: str) -> tuple[dict[str, dict[str, object]], list[dict[str, object]]]:
    """(about the run, its rows)"""
    bench = start(str(BENCH / "transfer.py"), *TINY, "--scratch", str(tmp_path), *argv)
    out, complaint = bench.communicate(timeout=150)
    assert bench.returncode == 0, complaint
    assert list(tmp_path.iterdir()) == []
    first, *rows = map(json.loads, out.splitlines())
    return first, rows


def test_every_method_brings_every_work_over_loopback(tmp_path: Path) -> None:
    about, rows = run(tmp_path, "--link", "loopback")
    assert about["links"] == {"loopback": "loopback"}
    found = {(row["work"], row["method"]): row for row in rows}
    for work in ("one-big", "few-big", "many-small", "many-lfs"):
        official = found[work, "snapshot_download, 8 workers"]
        assert official["requests"] >= 2 * official["files"]  # type: ignore[operator]
        assert official["times_official"]
    ours = found["one-big", "bring"]
    assert (ours["bytes"], len(ours["walls_s"])) == (3_000_000, 1)  # type: ignore[arg-type]
    assert ours["times_official"]
    assert found["peer", "bring"]["requests"]
    assert (found["peer", "curl, 1 stream"]["times_curl"] == 1) or shutil.which("curl") is None


def test_over_a_link_with_latency_it_says_what_made_the_latency(tmp_path: Path) -> None:
    about, rows = run(tmp_path, "--link", "delayed", "--work", "one-big,peer", "--only", "bring")
    assert about["links"]["4 ms"].startswith(("netem", "user-space relay"))  # type: ignore[attr-defined]
    assert [(row["work"], row["link"]) for row in rows] == [("one-big", "4 ms"), ("peer", "4 ms")]


def test_interrupted_it_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    bench = start(str(BENCH / "transfer.py"), *TINY, "--rounds", "1000", "--scratch", str(tmp_path))
    try:
        assert bench.stderr is not None
        while "round 2" not in bench.stderr.readline():
            assert bench.poll() is None
        family = psutil.Process(bench.pid).children(recursive=True)
        assert family
        bench.send_signal(signal.SIGTERM)
        bench.wait(60)
        _, alive = psutil.wait_procs(family, timeout=20)
        assert alive == []
        assert list(tmp_path.iterdir()) == []
        if shutil.which("ip"):
            listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
            assert f"crucible-bench-{bench.pid}" not in listed
    finally:
        bench.kill()
        bench.communicate(timeout=10)


INTERRUPTED = """
import os, signal, subprocess, sys
from scripts.bench import links
class Popen(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        print(self.pid, flush=True)
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))  # before anybody has heard of the new process
subprocess.Popen = Popen
with links.ended_by_signals(), links.Processes() as processes:
    processes.start([sys.executable, "-c", "import time; time.sleep(60)"])
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_a_process_starts_ends_that_one_too(name: str) -> None:
    told = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, name], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert told.returncode != 0
    assert "KeyboardInterrupt" in told.stderr
    assert not psutil.pid_exists(int(told.stdout))


@contextmanager
def relay(window: int) -> Iterator[socket.socket]:
    """A connection through the relay to a server that sends back whatever it gets."""
    echo = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        end, _ = echo.accept()
        with end:
            while data := end.recv(1 << 16):
                end.sendall(data)
            end.shutdown(socket.SHUT_WR)

    threading.Thread(target=answer, daemon=True).start()
    to = f"127.0.0.1:{echo.getsockname()[1]}"
    process = start(str(BENCH / "latency.py"), "--to", to, "--rtt-ms", str(RTT_S * 1000), "--window", str(window))
    try:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["ports"][0]
        with socket.create_connection(("127.0.0.1", port), timeout=30) as near:
            yield near
    finally:
        process.communicate(timeout=20)  # the end of its input is the end of it
        echo.close()


def receive(near: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        data += near.recv(size - len(data))
    return bytes(data)


def test_the_relay_delays_a_handshake_and_every_answer_by_a_round_trip() -> None:
    with relay(1 << 20) as near:
        started = time.monotonic()
        near.sendall(b"x")
        assert receive(near, 1) == b"x"
        assert time.monotonic() - started >= 1.9 * RTT_S  # the handshake's and the answer's
        started = time.monotonic()
        near.sendall(b"y")
        assert receive(near, 1) == b"y"
        assert time.monotonic() - started >= 0.9 * RTT_S


def test_the_relay_keeps_at_most_a_window_under_way_and_every_byte_in_order() -> None:
    window = 64 << 10
    sent = os.urandom(10 * window)
    with relay(window) as near:
        started = time.monotonic()

        def send() -> None:
            near.sendall(sent)
            near.shutdown(socket.SHUT_WR)

        threading.Thread(target=send, daemon=True).start()
        got = receive(near, len(sent))
        assert near.recv(1) == b""
        assert time.monotonic() - started >= 9 * RTT_S  # ten windows cannot be faster than nine round trips
    assert hashlib.sha256(got).digest() == hashlib.sha256(sent).digest()


@pytest.mark.parametrize("argv", [["--work", "nonsense"], ["--link", "nonsense"], ["--rounds", "0"]])
def test_wrong_usage_is_said_before_anything_starts(argv: list[str]) -> None:
    bench = start(str(BENCH / "transfer.py"), *argv)
    _, complaint = bench.communicate(timeout=60)
    assert bench.returncode == 2
    assert "usage:" in complaint
