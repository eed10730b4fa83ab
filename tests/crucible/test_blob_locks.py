"""One blob and many processes that want it: one is elected, with locks or without, and the others wait for it only."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from filelock import FileLock

from crucible.cache import lease
from tests.crucible.blob_cases import BRING, DATA, FILE, HALF, WAIT_S, child, fill, finish, folder, names, wait_until

ELECT = """
import fcntl
fcntl.flock = lambda descriptor, operation: None
for _ in range(20):
    say("ready")
    hear()
    with folder(home).claim(FILE) as held:
        if held is not None:
            finish(held)
    assert folder(home).path(FILE.oid).read_bytes() == DATA
    say("waited" if held is None else "brought")
"""


def test_without_any_lock_processes_that_start_at_once_elect_one(tmp_path: Path) -> None:
    with ExitStack() as stack:
        processes = [stack.enter_context(child(tmp_path, ELECT)) for _ in range(3)]
        for _ in range(20):
            for process in processes:
                process.expect("ready")
            for process in processes:
                process.tell("go")
            said = sorted(process.line() for process in processes)
            assert said == ["brought", "waited", "waited"]
            assert folder(tmp_path).path(FILE.oid).read_bytes() == DATA
            assert names(tmp_path) == ["oid"]
            folder(tmp_path).remove(FILE.oid)
        assert [process.end() for process in processes] == [0, 0, 0]


def test_those_that_wait_for_one_that_is_killed_elect_another(tmp_path: Path) -> None:
    began = time.monotonic()
    with ExitStack() as stack:
        processes = [stack.enter_context(child(tmp_path, BRING)) for _ in range(3)]
        for process in processes:
            process.tell("1 1000")
        wait_until(lambda: (tmp_path / "raw").is_dir() and len(names(tmp_path)) == 2, "one to begin")
        # whoever it is: its pid is in the journal
        path = tmp_path / "raw" / f"{FILE.oid}.00000001.journal.incomplete"
        holder = next(each for each in processes if f'"pid":{each.process.pid},' in path.read_text())
        holder.expect("adopted 0")
        for _ in range(20):
            holder.line()
        holder.kill()
        said = [line for process in processes if process is not holder for line in process.lines()]
    assert time.monotonic() - began < lease.LEASE_S, "nobody waits out the lease of a process that is seen to be dead"
    assert said.count("complete") + said.count("published") == 2
    assert said.count("published") == 1
    assert folder(tmp_path).path(FILE.oid).read_bytes() == DATA


FORK = """
with folder(home).claim(FILE) as held:
    fill(held, 0, SIZE // 2)
    pid = os.fork()
    if pid == 0:
        for attempt in (lambda: held.write(0, b"x"), lambda: held.record(0, 5, 0), held.reset, held.publish):
            try:
                attempt()
            except Exception as error:
                say(type(error).__name__, "forked" in str(error))
        assert not lease.PULSE._leases
        sys.exit(7)
    assert os.waitpid(pid, 0)[1] == 7 << 8
    assert not lease.Turn(home / "locks" / f"{FILE.oid}.lock").take()
    with folder(home).claim(FILE, wait_s=0.2) as other:
        say("private", other._lease is None)
    assert not held.fenced and held._lease.present()
    finish(held)
    say("published")
"""


def test_a_fork_neither_holds_nor_lets_go_its_parents_lease(tmp_path: Path) -> None:
    with child(tmp_path, FORK) as process:
        assert process.lines() == ["StoreError True"] * 4 + ["private True", "published"]
        assert process.end() == 0
    assert folder(tmp_path).path(FILE.oid).read_bytes() == DATA


def test_a_fork_that_outlives_its_parent_keeps_nobody_waiting_longer_than_a_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    code = """
with folder(home).claim(FILE) as held:
    fill(held, 0, SIZE // 2)
    if os.fork() == 0:
        hear()
        os._exit(0)
    say("forked")
    time.sleep(60)
"""
    with child(tmp_path, code) as process:
        process.expect("forked")
        process.kill()
        with folder(tmp_path).claim(FILE) as held:
            assert held is not None
            assert held.adopted == HALF
            finish(held)
        process.tell("end")


def test_another_program_that_holds_the_lock_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "locks").mkdir()
    code = """
with folder(home).claim(FILE, wait_s=20) as held:
    say("brings" if held else "complete")
"""
    with FileLock(tmp_path / "locks" / f"{FILE.oid}.lock"), child(tmp_path, code) as process:
        time.sleep(1)
        folder(tmp_path).put(FILE, DATA)
        process.expect("complete")
    with child(tmp_path, BRING) as process:
        assert process.line() == "complete"


def test_another_program_waits_for_us(tmp_path: Path) -> None:
    code = """
from filelock import FileLock
say("waits")
with FileLock(home / "locks" / f"{FILE.oid}.lock", timeout=30):
    say("complete" if folder(home).has(FILE) else "brings")
"""
    with child(tmp_path, code) as process:
        with folder(tmp_path).claim(FILE) as held:
            assert held is not None
            process.expect("waits")
            fill(held, 0, HALF)
            time.sleep(0.3)
            finish(held)
        process.expect("complete")


def test_another_program_that_holds_the_lock_and_does_nothing_is_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 0.5)
    (tmp_path / "locks").mkdir()
    code = """
from filelock import FileLock
with FileLock(home / "locks" / f"{FILE.oid}.lock"):
    say("holds")
    hear()
"""
    with child(tmp_path, code) as process:
        process.expect("holds")
        with folder(tmp_path).claim(FILE, wait_s=WAIT_S) as held:
            assert held is not None
            finish(held)
    assert names(tmp_path) == ["oid"]
