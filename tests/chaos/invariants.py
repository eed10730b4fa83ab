"""What must hold after a story, whatever went wrong in it. Each check gives what it found: nothing, or sentences.

They look at what the outside sees: what ranks received, what lies in the stores, what the Hub was asked. None of them
trusts what the product says of itself, but for the certificates of a delivery, which are checked like anything else.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from crucible.cache.holds import SUFFIX as LEASE
from crucible.cache.store import Store
from crucible.errors import UsageError
from crucible.hashing import shard_digest
from crucible.proof import epochs_of, read_plan, read_records, verdict
from tests.chaos.play import Played
from tests.chaos.rank import digest_of
from tests.chaos.stage import CONNECTIONS, TOKEN

Check = Callable[[Played], Iterator[str]]
SHOWN = 3
DAYS_S = 200_000.0
"""More than a clock jumps in a story: what looks as if it was written tomorrow is due too."""


def nothing_failed_or_hung(played: Played) -> Iterator[str]:
    yield from played.problems


def every_sample_comes_exactly_once(played: Played) -> Iterator[str]:
    """Over all ranks and starts; what came after the state that the next start went on from was rolled back."""
    story = played.story
    ends = [(run.epoch, run.position) for run in played.runs[1:]] + [(story.epochs, 0)]
    counted: list[Counter[int]] = [Counter() for _ in range(story.epochs)]
    for one in played.received:
        positions = one.positions(story.batch, story.total)
        kept = [place for place in zip(positions, one.ids) if (one.epoch, place[0]) < ends[one.run]]
        counted[one.epoch].update(number for _, number in kept)
    for epoch, counts in enumerate(counted):
        missing = [number for number in range(story.total) if not counts[number]]
        again = [number for number, count in counts.items() if count > 1]
        if missing:
            yield f"epoch {epoch}: {len(missing)} of {story.total} rows never came, such as {missing[:SHOWN]}"
        if again:
            yield f"epoch {epoch}: {len(again)} rows came more than once, such as {again[:SHOWN]}"


def the_order_is_that_of_a_run_without_faults(played: Played) -> Iterator[str]:
    """Of every batch of every start, those that were rolled back too."""
    story, truth = played.story, played.truth
    wrong = []
    for one in played.received:
        expected = [truth.order[one.epoch][at] for at in one.positions(story.batch, story.total)]
        if list(one.ids) != expected:
            wrong.append(
                f"start {one.run}, rank {one.rank}, epoch {one.epoch}, batch {one.unit}: rows {one.ids[:SHOWN]}"
            )
    if wrong:
        yield f"{len(wrong)} batches hold other rows than a run without faults: {wrong[:SHOWN]}"


def no_altered_row_reaches_a_batch(played: Played) -> Iterator[str]:
    texts = played.truth.texts
    wrong = [
        f"start {one.run}, rank {one.rank}, epoch {one.epoch}, batch {one.unit}"
        for one in played.received
        if one.digest != digest_of(list(one.ids), [texts[number] for number in one.ids])
    ]
    if wrong:
        yield f"{len(wrong)} batches hold an altered row: {wrong[:SHOWN]}"


def the_certificates_prove_each_epoch(played: Played) -> Iterator[str]:
    """What `crucible verify-epoch` says of the training."""
    folder = played.folder / "records"
    try:
        groups = epochs_of(read_records([folder]))
    except UsageError as error:
        yield str(error)
        return
    found = {group[0].epoch: verdict(group, lambda record: read_plan([folder], record)) for group in groups}
    for epoch in range(played.story.epochs):
        if epoch not in found:
            yield f"no record of epoch {epoch}"
        elif not found[epoch].proven:
            yield f"epoch {epoch} is not proven: missing {found[epoch].missing}, wrong {found[epoch].findings[:SHOWN]}"


def every_visible_shard_is_right(played: Played) -> Iterator[str]:
    """On every node: its bytes are those that a run without faults gives."""
    for home in played.homes:
        store = Store(home)
        for key, _ in store.shards():
            expected = played.truth.shards.get(key)
            if expected is None:
                yield f"{home.name} has a shard {key[:12]} that a run without faults does not make"
            elif (actual := shard_digest(store.shard_path(key))) != expected:
                yield f"{home.name} has shard {key[:12]} with digest {actual[:12]} and not {expected[:12]}"


def every_shard_is_held_as_often_as_was_asked(played: Played) -> Iterator[str]:
    """After the repair with which a story ends."""
    wanted = min(played.story.replicas, len(played.homes))
    held = Counter(key for home in played.homes for key, _ in Store(home).shards())
    lacking = [key[:12] for key in played.truth.shards if held[key] < wanted]
    if lacking:
        yield f"{len(lacking)} shards are on fewer than {wanted} nodes: {lacking[:SHOWN]}"


def every_manifest_is_that_of_a_run_without_faults(played: Played) -> Iterator[str]:
    known = 0
    for home in played.homes:
        for manifest in Store(home).manifests():
            known += 1
            if manifest.id != played.truth.manifest:
                yield f"{home.name} has manifest {manifest.id[:12]} and not {played.truth.manifest[:12]}"
    if not known:
        yield "no node has the manifest"


def the_hub_paid_each_byte_once_and_what_was_lost(played: Played) -> Iterator[str]:
    if played.paid > played.allowed:
        size = played.truth.source_bytes
        sent = [(record.path[-24:], record.sent) for record in played.log if record.sent > 4096]
        yield (
            f"the Hub sent {played.paid} bytes for {size}; with what was lost on the way {played.allowed} are allowed: "
            f"{sent}"
        )


def the_hub_was_left_alone_when_it_said_so(played: Played) -> Iterator[str]:
    for start, stop in played.quiet:
        asked = [
            record
            for record in played.log
            if start < record.time < stop and record.bucket == "resolvers" and record.origin == "hub"
        ]
        most = CONNECTIONS * played.processes
        if len(asked) > most:
            yield f"{len(asked)} requests in a quiet time of {stop - start:.1f} s; {most} may have been on their way"


def the_token_went_to_the_hub_alone(played: Played) -> Iterator[str]:
    told = [record.path for record in played.log if record.had_token and record.origin != "hub"]
    if told:
        yield f"the token went to the CDN: {told[:SHOWN]}"
    if not any(record.had_token for record in played.log):
        yield "no request had the token: this check shows nothing"
    for home in (*played.homes, played.folder):
        for path in home.rglob("*"):
            with suppress(OSError):
                if path.is_file() and path.suffix != ".arrow" and TOKEN.encode() in path.read_bytes():
                    yield f"the token lies in {path}"


def no_litter_is_left(played: Played) -> Iterator[str]:
    """After the next one who works in the store has begun, as it would find it a day later."""
    for home in played.homes:
        store = Store(home)
        with store.workspace() as own:
            store.raw.sweep(-DAYS_S, complete=True)
            for folder in own.parent.iterdir():
                if folder != own and any(folder.iterdir()):
                    yield f"{home.name} has {folder.name} in tmp, of a process that has nothing to do"
        for path in (home / "raw").glob("*"):
            yield f"{home.name} keeps {path.name} in raw, which is held by somebody"
        # a journal's draft goes when it is an hour old: see `crucible.cluster.logbook`
        for path in set(home.rglob(".*")) - set((home / "coordinator").rglob(".*")):
            yield f"{home.name} has {path.relative_to(home)}, half written"
        store.leased()  # looking takes away those of dead processes
        for path in (home / "leases").glob(f"*{LEASE}"):
            pid = path.name.removesuffix(LEASE).split("-")[-2]
            if not psutil.pid_exists(int(pid)):
                yield f"{home.name} has a lease of process {pid}, which is dead"
    for name in os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else ():
        if "crucible" in name:
            yield f"/dev/shm has {name}"


def no_lock_is_held_by_nobody(played: Played) -> Iterator[str]:
    """Whoever works next does not wait."""
    import fcntl

    for home in played.homes:
        for path in (home / "locks").glob("*.lock"):
            with path.open("rb") as file:
                try:
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield f"{home.name}: somebody still holds {path.name}"


def no_process_is_left(played: Played) -> Iterator[str]:
    """Ranks have ended, and what worked on a node has ended with it."""
    homes = set(map(str, played.homes))
    for process in psutil.process_iter(["ppid", "cmdline"]):
        with suppress(psutil.Error):
            if process.environ().get("CRUCIBLE_HOME") not in homes:
                continue
            words = " ".join(process.info["cmdline"] or ())
            if "tests.chaos.rank" in words:
                yield f"rank {process.pid} still runs: {words[:100]}"
            elif words.startswith("ray::") and not _has_raylet(process):
                yield f"{words[:40]} ({process.pid}) runs on without its raylet"


def _has_raylet(process: psutil.Process) -> bool:
    parent = process.parent()
    while parent is not None:
        if parent.name() == "raylet":
            return True
        parent = parent.parent()
    return False


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        nothing_failed_or_hung,
        every_sample_comes_exactly_once,
        the_order_is_that_of_a_run_without_faults,
        no_altered_row_reaches_a_batch,
        the_certificates_prove_each_epoch,
        every_visible_shard_is_right,
        every_shard_is_held_as_often_as_was_asked,
        every_manifest_is_that_of_a_run_without_faults,
        the_hub_paid_each_byte_once_and_what_was_lost,
        the_hub_was_left_alone_when_it_said_so,
        the_token_went_to_the_hub_alone,
        no_litter_is_left,
        no_lock_is_held_by_nobody,
        no_process_is_left,
    )
}


SETTLE_S = 60.0
"""What an agent holds for a node that died it lets go of after half that time (`workers.partials`)."""
SETTLES = ("no_litter_is_left", "no_lock_is_held_by_nobody", "no_process_is_left")


def broken(played: Played) -> list[str]:
    """What does not hold, each named by the invariant it is about. What is about to end has time for it."""
    until = time.monotonic() + SETTLE_S
    said = []
    for name, check in CHECKS.items():
        found = list(check(played))
        while found and name in SETTLES and time.monotonic() < until:
            time.sleep(0.5)
            found = list(check(played))
        said += [f"{name.replace('_', ' ')}: {one}" for one in found]
    return said


def leaks_in(folder: Path) -> list[str]:
    """Files below `folder` with the token in them: Ray's logs, at the end."""
    found = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file() and TOKEN.encode() in path.read_bytes():
                found.append(str(path))
    return found
