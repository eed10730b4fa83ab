"""Links that break at random, from a seed, while three hosts prefetch and while a rank on each reads.

    pytest tests/netns/test_link_seeds.py --chaos-seed 17 [--chaos-rounds 5]

The chaos suite (`tests/chaos`) has the other faults; here hosts have addresses of their own, so that a link can be cut.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

import crucible
from crucible.cache.store import Store
from crucible.hashing import shard_digest
from tests.netns.fleet import DEAD_AFTER_S, Fleet, result
from tests.netns.hosts import Host, eventually
from tests.ray.jobs import file_bytes

pytestmark = pytest.mark.timeout(400)

FILES, ROWS, BATCH, SEED = 9, 1500, 100, 7
SHORT, LONG = (3,), range(100, 112)
PATIENCE = {"CRUCIBLE_TRIES": "40", "CRUCIBLE_BACKOFF_CAP": "0.5", "CRUCIBLE_STALL": "1"}
"""A host without its link has nobody to ask: it must try for longer than the link is gone."""


@dataclass(frozen=True, slots=True)
class Break:
    """What happens to the link of one host."""

    at: float
    """The share of the Hub's bytes; for ranks that of their batches."""
    kind: Literal["cut", "unplugged", "mute", "slow", "late"]
    host: int
    seconds: float

    def __str__(self) -> str:
        return f"at {self.at:.0%} host {self.host} is {self.kind} for {self.seconds:.1f} s"


def breaks_of(seed: int, *, long: bool) -> tuple[tuple[Break, ...], tuple[Break, ...]]:
    """(during the prefetch, during the reading). The head keeps its link: without it there is no Ray to speak of."""
    dice = random.Random(f"links {seed}")

    def some() -> tuple[Break, ...]:
        found = [
            Break(
                round(dice.uniform(0.05, 0.8), 2),
                dice.choice(("cut", "cut", "unplugged", "mute", "slow", "late")),
                dice.randint(1, 2),
                round(dice.uniform(0.5, DEAD_AFTER_S + 4 if long else DEAD_AFTER_S / 3), 1),
            )
            for _ in range(dice.randint(1, 3))
        ]
        return tuple(sorted(found, key=lambda one: one.at))

    return some(), some()


class Links:
    """Breaks links, one at a time a host, and mends them when their time has come."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._broken: dict[int, tuple[float, Callable[[], None]]] = {}
        self.struck: list[Break] = []

    def strike(self, one: Break) -> None:
        if one.host not in self._broken:
            self._broken[one.host] = (time.monotonic() + one.seconds, self._break(one.kind, one.host))
            self.struck.append(one)

    def tick(self, *, all_of_it: bool = False) -> None:
        for number, (until, mend) in list(self._broken.items()):
            if all_of_it or time.monotonic() >= until:
                del self._broken[number]
                mend()

    def _break(self, kind: str, number: int) -> Callable[[], None]:
        network = self._fleet.network
        host: Host = network.hosts[number]
        if kind == "late":
            return network.delay(host, 0.05)
        if kind == "slow":
            network.limit(host, "4mbit")
            return lambda: network.limit(host, None)
        if kind == "mute":
            others = [other.address for other in network.hosts if other is not host]
            network.mute(host, *others)
            return lambda: network.unmute(host, *others)
        (network.cut if kind == "cut" else network.unplug)(host)
        return lambda: network.heal(host)


def truth_of(folder: Path, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """All rows in their order, as one reader without faults gets them."""
    monkeypatch.setenv("HF_ENDPOINT", fleet.hub.endpoint)
    monkeypatch.setenv("CRUCIBLE_HOME", str(folder))
    dataset = crucible.load_dataset("org/chat", split="train", streaming=True)
    assert isinstance(dataset, crucible.IterableDataset)
    batches = dataset.shuffle(seed=SEED).with_format("arrow").batch(500)
    rows = [row for batch in batches for row in batch.to_pylist()]
    fleet.hub.clear_log()
    return rows


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    first, rounds = metafunc.config.getoption("--chaos-seed"), metafunc.config.getoption("--chaos-rounds")
    if first is not None:
        marked = [pytest.param(seed, True, id=str(seed)) for seed in range(first, first + (rounds or 1))]
    else:
        marked = [pytest.param(seed, False, id=f"{seed} short") for seed in SHORT]
        marked += [pytest.param(seed, True, marks=pytest.mark.slow, id=str(seed)) for seed in LONG]
    metafunc.parametrize(("seed", "long"), marked)


def test_whatever_becomes_of_links_every_row_comes_once_and_in_its_place(
    seed: int, long: bool, fleet: Fleet, chat: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = chat(FILES, ROWS)
    truth = truth_of(tmp_path / "calm", fleet, monkeypatch)
    early, late = breaks_of(seed, long=long)
    links = Links(fleet)
    try:
        fleet.hub.add("slow", origin="cdn", piece=8_000, wait=0.05)
        job = fleet.prefetch(fleet.head, "org/chat", "--replicas", "2", **PATIENCE)
        left = list(early)

        def prefetched() -> bool:
            links.tick()
            while left and file_bytes(fleet.hub) >= left[0].at * size:
                links.strike(left.pop(0))
            if not left:
                fleet.hub.clear_faults()
            return not job.running()

        eventually("the prefetch ends", prefetched, 150)
        links.tick(all_of_it=True)
        report = result(job)
        assert report["rows"] == FILES * ROWS
        fleet.hub.clear_faults()
        fleet.start()  # a host that counted as dead comes back, with its store
        _read(fleet, links, late, truth, tmp_path)
    finally:
        links.tick(all_of_it=True)
    lost = len(links.struck) * 3 * size // FILES
    assert file_bytes(fleet.hub) <= size + lost + size // 2, [*map(str, links.struck)]
    for host in fleet.network.hosts:
        store = Store(host.store)
        for manifest in store.manifests():
            here = [shard for shard in manifest.shards if store.shard_path(shard.key).exists()]
            assert [s.key for s in here if shard_digest(store.shard_path(s.key)) != s.digest] == [], host.name


def _read(fleet: Fleet, links: Links, breaks: tuple[Break, ...], truth: list[dict[str, Any]], folder: Path) -> None:
    """A rank on each host. All stop before the same batch; then links break, and they go on."""
    hosts = fleet.network.hosts
    stop_at = int(breaks[0].at * FILES * ROWS / BATCH / len(hosts))
    gates, ranks = [], []
    for number, host in enumerate(hosts):
        gate = folder / f"gate-{number}"
        gate.mkdir()
        gates.append(gate)
        ranks.append(
            fleet.rank(host, "org/chat", number, len(hosts), seed=SEED, stop_at=stop_at, gate=gate, **PATIENCE)
        )
    eventually("all ranks have come so far", lambda: all((gate / "at").exists() for gate in gates), 90)
    for one in breaks:
        links.strike(one)
    for gate in gates:
        (gate / "go").touch()

    def read() -> bool:
        links.tick()
        return not any(rank.running() for rank in ranks)

    eventually("the ranks end", read, 150)
    for number, rank in enumerate(ranks):
        found, own = result(rank), truth[number :: len(hosts)]
        assert found["ids"] == [row["id"] for row in own], f"rank {number}: {[*map(str, links.struck)]}"
        content = hashlib.sha256()
        for at in range(0, len(own), BATCH):
            content.update(repr(own[at : at + BATCH]).encode())
        assert found["content"] == content.hexdigest(), f"rank {number} read altered rows"
