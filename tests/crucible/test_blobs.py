"""A folder of blobs: what one process sees of it, what it leaves on the disk, and what it takes over."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from crucible.cache import partial
from crucible.cache.blobs import BlobFolder
from crucible.cache.store import Store
from crucible.errors import DiskFull, StoreError, StoreReadOnly
from crucible.refs import SourceFile
from tests.crucible.blob_cases import DATA, FILE, HALF, PIECE, SIZE, WAIT_S, fill, finish, folder, leave, names

# --- the life of a blob


def test_a_blob_is_there_by_its_name_only_when_it_is_published(tmp_path: Path) -> None:
    blobs = folder(tmp_path)
    assert not blobs.has(FILE)
    with blobs.claim(FILE) as held:
        assert held is not None
        assert (held.adopted, held.fenced, list(held.ranges)) == (0, False, [])
        for start in range(0, SIZE, PIECE):
            fill(held, start, start + PIECE)
            assert not blobs.has(FILE)
        assert list(held.ranges) == [(0, SIZE)]
        assert finish(held) == blobs.path(FILE.oid)
        assert blobs.has(FILE)
    assert blobs.path(FILE.oid).read_bytes() == DATA
    assert names(tmp_path) == ["oid"]
    umask = os.umask(0)
    os.umask(umask)
    assert blobs.path(FILE.oid).stat().st_mode & 0o777 == 0o666 & ~umask
    with blobs.claim(FILE) as held:
        assert held is None
    blobs.remove(FILE.oid)
    blobs.remove(FILE.oid)
    assert not blobs.has(FILE)


def test_an_empty_file_is_there_only_once_it_was_published(tmp_path: Path) -> None:
    empty = SourceFile("empty", 0, hashlib.sha256(b"").hexdigest(), True)
    blobs = folder(tmp_path)
    assert not blobs.has(empty)
    with blobs.claim(empty) as held:
        assert held is not None
        held.publish()
    assert blobs.has(empty)
    with blobs.claim(empty) as held:
        assert held is None


def test_a_blob_of_another_size_does_not_count_and_is_replaced(tmp_path: Path) -> None:
    blobs = folder(tmp_path)
    blobs.put(FILE, DATA).write_bytes(DATA[:-1])
    assert not blobs.has(FILE)
    with blobs.claim(FILE) as held:
        assert held is not None
        with pytest.raises(StoreError, match=r"has 0 bytes, data/train\.parquet has 1,500,000"):
            held.publish()
        finish(held)
    assert blobs.path(FILE.oid).read_bytes() == DATA


@pytest.mark.parametrize("oid", ["", "..", "a" * 39, "A" * 40, "a" * 63 + "/", "../" + "a" * 61, "a" * 64 + "\n"])
def test_what_is_no_oid_reaches_no_path(tmp_path: Path, oid: str) -> None:
    blobs = folder(tmp_path)
    file = SourceFile("x", 1, oid, True)
    for attempt in (
        lambda: blobs.path(oid),
        lambda: blobs.has(file),
        lambda: blobs.remove(oid),
        lambda: blobs.put(file, b"x"),
        lambda: blobs.claim(file).__enter__(),
    ):
        with pytest.raises(StoreError, match="is not the oid of a blob"):
            attempt()
    assert not (tmp_path / "raw").exists()


def test_a_small_blob_is_put_whole_or_not_at_all(tmp_path: Path) -> None:
    blobs = folder(tmp_path)
    with pytest.raises(StoreError, match="3 bytes were given"):
        blobs.put(FILE, b"abc")
    assert blobs.put(FILE, memoryview(DATA)) == blobs.path(FILE.oid)
    assert blobs.put(FILE, bytearray(DATA)).read_bytes() == DATA
    assert names(tmp_path) == ["oid"]


def test_writes_outside_the_file_and_after_the_end_are_refused(tmp_path: Path) -> None:
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        for start in (-1, SIZE - 2):
            with pytest.raises(ValueError, match="is not a part of"):
                held.write(start, b"abc")
        with pytest.raises(ValueError, match="is not a part of"):
            held.record(0, SIZE + 1, 0)
    for late in (lambda: held.write(0, b"abc"), held.reset, held.publish, lambda: held.record(0, 3, 0)):
        with pytest.raises(StoreError, match="is closed"):
            late()


def test_many_threads_write_one_blob(tmp_path: Path) -> None:
    blobs = folder(tmp_path)
    with blobs.claim(FILE) as held:
        assert held is not None

        def some(first: int) -> None:
            for start in range(first * 7000, SIZE, 4 * 7000):
                fill(held, start, min(SIZE, start + 7000))

        threads = [threading.Thread(target=some, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert list(held.ranges) == [(0, SIZE)]
        held.publish()
    assert blobs.path(FILE.oid).read_bytes() == DATA


# --- taking back


def test_reset_forgets_bytes_ranges_and_etags_also_for_the_next_one(tmp_path: Path) -> None:
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        fill(held, 0, HALF)
        assert held.note_etag("hub", '"one"')
        held.reset()
        assert list(held.ranges) == []
        assert os.fstat(held.descriptor).st_size == 0
        assert held.note_etag("hub", '"two"')
        fill(held, PIECE, 2 * PIECE)
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        assert list(held.ranges) == [(PIECE, 2 * PIECE)]
        assert not held.note_etag("hub", '"one"')
        assert held.note_etag("hub", '"two"')
        finish(held)


def test_a_source_that_changed_its_etag_is_noticed_also_by_the_next_process(tmp_path: Path) -> None:
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        fill(held, 0, PIECE)
        assert held.note_etag("mirror \n one", 'W/"ä"')
        assert held.note_etag("mirror \n one", 'W/"ä"')
        assert held.note_etag("mirror two", "b")
        assert not held.note_etag("mirror two", "c")
    for _ in range(2):
        with folder(tmp_path).claim(FILE) as held:
            assert held is not None
            assert held.note_etag("mirror \n one", 'W/"ä"')
            assert not held.note_etag("mirror two", "c")


def test_wrong_bytes_are_put_aside_and_the_oldest_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "QUARANTINE_BYTES", 3 * SIZE + 20_000)
    aside = tmp_path / "quarantine"
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        number = held.descriptor
        kept = []
        for turn in range(5):
            held.write(0, bytes([turn]) * SIZE)
            held.record(0, SIZE, 0)
            kept.append(held.quarantine(aside))
            os.utime(kept[-1], (turn, turn))
            assert held.descriptor == number
            assert list(held.ranges) == []
            assert os.pread(number, 10, 0) == b""
        assert [path.exists() for path in kept] == [False, False, True, True, True]
        assert kept[-1].read_bytes() == b"\4" * SIZE
        finish(held)
    assert names(tmp_path) == ["oid"]


def test_of_a_huge_wrong_blob_only_the_beginning_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "QUARANTINE_BYTES", 100_000)
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        held.write(0, DATA)
        assert held.quarantine(tmp_path / "aside").read_bytes() == DATA[:100_000]
        finish(held)


def test_wrong_bytes_go_aside_to_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target).parent.name == "aside":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        held.write(0, DATA)
        assert held.quarantine(tmp_path / "aside").read_bytes() == DATA
        finish(held)


# --- sweeping


def test_a_sweep_takes_what_nobody_works_on_and_nothing_else(tmp_path: Path) -> None:
    blobs = folder(tmp_path)
    assert blobs.sweep(0) == 0, "a folder that is not there is swept already"
    blobs.put(FILE, DATA)
    other = SourceFile("other", SIZE, "1" * 64, True)
    held_file = SourceFile("held", SIZE, "2" * 40, False)
    with blobs.claim(other) as left:
        assert left is not None
        fill(left, 0, HALF)
    stranger = blobs.root / f"{'3' * 64}.a1b2c3d4.incomplete"  # another program's, of which there is no journal
    stranger.write_bytes(b"x" * 4096)
    (blobs.root / "README").write_bytes(b"not ours")
    with blobs.claim(held_file) as held:
        assert held is not None
        fill(held, 0, HALF)
        before = sorted(os.listdir(blobs.root))
        assert blobs.sweep(3600) == 0
        assert sorted(os.listdir(blobs.root)) == before
        freed = blobs.sweep(-1)
        assert HALF + 4096 <= freed < HALF + 65536
        assert sorted(os.listdir(blobs.root)) == sorted(
            [FILE.oid, "README", f"{held_file.oid}.00000001.incomplete", f"{held_file.oid}.00000001.journal.incomplete"]
        )
        assert not held.fenced
    assert blobs.sweep(-1, complete=True) >= SIZE + HALF
    assert os.listdir(blobs.root) == ["README"]


def test_a_store_prunes_what_was_abandoned_in_its_raw_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.raw.put(FILE, DATA)
    other = SourceFile("other", SIZE, "1" * 64, True)
    with store.raw.claim(other) as left:
        assert left is not None
        fill(left, 0, HALF)
    with store.workspace():
        assert store.raw.has(FILE)
    two_days_ago = time.time() - 2 * 86_400
    for path in store.raw.root.iterdir():
        os.utime(path, (two_days_ago, two_days_ago))
    fresh = SourceFile("fresh", 3, "4" * 64, True)
    store.raw.put(fresh, b"abc")
    with store.workspace():
        assert os.listdir(store.raw.root) == [fresh.oid]


# --- what a disk may say


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("a small tmpfs needs the right to mount")
    try:
        yield small
    finally:
        subprocess.run(["umount", "-l", str(small)], timeout=20, check=True)


def test_a_full_disk_is_named_and_what_was_recorded_stays_true(small_disk: Path) -> None:
    blobs = folder(small_disk)
    recorded = 0

    def bring() -> None:
        nonlocal recorded
        with blobs.claim(FILE) as held:
            assert held is not None
            for start in range(0, SIZE, PIECE):
                fill(held, start, start + PIECE)
                recorded = start + PIECE

    with pytest.raises(DiskFull, match=rf"{small_disk}.*1,500,000 bytes for data/train"):
        bring()
    assert recorded >= 10 * PIECE
    with pytest.raises(DiskFull, match=str(small_disk)):
        blobs.put(SourceFile("other", SIZE, "1" * 64, True), bytes(SIZE))
    with pytest.raises(DiskFull), blobs.claim(FILE):
        pass
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], timeout=20, check=True)
    with blobs.claim(FILE) as held:
        assert held is not None
        assert list(held.ranges) == [(0, recorded)]
        finish(held)
    assert names(small_disk) == ["oid"]


def test_a_journal_that_finds_no_space_keeps_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes half a line and then no more: what is written after that must not join it."""
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        fill(held, 0, PIECE)
        held.write(PIECE, DATA[PIECE : 3 * PIECE])
        real = os.pwrite
        refused: list[bool] = []

        def pwrite(descriptor: int, data: bytes, offset: int) -> int:
            if refused:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            refused.append(True)
            return real(descriptor, data[:-1], offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(DiskFull):
            held.record(PIECE, 2 * PIECE, zlib.crc32(DATA[PIECE : 2 * PIECE]))
        monkeypatch.setattr(os, "pwrite", real)
        assert list(held.ranges) == [(0, PIECE)]
    with folder(tmp_path).claim(FILE, wait_s=0) as held:
        assert held is not None
        assert list(held.ranges) == [(0, PIECE)], "it was let go, and that can be read behind the half line"


def test_a_read_only_disk_has_what_it_has_and_takes_no_more(tmp_path: Path) -> None:
    home, frozen = tmp_path / "home", tmp_path / "frozen"
    small = SourceFile("small", 3, "4" * 64, True)
    folder(home).put(small, b"abc")
    leave(home, (0, HALF))
    frozen.mkdir()
    command = ["mount", "--bind", str(home), str(frozen)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("a read-only mount needs the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(frozen)], timeout=20, check=True)
        blobs = folder(frozen)
        with blobs.claim(small) as held:
            assert held is None
        with pytest.raises(StoreReadOnly, match=str(frozen)), blobs.claim(FILE):
            pass
        with pytest.raises(StoreReadOnly, match=str(frozen)):
            blobs.put(FILE, DATA)
        assert blobs.sweep(-1) == 0
    finally:
        subprocess.run(["umount", "-l", str(frozen)], timeout=20, check=True)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_disk_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        finish(held)
    assert BlobFolder(tmp_path / "raw", None).has(FILE)


def test_a_disk_without_links_gets_its_blobs_by_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        finish(held)
    assert names(tmp_path) == ["oid"]
