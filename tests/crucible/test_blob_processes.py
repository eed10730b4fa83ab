"""One blob, many processes, and everything that ends or stops them: what is seen by its name has the right bytes."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from crucible.cache import lease
from tests.crucible.blob_cases import (
    BRING,
    DATA,
    FILE,
    HALF,
    PIECE,
    SIZE,
    Child,
    child,
    fill,
    finish,
    folder,
    names,
    wait_until,
)


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_it_brings_each_byte_once(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    begun: list[str] = []
    recorded: set[str] = set()
    kills = 0
    for _ in range(50):
        with child(tmp_path, BRING) as process:
            process.tell(f"{rng.randrange(1000)} 40")
            first = process.line().split()
            assert first[0] == "adopted"
            assert int(first[1]) >= 10_000 * len(recorded), "all that was recorded when it was killed"
            last = rng.randrange(10, 60)
            said: list[str] = []
            while len(said) < last and (line := process.line()):
                said.append(line)
            time.sleep(rng.random() * 0.003)
            process.kill()
            said += process.lines()
        begun += [line.split()[1] for line in said if line.startswith("writes")]
        recorded |= {line.split()[1] for line in said if line.startswith("recorded")}
        if folder(tmp_path).has(FILE):  # it may be killed after that and before it can say so
            break
        assert "published" not in said
        kills += 1
    assert kills >= 3
    assert folder(tmp_path).path(FILE.oid).read_bytes() == DATA
    assert len(begun) <= SIZE // 10_000 + kills, "at most the piece that was being written was written again"
    folder(tmp_path).sweep(-1)
    assert names(tmp_path) == ["oid"]


def test_a_process_that_was_killed_and_not_waited_for_is_dead(tmp_path: Path) -> None:
    with child(tmp_path, BRING) as process:
        process.tell("1 40")
        for _ in range(21):
            process.line()
        process.signal(signal.SIGKILL)
        stat = Path(f"/proc/{process.process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z", "the child to end")
        with folder(tmp_path).claim(FILE, wait_s=20) as held:
            assert held is not None  # its other threads may have held the lock for a moment longer
            assert held.adopted >= 100_000


STEPS = """
import itertools
calls = "open pwrite rename replace link unlink fsync ftruncate fchmod utime close".split()

def dies_at(step, act):
    '''Run `act` in a fork that kills itself before the step-th call that changes a disk; True if it came to its end.'''
    pid = os.fork()
    if not pid:
        count = itertools.count(1)
        def deadly(real):
            def call(*args, **kwargs):
                if next(count) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            return call
        for name in calls:
            setattr(os, name, deadly(getattr(os, name)))
        act()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0

