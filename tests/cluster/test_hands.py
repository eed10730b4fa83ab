"""What comes back from a node is taken in at once, in the thread in which Ray tells it. No Ray is running."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from crucible.cluster import hands as module
from crucible.cluster.agents import Agents
from crucible.cluster.executor import flight_of
from crucible.cluster.flights import Flights
from crucible.cluster.given import Given
from crucible.cluster.hands import RayHands
from crucible.cluster.ledger import Order
from crucible.cluster.operation import Recipe
from crucible.config import Settings
from crucible.errors import ClusterError
from crucible.refs import NodeId
from crucible.report import ItemResult
from crucible.workers.tasks import JobOptions
from tests.cluster.caring import make_manifest

NODE, LEAVING = NodeId("a1" * 28), NodeId("b2" * 28)


def test_wrong_bytes_are_put_aside_without_waiting_in_the_thread_that_tells_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That thread brings the answers to all other calls as well."""
    manifest = make_manifest(2)
    item, (right, wrong) = manifest.items[0], manifest.shards
    task: Future[ItemResult] = Future()
    call = SimpleNamespace(remote=lambda *_: SimpleNamespace(future=lambda: task))
    monkeypatch.setattr(module, "run_item_task", SimpleNamespace(options=lambda **_: call))
    landed: dict[str, int] = {}
    agents = SimpleNamespace(
        turn=SimpleNamespace(epoch=None),
        writers=lambda: (),
        landed=lambda _, shards, __: landed.update(shards),
        where_held=lambda _: None,
        given=Given(),
        flights=Flights(),
        drained=(),
    )
    asked: list[Any] = []
    answer, heard = threading.Event(), threading.Event()

    class Hands(RayHands):
        def ask(self, *said: Any, **how: Any) -> tuple[dict[NodeId, Any], dict[NodeId, str]]:
            assert answer.wait(60)
            asked.append((*said, how["nodes"]))
            heard.set()
            return {}, {}

    hands = Hands(cast("Agents", agents), Settings(tmp_path))
    made = hands.remake(NODE, Recipe(item, Order(), {right.key: right.digest, wrong.key: "another"}))
    teller = threading.Thread(
        target=task.set_result, args=(ItemResult(item.index, item.key, NODE, (right, wrong), ()),), daemon=True
    )
    teller.start()
    try:
        assert list(made.result(60)) == [wrong.key]
        assert landed == {right.key: right.size}
    finally:
        answer.set()
    assert heard.wait(60)
    assert asked == [("set_aside", [wrong.key], [NODE])]


def test_a_repair_waits_for_the_job_that_makes_the_same_and_makes_nothing_that_was_made_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_manifest(2)
    item, (first, second) = manifest.items[0], manifest.shards
    sent: list[Future[ItemResult]] = []

    def send(*_: Any) -> Any:
        sent.append(Future())
        return SimpleNamespace(future=lambda: sent[-1])

    monkeypatch.setattr(module, "run_item_task", SimpleNamespace(options=lambda **_: SimpleNamespace(remote=send)))
    landed: list[str] = []
    held: list[NodeId] = []
    agents = SimpleNamespace(
        turn=SimpleNamespace(epoch=None),
        writers=lambda: (),
        landed=lambda _, shards, __: landed.extend(shards),
        where_held=lambda _: held[0] if held else None,
        given=Given(),
        flights=Flights(),
        drained={LEAVING},
    )
    hands = RayHands(cast("Agents", agents), Settings(tmp_path))
    recipe = Recipe(item, Order(), {first.key: first.digest, second.key: second.digest})
    result = ItemResult(item.index, item.key, NODE, (first, second), ())

    theirs: Future[ItemResult] = Future()
    flight = flight_of(item, JobOptions.of(Settings(tmp_path)))
    agents.flights.join(flight, lambda: theirs, lambda made: made)
    ours = hands.remake(NODE, recipe)
    assert (sent, ours.done()) == ([], False)
    theirs.set_result(result)
    assert (ours.result(30), landed) == ({}, []), "the job has told of it"

    ours = hands.remake(NODE, recipe)
    job: Future[ItemResult] = agents.flights.join(flight, Future, lambda made: made)
    assert agents.given.at({NODE}) == {"upkeep": 1}
    sent[0].set_result(result)
    assert (ours.result(30), job.result(30), len(sent)) == ({}, result, 1)
    assert landed == [first.key, second.key]

    held.append(NODE)
    assert (hands.remake(NODE, recipe).result(0), len(sent)) == ({}, 1)
    held.clear()
    with pytest.raises(ClusterError, match="node b2b2b2b2b2b2 is drained"):
        hands.remake(LEAVING, recipe)
    with pytest.raises(ClusterError, match="node b2b2b2b2b2b2 is drained"):
        hands.bring(LEAVING, [])
