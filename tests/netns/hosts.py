"""Hosts on one machine: namespaces with addresses, names, homes and /dev/shm of their own. Needs root.

A host is one process (`INIT`) that is the first of a process-id namespace and has network, mount, uts and ipc
namespaces. It lives as long as the pipe to it: when the test process ends, however it ends, the pipe closes, that
process ends, and the kernel ends every process of the host and takes its links away. So there is nothing to sweep:
nothing of this has a name in a file system, and no process of another's is ever touched. `network` connects them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
COMMAND_S = 180
"""Most that one command may take in a host."""
LEAVE_S = 30

INIT = """
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


def namespaces(arguments: Sequence[str], *kinds: str) -> tuple[subprocess.Popen[str], int]:
    """(what holds the pipe, pid of the first process) of new namespaces, in which `INIT` or the like says "up"."""
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


def end(process: subprocess.Popen[str]) -> None:
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
        self.errors = ""
        """Its stderr, when it has ended."""

    def end(self, timeout_s: float = COMMAND_S) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) when it has ended; killed when it does not in time."""
        try:
            out, err = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self._process.communicate(timeout=LEAVE_S)
            raise AssertionError(f"{self._what}: not over after {timeout_s:g} s\n{out}\n{err}") from None
        self.errors = err
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
            return [*psutil.Process(self.pid).children(recursive=True), *self._entered()]
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
        """Name and id of a process -> the addresses that it accepts TCP connections on."""
        found: dict[str, list[str]] = {}
        for line in self.run("ss", "-Hltnp").splitlines():
            address, (name, rest) = line.split()[3], line.partition('(("')[2].split('",', 1)
            found.setdefault(f"{name} {rest.partition(',')[0]}", []).append(address)
        return found

    def off(self) -> None:
        """As if the power were cut: every process ends, and the links go."""
        self.close_commands()
        end(self.holder)

    def close_commands(self, but: Started | None = None) -> None:
        """End what was begun in this host, all but one."""
        for command in self.commands:
            if command is not but:
                command.close()
        self.commands = [command for command in self.commands if command is but]


def inside(host: Host, *words: str) -> None:
    do("nsenter", "-t", str(host.pid), "--net", *words)


def do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}"


def attempt(words: Sequence[str]) -> bool:
    return subprocess.run(words, capture_output=True, timeout=30).returncode == 0


def plain_environment() -> dict[str, str]:
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
