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
from crucible.cluster.flights import Flights
from crucible.cluster.given import Given
from crucible.cluster.hands import RayHands
from crucible.cluster.ledger import Order
from crucible.cluster.operation import Recipe
from crucible.config import Settings
from crucible.refs import NodeId
from crucible.report import ItemResult
from tests.cluster.caring import make_manifest

NODE = NodeId("a1" * 28)


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
