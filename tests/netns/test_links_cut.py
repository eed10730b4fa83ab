"""Links are cut, slow or closed one way while a prefetch runs and while ranks read: the rows stay the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.netns.fleet import DEAD_AFTER_S, Fleet, result
from tests.netns.hosts import Host, Started, eventually
from tests.ray.jobs import file_bytes

pytestmark = pytest.mark.timeout(400)
ROWS = 36_000
EXACT = list(range(ROWS))


def begun(fleet: Fleet, job: Started, size: int) -> None:
    """Wait until a part of the bytes has left the Hub."""
    eventually("a prefetch has begun", lambda: file_bytes(fleet.hub) > size // 10 or not job.running())
    assert job.running()


def in_order(fleet: Fleet, host: Host) -> list[int]:
    """The ids of all rows in the order of the source, as a rank on `host` reads them."""
    ids: list[int] = result(fleet.rank(host, "org/chat", seed=None))["ids"]
    return ids


def slowly(fleet: Fleet) -> None:
    """Each file takes the Hub some seconds."""
    fleet.hub.add("slow", origin="cdn", piece=16_000, wait=0.05)


def test_a_link_that_is_cut_for_a_moment_in_a_prefetch_costs_what_was_in_flight(
    fleet: Fleet, chat: Callable[..., int]
) -> None:
    size = chat()
    slowly(fleet)
    beta = fleet.network["beta"]
    job = fleet.prefetch(fleet.head, "org/chat")
    begun(fleet, job, size)
    nodes = dict(fleet.alive)
    cut_at = time.monotonic()
    fleet.network.cut(beta)
    stalled = fleet.hub.bytes_sent()
    eventually("the others go on", lambda: fleet.hub.bytes_sent() > stalled)
    fleet.network.heal(beta)
    cut_s = time.monotonic() - cut_at
    fleet.hub.clear_faults()
    report = result(job)
    assert report["rows"] == ROWS
    assert fleet.alive == nodes or cut_s > DEAD_AFTER_S / 2, "nobody was declared dead for that"
    # the report lacks what a task paid whose answer was lost with the link, and whose shards were found later
    assert report["counts"]["hub_bytes"] <= file_bytes(fleet.hub)
    assert size <= file_bytes(fleet.hub) <= 2 * size
    assert in_order(fleet, beta) == EXACT


def test_a_host_that_is_cut_off_until_it_counts_as_dead_is_done_without_and_may_come_back(
    fleet: Fleet, chat: Callable[..., int]
) -> None:
    size = chat()
    slowly(fleet)
    beta, gamma = fleet.others
    job = fleet.prefetch(fleet.head, "org/chat")
    begun(fleet, job, size)
    fleet.network.cut(gamma)
    fleet.wait_for(fleet.head, beta)
    fleet.hub.clear_faults()
    report = result(job)
    assert report["rows"] == ROWS
    assert file_bytes(fleet.hub) <= 2 * size
    kept = fleet.shards()["gamma"]
    assert in_order(fleet, beta) == EXACT

    fleet.network.heal(gamma)
    eventually("Ray's node ends that was declared dead", lambda: not gamma.called("raylet/raylet"))
    fleet.start()  # as whoever looks after the hosts would
    paid = file_bytes(fleet.hub)
    assert paid <= 2 * size, "what the lost host alone had, or was bringing, came again"
    again = result(fleet.prefetch(gamma, "org/chat"))
    assert (again["rows"], again["counts"]["hub_bytes"]) == (ROWS, 0)
    assert kept <= fleet.shards()["gamma"], "what it had is still there"
    assert in_order(fleet, gamma) == EXACT
    assert file_bytes(fleet.hub) == paid


@pytest.mark.parametrize(("how", "replicas"), [("cut", 1), ("cut", 2), ("slow", 1)])
def test_readers_leave_a_peer_whose_link_fails_them(
    fleet: Fleet, chat: Callable[..., int], tmp_path: Path, how: str, replicas: int
) -> None:
    chat()
    beta, gamma = fleet.others
    result(fleet.prefetch(fleet.head, "org/chat", "--replicas", str(replicas)))
    paid = file_bytes(fleet.hub)
    truth = result(fleet.rank(fleet.head, "org/chat", seed=None))
    for path in (beta.store / "shards").rglob("*.arrow"):
        path.unlink()
    patience = {"CRUCIBLE_AHEAD": "0", "CRUCIBLE_STALL_LOG": "1"}  # in the order of the source: a shard at a time
    reader = fleet.rank(beta, "org/chat", seed=None, stop_at=10, gate=tmp_path, **patience)
    eventually("the reader has come to its gate", lambda: (tmp_path / "at").exists() or not reader.running())
    missing = fleet.shards()["gamma"] - fleet.shards()["beta"]
    assert missing, "nothing is left to be asked of the peer"
    if how == "cut":
        fleet.network.cut(gamma)
    else:
        fleet.network.limit(gamma, "24kbit")
    (tmp_path / "go").touch()
    told = result(reader)
    assert (told["ids"], told["content"]) == (truth["ids"], truth["content"])
    if replicas == 2:
        assert file_bytes(fleet.hub) == paid, "the other replica was there"
        return
    said = [line for line in reader.errors.splitlines() if f"http://{gamma.address}:" in line]
    assert any("is asked last" in line for line in said), reader.errors
    assert any("rank 0 has waited" in line for line in said) or how == "cut", reader.errors


def test_a_host_that_cannot_reach_the_hub_gets_its_shards_from_peers(fleet: Fleet, chat: Callable[..., int]) -> None:
    chat()
    # the coordinator asks the Hub what there is; where it is, no job can begin without the Hub
    alone = next(host for host in fleet.others if not host.called("ray::CoordinatorCore"))
    fleet.network.mute(alone, fleet.network.here)
    hasty = {"CRUCIBLE_TRIES": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "3"}
    report = result(fleet.prefetch(fleet.head, "org/chat", **hasty))
    assert report["rows"] == ROWS
    paid = file_bytes(fleet.hub)
    rank = fleet.rank(alone, "org/chat", seed=None, **hasty)
    assert result(rank)["ids"] == EXACT
    assert "reading commit" in rank.errors, "it could not ask what `main` is, and says what it takes for it"
    assert file_bytes(fleet.hub) == paid
