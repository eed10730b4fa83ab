"""After the job: nodes die one after the other, and the product's own planner (`cluster.upkeep`) repairs each loss.

A plan is performed at once, as nothing else runs. Each must bring every shard back to as many nodes as can be, move
nothing that was not lost, and leave nothing for a second plan.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from crucible.cluster.upkeep import Place, Wanted, repair
from scripts.simulation.broken import Broken

if TYPE_CHECKING:
    from scripts.simulation.world import World


def lose_and_repair(world: World) -> int:
    """Raises Broken. Returns how many copies and remakes it took."""
    chance, cluster, one = random.Random(world.scenario.seed + 2), world.cluster, world.scenario
    wanted = list(
        {
            item.shard_key(0): Wanted(item.shard_key(0), item.size, one.replicas, item.key) for item in world.items
        }.values()
    )
    moves = _repair(world, wanted)[0]  # what the job had to leave, and deaths that nobody had noticed
    for _ in range(one.later_deaths):
        living = sorted(cluster.living)
        if len(living) < 2:
            break
        dead = cluster.nodes[chance.choice(living)]
        cluster.kill(dead)
        world.trace.append(f"     later  {dead.name} dies")
        made, fewer = _repair(world, wanted)
        if made > fewer:
            raise Broken("upkeep", f"{made} shards were copied or made, and {fewer} copies were lost with {dead.name}")
        moves += made
    return moves


def _repair(world: World, wanted: list[Wanted]) -> tuple[int, int]:
    """(copies and remakes, copies that were lacking)."""
    cluster = world.cluster
    places = {name: Place(1.0, node.rack) for name, node in cluster.living.items()}
    racks = len({place.rack for place in places.values()})
    most = min(world.scenario.replicas, len(places))
    lacking = sum(max(0, most - len(cluster.holders(one.key))) for one in wanted)
    # on nodes enough, but of too few racks: one more, and `trim` would take one away
    badly = sum(
        max(0, min(most, racks) - len({places[name].rack for name in cluster.holders(one.key)})) for one in wanted
    )
    plan = repair(wanted, cluster.holders, places)
    sizes = {one.key: one.size for one in wanted}
    for copy in plan.copies:
        if not cluster.holders(copy.key) and all(copy.key not in made.keys for made in plan.remakes):
            raise Broken("upkeep", f"{copy.key[:8]} is to be copied, and nobody has it")
        cluster.nodes[copy.node].disk[copy.key] = sizes[copy.key]
    for made in plan.remakes:
        for key in made.keys:
            cluster.nodes[made.node].disk[key] = sizes[key]
    for one in wanted:
        held = cluster.holders(one.key)
        if len(held) < most:
            raise Broken("upkeep", f"after a repair {one.key[:8]} is on {len(held)} nodes and not on {most}")
        if len({places[name].rack for name in held}) < min(most, racks):
            raise Broken("upkeep", f"after a repair {one.key[:8]} is on too few racks")
    again = repair(wanted, cluster.holders, places)
    if again.copies or again.remakes:
        raise Broken("upkeep", f"a second plan has {len(again.copies)} copies and {len(again.remakes)} remakes")
    return len(plan.copies) + sum(len(made.keys) for made in plan.remakes), lacking + badly