def begin():
    with folder(home).claim(FILE) as held:
        fill(held, 0, SIZE // 2)
        os.kill(os.getpid(), signal.SIGKILL)

def bring():
    with folder(home).claim(FILE) as held:
        if held is not None:
            assert held.adopted >= SIZE // 2, held.adopted
            finish(held)

def reset():
    with folder(home).claim(FILE) as held:
        held.reset()
        held.quarantine(home / "aside")
        held.note_etag("a", "b")

def let_go():
    with folder(home).claim(FILE) as held:
        assert held.adopted >= SIZE // 2, held.adopted

def right():
    return not folder(home).has(FILE) or folder(home).path(FILE.oid).read_bytes() == DATA

def claim_now():
    '''A lease at once; only one that was killed before it wrote its name is waited for, for two beats.'''
    try:
        with folder(home).claim(FILE, wait_s=0) as held:
            assert held is None or held._lease is not None
            return folder(home).claim(FILE)
    except AssertionError:
        journals = sorted(path for path in (home / "raw").iterdir() if ".journal." in path.name)
        assert journals[-1].stat().st_size == 0, "somebody still seems to live"
        return folder(home).claim(FILE)

lease.LEASE_S = 3.0
act = {"bring": bring, "let_go": let_go, "reset": reset}[hear()]
for step in itertools.count(1):
    dies_at(0, begin)
    done = dies_at(step, act)
    assert right(), step
    if act is reset:
        assert dies_at(0, lambda: None if folder(home).sweep(-1) < 0 else None)
    again = dies_at(step, act) if act is not reset else True  # and once more at that step
    assert right(), step
    with claim_now() as held:
        if held is not None:
            assert act is reset or held.adopted >= SIZE // 2, (step, held.adopted)
            finish(held)
    assert right() and folder(home).has(FILE)
    folder(home).remove(FILE.oid)
    folder(home).sweep(-1)
    assert os.listdir(home / "raw") == [], step
    if done:
        break
say("steps", step)
"""


@pytest.mark.parametrize("act", ["bring", "let_go", "reset"])
def test_a_kill_before_any_call_that_changes_the_disk_costs_nothing_that_was_recorded(tmp_path: Path, act: str) -> None:
    with child(tmp_path, STEPS) as process:
        process.tell(act)
        said = process.line().split()
        assert process.end() == 0
        assert said[0] == "steps"
        assert int(said[1]) > 10, "the calls were counted"


ZOMBIE = """
lease.LEASE_S = 1.0
with folder(home).claim(FILE) as held:
    held.write(0, DATA) if hear() == "all" else None
    fill(held, 0, SIZE // 2)
    say("half")
    task = hear()
    if task == "publish":
        try:
            say("published", held.publish().name)
        except Exception as error:
            say(type(error).__name__, error)
        sys.exit()
    held.write(0, b"wrong" * 300_000)
    held.record(0, SIZE, 0)
    say("fenced" if held.fenced else "free")
    held.write(0, b"wrong" * 300_000)
    hear()
say("left")
"""


def stop(process: Child) -> None:
    process.signal(signal.SIGSTOP)
    stat = Path(f"/proc/{process.process.pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the child to stop")


def test_a_holder_that_wakes_up_after_it_was_given_up_on_can_harm_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    blobs = folder(tmp_path)
    with child(tmp_path, ZOMBIE) as zombie:
        zombie.tell("half")
        zombie.expect("half")
        stop(zombie)
        with blobs.claim(FILE) as held:
            assert held is not None
            assert held.adopted == HALF, "its bytes were copied"
            zombie.signal(signal.SIGCONT)
            zombie.tell("wrong")
            zombie.expect("fenced")
            assert not held.fenced
            finish(held)
        assert blobs.path(FILE.oid).read_bytes() == DATA
        zombie.tell("leave")
        zombie.expect("left")
        assert zombie.end() == 0
    assert blobs.path(FILE.oid).read_bytes() == DATA
    assert names(tmp_path) == ["oid"]


def test_a_holder_that_sleeps_over_everything_touches_no_later_file_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blob was published, removed, and is being brought again under the same generation when it wakes up."""
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    blobs = folder(tmp_path)
    with child(tmp_path, ZOMBIE) as zombie:
        zombie.tell("all")
        zombie.expect("half")
        stop(zombie)
        with blobs.claim(FILE) as held:
            assert held is not None
            finish(held)
        blobs.remove(FILE.oid)
        with blobs.claim(FILE) as held:
            assert held is not None
            assert names(tmp_path) == ["oid.00000001.incomplete", "oid.00000001.journal.incomplete"]
            fill(held, 0, PIECE)
            zombie.signal(signal.SIGCONT)
            zombie.tell("publish")
            assert "another process goes on with data/train.parquet" in zombie.line()
            assert zombie.end() == 0
            assert not blobs.has(FILE)
            assert len(names(tmp_path)) == 2
            fill(held, PIECE, 2 * PIECE)
            assert not held.fenced
            finish(held)
    assert blobs.path(FILE.oid).read_bytes() == DATA


def test_a_holder_that_wakes_up_with_all_of_it_may_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    blobs = folder(tmp_path)
    with child(tmp_path, ZOMBIE) as zombie:
        zombie.tell("all")
        zombie.expect("half")
        stop(zombie)
        with blobs.claim(FILE) as held:
            assert held is not None
            finish(held)
        zombie.signal(signal.SIGCONT)
        zombie.tell("publish")
        zombie.expect(f"published {FILE.oid}")
        assert zombie.end() == 0
    assert blobs.path(FILE.oid).read_bytes() == DATA
    assert names(tmp_path) == ["oid"]


def test_one_that_is_stopped_holds_up_the_others_no_longer_than_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it is the third generation that dies while the first one sleeps with the lock in its hand."""
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    with child(tmp_path, ZOMBIE) as first:
        first.tell("half")
        first.expect("half")
        stop(first)
        with folder(tmp_path).claim(FILE) as held:
            assert held is not None
        with folder(tmp_path).claim(FILE) as held:
            assert held is not None
            assert held.adopted == HALF
            finish(held)
