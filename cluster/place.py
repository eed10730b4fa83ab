"""Work items and replicas -> nodes. Pure.

A ring of hashed points with bounded loads: each item starts at its own point of the ring and takes the first node that
has room. So loads follow the weights, and when a node comes or goes most items keep their node: only the lost share,
and the little that the changed bounds push over, moves. (Consistent hashing with bounded loads, Mirrokni et al. 2016.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crucible.refs import NodeId, ShardInfo, WorkItem

POINTS = 64
"""Ring points of a node of average weight: enough that arcs differ little, few enough that 1,024 nodes stay cheap."""
SLACK = 1.1
"""How far above its fair share of bytes a node may go before items walk on: low is even, high is stable."""
Numbers = Sequence[int] | NDArray[Any]
NO_RACKS: Mapping[NodeId, str] = {}
"""Nobody said where the nodes stand."""


def assign(items: Sequence[WorkItem], nodes: Mapping[NodeId, float]) -> dict[int, NodeId]:
    """item index -> node. `nodes` maps node -> weight (> 0, such as free disk bytes). Raises ValueError without nodes.

    Every node's bytes stay within about 1.1 times its fair share, plus one item. The result depends on item keys and
    on nodes, not on the order of either.
    """
    ring = ring_of(nodes)
    homes = deal([item.size for item in items], [point_of(item.key) for item in items], ring)
    return {item.index: ring.names[home] for item, home in zip(items, homes, strict=True)}


def deal(sizes: Numbers, points: Numbers, ring: Ring) -> list[int]:
    """The same for many items: for each, by its bytes and its `point_of`, the number of its node in `ring.names`."""
    needs = np.asarray(sizes, np.int64) + 1
    starts = np.asarray(points, np.uint64)
    room = (SLACK * float(needs.sum()) * ring.share_of).tolist()
    # big items first: they are the ones that would not fit any more at the end
    order = np.lexsort((starts, -needs))
    firsts = np.searchsorted(ring.at, starts[order]).tolist()
    owners, turn = ring.owners, len(ring.owners)
    homes = [0] * len(needs)
    most = max(room)
    for index, first, need in zip(order.tolist(), firsts, needs[order].tolist(), strict=True):
        home = owners[first if first < turn else 0]
        if need > most:  # as when few items are left over from a node that died: no need to go around for each
            home = -1
        elif room[home] < need:
            home = next((other for other in _onwards(owners, first) if room[other] >= need), -1)
        if home < 0:  # nothing has room for it whole: to where the most is left
            home = max(range(len(room)), key=lambda one: (room[one] / ring.share_of[one], ring.names[one]))
        room[home] -= need
        homes[index] = home
    return homes


def _onwards(owners: list[int], start: int) -> Iterator[int]:
    """Once around the ring, nodes coming as often as they have points."""
    yield from map(owners.__getitem__, range(start, len(owners)))
    yield from map(owners.__getitem__, range(start))


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
        self.names = sorted(nodes)
        self.shares = {node: max(nodes[node] / whole if whole > 0 else even, 1e-6) for node in self.names}
        self.share_of = np.array(list(self.shares.values()))
        """Of the nodes by number, which is the place in `names`."""
        arcs = [_points_of(node, max(1, round(POINTS * share / even))) for node, share in self.shares.items()]
        points = np.concatenate(arcs)
        numbers = np.repeat(np.arange(len(arcs)), [len(arc) for arc in arcs])
        order = np.argsort(points, kind="stable")
        self.at = points[order]
        """The points, ascending."""
        self.owners: list[int] = numbers[order].tolist()
        """The number of each point's node."""

    def walk(self, key: str) -> Iterator[NodeId]:
        """Every node once, in the order met from the key's point on."""
        start = int(np.searchsorted(self.at, np.uint64(point_of(key))))
        seen: set[int] = set()
        for number in _onwards(self.owners, start):
            if number not in seen:
                seen.add(number)
                yield self.names[number]
                if len(seen) == len(self.names):
                    return


def ring_of(nodes: Mapping[NodeId, float]) -> Ring:
    """The ring of these nodes, remembered for as long as they stay the same."""
    return _ring_of(tuple(sorted(nodes.items())))


@lru_cache(maxsize=4)  # asked for item by item while the nodes stay the same
def _ring_of(nodes: tuple[tuple[NodeId, float], ...]) -> Ring:
    return Ring(dict(nodes))


def point_of(key: str) -> int:
    """Where a key stands on the circle: the first 64 bits of one that is a hash, else of its hash."""
    try:
        return int(key[:16], 16) if len(key) == 64 else _hash_of(key)
    except ValueError:
        return _hash_of(key)


@lru_cache(maxsize=4096)  # when a node comes or goes, the others keep their points
def _points_of(node: NodeId, count: int) -> NDArray[np.uint64]:
    return np.array([_hash_of(f"{node}/{number}") for number in range(count)], np.uint64)


def _hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
