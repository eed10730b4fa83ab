"""Links that are not simply cut: late for all of Ray too, and open one way only."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.netns.fleet import Fleet, result
from tests.netns.hosts import eventually
from tests.ray.jobs import file_bytes

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]
ROWS = 36_000


def test_a_host_that_is_far_away_takes_part(fleet: Fleet, chat: Callable[..., int]) -> None:
    size = chat()
    gamma = fleet.network["gamma"]
    undo = fleet.network.delay(gamma, 0.05)
    try:
        report = result(fleet.prefetch(gamma, "org/chat", "--replicas", "2"))
        assert (report["rows"], report["counts"]["hub_bytes"], file_bytes(fleet.hub)) == (ROWS, size, size)
        assert fleet.shards()["gamma"]
        told = result(fleet.rank(gamma, "org/chat", seed=None))
        assert told["ids"] == list(range(ROWS))
        assert file_bytes(fleet.hub) == size
    finally:
        undo()


@pytest.mark.parametrize("deaf", ["the head", "the lost host"])
def test_a_link_that_is_open_one_way_is_as_good_as_cut(fleet: Fleet, chat: Callable[..., int], deaf: str) -> None:
    head, beta, gamma = fleet.network.hosts
    fleet.stop_ray(head)
    fleet.start()
    fleet.hub.import_files("org/first", {"train.txt": b"one row\n"})
    result(fleet.prefetch(gamma, "org/first"))  # so the coordinator is there, and will not hear that it was replaced
    size = chat()
    fleet.hub.add("slow", origin="cdn", piece=16_000, wait=0.05)
    fleet.hub.clear_log()
    job = fleet.prefetch(beta, "org/chat")
    eventually("a prefetch has begun", lambda: file_bytes(fleet.hub) > size // 10 or not job.running())
    if deaf == "the head":
        fleet.network.mute(gamma, head.address)
    else:
        fleet.network.mute(head, gamma.address)
    fleet.wait_for(head, beta)
    fleet.hub.clear_faults()
    assert result(job)["rows"] == ROWS
    assert file_bytes(fleet.hub) <= 2 * size
    assert result(fleet.rank(beta, "org/chat", seed=None))["ids"] == list(range(ROWS))
    # who stands on the wrong side reads on too, from its store, the peer it can reach, or the Hub
    assert result(fleet.rank(gamma, "org/chat", seed=None))["ids"] == list(range(ROWS))
