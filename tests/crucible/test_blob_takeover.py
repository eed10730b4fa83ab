"""Going on where another process stopped: whose bytes are taken over, from whom, and how long it is waited for."""

from __future__ import annotations

import os
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.cache import journal, lease
from crucible.cache.owner import Owner
from tests.crucible.blob_cases import (
    DATA,
    FILE,
    HALF,
    PIECE,
    SIZE,
    WAIT_S,
    data_path,
    disown,
    fill,
    finish,
    folder,
    journal_path,
    leave,
    names,
    wait_until,
)


def test_what_was_let_go_is_taken_over_at_once_and_in_place(tmp_path: Path) -> None:
    leave(tmp_path, (0, 1000), (HALF, HALF + PIECE))
    inode = data_path(tmp_path).stat().st_ino
    began = time.monotonic()
    with folder(tmp_path).claim(FILE) as held:
        assert time.monotonic() - began < lease.LEASE_S / 4
        assert held is not None
        assert list(held.ranges) == [(0, 1000), (HALF, HALF + PIECE)]
        assert held.adopted == 1000 + PIECE
        assert data_path(tmp_path, 2).stat().st_ino == inode
        assert not data_path(tmp_path).exists()
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        assert held.adopted == 1000 + PIECE, "what was taken over is journalled anew"
        finish(held)
    assert names(tmp_path) == ["oid"]


def test_a_lease_under_which_nothing_was_recorded_leaves_nothing(tmp_path: Path) -> None:
    leave(tmp_path)
    assert names(tmp_path) == []
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        held.write(0, b"not recorded")
    assert names(tmp_path) == []


def test_the_fullest_of_several_leftovers_is_taken_and_the_others_go(tmp_path: Path) -> None:
    leave(tmp_path, (0, HALF))
    small, large = journal_path(tmp_path), data_path(tmp_path)
    kept = small.read_bytes(), large.read_bytes()
    leave(tmp_path, (HALF, HALF + PIECE))
    small.write_bytes(kept[0])
    large.write_bytes(kept[1])
    body = journal_path(tmp_path, 2).read_bytes().split(b"\n")
    journal_path(tmp_path, 2).write_bytes(b"\n".join([body[0], body[-3], body[-2], b""]))  # only its last entry
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        assert list(held.ranges) == [(0, HALF)]
        assert [path.name for path in (tmp_path / "raw").glob("*") if ".journal." not in path.name] == [
            data_path(tmp_path, 3).name
        ]


def test_a_flipped_byte_costs_its_range_and_no_other(tmp_path: Path) -> None:
    leave(tmp_path, *((start, start + PIECE) for start in range(0, SIZE, PIECE)))
    with data_path(tmp_path).open("r+b") as out:
        out.seek(3 * PIECE + 17)
        out.write(bytes([DATA[3 * PIECE + 17] ^ 1]))
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        assert held.ranges.missing(SIZE) == ((3 * PIECE, 4 * PIECE),)
        finish(held)


def test_a_data_file_that_lost_its_end_in_a_power_cut_costs_what_it_lost(tmp_path: Path) -> None:
    leave(tmp_path, *((start, start + PIECE) for start in range(0, SIZE, PIECE)))
    os.truncate(data_path(tmp_path), 10 * PIECE + 1)
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        assert held.ranges.missing(SIZE) == ((10 * PIECE, SIZE),)
        finish(held)


@pytest.mark.parametrize(
    "torn", [b"", b"7", b"150000 ", b"150000 200000 12", b"rel", b"150000 200000 12 13\n", b"\0" * 9]
)
def test_a_journal_is_read_up_to_where_it_was_torn(tmp_path: Path, torn: bytes) -> None:
    leave(tmp_path, *((start, start + PIECE) for start in range(0, SIZE, PIECE)))
    lines = journal_path(tmp_path).read_bytes().split(b"\n")
    journal_path(tmp_path).write_bytes(b"\n".join([*lines[:4], torn]))
    disown(tmp_path, started=1)
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        assert list(held.ranges) == [(0, 3 * PIECE)]


