"""A store of an older layout is migrated, one of a newer or an unknown one is left alone and named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crucible.cache import layout
from crucible.cache.store import Store
from crucible.errors import StoreError, StoreVersion

KEY = "ab" + "0" * 62


def flat_store(home: Path) -> None:
    """A store of a layout that never was: shards lie without their two-letter folders."""
    (home / "flat").mkdir(parents=True)
    (home / "flat" / f"{KEY}.arrow").write_bytes(b"shard")
    (home / "flat" / "notes.txt").write_text("the user's own")
    (home / "elsewhere").write_text("not ours")
    (home / "VERSION").write_text("0\n")


def from_flat(home: Path) -> None:
    for path in sorted((home / "flat").glob("*.arrow")):
        target = home / "shards" / path.name[:2] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)


def test_a_store_of_an_older_layout_is_migrated_and_what_is_unknown_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MIGRATIONS", {"0": ("1", from_flat)})
    flat_store(tmp_path)
    assert list(Store(tmp_path).shards()) == [(KEY, 5)]
    assert (tmp_path / "VERSION").read_text() == "1\n"
    assert (tmp_path / "flat" / "notes.txt").read_text() == "the user's own"
    assert (tmp_path / "elsewhere").exists()


def test_migrations_are_chained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    steps = {"-1": ("0", lambda home: done.append("first")), "0": ("1", lambda home: done.append("second"))}
    monkeypatch.setattr(layout, "MIGRATIONS", steps)
    (tmp_path / "VERSION").write_text("-1\n")
    Store(tmp_path)
    assert done == ["first", "second"]


def test_a_migration_that_was_interrupted_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def stumbles(home: Path) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise KeyboardInterrupt
        from_flat(home)

    monkeypatch.setattr(layout, "MIGRATIONS", {"0": ("1", stumbles)})
    flat_store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path)
    assert layout.found_layout(tmp_path) == "0"
    assert [key for key, _ in Store(tmp_path).shards()] == [KEY]


def test_a_disk_that_fails_leaves_the_older_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(home: Path) -> None:
        raise OSError(28, "No space left on device", str(home))

    monkeypatch.setattr(layout, "MIGRATIONS", {"0": ("1", fails)})
    flat_store(tmp_path)
    with pytest.raises(OSError, match="no space left"):
        Store(tmp_path)
    assert layout.found_layout(tmp_path) == "0"


@pytest.mark.parametrize("found", ["2", "", "one", "1.5", "1\n1"])
def test_a_store_of_a_newer_or_unknown_layout_is_refused_untouched(tmp_path: Path, found: str) -> None:
    flat_store(tmp_path)
    (tmp_path / "VERSION").write_text(found)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(StoreVersion) as refused:
        Store(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert "this crucible reads 1" in str(refused.value)
    assert "CRUCIBLE_HOME" in str(refused.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


_MIGRATE = """
import os, sys, time
from pathlib import Path
from crucible.cache import layout
from crucible.cache.store import Store
def step(home):
    with open(home / "migrated", "a") as file:
        file.write("x")
    time.sleep(0.3)
layout.MIGRATIONS = {"0": ("1", step)}
Store(Path(sys.argv[1]))
"""


def test_of_several_processes_one_migrates(tmp_path: Path) -> None:
    flat_store(tmp_path)
    command = [sys.executable, "-c", _MIGRATE, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "migrated").read_text() == "x"
    shutil.rmtree(tmp_path / "flat")


def test_a_home_that_this_user_cannot_read_is_named_and_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0)
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            Store(home)
        except StoreError as error:
            os._exit(0 if "cannot be read" in str(error) and "CRUCIBLE_HOME" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
