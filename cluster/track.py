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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from crucible.cluster.place import assign, replica_targets, successor
from crucible.cluster.waiting import Waiting
from crucible.errors import ClusterError, CrucibleError
from crucible.refs import NodeId, ShardInfo, WorkItem
from crucible.report import ItemResult

TRIES = 4
"""Tasks started for one item before the job gives up. The task itself has tried its sources several times by then."""


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


Event = Started | ItemDone | ItemFailed | CopyDone | CopyFailed | NodesChanged | Wished

# --- commands


@dataclass(frozen=True, slots=True)
class RunItem:
    item: WorkItem
    node: NodeId
    spare: NodeId | None = None
    """Where the item will go if `node` fails: finished ranges of big files go there as well, meanwhile."""


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
    """Items that a node is given at a time. Fewer are sooner overtaken by what a reader wishes for."""
    phase: Literal["new", "items", "copies", "finished", "failed"] = "new"
    waiting: Waiting = field(default_factory=Waiting)
    homes: dict[int, NodeId] = field(default_factory=dict)
    running: dict[int, NodeId] = field(default_factory=dict)
    spares: dict[int, NodeId] = field(default_factory=dict)
    """Of running items."""
    inflight: int = 0
    done: dict[int, ItemResult] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)
    holders: dict[str, set[NodeId]] = field(default_factory=dict)
    lost_nodes: set[NodeId] = field(default_factory=set)
    """Nodes that went away during the job: what they still report as done went with them."""
    copying: set[tuple[str, NodeId]] = field(default_factory=set)
    missed_copies: list[CrucibleError] = field(default_factory=list)
    """Copies that could not be made: the job is complete without them, with fewer replicas than asked for."""
    error: CrucibleError | None = None


def apply(state: JobState, event: Event) -> tuple[JobState, list[Command]]:
    """Fold one event into the state. Events of a finished job change nothing."""
    if state.phase in ("finished", "failed"):
        return state, []
    match event:
        case Started():
            state.phase = "items"
            state.waiting = Waiting(state.slots)
            state.waiting.add(item.index for item in state.items)
            fresh = [item for item in state.items if state.prefer.get(item.index) not in state.nodes]
            state.homes = {**state.prefer, **assign(fresh, state.nodes)}
        case ItemDone(result):
            _landed(state, result.index)
            state.spares.pop(result.index, None)
            if result.shards and result.node in state.lost_nodes:
                _again(state, [result.index])
            else:
                state.done[result.index] = result
                for shard in result.shards:
                    state.holders.setdefault(shard.key, set()).add(result.node)
        case ItemFailed(index, node, error, passing):
            _landed(state, index)
            _failed(state, index, node, error, passing)
        case CopyDone(key, node):
            state.copying.discard((key, node))
            if node not in state.lost_nodes:
                state.holders.setdefault(key, set()).add(node)
        case CopyFailed(key, node, error):
            state.copying.discard((key, node))
            state.missed_copies.append(error)
        case NodesChanged(nodes):
            _nodes_changed(state, nodes)
        case Wished(indexes):
            for place, index in enumerate(indexes):
                state.waiting.wish(index, place)
    return state, _next(state)


def _landed(state: JobState, index: int) -> None:
    if (node := state.running.pop(index, None)) is not None:
        state.inflight -= state.items[index].size
        state.waiting.end(node)


def _failed(state: JobState, index: int, node: NodeId, error: CrucibleError, passing: bool) -> None:
    heir = state.spares.pop(index, None)
    state.failures[index] = state.failures.get(index, 0) + 1
    if not passing or state.failures[index] >= TRIES:
        state.error = state.error or error
        return
    if heir is None or heir == node or heir not in state.nodes:
        heir = successor(state.items[index], state.nodes, node) if state.nodes else None
    if heir is not None:
        state.homes[index] = heir
    state.waiting.again(index)


def _nodes_changed(state: JobState, nodes: Mapping[NodeId, float]) -> None:
    gone = state.nodes.keys() - nodes.keys()
    state.nodes = nodes
    state.lost_nodes = (state.lost_nodes | gone) - nodes.keys()
    if not nodes:
        state.error = state.error or ClusterError("every node of the cluster is gone")
        return
    if not gone:
        state.waiting.rebuild(nodes)
        return
    for holders in state.holders.values():
        holders -= gone
    # shards that nobody holds any more were lost, wherever they were born, and so was the work behind them
    lost = [i for i, done in state.done.items() if not all(state.holders[shard.key] for shard in done.shards)]
    for index in lost:
        del state.done[index]
    _again(state, lost)
    state.waiting.rebuild(nodes)


def _again(state: JobState, lost: Sequence[int]) -> None:
    """Do items again whose shards are gone, and give every waiting item a home that is still there."""
    state.waiting.add(lost)
    if lost and state.phase == "copies":
        state.phase = "items"
    homeless = [state.items[index] for index in state.waiting if state.homes[index] not in state.nodes]
    if state.nodes:
        state.homes.update(assign(homeless, state.nodes))


def _next(state: JobState) -> list[Command]:
    """What to do now that an event was folded in."""
    if state.error is not None:
        if state.running or state.copying:
            return []  # let them finish: their shards are kept
        state.phase = "failed"
        return [Fail(state.error)]
    commands: list[Command] = []
    while (index := state.waiting.first(state.homes, state.nodes)) is not None:
        item = state.items[index]
        if state.running and state.inflight + item.size > state.limit_bytes:
            break
        node = state.homes[index]
        state.waiting.start(index, node)
        state.running[item.index] = node
        state.inflight += item.size
        spare = _spare(state, item, node)
        if spare is not None:
            state.spares[item.index] = spare
        commands.append(RunItem(item, node, spare))
    if state.phase == "items" and not state.waiting and not state.running:
        state.phase = "copies"
        commands += _copies(state)
    if state.phase == "copies" and not state.copying and not state.running:
        state.phase = "finished"
        commands.append(Finish())
    return commands


def _spare(state: JobState, item: WorkItem, node: NodeId) -> NodeId | None:
    if state.part_bytes is None or all(file.size <= state.part_bytes for file in item.files):
        return None
    return successor(item, state.nodes, node)


def _copies(state: JobState) -> list[CopyShard]:
    commands = []
    if state.replicas > 1:
        for index in sorted(state.done):
            for shard in state.done[index].shards:
                holders = state.holders[shard.key]
                for node in replica_targets(shard, holders, state.nodes, state.replicas):
                    state.copying.add((shard.key, node))
                    commands.append(CopyShard(shard, tuple(sorted(holders)), node))
    return commands