@pytest.mark.parametrize(
    "change",
    [{"size": SIZE + 1}, {"oid": "0" * 64}, {"journal": 99}, {"pid": "no"}],
    ids=lambda change: next(iter(change)),
)
def test_a_journal_of_another_file_or_of_nobody_is_thrown_away_with_its_data(
    tmp_path: Path, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 0.5)
    leave(tmp_path, (0, HALF))
    disown(tmp_path, **{"started": 1, **change})
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        assert held.adopted == 0
        assert not data_path(tmp_path).exists()
        finish(held)
    assert names(tmp_path) == ["oid"]


OWNER = Owner("host", "boot", "pid:1", 7, 8)
entries = st.lists(
    st.tuples(st.integers(0, SIZE), st.integers(0, SIZE), st.integers(0, 2**32 - 1))
    .filter(lambda entry: entry[0] < entry[1])
    .map(lambda entry: journal.Entry(*entry)),
    max_size=6,
)


@settings(deadline=None, max_examples=200)
@given(entries, st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3), st.data())
def test_any_beginning_of_a_journal_says_a_beginning_of_what_it_said(
    written: list[journal.Entry], etags: dict[str, str], data: st.DataObject
) -> None:
    text = journal.header(FILE, OWNER)
    text += b"".join([journal.etag_line(*pair) for pair in etags.items()] + [entry.line() for entry in written])
    whole = journal.parse(text + journal.RELEASED, FILE)
    assert whole == journal.Journal(OWNER, tuple(written), etags)
    cut = data.draw(st.integers(0, len(text)))
    read = journal.parse(text[:cut], FILE)
    if read is not None:
        assert read.entries == tuple(written[: len(read.entries)])
        assert read.etags.items() <= etags.items()
    garbage = data.draw(st.binary(max_size=40))
    after = journal.parse(text[:cut] + garbage, FILE)
    assert after is None or read is None or after.entries[: len(read.entries)] == read.entries


def test_a_data_file_with_a_second_name_is_copied_not_written_to(tmp_path: Path) -> None:
    """A kill between a blob's link and the removal of its old name leaves such a pair."""
    leave(tmp_path, (0, SIZE))
    other = tmp_path / "other"
    os.link(data_path(tmp_path), other)
    with folder(tmp_path).claim(FILE) as held:
        assert held is not None
        assert held.adopted == SIZE
        held.write(0, b"something else")
        assert other.read_bytes() == DATA


# --- who is dead


def test_a_process_with_a_recycled_pid_is_dead(tmp_path: Path) -> None:
    leave(tmp_path, (0, HALF))
    disown(tmp_path, started=Owner.current().started - 1)
    with folder(tmp_path).claim(FILE, wait_s=0) as held:
        assert held is not None
        assert (held.adopted, held.ranges.frontier) == (HALF, HALF)
        assert not data_path(tmp_path).exists()


@pytest.mark.parametrize(
    "elsewhere", [{"host": "elsewhere"}, {"boot": "another"}, {"namespace": "pid:1"}, {"boot": ""}]
)
def test_a_process_out_of_sight_is_believed_until_it_is_silent_and_then_copied(
    tmp_path: Path, elsewhere: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 0.6)
    leave(tmp_path, (0, HALF))
    disown(tmp_path, pid=2**22 + 1, started=1, **elsewhere)
    inode = data_path(tmp_path).stat().st_ino
    stop = threading.Event()
    signs = [(time.monotonic(), time.monotonic())]
    """Before and after each sign of life: it was given somewhere between."""

    def live() -> None:
        for _ in range(20):
            before = time.monotonic()
            os.utime(journal_path(tmp_path))
            signs.append((before, time.monotonic()))
            if stop.wait(0.05):
                return

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with folder(tmp_path).claim(FILE) as held:
            end = time.monotonic()
            given = [sign for sign in list(signs) if sign[1] <= end]
            # the longest, not the last: on a busy machine it may have been silent earlier
            longest = max(later - earlier for (earlier, _), (_, later) in pairwise([*given, (end, end)]))
            assert longest > 0.5, "it was silent before it was given up on"
            assert held is not None
            assert held.adopted == HALF
            assert data_path(tmp_path, 2).stat().st_ino != inode
            finish(held)
    finally:
        stop.set()
        thread.join(WAIT_S)
    assert names(tmp_path) == ["oid"]


