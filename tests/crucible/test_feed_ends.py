"""A feeder leaves no thread behind: not when it is closed or forgotten, not after Ctrl-C, at the end, or in a fork."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from crucible.cache.holds import holds_of
from crucible.feed import Feeder
from crucible.iterate import ShardReader
from crucible.manifest import Manifest
from crucible.refs import ShardInfo
from crucible.stopping import never
from tests.fakes.feeding import WAIT_S, FarSource, feed_threads, until
from tests.fakes.shards import number_split

ROOT = Path(__file__).resolve().parents[2]
SHARDS = 12
BUDGET = 1 << 20
forking = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
"""What Python says of a fork beside threads, from 3.12 on; a DataLoader forks all the same."""


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    (tmp_path / "far").mkdir()
    return number_split(tmp_path / "far", [20] * SHARDS)[0]


@pytest.fixture
def source(tmp_path: Path, manifest: Manifest) -> Iterator[FarSource]:
    made = FarSource(tmp_path / "far", tmp_path / "store")
    yield made
    made.open.set()
    holds_of(tmp_path / "store").close()
    until(lambda: not feed_threads())


def all_of(manifest: Manifest) -> Iterator[tuple[Manifest, ShardInfo]]:
    return ((manifest, shard) for shard in manifest.shards)


def test_close_ends_fetches_that_are_under_way(manifest: Manifest, source: FarSource) -> None:
    source.open.clear()
    feeder = Feeder(source, most_bytes=BUDGET, fetchers=3)
    feeder.want(all_of(manifest))
    until(lambda: len(feed_threads()) == 3)
    feeder.close()
    assert feed_threads() == []
    assert feeder.bytes_ahead == 0
    assert source.store.leased() == set()
    source.open.set()
    assert feeder.path(manifest, manifest.shards[0]).exists(), "a closed one still gives what is asked for"
    feeder.want(all_of(manifest))
    feeder.opened(manifest, manifest.shards[0])
    assert feed_threads() == []


@pytest.mark.parametrize("by_cycle", [False, True])
def test_a_feeder_that_is_forgotten_ends(manifest: Manifest, source: FarSource, by_cycle: bool) -> None:
    source.open.clear()
    feeder = Feeder(source, most_bytes=BUDGET)
    feeder.want(all_of(manifest))
    until(lambda: len(feed_threads()) == 2)
    if by_cycle:
        feeder.itself = feeder  # type: ignore[attr-defined]
    del feeder
    gc.collect()
    until(lambda: not feed_threads())
    assert source.store.leased() == set()


def test_who_is_interrupted_while_it_waits_gets_away_at_once_and_the_fetch_ends(
    manifest: Manifest, source: FarSource
) -> None:
    source.open.clear()
    reader = ShardReader(manifest, source)

    def interrupt() -> None:
        until(lambda: source.fetched)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        reader.slice(0, 5)
    until(lambda: not feed_threads())
    assert source.store.leased() == set()
    source.open.set()
    assert reader.slice(0, 2)["id"].to_pylist() == [0, 1], "and may be asked for again"


def test_two_who_wait_for_one_fetch_do_not_end_it_for_each_other(manifest: Manifest, source: FarSource) -> None:
    source.open.clear()
    feeder = Feeder(source)
    shard, got = manifest.shards[0], list[Path]()
    other = threading.Thread(target=lambda: got.append(feeder.path(manifest, shard)), daemon=True)
    other.start()
    until(lambda: source.fetched)

    def interrupt() -> None:
        state = feeder._state
        until(lambda: state is not None and state._under_way[shard.key].waiting == 2)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        feeder.path(manifest, shard)
    source.open.set()
    other.join(WAIT_S)
    assert len(got) == 1
    assert len(source.fetched) == 1


@forking
def test_a_forked_child_has_no_threads_and_fetches_by_itself(manifest: Manifest, source: FarSource) -> None:
    source.open.clear()
    feeder = Feeder(source, most_bytes=BUDGET, fetchers=1)
    reader = ShardReader(manifest, feeder)
    feeder.want(all_of(manifest))
    until(lambda: len(feed_threads()) == 1)
    child = os.fork()
    if child == 0:
        code = 1
        with suppress(BaseException):
            assert feed_threads() == []
            source.open = threading.Event()
            source.open.set()
            assert reader.slice(0, 40)["id"].to_pylist() == list(range(40))
            until(lambda: len(source.came) == SHARDS)
            feeder.close()
            assert feed_threads() == []
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(feed_threads()) == 1, "the parent's goes on"
    feeder.close()


@forking
def test_forking_in_the_middle_of_fetches_never_hangs(manifest: Manifest, source: FarSource) -> None:
    feeder = Feeder(source, most_bytes=BUDGET, fetchers=3)
    for _ in range(15):
        feeder.want((manifest, shard) for shard in manifest.shards)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            with suppress(BaseException):
                feeder.want(all_of(manifest))
                for shard in manifest.shards:
                    source.path(manifest, shard, never)
                    feeder.path(manifest, shard)
                    feeder.opened(manifest, shard)
                feeder.close()
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for shard in manifest.shards:
            source.store.evict(shard.key)
    feeder.close()


SCRIPT = """
import signal, sys, threading
from pathlib import Path
from crucible.feed import Feeder
from crucible.iterate import ShardReader
from tests.fakes.feeding import FarSource, feed_threads, until
from tests.fakes.shards import number_split
root = Path(sys.argv[1])
(root / "far").mkdir()
manifest, _ = number_split(root / "far", [20] * 12)
source = FarSource(root / "far", root / "store")
source.open.clear()
feeder = Feeder(source, most_bytes=1 << 20)
reader = ShardReader(manifest, feeder)
feeder.want((manifest, shard) for shard in manifest.shards)
until(lambda: len(feed_threads()) == 2)
print("fetching", flush=True)
"""


@pytest.mark.parametrize("end", ["pass", "reader.slice(0, 5)"])
def test_a_process_that_ends_while_it_fetches_ends(tmp_path: Path, end: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + end, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "fetching\n"
        if end.startswith("reader"):
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
        process.wait(WAIT_S)
    if end.startswith("reader"):
        assert process.returncode == -signal.SIGINT
        assert said.strip().endswith("KeyboardInterrupt")
    else:
        assert (process.returncode, said) == (0, "")
    assert list((tmp_path / "store" / "leases").iterdir()) == []
