"""A store on a disk without locks, and the leases of a store after a fork."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

from crucible.cache.store import Store

WAIT_S = 60.0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks_grants_them_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    entered = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # filelock says that it goes on without
        for turn in range(2):
            with Store(tmp_path).lock("item-x"):
                entered.append(turn)
    assert entered == [0, 1]


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_a_thread_that_only_its_parent_has(tmp_path: Path) -> None:
    store, pipe = Store(tmp_path), tmp_path / "leases" / "slow.lease"
    pipe.parent.mkdir()
    os.mkfifo(pipe)  # a disk that does not answer: whoever reads this waits
    reading = threading.Thread(target=store.leased, daemon=True)
    reading.start()
    writer = _opened(pipe)
    pipe.rename(tmp_path / "pipe")
    child = os.fork()
    if child == 0:
        os._exit(len(Store(tmp_path).leased()) + len(store.leased()))
    try:
        assert _status(child) == 0
    finally:
        os.close(writer)
        reading.join(WAIT_S)


SWEEP = """
import sys
from pathlib import Path
from crucible.cache.store import Store
from crucible.workers.litter import litter, sweep
store = Store(Path(sys.argv[1]))
sweep(litter(store))
with store.workspace():
    pass
"""


def test_a_container_beside_this_one_leaves_its_work_in_progress_alone(tmp_path: Path) -> None:
    """Of one host name, as with the host's network, and with processes that do not see each other."""
    elsewhere = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", SWEEP, str(tmp_path)]
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a namespace of processes needs root and unshare")
    with Store(tmp_path).workspace() as folder:
        (folder / "draft").write_bytes(b"half a shard")
        done = subprocess.run(elsewhere, timeout=WAIT_S, capture_output=True, text=True, check=False)
        if "unshare failed" in done.stderr or "mount" in done.stderr:
            pytest.skip(done.stderr)
        assert done.returncode == 0, done.stderr
        assert (folder / "draft").read_bytes() == b"half a shard"
    assert list((tmp_path / "tmp").iterdir()) == []


def _opened(pipe: Path) -> int:
    """The writing end, as soon as somebody reads."""
    give_up = time.monotonic() + WAIT_S
    while time.monotonic() < give_up:
        with suppress(OSError):
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.01)
    raise TimeoutError("nobody reads")


def _status(child: int) -> int:
    give_up = time.monotonic() + WAIT_S / 2
    while time.monotonic() < give_up:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -1
