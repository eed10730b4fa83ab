"""What happens to a simulated cluster: drawn from a seed, or named. Frozen data, no clock.

Bytes and seconds are the simulation's own; only their ratios mean something.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

MB = 1 << 20
GB = 1 << 30


@dataclass(frozen=True)
class Scenario:
    """A job on a cluster, and its bad luck."""

    seed: int
    nodes: int
    items: int
    item_bytes: int = 256 * MB
    """Of an item on average; they differ by up to four times unless `even`."""
    even: bool = False
    replicas: int = 1
    slots: int | None = 4
    limit_bytes: int = 1 << 62
    part_bytes: int | None = 64 * MB
    racks: int = 0
    twins: float = 0.0
    """Share of items that have the content of another."""
    node_rate: float = 1.0 * GB
    """Bytes per second of a node's link, which carries downloads and copies."""
    hub_rate: float = 20.0 * GB
    slow: tuple[tuple[int, float], ...] = ()
    """(node, its link's share of the usual rate)."""
    convert_rate: float = 1.0 * GB
    """Bytes per second of one task's conversion."""
    quota: int | None = None
    """Requests that the Hub answers in a window; None: any number."""
    window_s: float = 30.0
    others: float = 0.0
    """Share of the quota that others use up, at moments of their own."""
    failing: float = 0.0
    """Share of tries that fail for a reason that may pass; half as many copies do."""
    deaths: tuple[tuple[float, int, float | None], ...] = ()
    """(when, node, seconds until it is back with its disk, or None: never)."""
    joins: tuple[float, ...] = ()
    restarts: tuple[float, ...] = ()
    """When the coordinator is killed and started again."""
    wishes: int = 0
    """How often a reader says what it needs next."""
    notice_s: float = 5.0
    """Up to so long after a death Ray says so."""
    loop_s: float = 0.0
    """How long the coordinator is busy with other things before it looks at what happened; 0: it hears each at once."""
    later_deaths: int = 0
    """Nodes lost one after the other when the job is over, each repaired."""


def drawn(seed: int) -> Scenario:
    """A small cluster, and a little of everything that can go wrong."""
    chance = random.Random(seed)
    nodes, items = chance.randint(3, 12), chance.randint(5, 60)
    item_bytes = chance.choice((1, 40, 200, 900)) * MB
    replicas = chance.choice((1, 1, 2, 2, 3))
    span = 1.0 + items * item_bytes * replicas / (nodes * GB) + (items if chance.random() < 0.3 else 0)
    some = lambda most: chance.randint(0, most) if chance.random() < 0.6 else 0  # noqa: E731 - three times the same
    deaths = tuple(
        sorted(
            (chance.uniform(0, span), node, chance.uniform(0, span) if chance.random() < 0.3 else None)
            for node in chance.sample(range(nodes), min(some(3), nodes - 1))
        )
    )
    quota = chance.choice((None, chance.randint(4, 40)))
    return Scenario(
        seed,
        nodes,
        items,
        item_bytes,
        replicas=replicas,
        slots=chance.choice((None, 1, 2, 4)),
        limit_bytes=chance.choice((1 << 62, 3 * item_bytes, nodes * 2 * item_bytes)),
        racks=chance.choice((0, 0, 2, 3)),
        twins=chance.choice((0.0, 0.0, 0.2)),
        slow=tuple((node, chance.uniform(0.02, 0.5)) for node in chance.sample(range(nodes), some(2))),
        quota=quota,
        others=chance.choice((0.0, 0.5, 1.0)) if quota else 0.0,
        failing=chance.choice((0.0, 0.0, 0.02, 0.1)),
        deaths=deaths,
        joins=tuple(sorted(chance.uniform(0, span) for _ in range(some(3)))),
        restarts=tuple(sorted(chance.uniform(0, span) for _ in range(some(2)))),
        wishes=some(6),
        notice_s=chance.choice((0.1, 2.0, 20.0)),
        loop_s=chance.choice((0.0, 0.0, 0.05, 1.0)),
        later_deaths=some(3),
    )


def thousand(seed: int) -> Scenario:
    """1,024 nodes and a million shards of 64 MiB, with what happens to such a cluster in a day."""
    chance = random.Random(seed)
    nodes, items, item_bytes = 1024, 1_000_000, 64 * MB
    span = items * item_bytes / (200.0 * GB)
    return Scenario(
        seed,
        nodes,
        items,
        item_bytes,
        slots=8,
        limit_bytes=2 << 40,
        hub_rate=200.0 * GB,
        slow=tuple((node, 0.1) for node in chance.sample(range(nodes), 16)),
        failing=0.001,
        deaths=tuple(sorted((chance.uniform(0, span), node, None) for node in chance.sample(range(nodes), 10))),
        joins=tuple(sorted(chance.uniform(0, span) for _ in range(10))),
        wishes=20,
        notice_s=30.0,
    )


def quiet(seed: int) -> Scenario:
    """Sixteen even nodes to which nothing happens: how close the makespan comes to the lower bound."""
    return Scenario(seed, 16, 1_600, slots=4)


def straggler(seed: int) -> Scenario:
    """The same with one node at a twentieth of the speed."""
    return replace(quiet(seed), slow=((3, 0.05),))


def limited(seed: int) -> Scenario:
    """The same with a Hub that answers few requests, and others who spend from the same quota."""
    return replace(quiet(seed), quota=300, others=0.3)


def losses(seed: int) -> Scenario:
    """Sixteen nodes with two replicas; every other dies, one after the other."""
    deaths = tuple((2.0 + 3.0 * number, 2 * number, None) for number in range(8))
    return replace(quiet(seed), replicas=2, deaths=deaths, later_deaths=3)


NAMED: dict[str, Callable[[int], Scenario]] = {
    "drawn": drawn,
    "quiet": quiet,
    "straggler": straggler,
    "limited": limited,
    "losses": losses,
    "thousand": thousand,
}


def with_numbers(scenario: Scenario, **given: Any) -> Scenario:
    """The scenario with other numbers of nodes or items; what happens to nodes that are not there does not happen."""
    changed = replace(scenario, **{name: value for name, value in given.items() if value is not None})
    return replace(
        changed,
        slow=tuple(one for one in changed.slow if one[0] < changed.nodes),
        deaths=tuple(one for one in changed.deaths if one[1] < changed.nodes),
    )


def told(scenario: Scenario) -> str:
    """What is not as usual, in a line."""
    usual = Scenario(0, 0, 0)
    return " ".join(
        f"{one.name}={getattr(scenario, one.name)!r}"
        for one in fields(scenario)
        if getattr(scenario, one.name) != getattr(usual, one.name)
    )
