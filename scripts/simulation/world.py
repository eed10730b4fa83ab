"""A job in virtual time: the product's own mind (`track.apply`), and a coordinator that performs what it commands.

What `drive`, `executor` and `agents` do with threads and Ray this does with a heap of moments: it sends tasks, tells
the mind what became of them, notices late which nodes came and went, joins work that is under way, keeps the catalog,
and after a kill of the coordinator begins anew with what the stores hold.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from crucible.cluster import track
from crucible.cluster.catalog import Catalog
from crucible.cluster.items import Items
from crucible.cluster.track import (
    Command,
    CopyDone,
    CopyFailed,
    CopyShard,
    Event,
    Fail,
    Finish,
    ItemDone,
    ItemFailed,
    JobState,
    NodesChanged,
    Proceed,
    RunItem,
    Started,
    Together,
    Wished,
)
from crucible.errors import CrucibleError, SourceUnavailable
from crucible.refs import NodeId, ReadOptions, RepoRef, ShardInfo, SourceFile, WorkItem
from crucible.report import ItemResult
from scripts.simulation.broken import Broken
from scripts.simulation.cluster import DISPATCH_S, Cluster, Node
from scripts.simulation.invariants import Watch
from scripts.simulation.scenario import Scenario

POLL_S = 1.0
RESTART_S = 3.0
"""From a coordinator's death until another one acts."""
MOST_STEPS, MOST_STEPS_AN_ITEM = 20_000, 500
"""In which a job has to end."""
SCHEMA = "5" * 64
PASSING = SourceUnavailable("file", "the Hub", "it hung up")


def work_of(scenario: Scenario) -> Items:
    """The job's items: one file each, some with the content of others."""
    chance = random.Random(scenario.seed)
    files = []
    for number in range(scenario.items):
        size = scenario.item_bytes if scenario.even else int(scenario.item_bytes * 2 ** chance.uniform(-1, 1))
        oid = f"{scenario.seed:032x}{number:032x}"
        if files and chance.random() < scenario.twins:
            twin = chance.choice(files)
            size, oid = twin.size, twin.oid
        files.append(SourceFile(f"{number}.parquet", size, oid, lfs=True))
    ends = range(1, len(files) + 1)
    return Items(RepoRef("org/data", "0" * 40), files, ends, ReadOptions("parquet"), 1 << 28)


