"""Between client and server: loopback, or a line with latency. And the processes of a benchmark, which end with it.

A line with latency is a network namespace of the benchmark's own, joined by a veth pair whose ends both delay (netem).
Where that cannot be had (no root, a kernel without netem) it is loopback through the relay of `latency.py`. The server
binds to loopback or to its end of the pair, to nothing else.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
START_S = 60.0
PREFIX = "crucible-bench-"


@dataclass(frozen=True, slots=True)
class Finished:
    """A process that ended: what it printed, and how long it took from start to end."""

    out: str
    wall_s: float
    cpu_s: float


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that every process and namespace is removed."""
    before = {number: signal.signal(number, _unwind) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """A signal that would unwind does so at the end of this. In the main thread."""
    _held.append(False)
    try:
        yield
    finally:
        came = _held.pop()
    if came:
        _unwind()


_held: list[bool] = []
"""Whether a signal has come, of each `undisturbed` that is entered."""


def _unwind(*_: object) -> None:
    if _held:
        _held[-1] = True
    else:
        raise KeyboardInterrupt


class Processes:
    """What the benchmark starts, each in a session of its own. `close` ends those that still run, by their ids."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[str]] = []

    def start(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        with undisturbed():  # one that was just started and is on no list would outlive us
            process = subprocess.Popen(argv, text=True, start_new_session=True, **options)
            self._running.append(process)
        return process

    def run(self, argvs: Sequence[Sequence[str]], *, env: Mapping[str, str], outs: Sequence[int] = ()) -> Finished:
        """Run these at once, wait for all. `outs` are descriptors for their output. Raises what failed."""
        started = time.perf_counter()
        spent = _children_cpu_s()
        options: dict[str, Any] = {"env": env, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        children = [
            self.start(argv, stdout=outs[number] if outs else subprocess.PIPE, **options)
            for number, argv in enumerate(argvs)
        ]
        said = [child.communicate() for child in children]
        wall = time.perf_counter() - started
        for child, (_, complaint) in zip(children, said):
            self._running.remove(child)
            if child.returncode:
                raise RuntimeError(f"{child.args!r} ended with {child.returncode}:\n{complaint[-3000:]}")
        return Finished("".join(out or "" for out, _ in said), wall, _children_cpu_s() - spent)

    def end(self, process: subprocess.Popen[str]) -> None:
        """End one by its id, and what it left in its session."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:  # not reaped yet, so the id is still its own
                os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        if process in self._running:
            self._running.remove(process)

    def close(self) -> None:
        for process in list(self._running):
            self.end(process)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Server:
    """A process of `servers.py` as the benchmark sees it."""

    def __init__(self, process: subprocess.Popen[str], origins: Sequence[str]) -> None:
        self._process, self.origins = process, list(origins)

    @property
    def endpoint(self) -> str:
        return self.origins[0]

    def since(self) -> dict[str, Any]:
        """`requests` (None where nobody counts) and `cpu_s` since the last call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))


Opener = Callable[[dict[str, Any]], AbstractContextManager[Server]]


@dataclass(frozen=True)
class Link:
    """A way from client to server. `open(spec)` starts the server that `spec` describes at the far end."""

    name: str
    how: str
    open: Opener


@contextmanager
def _server(processes: Processes, spec: dict[str, Any], prefix: Sequence[str] = ()) -> Iterator[Server]:
    argv = [*prefix, sys.executable, str(HERE / "servers.py"), json.dumps(spec)]
    process = processes.start(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the server did not start; what it said is above")
        yield Server(process, json.loads(line)["origins"])
    finally:
        processes.end(process)


def loopback(processes: Processes) -> Link:
    return Link("loopback", "loopback", lambda spec: _server(processes, {**spec, "host": "127.0.0.1"}))


@contextmanager
def delayed(processes: Processes, rtt_ms: float, window: int) -> Iterator[Link]:
    """A line with `rtt_ms` of latency: netem if this machine has it, else the relay. `how` says which, and why."""
    name = f"{rtt_ms:g} ms"
    made, why = _namespace(rtt_ms)
    if made is not None:
        namespace, host = made
        prefix = ["ip", "netns", "exec", namespace]
        how = f"netem, {rtt_ms / 2:g} ms each way, in a namespace" if rtt_ms else "a namespace, no latency"
        try:
            yield Link(name, how, lambda spec: _server(processes, {**spec, "host": host}, prefix))
        finally:
            _ip("netns", "del", namespace)
        return

    @contextmanager
    def through_relay(spec: dict[str, Any]) -> Iterator[Server]:
        count = 2 if spec["kind"] == "hub" else 1
        listeners = [socket.create_server(("127.0.0.1", 0), backlog=512) for _ in range(count)]
        public = [f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
        with _server(processes, {**spec, "host": "127.0.0.1", "public": public}) as server:
            argv = [sys.executable, str(HERE / "latency.py"), "--rtt-ms", str(rtt_ms), "--window", str(window)]
            for listener, origin in zip(listeners, server.origins):
                argv += ["--fd", str(listener.fileno()), "--to", origin.removeprefix("http://")]
            fds = [listener.fileno() for listener in listeners]
            process = processes.start(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=fds)
            try:
                assert process.stdout is not None
                process.stdout.readline()
                server.origins = public
                yield server
            finally:
                processes.end(process)
                for listener in listeners:
                    listener.close()

    yield Link(name, f"user-space relay, {rtt_ms / 2:g} ms each way, window {window:,} bytes ({why})", through_relay)


def _namespace(rtt_ms: float) -> tuple[tuple[str, str] | None, str]:
    """((namespace, address inside it), ""), or (None, why not). Leaves nothing behind when it fails."""
    if os.geteuid() != 0:
        return None, "no netem without root"
    if not shutil.which("ip") or not shutil.which("tc"):
        return None, "no `ip` or `tc` here"
    _remove_stale()
    pid = os.getpid()
    name, near, far = f"{PREFIX}{pid}", f"cb{pid}a", f"cb{pid}b"
    net = f"169.254.{100 + pid % 100}"  # link-local: routed nowhere
    steps = [
        ["ip", "netns", "add", name],
        ["ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name],
        ["ip", "addr", "add", f"{net}.1/30", "dev", near],
        ["ip", "link", "set", near, "up"],
        ["ip", "-n", name, "addr", "add", f"{net}.2/30", "dev", far],
        ["ip", "-n", name, "link", "set", far, "up"],
        ["ip", "-n", name, "link", "set", "lo", "up"],
    ]
    delay = ["root", "netem", "delay", f"{rtt_ms / 2:g}ms", "limit", "100000"]
    if rtt_ms:
        steps += [["tc", "qdisc", "add", "dev", near, *delay], ["tc", "-n", name, "qdisc", "add", "dev", far, *delay]]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            _ip("netns", "del", name)
            return None, f"`{step[0]}` said: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
    return (name, f"{net}.2"), ""


def _remove_stale() -> None:
    """Namespaces of benchmarks that were killed: their pid is in the name, and nobody has it any more."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
    for name in listed:
        pid = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            _ip("netns", "del", name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True)
