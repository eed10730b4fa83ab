"""The mind of one job: `apply(state, event) -> (state, commands)`. No I/O, no clock, no Ray; `drive` performs commands.

Replaying the same events on a fresh state gives the same commands, so a job can be simulated and a bug reproduced.
`apply` takes the state over (a job may have a million items, copying them per event would be quadratic): use the state
it returns, never the one you passed.

What it promises: source bytes in flight never exceed the limit unless one item alone does; items start in the order
they will be read, those that readers wait for before others (`waiting`); an item that fails for a reason that may
pass is tried again, elsewhere if there is an elsewhere, at most TRIES times; an item with a big file goes then to its
spare, which has been given the ranges that had arrived; an item whose node died with its shards before the job ended
is done again; after an error that will not pass nothing new starts, what runs is let finish (its shards are kept for
the next run), and the job fails.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from crucible.cluster.copying import Copy, Copying
from crucible.cluster.items import points_of, sizes_of
from crucible.cluster.place import NO_RACKS, Ring, deal, ring_of, spread
from crucible.cluster.results import Results
from crucible.cluster.waiting import Waiting
from crucible.errors import ClusterError, CrucibleError
from crucible.refs import NodeId, ShardInfo, WorkItem
from crucible.report import ItemResult

TRIES = 4
"""Tasks of one item that may fail before the job gives up. The task itself has tried its sources several times by then.
Those that failed on nodes that are known to be dead do not count..."""
MOST_TRIES = 4 * TRIES
"""...up to so many: an item that kills its nodes must not kill all of them."""
STEP = 1024
"""Commands of one step. What happened meanwhile is heard before the next."""


# --- events


@dataclass(frozen=True, slots=True)
class Started:
    """The job begins."""


@dataclass(frozen=True, slots=True)
class ItemDone:
    result: ItemResult


@dataclass(frozen=True, slots=True)
class ItemFailed:
    index: int
    node: NodeId
    error: CrucibleError
    passing: bool
    """True when another try, or another node, may succeed."""


@dataclass(frozen=True, slots=True)
class CopyDone:
    key: str
    node: NodeId


@dataclass(frozen=True, slots=True)
class CopyFailed:
    key: str
    node: NodeId
    error: CrucibleError


@dataclass(frozen=True, slots=True)
class NodesChanged:
    """All nodes there are now, with their weights."""

    nodes: Mapping[NodeId, float]


@dataclass(frozen=True, slots=True)
class Wished:
    """A reader needs these items, in this order. Those that do not wait any more are passed over."""

    indexes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Proceed:
    """Nothing happened: go on with what one step had no room for."""


@dataclass(frozen=True, slots=True)
class Together:
    """All that happened since the last step, in that order. What to do is then decided once."""

    events: Sequence[Event]


Event = Started | ItemDone | ItemFailed | CopyDone | CopyFailed | NodesChanged | Wished | Proceed | Together

# --- commands


@dataclass(frozen=True, slots=True)
class RunItem:
    item: WorkItem
    node: NodeId
    spare: NodeId | None = None
    """Where the item will go if `node` fails: finished ranges of big files go there as well, meanwhile."""


_SET_ITEM, _SET_NODE, _SET_SPARE = (getattr(RunItem, name).__set__ for name in ("item", "node", "spare"))


def _run_item(item: WorkItem, node: NodeId, spare: NodeId | None) -> RunItem:
    """`RunItem(...)` in half the time, as there is one for every item."""
    made = object.__new__(RunItem)
    _SET_ITEM(made, item)
    _SET_NODE(made, node)
    _SET_SPARE(made, spare)
    return made


@dataclass(frozen=True, slots=True)
class CopyShard:
    """Bring a shard to `node` from one of `holders`."""

    shard: ShardInfo
    holders: tuple[NodeId, ...]
    node: NodeId


@dataclass(frozen=True, slots=True)
class Finish:
    """Every item is done and every copy made, or given up."""


@dataclass(frozen=True, slots=True)
class Fail:
    error: CrucibleError


Command = RunItem | CopyShard | Finish | Fail


@dataclass(slots=True)
class JobState:
    """Owned by `apply`. `items` is in the order in which training will read."""

    items: Sequence[WorkItem]
    nodes: Mapping[NodeId, float]
    limit_bytes: int
    replicas: int = 1
    prefer: Mapping[int, NodeId] = field(default_factory=dict)
    """Items that some node has done already, from an earlier job: they are sent there, and move nothing."""
    part_bytes: int | None = None
    """An item with a bigger file than this has a spare; None: no item has."""
    slots: int | None = None
    """Items, or copies, that a node is given at a time. Fewer are sooner overtaken by what a reader wishes for."""
    racks: Mapping[NodeId, str] = field(default_factory=lambda: NO_RACKS)
    phase: Literal["new", "items", "copies", "finished", "failed"] = "new"
    waiting: Waiting = field(default_factory=Waiting)
    running: dict[int, NodeId] = field(default_factory=dict)
    spares: dict[int, NodeId] = field(default_factory=dict)
    """Of running items."""
    inflight: int = 0
    """Bytes of what runs and of what is copied."""
    done: Results = field(init=False)
    failed_on: dict[int, list[NodeId]] = field(default_factory=dict)
    """Of items that failed, the node of each try."""
    retries: int = 0
    copying: Copying = field(default_factory=Copying)
    missed_copies: list[CrucibleError] = field(default_factory=list)
    """Copies that could not be made: the job is complete without them, with fewer replicas than asked for."""
    error: CrucibleError | None = None
    more: bool = False
    """True when the last step stopped at `STEP` commands: `Proceed` goes on."""
    ring: Ring | None = None
    sizes: array[int] = field(init=False)

    def __post_init__(self) -> None:
        self.done = Results(self.items)
        self.sizes = sizes_of(self.items)

    @property
    def homes(self) -> Sequence[NodeId]:
        """Where each item goes, or went."""
        return self.waiting.homes


def apply(state: JobState, event: Event) -> tuple[JobState, list[Command]]:
    """Fold one event into the state. Events of a finished job change nothing, nor what is told of an item twice."""
    if state.phase in ("finished", "failed"):
        return state, []
    for one in event.events if isinstance(event, Together) else (event,):
        _fold(state, one)
    return state, _next(state)


def _fold(state: JobState, event: Event) -> None:
    match event:
        case ItemDone(result):
            if (node := _landed(state, result.index)) is None:
                return
            if result.shards and result.node not in state.nodes:
                # it is gone, or one that is not of this job, whose end nobody would tell us
                state.waiting.add(result.index, _heir(state, result.index, node))
            else:
                state.done.put(result)
                if state.copying.begun:
                    state.copying.look_at([result.index])
        case Started():
            _started(state)
        case ItemFailed(index, node, error, passing):
            heir = state.spares.get(index)
            if _landed(state, index) is None:
                return
            _failed(state, index, node, error, passing, heir)
        case CopyDone(key, node):
            for copy in state.copying.ended(key, node):
                state.inflight -= copy.size
                if node in state.nodes and copy.index in state.done:
                    state.done.copied(copy.index, copy.place, node)
        case CopyFailed(key, node, error):
            for copy in state.copying.ended(key, node):
                state.inflight -= copy.size
                if not state.copying.again(copy, node, lost=node not in state.nodes):
                    state.missed_copies.append(error)
        case NodesChanged(nodes):
            _nodes_changed(state, nodes)
        case Wished(indexes):
            for place, index in enumerate(indexes):
                state.waiting.wish(index, place)
        case Proceed() | Together():
            pass


def _started(state: JobState) -> None:
    state.phase = "items"
    state.waiting = Waiting(state.slots)
    if not state.nodes:
        _gone(state)
        return
    ring = state.ring = ring_of(state.nodes)
    numbers = {node: number for number, node in enumerate(ring.names)}
    homes = np.full(len(state.items), -1, np.int64)
    for index, node in state.prefer.items():
        homes[index] = numbers.get(node, -1)
    fresh = np.flatnonzero(homes < 0)
    homes[fresh] = deal(np.asarray(state.sizes)[fresh], points_of(state.items)[fresh], ring)
    state.waiting.begin(ring.names, homes.tolist())


def _landed(state: JobState, index: int) -> NodeId | None:
    """The node that an item ran on and does not any more; None for one that did not run."""
    node = state.running.pop(index, None)
    if node is not None:
        state.inflight -= state.sizes[index]
        state.spares.pop(index, None)
        state.waiting.end(node)
    return node


def _failed(
    state: JobState, index: int, node: NodeId, error: CrucibleError, passing: bool, spare: NodeId | None
) -> None:
    tried = state.failed_on.setdefault(index, [])
    tried.append(node)
    state.retries += 1
    # that a node died says little about the item; that it failed on many that died does
    alive = sum(one in state.nodes for one in tried)
    if not passing or alive >= TRIES or len(tried) >= MOST_TRIES:
        state.error = state.error or error
        return
    if spare is None or spare == node or spare not in state.nodes:
        spare = _heir(state, index, node)
    state.waiting.again(index, spare)


def _heir(state: JobState, index: int, without: NodeId) -> NodeId:
    """Where an item goes that `without` did not do; to that again where there is no other."""
    if state.ring is None:
        return without
    return next((node for node in state.ring.walk(state.items[index].key) if node != without), without)


def _nodes_changed(state: JobState, nodes: Mapping[NodeId, float]) -> None:
    gone = sorted(state.nodes.keys() - nodes.keys())
    if len(state.nodes) < min(state.replicas, len(nodes)):
        state.copying.look_at_all()
    state.nodes = nodes
    if not nodes:
        _gone(state)
        return
    ring = state.ring = ring_of(nodes)
    homeless = state.waiting.changed(nodes)
    state.copying.unpark(gone)
    # shards that nobody holds any more were lost, wherever they were born, and so was the work behind them
    lost: list[int] = []
    for node in gone:
        forgotten, fewer = state.done.lose(node)
        lost += forgotten
        state.copying.look_at(fewer)
    if lost and state.phase == "copies":
        state.phase = "items"
    moved = np.array(homeless + lost, np.int64)
    if len(moved):
        homes = deal(np.asarray(state.sizes)[moved], points_of(state.items)[moved], ring)
        for number, (index, home) in enumerate(zip(moved.tolist(), homes, strict=True)):
            (state.waiting.move if number < len(homeless) else state.waiting.add)(index, ring.names[home])


def _gone(state: JobState) -> None:
    state.ring = None
    state.error = state.error or ClusterError("every node of the cluster is gone")


def _next(state: JobState) -> list[Command]:
    """What to do now that an event was folded in. At most `STEP` commands, so that events are heard in between."""
    if state.error is not None:
        state.more = False
        if state.running or state.copying:
            return []  # let them finish: their shards are kept
        state.phase = "failed"
        return [Fail(state.error)]
    commands: list[Command] = []
    waiting, part = state.waiting, state.part_bytes
    while len(commands) < STEP and (turn := waiting.next()) is not None:
        index, node = turn
        size = state.sizes[index]
        if state.inflight and state.inflight + size > state.limit_bytes:
            break
        item = state.items[index]
        waiting.start(index, node)
        state.running[index] = node
        state.inflight += size
        spare = None if part is None or size <= part else _spare(state, item, node)
        if spare is not None:
            state.spares[index] = spare
        commands.append(_run_item(item, node, spare))
    if state.phase == "items" and not state.waiting and not state.running:
        state.phase = "copies"
        if state.replicas > 1:
            state.copying.begin(len(state.items), state.slots)
    if state.phase == "copies":
        commands += _copies(state, STEP - len(commands))
        if not state.copying and not state.running:
            state.phase = "finished"
            commands.append(Finish())
    state.more = len(commands) >= STEP
    return commands


def _spare(state: JobState, item: WorkItem, node: NodeId) -> NodeId | None:
    part, ring = state.part_bytes, state.ring
    if part is None or ring is None or all(file.size <= part for file in item.files):
        return None
    return next((other for other in ring.walk(item.key) if other != node), None)


def _copies(state: JobState, most: int) -> list[CopyShard]:
    """Copies that may begin now, in the order of the source, until every shard has `replicas` holders."""
    commands: list[CopyShard] = []
    assert state.ring is not None
    while len(commands) < most and (index := state.copying.next()) is not None:
        if index not in state.done:
            continue
        for place, shard in enumerate(state.done.shards(index)):
            holders = state.done.holders(index, place)
            state.copying.join(index, place, shard.key)
            for node in _targets(state, index, shard, holders):
                if state.inflight and state.inflight + shard.size > state.limit_bytes:
                    state.copying.first(index)
                    return commands
                if state.copying.start(Copy(index, place, shard.size), shard.key, node):
                    state.inflight += shard.size
                    commands.append(CopyShard(shard, tuple(sorted(holders)), node))
    return commands


def _targets(state: JobState, index: int, shard: ShardInfo, holders: set[NodeId]) -> list[NodeId]:
    """Nodes that should get the shard now, those on which a copy of it failed after all others."""
    assert state.ring is not None
    there = (holders | state.copying.coming(shard.key)) & state.nodes.keys()
    targets = spread(state.ring, shard.key, there, state.replicas, state.racks)
    failed = state.copying.failed_on.get(index)
    if not failed or not set(targets) & set(failed):
        return targets
    wider = spread(state.ring, shard.key, there, state.replicas + len(failed), state.racks)
    return sorted(wider, key=failed.count)[: len(targets)]