class World:
    """One run. `finish` brings it to its end and raises Broken if anything does not hold on the way."""

    def __init__(self, scenario: Scenario, items: Items | None = None, *, careful: bool = True) -> None:
        """`careful` checks everything after every event, which costs as many steps as there are items."""
        self.scenario = scenario
        self.now = 0.0
        self.cpu_s = 0.0
        """Of the mind."""
        self.events = self.commands = self.tries = self.restarts = self.repairs = 0
        self.trace: deque[str] = deque(maxlen=60)
        self.ended_at: float | None = None
        self.error: CrucibleError | None = None
        self.items = work_of(scenario) if items is None else items
        self._chance = random.Random(scenario.seed + 1)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._steps = 0
        self.cluster = Cluster(scenario, self._chance, lambda: self.now, self._after)
        self.known: dict[NodeId, float] = dict.fromkeys(self.cluster.nodes, 1.0)
        """The nodes that the coordinator believes to be there."""
        self.catalog = Catalog()
        self.sizes: dict[str, int] = {}
        """What is in the catalog of items: key -> bytes."""
        self._flights: dict[str, list[Callable[[], None]]] = {}
        self._life, self._up = 0, True
        self._inbox: list[Event] = []
        """What happened since the mind listened."""
        self.watch = Watch(self, careful=careful)
        self.state = self._fresh({})
        self._plan_luck()

    # --- time

    def _after(self, seconds: float, do: Callable[[], None]) -> None:
        self._steps += 1
        heappush(self._heap, (self.now + max(0.0, seconds), self._steps, do))

    def _mine(self, do: Callable[[], None]) -> Callable[[], None]:
        """For this coordinator only: one that was killed hears nothing."""
        life = self._life
        return lambda: do() if life == self._life else None

    def finish(self) -> None:
        """Until the job has ended, well or not."""
        self.tell(Started())
        self._poll()
        while self.ended_at is None:
            if not self._heap:
                raise Broken("termination", "nothing is under way and the job has not ended")
            self.now, _, do = heappop(self._heap)
            do()
            if self._steps > MOST_STEPS + MOST_STEPS_AN_ITEM * len(self.items):
                raise Broken("termination", f"{self._steps} steps, {self.events} events, and no end")
        self.watch.at_the_end()

    # --- bad luck

    def _plan_luck(self) -> None:
        names = list(self.cluster.nodes)
        for at, number, back_s in self.scenario.deaths:
            self._after(at, lambda name=names[number], back_s=back_s: self._die(self.cluster.nodes[name], back_s))
        for at in self.scenario.joins:
            self._after(at, self._join)
        for at in self.scenario.restarts:
            self._after(at, self._restart)
        for _ in range(self.scenario.wishes):
            self._after(self._chance.uniform(0, 30), self._wish)

    def _die(self, node: Node, back_s: float | None) -> None:
        if len(self.cluster.living) < 2:
            return  # a cluster of no nodes has no job
        self._say(f"{node.name} dies")
        self.cluster.kill(node)
        self._after(self._chance.uniform(0, self.scenario.notice_s), lambda: self._noticed(node))
        if back_s is not None:
            self._after(back_s, lambda: self._join(node.disk))

    def _noticed(self, node: Node) -> None:
        self.known.pop(node.name, None)
        self.catalog.drop(node.name)

    def _join(self, disk: dict[str, int] | None = None) -> None:
        node = self.cluster.add(1.0, disk)
        self._say(f"{node.name} joins")
        self._after(self._chance.uniform(0, self.scenario.notice_s), lambda: self._met(node))

    def _met(self, node: Node) -> None:
        if node.alive:
            self.known[node.name] = 1.0
            self.catalog.replace(node.name, list(node.disk), list(node.disk.values()))

    def _restart(self) -> None:
        if self.ended_at is not None:
            return
        self._say("the coordinator is killed")
        self.restarts += 1
        self._life += 1
        self._inbox.clear()
        self._up = False
        self._flights.clear()
        self.watch.forget()
        self.cluster.cut()
        self._after(RESTART_S, self._mine(self._again))

    def _again(self) -> None:
        self._up = True
        self.known = {}
        self.catalog = Catalog()
        for node in self.cluster.living.values():
            self._met(node)
        keys = ((item.index, self._done_at(item)) for item in self.items)
        self.state = self._fresh({index: node for index, node in keys if node is not None})
        self.tell(Started())
        self._poll()

    def _fresh(self, prefer: dict[int, NodeId]) -> JobState:
        one = self.scenario
        racks = {name: node.rack for name, node in self.cluster.nodes.items() if node.rack}
        return JobState(
            self.items,
            dict(self.known),
            one.limit_bytes,
            one.replicas,
            prefer=prefer,
            part_bytes=one.part_bytes,
            slots=one.slots,
            racks=racks,
        )

    def _wish(self) -> None:
        first = self._chance.randrange(max(1, len(self.items)))
        if not self._up:
            return  # nobody hears it
        self.tell(Wished(tuple(range(first, first + 8))))

    def _poll(self) -> None:
        """Look at the nodes, as the coordinator does every second."""
        if self.known.keys() != self.state.nodes.keys():
            self.tell(NodesChanged(dict(self.known)))
        if self.ended_at is None:
            self._after(POLL_S, self._mine(self._poll))

    # --- the coordinator

    def tell(self, event: Event) -> None:
        """Let the mind know of an event, now or with what else happens until it listens."""
        if not self.scenario.loop_s:
            self._fold(event, (event,))
        else:
            self._inbox.append(event)
            if len(self._inbox) == 1:
                self._after(self.scenario.loop_s, self._mine(self._listen))

    def _listen(self) -> None:
        events, self._inbox = self._inbox, []
        self._fold(Together(events), events)

    def _fold(self, event: Event, events: Sequence[Event]) -> None:
        """Fold into the mind what happened, and perform what it commands."""
        for one in events:
            self.watch.before(one)
        while self.ended_at is None:
            self.events += 1
            began = time.process_time()
            self.state, commands = track.apply(self.state, event)
            self.cpu_s += time.process_time() - began
            self.commands += len(commands)
            self.watch.after(events, commands)
            for command in commands:
                self._perform(command)
            if not self.state.more:
                return
            event, events = Proceed(), ()

    def _perform(self, command: Command) -> None:
        match command:
            case RunItem():
                self.tries += 1
                self._after(DISPATCH_S, self._mine(lambda: self._run(command)))
            case CopyShard():
                self._after(DISPATCH_S, self._mine(lambda: self._copy(command)))
            case Fail(error):
                self.ended_at, self.error = self.now, error
            case Finish():
                self.ended_at = self.now

    def _done_at(self, item: WorkItem) -> NodeId | None:
        return min(self.catalog.holders(item.shard_key(0)) & self.known.keys(), default=None)

    def _run(self, command: RunItem) -> None:
        """Start a task, or wait for the one that makes the same; where the item is done already, ask there."""
        item = command.item
        if (waiting := self._flights.get(item.key)) is not None:
            waiting.append(lambda: self._run(command))
            return
        there = self._done_at(item)
        node = self.cluster.nodes[command.node if there is None else there]
        if not node.alive and self._chance.random() < 0.5:  # Ray gives the work to another where it knows better
            node = self.cluster.nodes[self._chance.choice(sorted(self.cluster.living))]
        self.watch.begins(item.index)
        if not node.alive:
            self._after(
                self._chance.uniform(0, self.scenario.notice_s), self._mine(lambda: self._ran(command, node, False))
            )
            return
        key = item.shard_key(0)
        if key in node.disk:
            self._after(DISPATCH_S, self._mine(lambda: self._ran(command, node, node.alive)))
            return
        self._flights[item.key] = []
        self.watch.brings(item)

        def ended(well: bool) -> None:
            late = self._chance.uniform(0, 0.05 if node.alive else self.scenario.notice_s)
            if well:
                node.disk[key] = item.size
                self.watch.brought(item)
            self._after(late, self._mine(lambda: self._landed(command, node, well)))

        self.cluster.download(node, item.size, ended)

    def _landed(self, command: RunItem, node: Node, well: bool) -> None:
        followers = self._flights.pop(command.item.key)
        self._ran(command, node, well)
        for follow in followers:
            follow()

    def _ran(self, command: RunItem, node: Node, well: bool) -> None:
        item = command.item
        self.watch.ends(item.index)
        if not well:
            self.tell(ItemFailed(item.index, command.node, PASSING, True))
            return
        if node.name in self.known:
            self.catalog.add(node.name, [item.shard_key(0)], [item.size])
        shard = ShardInfo(item.shard_key(0), 1, item.size, item.key, SCHEMA, item.index, 0)
        self.tell(ItemDone(ItemResult(item.index, item.key, node.name, (shard,), ((SCHEMA, ""),))))

    def _copy(self, command: CopyShard) -> None:
        shard, target = command.shard, self.cluster.nodes[command.node]
        sources = [self.cluster.nodes[name] for name in sorted(self.catalog.holders(shard.key))]
        sources = [node for node in sources if node.alive and node is not target]
        if not target.alive or not sources:
            late = self._chance.uniform(0, self.scenario.notice_s)
            self._after(late, self._mine(lambda: self._copied(command, False)))
            return

        def ended(well: bool) -> None:
            if well:
                target.disk[shard.key] = shard.size
            late = self._chance.uniform(0, 0.05 if target.alive else self.scenario.notice_s)
            self._after(late, self._mine(lambda: self._copied(command, well)))

        self.cluster.copy(self._chance.choice(sources), target, shard.size, ended)

    def _copied(self, command: CopyShard, well: bool) -> None:
        if not well:
            self.tell(CopyFailed(command.shard.key, command.node, PASSING))
            return
        if command.node in self.known:
            self.catalog.add(command.node, [command.shard.key], [command.shard.size])
        self.tell(CopyDone(command.shard.key, command.node))

    def _say(self, text: str) -> None:
        self.trace.append(f"{self.now:10.3f}  {text}")
