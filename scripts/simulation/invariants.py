"""What must hold while a simulated job runs, and when it has ended. The first that does not raises Broken, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from crucible.cluster.copying import COPY_TRIES
from crucible.cluster.track import (
    MOST_TRIES,
    STEP,
    TRIES,
    Command,
    CopyShard,
    Event,
    Fail,
    Finish,
    ItemDone,
    ItemFailed,
    NodesChanged,
    Proceed,
    RunItem,
)
from crucible.refs import NodeId, WorkItem
from scripts.simulation.broken import Broken

if TYPE_CHECKING:
    from scripts.simulation.world import World


class Watch:
    """Looks at a world before and after each event, and at the end."""

    def __init__(self, world: World, *, careful: bool) -> None:
        self._world, self._careful = world, careful
        self._running: set[int] = set()
        self._sent: Counter[int] = Counter()
        self._owed: Counter[int] = Counter()
        """How often an item may be sent: once, and once more for each time that it failed or was lost."""
        self._done: set[int] = set()
        self._homes: list[NodeId] = []
        self._before: frozenset[NodeId] = frozenset()
        self._brought: set[str] = set()
        self._failed = False
        self.short = self.missing = 0
        """At the end: items with fewer holders than wanted, because copies failed; and items on nodes that have died,
        of which the coordinator has not heard."""
        self.again_bytes = 0
        """Of content that had come before: it was lost, or is where the coordinator cannot know of it."""
        self.copies = 0
        self.most_commands = 0
        self.moved = 0

    # --- what the world tells

    def begins(self, index: int) -> None:
        if index in self._running:
            raise Broken("once", f"item {index} runs twice at once")
        self._running.add(index)

    def ends(self, index: int) -> None:
        self._running.discard(index)

    def brings(self, item: WorkItem) -> None:
        """An item's bytes are about to be asked of the Hub."""
        world = self._world
        known = world.catalog.holders(item.shard_key(0)) & world.known.keys()
        if known and known <= world.cluster.living.keys():  # of a death that was not noticed nobody can know
            raise Broken("hub bytes", f"item {item.index} is brought again, and a node is known to have it")

    def brought(self, item: WorkItem) -> None:
        """An item's bytes have come, and its shard is on a disk."""
        if item.key in self._brought:
            self.again_bytes += item.size
        self._brought.add(item.key)

    def forget(self) -> None:
        """The coordinator was killed: what it had sent is no more."""
        self._running.clear()
        self._sent.clear()
        self._owed.clear()
        self._done.clear()

    def before(self, event: Event) -> None:
        state, world = self._world.state, self._world
        world.trace.append(f"{world.now:10.3f}  {_short(event)}")
        if isinstance(event, ItemFailed) and event.index in state.running:
            self._owed[event.index] += 1
        if isinstance(event, ItemDone):
            self._done.add(event.result.index)
        if isinstance(event, NodesChanged) and self._careful:
            self._homes, self._before = list(state.homes), frozenset(state.nodes)

    def after(self, events: Sequence[Event], commands: Sequence[Command]) -> None:
        world, state = self._world, self._world.state
        if len(commands) > STEP + 1:
            raise Broken("storm", f"{len(commands)} commands in one step")
        self.most_commands = max(self.most_commands, len(commands))
        starts = 0
        for command in commands:
            if isinstance(command, RunItem):
                starts += 1
                index = command.item.index
                if index in self._done and index not in state.done:
                    self._done.discard(index)
                    self._owed[index] += 1  # it was lost with its nodes
                self._sent[index] += 1
                if self._sent[index] > 1 + self._owed[index]:
                    raise Broken(
                        "once", f"item {index} was sent {self._sent[index]} times, and needed {1 + self._owed[index]}"
                    )
                if index in state.done:
                    raise Broken("once", f"item {index} was sent and is done")
            elif isinstance(command, CopyShard):
                self.copies += 1
        if state.error is not None and not self._failed:
            self._failed = True
            self._rightly()
        if not self._careful:
            return
        for command in commands:
            world.trace.append(f"{world.now:10.3f}      -> {_short(command)}")
        self._accounts(starts)
        if any(isinstance(one, NodesChanged) for one in events):
            self._nothing_else_moved({one.index for one in events if isinstance(one, ItemFailed)})

    def _rightly(self) -> None:
        state = self._world.state
        tries = [tried for tried in state.failed_on.values() if len(tried) >= TRIES]
        often = any(len(one) >= MOST_TRIES or sum(node in state.nodes for node in one) >= TRIES for one in tries)
        if state.nodes and not often:
            raise Broken("failure", f"the job fails with {state.error}, and no item failed so often")

    def _accounts(self, starts: int) -> None:
        state = self._world.state
        if state.phase in ("finished", "failed"):
            return
        sizes = [state.sizes[index] for index in state.running]
        copies = [copy.size for there in state.copying.under_way.values() for many in there.values() for copy in many]
        if state.inflight != sum(sizes) + sum(copies):
            raise Broken(
                "in flight", f"{state.inflight} bytes are accounted for, {sum(sizes) + sum(copies)} are under way"
            )
        if state.inflight > state.limit_bytes and sum(size > 0 for size in sizes + copies) > 1:
            raise Broken("in flight", f"{state.inflight} bytes are under way, and the limit is {state.limit_bytes}")
        if state.slots is not None and max(Counter(state.running.values()).values(), default=0) > state.slots:
            raise Broken("slots", f"a node has more than {state.slots} items at a time")
        lost = set(range(len(state.items))) - set(state.waiting) - state.running.keys() - set(state.done)
        if lost and state.error is None:
            raise Broken("none lost", f"items {sorted(lost)[:5]} neither wait, nor run, nor are done")
        room = state.slots is None or any(
            list(state.running.values()).count(node) < state.slots for node in state.nodes
        )
        first_try = any(index not in state.failed_on for index in state.waiting)
        if starts == 0 and room and first_try and not state.inflight and not state.running and state.error is None:
            raise Broken("work", "items wait, nothing runs, and nothing was started")

    def _nothing_else_moved(self, failed: set[int]) -> None:
        state = self._world.state
        for index in state.waiting:
            was, now = self._homes[index], state.homes[index]
            if was != now and was in state.nodes and index not in self._done | failed:
                raise Broken("placement", f"item {index} waits for {now} and waited for {was}, which is still there")
            self.moved += was != now

    # --- the end

    def at_the_end(self) -> None:
        world, state = self._world, self._world.state
        cluster = world.cluster
        repo = sum({item.key: item.size for item in world.items}.values()) if self._careful else sum(state.sizes)
        if cluster.hub_bytes > repo + cluster.lost_bytes + self.again_bytes + 1:
            raise Broken(
                "hub bytes", f"{cluster.hub_bytes:.0f} came, {repo} would do, {cluster.lost_bytes:.0f} were lost"
            )
        if world.error is not None:
            return
        if len(state.done) != len(state.items) or state.running or state.copying or state.inflight:
            raise Broken("termination", "the job has finished, and work is left")
        told = {name for name in state.nodes if name in cluster.living}
        for index in range(len(state.items)):
            key = state.items[index].shard_key(0) if self._careful else ""
            believed = state.done.holders(index, 0)
            if not believed or not believed <= state.nodes.keys():
                raise Broken("holders", f"item {index} is done, and its shard is on {sorted(believed)}")
            if self._careful:
                truth = cluster.holders(key)
                if believed & told - truth:
                    raise Broken("holders", f"item {index}: {sorted(believed & told - truth)} do not have it")
            tried = state.copying.failed_on.get(index, ())
            if len(believed) < min(state.replicas, len(state.nodes)):
                self.short += 1
                if len(tried) < COPY_TRIES:
                    raise Broken("replicas", f"item {index} has {len(believed)} of {state.replicas} holders")
            self.missing += not believed & told


def _short(thing: Event | Command) -> str:
    match thing:
        case ItemDone(result):
            return f"item {result.index} done on {result.node}"
        case ItemFailed(index, node):
            return f"item {index} failed on {node}"
        case RunItem(item, node, spare):
            return f"run item {item.index} on {node}, spare {spare}"
        case CopyShard(shard, holders, node):
            return f"copy {shard.key[:8]} of item {shard.item} from {', '.join(holders)} to {node}"
        case NodesChanged(nodes):
            return f"nodes: {', '.join(sorted(nodes))}"
        case Finish():
            return "finished"
        case Fail(error):
            return f"failed: {error}"
        case Proceed():
            return "more"
        case _:
            return str(thing)
