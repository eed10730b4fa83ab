"""The simulated nodes: links, disks, tasks, and what of it the cluster knows. In virtual time.

A link and the Hub serve what they carry one after the other, each at its rate: for throughput that is what sharing them
fairly would give, and costs nothing to keep up to date. A task is a request, a download, a conversion; a copy is a
transfer between two links. A node that dies takes its tasks with it, and its disk, unless it comes back.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from crucible.refs import NodeId
from scripts.simulation.broken import Broken
from scripts.simulation.hub import Hub
from scripts.simulation.scenario import Scenario

DISPATCH_S = 0.01


@dataclass
class Node:
    name: NodeId
    rate: float
    rack: str
    alive: bool = True
    free_at: float = 0.0
    """When the link has carried all that was put on it."""
    disk: dict[str, int] = field(default_factory=dict)
    """Shard key -> bytes."""
    work: dict[int, Task] = field(default_factory=dict)


@dataclass(eq=False)
class Task:
    """A download and conversion, or a copy."""

    number: int
    node: Node
    source: Node | None
    size: int
    ended: Callable[[bool], None]
    """Called once: True when it is done, False when it failed."""
    began: float | None = None
    """When bytes began to come."""
    comes: float = 0.0
    """When all have come."""
    over: bool = False


class Cluster:
    """Nodes by name, the Hub, and the count of bytes."""

    def __init__(
        self,
        scenario: Scenario,
        chance: random.Random,
        clock: Callable[[], float],
        after: Callable[[float, Callable[[], None]], None],
    ) -> None:
        self._scenario, self._chance, self._clock, self._after = scenario, chance, clock, after
        self.hub = Hub(chance, scenario.quota, scenario.window_s, scenario.others, clock, after)
        self._hub_free_at = 0.0
        self.nodes: dict[NodeId, Node] = {}
        self.hub_bytes = 0.0
        self.lost_bytes = 0.0
        """Of downloads that did not end well."""
        self.copied_bytes = 0
        self.most_in_flight = 0
        self._in_flight = 0
        self._tasks = 0
        for number in range(scenario.nodes):
            self.add(dict(scenario.slow).get(number, 1.0))

    def add(self, share: float = 1.0, disk: dict[str, int] | None = None) -> Node:
        """A node joins, empty or with the disk it had under another name."""
        number = len(self.nodes)
        rack = f"rack{number % self._scenario.racks}" if self._scenario.racks else ""
        node = Node(NodeId(f"node{number}"), share * self._scenario.node_rate, rack, disk=dict(disk or {}))
        node.free_at = self._clock()
        self.nodes[node.name] = node
        return node

    @property
    def living(self) -> dict[NodeId, Node]:
        return {name: node for name, node in self.nodes.items() if node.alive}

    def holders(self, key: str) -> set[NodeId]:
        """The living nodes on whose disks a shard is, known or not."""
        return {name for name, node in self.nodes.items() if node.alive and key in node.disk}

    def kill(self, node: Node) -> None:
        """The node and all that runs on it, or comes from it, ends now."""
        node.alive = False
        for task in list(node.work.values()):
            self._end(task, well=False)

    def cut(self) -> None:
        """Every task ends, as tasks do with the coordinator that started them, and nobody is told."""
        for node in self.nodes.values():
            for task in list(node.work.values()):
                task.ended = lambda _: None
                self._end(task, well=False)

    def download(self, node: Node, size: int, ended: Callable[[bool], None]) -> None:
        """Bring `size` bytes from the Hub to a node and convert them there."""
        task = self._task(node, None, size, ended)
        self.hub.ask(lambda: self._answered(task))

    def _answered(self, task: Task) -> None:
        if task.over:
            return
        now, node = self._clock(), task.node
        task.began = now
        self._hub_free_at = max(now, self._hub_free_at) + task.size / self._scenario.hub_rate
        node.free_at = max(now, node.free_at) + task.size / node.rate
        task.comes = max(self._hub_free_at, node.free_at)
        ends = task.comes + task.size / self._scenario.convert_rate
        fails = self._chance.random() < self._scenario.failing
        if fails:
            ends = now + self._chance.random() * (ends - now)
        self._after(ends - now, lambda: self._end(task, well=not fails))

    def copy(self, source: Node, node: Node, size: int, ended: Callable[[bool], None]) -> None:
        """Bring a shard of `size` bytes from one node to another."""
        task = self._task(node, source, size, ended)
        source.work[task.number] = task
        now = task.began = self._clock()
        for one in (source, node):
            one.free_at = max(now, one.free_at) + size / one.rate
        task.comes = max(source.free_at, node.free_at)
        fails = self._chance.random() < 0.5 * self._scenario.failing
        self._after(task.comes - now, lambda: self._end(task, well=not fails))

    def _task(self, node: Node, source: Node | None, size: int, ended: Callable[[bool], None]) -> Task:
        self._tasks += 1
        task = Task(self._tasks, node, source, size, ended)
        node.work[task.number] = task
        self._in_flight += size
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        return task

    def _end(self, task: Task, *, well: bool) -> None:
        if task.over:
            return
        task.over = True
        self._in_flight -= task.size
        for one in (task.node, task.source):
            if one is not None:
                one.work.pop(task.number, None)
        if well and not task.node.alive:
            raise Broken("model", "a task ended well on a node that is dead")
        now = self._clock()
        if task.source is not None:
            self.copied_bytes += task.size if well else 0
        elif task.began is not None:
            part = task.size * min(1.0, (now - task.began) / max(1e-9, task.comes - task.began))
            self.hub_bytes += part
            self.lost_bytes += 0.0 if well else part
        task.ended(well)
