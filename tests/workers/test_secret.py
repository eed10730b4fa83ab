"""The secret of a cluster: a file for its user only, compared in constant time, changed without a reader failing."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible.cache.store import Store
from crucible.cluster.keys import Keys
from crucible.errors import StoreError
from crucible.workers import secret as secrets
from crucible.workers.secret import (
    Keyring,
    News,
    ensure_numbered,
    ensure_secret,
    keep_old,
    keep_secret,
    load_numbered,
    load_old,
    load_secret,
    new_secret,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(secrets, "time", clock)
    return clock


class TestFile:
    def test_it_is_made_once_and_for_this_user_only(self, store: Store) -> None:
        made = ensure_secret(store)
        assert len(made) >= 40
        assert made == ensure_secret(store) == load_secret(store)
        assert (store.home / "secret").stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o666, 0o644, 0o601])
    def test_one_that_others_may_read_or_write_is_refused_by_name(self, store: Store, mode: int) -> None:
        ensure_secret(store)
        path = store.home / "secret"
        path.chmod(mode)
        with pytest.raises(StoreError, match=rf"{path}: has mode {mode:04o}.*rotate-secret"):
            load_secret(store)
        with pytest.raises(StoreError):
            ensure_secret(store)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
    def test_one_of_another_user_is_refused_by_name(self, store: Store) -> None:
        ensure_secret(store)
        os.chown(store.home / "secret", 12345, -1)
        with pytest.raises(StoreError, match="belongs to user 12345"):
            load_secret(store)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
    def test_root_reads_the_one_of_the_user_whose_store_it_is(self, store: Store) -> None:
        made = ensure_secret(store)
        for path in (store.home, store.home / "secret"):
            os.chown(path, 12345, -1)
        assert load_secret(store) == made

    @pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
    def test_what_is_no_file_is_refused(self, store: Store, tmp_path: Path, kind: str) -> None:
        store.home.mkdir(parents=True)
        path = store.home / "secret"
        if kind == "link":
            other = tmp_path / "other"
            other.write_text("of somebody else")
            other.chmod(0o600)
            path.symlink_to(other)
        elif kind == "folder":
            path.mkdir()
        else:
            os.mkfifo(path, 0o600)
        with pytest.raises(StoreError, match="secret"):
            load_secret(store)

    def test_one_of_a_store_without_numbers_is_the_first(self, store: Store) -> None:
        store.write_small("secret", b"of-an-older-crucible", mode=0o600)
        assert load_numbered(store) == secrets.Secret("of-an-older-crucible", 1)

    @pytest.mark.parametrize("data", [b"", b"\n", b"  "])
    def test_an_empty_one_is_none(self, store: Store, data: bytes) -> None:
        store.write_small("secret", data, mode=0o600)
        assert load_secret(store) is None
        assert ensure_secret(store)

    def test_no_repr_shows_it(self, store: Store) -> None:
        made = ensure_numbered(store)
        assert made.text not in repr(made) + repr(News(made, made, 1.0)) + str(made)
        assert pickle.loads(pickle.dumps(made)) == made


class TestKeyring:
    @given(st.text(max_size=50), st.text(max_size=50))
    def test_only_the_same_text_is_the_same(self, one: str, other: str) -> None:
        try:
            assert Keyring(other).good(one) == (one == other)
        except UnicodeEncodeError:
            assert any("\ud800" <= letter <= "\udfff" for letter in one + other)

    def test_what_no_utf8_can_be_is_a_wrong_one(self) -> None:
        assert not Keyring("x").good("\udcff")

    def test_the_old_one_is_good_for_a_while(self, clock: Clock) -> None:
        ring = Keyring("first")
        ring.turn("second", 10)
        clock.now += 9
        assert (ring.good("first"), ring.good("second"), ring.good("third")) == (True, True, False)
        clock.now += 2
        assert (ring.good("first"), ring.good("second")) == (False, True)

    def test_without_overlap_the_old_one_is_refused_at_once(self, clock: Clock) -> None:
        ring = Keyring("first")
        ring.turn("second", 0)
        assert (ring.good("first"), ring.good("second")) == (False, True)

    def test_one_that_is_coming_is_good_already_and_stays_so_when_it_comes(self, clock: Clock) -> None:
        ring = Keyring("first")
        ring.accept("second", 5)
        assert ring.good("first")
        assert ring.good("second")
        ring.turn("second", 5)
        clock.now += 100
        assert ring.good("second")

    def test_a_later_turn_makes_no_old_one_good_for_longer(self, clock: Clock) -> None:
        ring = Keyring("first")
        ring.turn("second", 10)
        clock.now += 5
        ring.turn("third", 100)
        clock.now += 6
        assert (ring.good("first"), ring.good("second"), ring.good("third")) == (False, True, True)

    def test_accepting_what_counts_does_not_make_it_end(self, clock: Clock) -> None:
        ring = Keyring("first")
        ring.accept("first", 1)
        clock.now += 2
        assert ring.good("first")


class TestOldOnDisk:
    def test_it_is_accepted_after_a_restart_as_long_as_it_was_to_be(self, store: Store, clock: Clock) -> None:
        keep_old(store, "first", 10)
        clock.now += 4
        assert load_old(store) == ("first", 6.0)
        clock.now += 7
        assert load_old(store) is None
        assert not (store.home / "secret.old").exists()

    def test_a_clock_that_was_set_back_does_not_make_it_good_for_ever(self, store: Store, clock: Clock) -> None:
        keep_old(store, "first", 10)
        clock.now -= 500
        assert load_old(store) == ("first", 10.0)

    @pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b'{"secret": "x", "until": "soon", "overlap": 1}'])
    def test_what_cannot_be_read_is_none(self, store: Store, data: bytes) -> None:
        store.write_small("secret.old", data, mode=0o600)
        assert load_old(store) is None


class TestKeys:
    def test_agents_accept_the_new_one_before_anybody_uses_it(self, store: Store) -> None:
        keys = Keys(store)
        first = keys.news().now
        seen: list[tuple[News, str | None]] = []

        def tell() -> dict[str, str]:
            seen.append((keys.news(), load_secret(store)))
            return {"n": "no answer"} if len(seen) == 2 else {}

        told = keys.turn(30, tell)  # type: ignore[arg-type]
        (before, on_disk), (after, on_disk_then) = seen
        assert (before.now, on_disk) == (first, first.text)
        assert before.coming == after.now == load_numbered(store)
        assert on_disk_then == after.now.text != first.text
        assert (after.coming, after.now.number) == (None, 2)
        assert told == {"number": 2, "overlap_s": 30, "missed": {"n": "no answer"}}
        assert load_old(store) is not None

    def test_a_disk_that_cannot_keep_it_leaves_the_old_one(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = Keys(store)
        first = keys.news()

        def full(*_: object, **__: object) -> None:
            raise StoreError("secret", "no space")

        monkeypatch.setattr(Store, "write_small", full)
        with pytest.raises(StoreError):
            keys.turn(30, dict)
        assert keys.news().now == first.now
        assert keys.news().coming is None

    def test_a_coordinator_that_missed_a_change_takes_the_later_one_and_no_earlier_one(self, store: Store) -> None:
        keys = Keys(store)
        later = new_secret(7)
        keys.adopt(later)
        keys.adopt(new_secret(3))
        assert keys.news().now == later == load_numbered(store)

    def test_a_secret_in_use_outlives_its_coordinator(self, store: Store) -> None:
        keep_secret(store, "kept", 5)
        assert Keys(store).number == 5
