"""Work items and replicas -> nodes. Pure.

A ring of hashed points with bounded loads: each item starts at its own point of the ring and takes the first node that
has room. So loads follow the weights, and when a node comes or goes most items keep their node: only the lost share,
and the little that the changed bounds push over, moves. (Consistent hashing with bounded loads, Mirrokni et al. 2016.)
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache

from crucible.refs import NodeId, ShardInfo, WorkItem

POINTS = 64
"""Ring points of a node of average weight: enough that arcs differ little, few enough that 1,024 nodes stay cheap."""
SLACK = 1.1
"""How far above its fair share of bytes a node may go before items walk on: low is even, high is stable."""
NO_RACKS: Mapping[NodeId, str] = {}
"""Nobody said where the nodes stand."""


def assign(items: Sequence[WorkItem], nodes: Mapping[NodeId, float]) -> dict[int, NodeId]:
    """item index -> node. `nodes` maps node -> weight (> 0, such as free disk bytes). Raises ValueError without nodes.

    Every node's bytes stay within about 1.1 times its fair share, plus one item. The result depends on item keys and
    on nodes, not on the order of either.
    """
    ring = Ring(nodes)
    total = sum(item.size + 1 for item in items)
    room = {node: SLACK * total * share for node, share in ring.shares.items()}
    homes: dict[int, NodeId] = {}
    # big items first: they are the ones that would not fit any more at the end
    for item in sorted(items, key=lambda item: (-item.size, item.key, item.index)):
        walk = ring.walk(item.key)
        home = next((node for node in walk if room[node] >= item.size + 1), None)
        if home is None:  # nothing has room for it whole: to where the most is left
            home = max(room, key=lambda node: (room[node] / ring.shares[node], node))
        room[home] -= item.size + 1
        homes[item.index] = home
    return homes


def successor(item: WorkItem, nodes: Mapping[NodeId, float], without: NodeId) -> NodeId | None:
    """The node that takes `item` when `without` cannot; None if there is no other.

    The next one on the ring, whatever the loads: items that one node loses have their own points on the ring, so they
    spread over all others.
    """
    return next((node for node in ring_of(nodes).walk(item.key) if node != without), None)


def replica_targets(
    shard: ShardInfo,
    holders: AbstractSet[NodeId],
    nodes: Mapping[NodeId, float],
    replicas: int,
    racks: Mapping[NodeId, str] = NO_RACKS,
) -> list[NodeId]:
    """Nodes that should get a copy of `shard` so that `replicas` nodes hold it, on as many racks as can be; or [].

    `racks` maps node -> rack; the nodes that are not in it count as one rack of their own. The same for the same shard
    and nodes, wherever it is asked.
    """
    return spread(ring_of(nodes), shard.key, holders & nodes.keys(), replicas, racks) if nodes else []


def spread(
    ring: Ring, key: str, holders: AbstractSet[NodeId], replicas: int, racks: Mapping[NodeId, str] = NO_RACKS
) -> list[NodeId]:
    """As `replica_targets`, for many shards and the same nodes. `holders` are nodes of the ring."""
    wanted = min(replicas, len(ring.shares))
    used = {racks.get(node, "") for node in holders}
    fresh = max(0, min(wanted, len({racks.get(node, "") for node in ring.shares})) - len(used)) if racks else 0
    missing = max(wanted - len(holders), fresh)
    targets: list[NodeId] = []
    late: list[NodeId] = []
    for node in ring.walk(key) if missing > 0 else ():
        if node in holders:
            continue
        rack = racks.get(node, "")
        if fresh and rack in used:
            late.append(node)
        else:
            fresh -= fresh > 0
            used.add(rack)
            targets.append(node)
        if not fresh:
            targets += late[: missing - len(targets)]
            late = []
        if len(targets) == missing:
            break
    return targets


class Ring:
    """Nodes as points on a circle of 64-bit hashes, more points for more weight."""

    def __init__(self, nodes: Mapping[NodeId, float]) -> None:
        if not nodes:
            raise ValueError("there are no nodes to place work on")
        whole = sum(nodes.values())
        even = 1 / len(nodes)
        self.shares = {node: (weight / whole if whole > 0 else even) for node, weight in nodes.items()}
        self.shares = {node: max(share, 1e-6) for node, share in self.shares.items()}
        points = [
            (_point(f"{node}/{number}"), node)
            for node, share in self.shares.items()
            for number in range(max(1, round(POINTS * share / even)))
        ]
        points.sort()
        self._at = [point for point, _ in points]
        self._node = [node for _, node in points]

    def walk(self, key: str) -> Iterator[NodeId]:
        """Every node once, in the order met from the key's point on."""
        start = bisect_left(self._at, _point(key))
        seen: set[NodeId] = set()
        for step in range(len(self._at)):
            node = self._node[(start + step) % len(self._at)]
            if node not in seen:
                seen.add(node)
                yield node
                if len(seen) == len(self.shares):
                    return


def ring_of(nodes: Mapping[NodeId, float]) -> Ring:
    """The ring of these nodes, remembered for as long as they stay the same."""
    return _ring_of(tuple(sorted(nodes.items())))


@lru_cache(maxsize=4)  # asked for item by item while the nodes stay the same
def _ring_of(nodes: tuple[tuple[NodeId, float], ...]) -> Ring:
    return Ring(dict(nodes))


def _point(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
