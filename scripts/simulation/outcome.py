"""What a run was like, in figures: beside what no cluster could have bettered."""

from __future__ import annotations

import math
import resource
from typing import Any

from scripts.simulation.broken import Broken
from scripts.simulation.care import lose_and_repair
from scripts.simulation.planted import planted
from scripts.simulation.scenario import Scenario
from scripts.simulation.world import World


def run(scenario: Scenario, bug: str | None = None) -> World:
    """A world that has come to its end. Raises Broken, with the world's trace in `trace`."""
    careful = scenario.items <= 5_000
    with planted(bug):
        world = World(scenario, careful=careful)
        try:
            world.finish()
            if careful and world.error is None:
                world.repairs = lose_and_repair(world)
        except Broken as broken:
            broken.trace = list(world.trace)
            raise
    return world


def lower_bound(scenario: Scenario, world: World) -> float:
    """Seconds that no order of work could better, if nothing failed and no node came or went.

    Whichever is longest: the repo through the Hub's link; the repo and its copies, which two links carry, through all
    nodes' links together; the requests through the windows of the quota.
    """
    repo = sum({item.key: item.size for item in world.items}.values()) if scenario.twins else sum(world.items.sizes)
    copies = (min(scenario.replicas, scenario.nodes) - 1) * repo
    rates = sum(dict(scenario.slow).get(number, 1.0) for number in range(scenario.nodes)) * scenario.node_rate
    windows = 0 if scenario.quota is None else math.ceil(scenario.items / scenario.quota) - 1
    return max(repo / scenario.hub_rate, (repo + 2 * copies) / rates, windows * scenario.window_s)


def figures(scenario: Scenario, world: World) -> dict[str, Any]:
    """One row, with stable keys. Bytes, seconds of virtual time, and seconds of this process for the mind."""
    bound = lower_bound(scenario, world)
    repo = sum(world.items.sizes)
    assert world.ended_at is not None
    return {
        "seed": scenario.seed,
        "nodes": scenario.nodes,
        "shards": scenario.items,
        "replicas": scenario.replicas,
        "ended": "failed" if world.error is not None else "finished",
        "makespan_s": round(world.ended_at, 3),
        "lower_bound_s": round(bound, 3),
        "makespan_over_bound": round(world.ended_at / bound, 3) if bound else None,
        "repo_bytes": repo,
        "hub_bytes": round(world.cluster.hub_bytes),
        "hub_over_repo": round(world.cluster.hub_bytes / repo, 5) if repo else None,
        "lost_bytes": round(world.cluster.lost_bytes),
        "copied_bytes": world.cluster.copied_bytes,
        "most_in_flight_bytes": world.cluster.most_in_flight,
        "hub_requests": world.cluster.hub.requests,
        "hub_refusals": world.cluster.hub.refusals,
        "tries": world.tries,
        "copies": world.watch.copies,
        "repairs": world.repairs,
        "restarts": world.restarts,
        "events": world.events,
        "most_commands_an_event": world.watch.most_commands,
        "coordinator_cpu_s": round(world.cpu_s, 3),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
