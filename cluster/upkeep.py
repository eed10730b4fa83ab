"""What to copy, make again and drop so that every shard is held as it should be. Pure; `care` performs the plans.

A plan is made anew from what is there whenever one is needed, and never kept: whatever was done of an older one, or
went wrong, is seen in the stores. When a plan was performed, the next one is empty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

from crucible.cluster.place import SLACK, Ring, ring_of, spread
from crucible.refs import NodeId

NOBODY: frozenset[NodeId] = frozenset()


class Wanted(NamedTuple):
    """A shard that nodes are to hold."""

    key: str
    size: int
    """Bytes."""
    replicas: int
    item: object
    """What names the recipe that makes it, and its neighbours: equal for the shards of one work item."""


@dataclass(frozen=True, slots=True)
class Place:
    """A node that is there."""

    weight: float
    """Such as the bytes its disk may hold: its share is in proportion."""
    rack: str = ""
    drained: bool = False
    """What it holds can be read and copied, and is counted as gone; nothing new comes to it."""
    makes: bool = True
    """It can make lost shards again, with the bytes that they had."""


@dataclass(frozen=True, slots=True)
class Copy:
    key: str
    size: int
    node: NodeId
    living: int
    """Copies on nodes that stay: 0 says that the only ones are on nodes that are about to go."""


@dataclass(frozen=True, slots=True)
class Remake:
    """Shards that nobody holds, made again on `node` from the recipe `item`."""

    item: object
    node: NodeId
    keys: tuple[str, ...]
    size: int
    """Bytes of the lost shards."""


@dataclass(frozen=True, slots=True)
class Drop:
    """A copy more than is wanted, or one that has moved away. Not before the others are there."""

    key: str
    size: int
    node: NodeId


@dataclass(frozen=True, slots=True)
class Plan:
    """Remakes first, then the copies, those of the most endangered shards first, then the drops."""

    remakes: tuple[Remake, ...] = ()
    copies: tuple[Copy, ...] = ()
    drops: tuple[Drop, ...] = ()
    hopeless: tuple[str, ...] = ()
    """Keys of shards that no node can be given: lost ones while there is none that could make them again, and those of
    nodes that go while none stays."""

    def __bool__(self) -> bool:
        return bool(self.remakes or self.copies or self.drops)

    @property
    def left(self) -> int:
        """Shards that are not held as they should be."""
        lost = {key for one in self.remakes for key in one.keys}
        return len(lost | {copy.key for copy in self.copies} | set(self.hopeless))

    @property
    def bytes(self) -> int:
        """To be copied or made again."""
        return sum(copy.size for copy in self.copies) + sum(one.size for one in self.remakes)


Holders = Callable[[str], AbstractSet[NodeId]]
Pinned = Callable[[str], AbstractSet[NodeId]]


def repair(
    shards: Iterable[Wanted],
    holders: Holders,
    nodes: Mapping[NodeId, Place],
    *,
    trim: bool = False,
    pinned: Pinned = lambda _: NOBODY,
    remake: Callable[[str], bool] = lambda _: True,
) -> Plan:
    """Bring every shard to as many nodes as it wants, or all there are, on as many racks as can be.

    `shards` is gone over twice when some were lost. A node that is drained counts as gone, so this also drains. `trim`
    drops what is more than wanted, but never a copy that is `pinned`; a drained node's copies stay, until the node
    goes. `remake` says of a lost key whether it is to be made again.
    """
    staying = {node: place.weight for node, place in nodes.items() if not place.drained}
    racks = {node: nodes[node].rack for node in staying} if any(place.rack for place in nodes.values()) else {}
    if not staying:
        return Plan(hopeless=tuple(one.key for one in shards if holders(one.key) & nodes.keys() or remake(one.key)))
    ring, here = ring_of(staying), nodes.keys()
    planner = _Planner(ring, racks, nodes, trim, pinned)
    lost: dict[object, list[Wanted]] = defaultdict(list)
    for one in shards:
        if there := holders(one.key) & here:
            planner.look(one, there)
        elif remake(one.key):
            lost[one.item].append(one)
    if lost:
        planner.remake(lost, shards, holders)
    planner.copies.sort(key=lambda copy: copy.living)  # stable: as the shards come, which is as they are read
    return Plan(tuple(planner.remakes), tuple(planner.copies), tuple(planner.drops), tuple(planner.hopeless))


@dataclass
class _Planner:
    ring: Ring
    racks: Mapping[NodeId, str]
    nodes: Mapping[NodeId, Place]
    trim: bool
    pinned: Pinned
    remakes: list[Remake] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    hopeless: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.most_racks = len(self._racks_of(self.ring.shares))

    def _racks_of(self, nodes: Iterable[NodeId]) -> set[str]:
        return {self.racks.get(node, "") for node in nodes}

    def look(self, one: Wanted, there: AbstractSet[NodeId]) -> None:
        """A shard that `there` hold, or will when the remakes are done."""
        staying = there & self.ring.shares.keys()
        wanted = min(one.replicas, len(self.ring.shares))
        targets: list[NodeId] = []
        # nearly all shards are as they should be, and there may be a million of them
        if len(staying) < wanted or (self.racks and len(self._racks_of(staying)) < min(wanted, self.most_racks)):
            targets = spread(self.ring, one.key, staying, one.replicas, self.racks)
        self.copies += [Copy(one.key, one.size, node, len(staying)) for node in targets]
        if self.trim and len(staying) + len(targets) > one.replicas:
            keep = self._keep(one, staying, targets)
            self.drops += [Drop(one.key, one.size, node) for node in sorted(staying - keep)]

    def _keep(self, one: Wanted, staying: AbstractSet[NodeId], targets: list[NodeId]) -> set[NodeId]:
        """The best of `staying` that, with the new `targets`, are enough."""
        keep = {*targets, *(self.pinned(one.key) & staying)}
        order = [node for node in self.ring.walk(one.key) if node in staying]
        used = self._racks_of(keep)
        reachable = len(used | self._racks_of(order))
        for node in order:  # first one of every rack that is wanted, then whatever comes
            if node not in keep and self.racks.get(node, "") not in used and len(used) < min(one.replicas, reachable):
                keep.add(node)
                used.add(self.racks.get(node, ""))
        for node in order:
            if len(keep) >= one.replicas:
                break
            keep.add(node)
        return keep

    def remake(self, lost: Mapping[object, list[Wanted]], shards: Iterable[Wanted], holders: Holders) -> None:
        """The items of lost shards, each where most of the item is; then look at its shards as they will be.

        Making an item again gives all its shards, so the neighbours of a lost one are looked at anew.
        """
        makers = {node for node in self.ring.shares if self.nodes[node].makes}
        if not makers:
            self.hopeless += [one.key for many in lost.values() for one in many]
            return
        family: dict[object, list[Wanted]] = defaultdict(list)
        for one in shards:
            if one.item in lost:
                family[one.item].append(one)
        again = {one.key for members in family.values() for one in members}
        self.copies = [copy for copy in self.copies if copy.key not in again]
        self.drops = [drop for drop in self.drops if drop.key not in again]
        for item, members in family.items():
            held: dict[NodeId, int] = defaultdict(int)
            for one in members:
                for node in holders(one.key) & makers:
                    held[node] += 1
            most = max(held.values(), default=0)
            node = next(n for n in self.ring.walk(members[0].key) if n in makers and held.get(n, 0) == most)
            gone = lost[item]
            self.remakes.append(Remake(item, node, tuple(one.key for one in gone), sum(one.size for one in gone)))
            for one in members:
                self.look(one, (holders(one.key) & self.nodes.keys()) | {node})


def rebalance(
    shards: Iterable[Wanted],
    holders: Holders,
    nodes: Mapping[NodeId, Place],
    *,
    pinned: Pinned = lambda _: NOBODY,
) -> Plan:
    """Move copies from nodes with more than their share to those with less, and nothing else.

    A node that joined gets its share by this. A move is made only if the node that gets the shard is then less full by
    a tenth than the one that gave it was (else shards of about one size would change places for nothing), one of the
    two is more than a tenth off its share, and the shard's racks stay as many. What is pinned stays.
    """
    staying = {node: place.weight for node, place in nodes.items() if not place.drained}
    known = [one for one in shards if holders(one.key) & staying.keys()]
    if len(staying) < 2 or not known:
        return Plan()
    ring = ring_of(staying)
    racks = {node: nodes[node].rack for node in staying}
    where = {one.key: set(holders(one.key) & staying.keys()) for one in known}
    load = dict.fromkeys(staying, 0)
    for one in known:
        for node in where[one.key]:
            load[node] += one.size
    total = sum(load.values())
    fair = {node: max(total * ring.shares[node], 1e-9) for node in staying}
    fill = {node: load[node] / fair[node] for node in staying}
    low = {node for node in staying if fill[node] < 1}
    needy = {node for node in low if fill[node] * SLACK < 1}

    def takes(one: Wanted, giver: NodeId, taker: NodeId) -> bool:
        there = where[one.key]
        if taker in there or (load[taker] + one.size) / fair[taker] * SLACK >= fill[giver]:
            return False
        others = {racks[node] for node in there if node != giver}
        return racks[taker] not in others or racks[giver] in others

    def move(one: Wanted, giver: NodeId, taker: NodeId) -> None:
        where[one.key].remove(giver)
        where[one.key].add(taker)
        for node, change in ((giver, -one.size), (taker, one.size)):
            load[node] += change
            fill[node] = load[node] / fair[node]
            (low.add if fill[node] < 1 else low.discard)(node)
            (needy.add if fill[node] * SLACK < 1 else needy.discard)(node)

    moving = True
    while moving:  # every move makes the fuller of two nodes less full than it was, so this ends
        moving = False
        for one in known:
            for giver in sorted(where[one.key] - pinned(one.key), key=lambda node: (-fill[node], node)):
                few = low if fill[giver] > SLACK else needy
                if fill[giver] <= 1 or not few:
                    break
                walk = (node for node in ring.walk(one.key) if node in few) if len(few) > 1 else iter(tuple(few))
                if (taker := next((node for node in walk if takes(one, giver, node)), None)) is not None:
                    move(one, giver, taker)
                    moving = True
    copies, drops = [], []
    for one in known:
        if (now := where[one.key]) != (before := holders(one.key) & staying.keys()):
            copies += [Copy(one.key, one.size, node, len(before)) for node in sorted(now - before)]
            drops += [Drop(one.key, one.size, node) for node in sorted(before - now)]
    return Plan(copies=tuple(copies), drops=tuple(drops))
