"""Faults of the kind that must never get through, put into what a story left, to show that the invariants see them.

Each is a context: the evidence is wrong inside of it, and as it was afterwards. The name is the invariant's that has to
speak up; the product knows nothing of any of them.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from tests.chaos.play import Played
from tests.chaos.rank import digest_of
from tests.chaos.stage import CONNECTIONS, TOKEN

Plant = Callable[[Played], AbstractContextManager[None]]


@contextmanager
def _received(played: Played, spoil: Callable[[Played], None]) -> Iterator[None]:
    before = list(played.received)
    spoil(played)
    yield
    played.received[:] = before


def a_dropped_batch(played: Played) -> AbstractContextManager[None]:
    return _received(played, lambda played: played.received.__delitem__(len(played.received) // 2))


def a_batch_that_came_twice(played: Played) -> AbstractContextManager[None]:
    return _received(played, lambda played: played.received.insert(3, played.received[3]))


def two_batches_that_changed_places(played: Played) -> AbstractContextManager[None]:
    def spoil(played: Played) -> None:
        one, two = played.received[1:3]
        played.received[1:3] = [
            replace(one, ids=two.ids, digest=two.digest), replace(two, ids=one.ids, digest=one.digest)
        ]  # fmt: skip

    return _received(played, spoil)


def an_altered_row(played: Played) -> AbstractContextManager[None]:
    def spoil(played: Played) -> None:
        one = played.received[2]
        texts = [played.truth.texts[number] for number in one.ids]
        texts[0] = "x" + texts[0][1:]
        played.received[2] = replace(one, digest=digest_of(list(one.ids), texts))

    return _received(played, spoil)


@contextmanager
def _changed(path: Path, data: bytes | None) -> Iterator[None]:
    """A file with other bytes, or without any."""
    before = path.read_bytes()
    path.write_bytes(data) if data is not None else path.unlink()
    yield
    path.write_bytes(before)


@contextmanager
def _added(path: Path, data: bytes = b"?") -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    yield
    path.unlink(missing_ok=True)


def a_lost_record(played: Played) -> AbstractContextManager[None]:
    return _changed(next((played.folder / "records").glob("*.delivered.json")), None)


def a_byte_flipped_after_verification(played: Played) -> AbstractContextManager[None]:
    path = next(path for home in played.homes for path in (home / "shards").rglob("*.arrow"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    return _changed(path, bytes(data))


def a_shard_of_something_else(played: Played) -> AbstractContextManager[None]:
    return _added(played.homes[1] / "shards" / "ab" / f"{'ab' * 32}.arrow")


@contextmanager
def a_lost_shard(played: Played) -> Iterator[None]:
    name = f"{next(iter(played.truth.shards))}.arrow"
    paths = [path for home in played.homes for path in (home / "shards").rglob(name)]
    for path in paths:
        path.rename(path.with_suffix(".hidden"))
    yield
    for path in paths:
        path.with_suffix(".hidden").rename(path)


@contextmanager
def another_manifest(played: Played) -> Iterator[None]:
    from crucible.cache.store import Store

    store = Store(played.homes[0])
    (manifest,) = store.manifests()
    other = replace(manifest, config="other")
    with _added(store.home / "manifests" / f"{other.id}.json", other.to_json()):
        yield


@contextmanager
def a_second_download(played: Played) -> Iterator[None]:
    before, played.paid = played.paid, played.allowed + 1
    yield
    played.paid = before


@contextmanager
def _asked(played: Played, count: int, origin: str, token: bool) -> Iterator[None]:
    before = list(played.log)
    one = next(record for record in before if record.bucket == "resolvers" and record.origin == "hub")
    played.log += [replace(one, origin=origin, had_token=token)] * count  # type: ignore[arg-type]
    played.quiet.append((one.time - 0.1, one.time + 0.1))
    yield
    played.log[:] = before
    played.quiet.pop()


def a_crowd_in_a_quiet_time(played: Played) -> AbstractContextManager[None]:
    return _asked(played, CONNECTIONS * played.processes + 1, "hub", token=True)


def a_token_for_the_cdn(played: Played) -> AbstractContextManager[None]:
    return _asked(played, 1, "cdn", token=True)


def a_token_on_a_disk(played: Played) -> AbstractContextManager[None]:
    return _added(played.homes[2] / "early" / "note.json", json.dumps({"token": TOKEN}).encode())


def a_forgotten_folder(played: Played) -> AbstractContextManager[None]:
    # of a process that lives and has nothing to do with it: nobody would ever take it away
    return _added(played.homes[1] / "tmp" / f"{os.uname().nodename}-{os.getpid()}-forgotten" / "draft")


def a_half_written_file(played: Played) -> AbstractContextManager[None]:
    return _added(played.homes[0] / "items" / "ab" / ".draft.json.1.abcd")


@contextmanager
def a_lock_that_nobody_gives_back(played: Played) -> Iterator[None]:
    path = played.homes[0] / "locks" / "item-0.lock"
    with _added(path), path.open("rb") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        yield


@contextmanager
def a_rank_that_runs_on(played: Played) -> Iterator[None]:
    code = "import time; time.sleep(60)"
    environment = {**os.environ, "CRUCIBLE_HOME": str(played.homes[0])}
    process = subprocess.Popen([sys.executable, "-c", code, "tests.chaos.rank"], env=environment)
    yield
    process.kill()
    process.wait(10)


@contextmanager
def a_hang(played: Played) -> Iterator[None]:
    played.problems.append("training did not end")
    yield
    played.problems.pop()


PLANTED: tuple[tuple[str, Plant], ...] = (
    ("every_sample_comes_exactly_once", a_dropped_batch),
    ("every_sample_comes_exactly_once", a_batch_that_came_twice),
    ("the_order_is_that_of_a_run_without_faults", two_batches_that_changed_places),
    ("no_altered_row_reaches_a_batch", an_altered_row),
    ("the_certificates_prove_each_epoch", a_lost_record),
    ("every_visible_shard_is_right", a_byte_flipped_after_verification),
    ("every_visible_shard_is_right", a_shard_of_something_else),
    ("every_shard_is_held_as_often_as_was_asked", a_lost_shard),
    ("every_manifest_is_that_of_a_run_without_faults", another_manifest),
    ("the_hub_paid_each_byte_once_and_what_was_lost", a_second_download),
    ("the_hub_was_left_alone_when_it_said_so", a_crowd_in_a_quiet_time),
    ("the_token_went_to_the_hub_alone", a_token_for_the_cdn),
    ("the_token_went_to_the_hub_alone", a_token_on_a_disk),
    ("no_litter_is_left", a_forgotten_folder),
    ("no_litter_is_left", a_half_written_file),
    ("no_lock_is_held_by_nobody", a_lock_that_nobody_gives_back),
    ("no_process_is_left", a_rank_that_runs_on),
    ("nothing_failed_or_hung", a_hang),
)