def test_a_clock_that_is_wrong_does_not_make_a_living_holder_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its signs of life are changes; what their times say matters only when there are none."""
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    path = tmp_path / "journal"
    path.write_bytes(journal.header(FILE, OWNER))
    silence = lease.Silence(tmp_path)

    def silent() -> bool:
        seen = journal.glance(path)
        assert seen is not None
        return silence.of(seen)

    for second in range(8):
        os.utime(path, (second, second))  # half a century ago
        assert not silent()
        time.sleep(0.02)
    wait_until(silent, "its silence to be noticed")


def test_a_slow_holder_that_lives_keeps_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 2.0)  # a disk may take a second over a sign of life
    blobs = folder(tmp_path)
    found: list[object] = []

    def wait() -> None:
        with blobs.claim(FILE) as other:
            found.append(other)

    with blobs.claim(FILE) as held:
        assert held is not None
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(4.5)  # more than twice the lease, without a byte
        assert not held.fenced
        assert found == []
        finish(held)
    thread.join(WAIT_S)
    assert found == [None]


# --- waiting


def test_a_blob_published_between_the_look_and_the_lease_is_not_brought_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = folder(tmp_path)
    real = lease.Lease.create

    def late(*args: Any) -> lease.Lease | None:
        blobs.put(FILE, DATA)
        return real(*args)

    monkeypatch.setattr(lease.Lease, "create", late)
    with blobs.claim(FILE) as held:
        assert held is None
    assert names(tmp_path) == ["oid"]


def test_a_gap_in_the_generations_is_closed_and_the_highest_still_holds(tmp_path: Path) -> None:
    """Somebody tidied up: the holder of a higher number lives, lower ones are gone."""
    leave(tmp_path, (0, PIECE))
    blobs = folder(tmp_path)
    with blobs.claim(FILE) as held:
        assert held is not None
        journal_path(tmp_path).unlink()
        with blobs.claim(FILE, wait_s=0) as alone:
            assert alone is not None
            assert (alone.adopted, alone.fenced) == (0, False)
        assert not held.fenced
        finish(held)
    assert names(tmp_path) == ["oid"]


def test_a_second_thread_waits_and_finds_the_blob(tmp_path: Path) -> None:
    blobs = folder(tmp_path)
    found: list[object] = []

    def bring() -> None:
        with blobs.claim(FILE) as held:
            found.append(held)
            if held is not None:
                time.sleep(0.2)
                finish(held)

    threads = [threading.Thread(target=bring) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(found) == 4
    assert sum(held is not None for held in found) == 1


def test_a_holder_without_progress_is_passed_by_with_a_private_file(tmp_path: Path) -> None:
    blobs = folder(tmp_path)
    with blobs.claim(FILE) as held:
        assert held is not None
        fill(held, 0, HALF)
        with blobs.claim(FILE, wait_s=0.3) as alone:
            assert alone is not None
            assert (alone.adopted, alone.fenced, held.fenced) == (0, False, False)
            assert sum(".journal." in name for name in names(tmp_path)) == 1
            fill(alone, 0, SIZE)
        assert len(names(tmp_path)) == 2, "what nobody can go on with is removed"
        with blobs.claim(FILE, wait_s=0) as alone:
            assert alone is not None
            alone.write(0, b"wrong")
            alone.reset()
            assert alone.note_etag("hub", "1")
            finish(alone)
        assert blobs.path(FILE.oid).read_bytes() == DATA
        held.write(0, b"wrong")
        assert blobs.path(FILE.oid).read_bytes() == DATA, "two that bring one blob share no bytes"
        held.reset()
        finish(held)
    assert names(tmp_path) == ["oid"]


def test_a_holder_that_gets_on_is_waited_for_beyond_the_limit(tmp_path: Path) -> None:
    blobs = folder(tmp_path)
    found: list[object] = []

    def wait() -> None:
        with blobs.claim(FILE, wait_s=1.5) as other:
            found.append(other)

    with blobs.claim(FILE) as held:
        assert held is not None
        thread = threading.Thread(target=wait)
        thread.start()
        for start in range(0, SIZE, PIECE):
            fill(held, start, start + PIECE)
            time.sleep(0.07)
        assert found == []
        held.publish()
    thread.join(WAIT_S)
    assert found == [None]
