"""What a job of a million shards on a thousand nodes costs the coordinator: seconds of CPU, and memory.

Example: python scripts/bench/scale.py
         python scripts/bench/scale.py --items 100000 --nodes 256 --json

One process, no Ray, no network: the product's own functions on a listing that is made up. Each line is a phase:

listing    the source files, as the Hub's pages give them (made here; not the coordinator's work)
resolve    configs, splits and their files
plan       work items
place      every item gets its node, and the first are commanded
track      every item is done: all events applied, all commands taken
catalog    every shard is entered, with its bytes
summary    what `crucible status` shows of all of it, as a mean of a hundred
loss       a node dies when all is done: the mind and the catalog hear of it
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import resource
import sys
import time
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from crucible.cluster.catalog import Catalog
from crucible.cluster.plan import plan_items
from crucible.cluster.resolve import choose, resolve
from crucible.cluster.track import Event, ItemDone, JobState, NodesChanged, Proceed, RunItem, Started, Together, apply
from crucible.refs import NodeId, RepoRef, ShardInfo, SourceFile
from crucible.report import Counts, ItemResult

BATCH = 64
SCHEMA = "5" * 64
SIZE = 64 << 20


def made_up(count: int) -> list[SourceFile]:
    """Files of about 64 MiB, with the two hashes that the Hub tells of each."""
    return [
        SourceFile(
            f"data/train-{number:07d}-of-{count:07d}.parquet",
            SIZE + number % 1000,
            hashlib.sha256(b"%d" % number).hexdigest(),
            True,
            hashlib.sha256(b"x%d" % number).hexdigest(),
        )
        for number in range(count)
    ]


class Clock:
    """CPU seconds by phase, and what the process holds after each."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self._at = time.process_time()

    def phase(self, name: str, seconds: float | None = None) -> None:
        """The time since the last phase, or `seconds`, was for `name`."""
        now = time.process_time()
        held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        took = now - self._at if seconds is None else seconds
        self.rows.append({"phase": name, "cpu_s": round(took, 4), "rss_bytes": held, "peak_rss_bytes": peak})
        self._at = time.process_time()


def done(item: RunItem) -> ItemDone:
    """What a task would report."""
    one = item.item
    digest = hashlib.sha256(one.key.encode()).hexdigest()
    shard = ShardInfo(one.shard_key(0), 1000, SIZE, digest, SCHEMA, one.index, 0)
    return ItemDone(ItemResult(one.index, one.key, item.node, (shard,), ((SCHEMA, ""),), Counts(hub_bytes=one.size)))


def measure(count: int, node_count: int) -> list[dict[str, object]]:
    """All phases, in order."""
    clock = Clock()
    clock.phase("imports")
    repo = RepoRef("org/data", "0" * 40)
    files = made_up(count)
    clock.phase("listing")
    _, (split,) = choose(repo, resolve(repo, files, None), None, None)
    del files
    clock.phase("resolve")
    items = plan_items(repo, split, shard_bytes=256 << 20)
    clock.phase("plan")
    gc.collect()
    gc.freeze()  # as the coordinator does: the listing stays, and need not be looked through again and again
    nodes = {NodeId(hashlib.sha256(b"node%d" % number).hexdigest()[:56]): 1.0 for number in range(node_count)}
    state = JobState(items, nodes, 1 << 62, slots=8, part_bytes=1 << 30)
    state, commands = apply(state, Started())
    while state.more:
        state, more = apply(state, Proceed())
        commands += more
    clock.phase("place")
    under_way = deque(command for command in commands if isinstance(command, RunItem))
    catalog = Catalog()
    tracked = entered = 0.0
    while under_way:
        events: list[Event] = [done(under_way.popleft()) for _ in range(min(BATCH, len(under_way)))]
        began = time.process_time()
        state, commands = apply(state, Together(events))
        ended = time.process_time()
        for event in events:
            if isinstance(event, ItemDone):
                for shard in event.result.shards:
                    catalog.add(event.result.node, (shard.key,), (shard.size,))
        tracked, entered = tracked + ended - began, entered + time.process_time() - ended
        under_way.extend(command for command in commands if isinstance(command, RunItem))
    assert (state.phase, len(state.done), len(catalog)) == ("finished", count, count)
    clock.phase("track", tracked)
    clock.phase("catalog", entered)
    began = time.process_time()
    for _ in range(100):
        catalog.summary()
    clock.phase("summary", (time.process_time() - began) / 100)
    state.phase = "items"
    began = time.process_time()
    gone = next(iter(nodes))
    state, commands = apply(state, NodesChanged({node: weight for node, weight in nodes.items() if node != gone}))
    catalog.drop(gone)
    clock.phase("loss", time.process_time() - began)
    return clock.rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--nodes", type=int, default=1_024)
    parser.add_argument("--json", action="store_true", help="one object a phase")
    given = parser.parse_args()
    rows = measure(given.items, given.nodes)
    for row in rows:
        if given.json:
            print(json.dumps(row))
        else:
            held, peak = (int(str(row[name])) >> 20 for name in ("rss_bytes", "peak_rss_bytes"))
            print(f"{row['phase']:8} {row['cpu_s']:9} s   {held:6,} MiB   peak {peak:6,} MiB")
    if not given.json:
        mind = sum(float(str(row["cpu_s"])) for row in rows if row["phase"] in ("plan", "place", "track"))
        print(f"plan, place and track: {mind:.2f} s of CPU for {given.items:,} items on {given.nodes:,} nodes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
