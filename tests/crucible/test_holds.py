"""What a living process has leased is not evicted; what a dead one had leased is free. Real processes, real kills."""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from crucible.cache import lease
from crucible.cache.holds import Holds, LeaseBook, holds_of
from crucible.cache.store import Store

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60.0
HOLDER = """
import sys
from pathlib import Path
from crucible.cache.holds import holds_of
holds = holds_of(Path(sys.argv[1]))
for key in sys.argv[2:]:
    holds.hold(key)
print("held", flush=True)
for line in sys.stdin:
    word, _, key = line.strip().partition(" ")
    getattr(holds, word)(key)
    print("done", flush=True)
"""


def key(number: int) -> str:
    return f"{number:064x}"


def put(store: Store, number: int, size: int = 100) -> Path:
    path = store.shard_path(key(number))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    yield Store(tmp_path / "store")
    holds_of(tmp_path / "store").close()


@pytest.fixture
def start(store: Store) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that leases shards and then does what its stdin says."""
    processes: list[subprocess.Popen[str]] = []

    def run(*numbers: int, prelude: str = "") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", prelude + HOLDER, str(store.home), *map(key, numbers)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate(timeout=WAIT_S)


def tell(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{words}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"


def files(store: Store) -> list[str]:
    return sorted(os.listdir(store.home / "leases"))


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_a_shard_that_nobody_leased_is_evicted_and_one_that_is_not_here_frees_nothing(store: Store) -> None:
    put(store, 1, size=123)
    assert store.evict(key(1)) == 123
    assert not store.shard_path(key(1)).exists()
    assert store.evict(key(1)) == 0


def test_what_another_process_reads_stays_until_it_gives_it_back(
    store: Store, start: Callable[..., subprocess.Popen[str]]
) -> None:
    path = put(store, 1)
    process = start(1, 2)
    assert store.evict(key(1)) == 0
    assert path.exists()
    assert store.leased() == {key(1), key(2)}
    tell(process, f"release {key(1)}")
    assert store.evict(key(1)) > 0
    assert store.leased() == {key(2)}


def test_a_lease_taken_twice_is_given_back_twice(store: Store) -> None:
    put(store, 1)
    store.holds.hold(key(1))
    store.holds.hold(key(1))
    store.holds.release(key(1))
    assert store.evict(key(1)) == 0
    store.holds.release(key(1))
    assert store.evict(key(1)) > 0


def test_the_leases_of_a_killed_process_are_free_and_its_file_is_swept(
    store: Store, start: Callable[..., subprocess.Popen[str]]
) -> None:
    put(store, 1)
    process = start(1)
    process.kill()
    process.wait(WAIT_S)
    assert len(files(store)) == 1
    assert store.evict(key(1)) > 0
    assert files(store) == []


def test_a_process_that_leases_first_sweeps_up_after_the_dead(
    store: Store, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(1)
    process.kill()
    process.wait(WAIT_S)
    store.holds.hold(key(2))
    assert len(files(store)) == 1


def test_a_stopped_process_keeps_its_leases(store: Store, start: Callable[..., subprocess.Popen[str]]) -> None:
    put(store, 1)
    process = start(1)
    process.send_signal(signal.SIGSTOP)
    assert store.evict(key(1)) == 0
    process.send_signal(signal.SIGCONT)


def test_a_process_that_ends_well_leaves_nothing(store: Store, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(1, 2, 3)
    process.communicate(timeout=WAIT_S)
    assert files(store) == []


def test_giving_everything_back_removes_the_file_and_the_next_lease_makes_another(store: Store) -> None:
    for _ in range(3):
        store.holds.hold(key(1))
        assert len(files(store)) == 1
        store.holds.release(key(1))
        assert files(store) == []


def test_a_forked_child_holds_nothing_and_gives_back_nothing_of_its_parents(store: Store) -> None:
    put(store, 1)
    store.holds.hold(key(1))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        with suppress(BaseException):
            store.holds.release(key(1))
            kept = Store(store.home).leased() == {key(1)}
            store.holds.hold(key(2))
            both = Store(store.home).leased() == {key(1), key(2)}
            os.write(writer, b"x")
            code = 0 if kept and both else 2
        os._exit(code)
    try:
        assert os.read(reader, 1) == b"x"
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        os.close(reader)
        os.close(writer)
    assert store.leased() == {key(1)}, "the child ended without a word, and its lease with it"


def test_the_lease_of_a_dead_parent_ends_though_its_forked_child_lives(store: Store) -> None:
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from crucible.cache.holds import holds_of\n"
        "holds_of(Path(sys.argv[1])).hold(sys.argv[2])\n"
        "if os.fork() == 0:\n"
        "    os.close(1)\n"
        "    sys.stdin.read()\n"  # until the test lets go
        "    os._exit(0)\n"
        "print('held', flush=True)\n"
        "os._exit(0)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(store.home), key(1)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.wait(WAIT_S)
        (name,) = files(store)
        with (store.home / "leases" / name).open("rb") as file:
            until(lambda: is_free(file.fileno()))  # once the child has begun to run
        assert store.leased() == set()
    finally:
        assert process.stdin is not None
        process.stdin.close()
        assert process.stdout is not None
        process.stdout.close()


NO_LOCKS = "import fcntl; fcntl.flock = lambda *_: None\n"
STRANGER = "from crucible.cache import owner; owner._namespace = lambda: 'elsewhere'\n"
"""As in a container: whoever looks from outside can prove neither that it lives nor that it is dead."""


def test_the_lock_tells_of_a_process_of_another_container(
    store: Store, start: Callable[..., subprocess.Popen[str]]
) -> None:
    put(store, 1)
    process = start(1, prelude=STRANGER)
    assert store.evict(key(1)) == 0
    process.kill()
    process.wait(WAIT_S)
    assert store.evict(key(1)) > 0


def test_where_a_lock_means_nothing_a_process_shows_that_it_lives_and_its_silence_ends_its_lease(
    store: Store, start: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    fast = "from crucible.cache import lease; lease.LEASE_S = 0.6\n"
    process = start(1, prelude=NO_LOCKS + STRANGER + fast)
    path = store.home / "leases" / files(store)[0]
    first = path.stat().st_mtime
    until(lambda: path.stat().st_mtime > first)
    assert store.leased() == {key(1)}
    process.kill()
    process.wait(WAIT_S)
    assert store.leased() == {key(1)}, "not silent for long enough"
    monkeypatch.setattr(lease, "LEASE_S", 0.05)
    until(lambda: store.leased() == set())


@pytest.mark.parametrize("cut", [1, 5, 65])
def test_half_a_line_is_waited_for(tmp_path: Path, cut: int) -> None:
    holds, book = Holds(tmp_path), LeaseBook(tmp_path)
    holds.hold(key(1))
    line = b"+" + key(2).encode() + b"\n"
    with next(tmp_path.iterdir()).open("ab", buffering=0) as file:
        file.write(line[:cut])
        assert book.keys() == {key(1)}
        file.write(line[cut:])
        assert book.keys() == {key(1), key(2)}
    holds.close()


def test_a_disk_that_is_full_for_a_while_ends_the_leases_and_the_next_one_tells_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    holds, book, write = Holds(tmp_path), LeaseBook(tmp_path), os.write
    holds.hold(key(1))
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:10]))
        holds.hold(key(2))
    assert "cannot be leased" in caplog.text
    assert book.keys() == set()
    holds.hold(key(3))
    assert book.keys() == {key(1), key(2), key(3)}
    holds.close()


def test_a_store_travels_without_what_it_has_read(store: Store) -> None:
    put(store, 1)
    assert store.leased() == set()
    assert pickle.loads(pickle.dumps(store)).evict(key(1)) > 0


def test_thousands_of_shards_that_come_and_go_leave_a_short_file(tmp_path: Path) -> None:
    holds, book = Holds(tmp_path), LeaseBook(tmp_path)
    for number in range(20_000):
        holds.hold(key(number))
        if number >= 100:
            holds.release(key(number - 100))
        if number % 5000 == 0:
            assert key(number) in book.keys()  # noqa: SIM118 - it is no dict
    assert book.keys() == {key(number) for number in range(19_900, 20_000)}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1_000_000
    holds.close()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_leases_is_read_from_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "leases").write_text("no folder")
    holds = Holds(tmp_path / "leases")
    for number in range(3):
        holds.hold(key(number))
        holds.release(key(number))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert LeaseBook(tmp_path / "leases").keys() == set()
