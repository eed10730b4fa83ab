"""Source files -> work items, and what doing them will cost. Pure: nothing here knows a socket, a disk or Ray.

The items of a split are a function of its files and options alone, never of the number of nodes: shard keys follow from
them, and a laptop and a cluster must leave the same bytes in their stores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from crucible.cluster.builders import NAMED
from crucible.cluster.items import Items
from crucible.cluster.place import assign
from crucible.cluster.resolve import ResolvedSplit
from crucible.parts import link_batches, part_size
from crucible.refs import NodeId, ReadOptions, RepoRef, SourceFile, WorkItem

BATCH_SHARE = 64
"""A split is cut into at least about this many items, so that its work spreads over nodes..."""
BATCH_MIN, BATCH_MAX = 256 << 10, 32 << 20
"""...but small files are batched up to between these bounds, so that 50,000 of them are not 50,000 tasks."""
BATCH_FILES = 256
"""Nor do more files share an item, however small: each costs a round trip, and one node would make all of them."""


def plan_items(repo: RepoRef, split: ResolvedSplit, *, shard_bytes: int) -> Items:
    """The split's work items in source order. Linear in the number of files; an item is made when it is asked for.

    Consecutive small files share an item up to 1/64 of the split (between 256 KiB and 32 MiB) and up to 256 files; a
    file above that is an item of its own. `repo` is pinned.
    """
    limit = batch_limit(split.files)
    ends: list[int] = []
    start = size = 0
    for number, file in enumerate(split.files):
        if number > start and (size + file.size > limit or number - start == BATCH_FILES):
            ends.append(number)
            start, size = number, 0
        size += file.size
    if split.files:
        ends.append(len(split.files))
    named = named_options if split.options.builder in NAMED else None
    return Items(repo, split.files, ends, split.options, shard_bytes, named)


def batch_limit(files: Sequence[SourceFile]) -> int:
    """Bytes up to which small files of a split share an item."""
    return min(BATCH_MAX, max(BATCH_MIN, sum(file.size for file in files) // BATCH_SHARE))


def named_options(options: ReadOptions, files: Sequence[SourceFile]) -> ReadOptions:
    """`options` for an item of `files`, with their names where the rows hold these, so that its key does too."""
    if options.builder not in NAMED:
        return options
    names = json.dumps([file.path for file in files], ensure_ascii=False)
    return replace(options, params=tuple(sorted((*options.params, ("names", names)))))


def file_requests(file: SourceFile, *, part_bytes: int, streams: int) -> tuple[int, int]:
    """(to the Hub, to its CDN): the requests that bringing one file takes when nothing goes wrong.

    An LFS file is resolved once and then read in parts from where the Hub redirected to; a regular file is answered by
    the Hub itself, in parts; an empty file is not asked for at all.
    """
    parts = -(-file.size // part_size(file.size, streams, part_bytes))
    if file.lfs:
        return (1 if parts else 0), parts
    return parts, 0


def item_requests(files: Sequence[SourceFile], *, part_bytes: int, streams: int) -> int:
    """To the Hub and its CDN together: the requests that bringing an item's files takes when nothing goes wrong.

    Of many small LFS files the links are asked for in batches, and none is resolved.
    """
    batches = link_batches(files)
    spared = sum(len(batch) for batch in batches)
    each = (file_requests(file, part_bytes=part_bytes, streams=streams) for file in files)
    return len(batches) - spared + sum(sum(pair) for pair in each)


@dataclass(frozen=True, slots=True)
class Fetch:
    """What bringing something takes when nothing goes wrong."""

    size: int
    """Bytes from the Hub and its CDN."""
    requests: int
    """To both."""


def item_fetch(files: Sequence[SourceFile], ranges: Mapping[str, Fetch], *, part_bytes: int, streams: int) -> Fetch:
    """As `item_requests`, for an item of which some files come in ranges: path -> bytes and ranges of such a file."""
    whole = [file for file in files if file.path not in ranges]
    parts = [ranges[file.path] for file in files if file.path in ranges]
    links = sum(file.lfs for file in files if file.path in ranges)
    asked = item_requests(whole, part_bytes=part_bytes, streams=streams) + links
    return Fetch(
        sum(file.size for file in whole) + sum(part.size for part in parts),
        asked + sum(part.requests for part in parts),
    )


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What one node will do. Bytes of shards are estimates (`~`) unless the manifest is known already."""

    node: NodeId
    items: int
    hub_bytes: int
    """Source bytes this node brings from the Hub. Exact."""
    peer_bytes: int
    """Shard bytes that come from other nodes: replicas, and what this node's ranks read in the first epoch."""
    disk_bytes: int
    """Shard bytes that this node's ranks read from its own disk in the first epoch."""
    requests: int
    """To the Hub and its CDN. Exact when nothing goes wrong."""
    peak_disk_bytes: int
    """Shards kept here, and the biggest source file beside them while it is converted."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a prefetch would move, and what each rank would then read. Made before a byte of data moves."""

    repo: str
    commit: str
    config: str
    splits: tuple[str, ...]
    nodes: tuple[NodePlan, ...]
    files: int
    source_bytes: int
    requests: int
    """All that the run will send to the Hub and its CDN, metadata included. Exact when nothing goes wrong."""
    rows: int | None
    """Exact from parquet footers or a manifest; from the card where only it knows (`rows_from`); else None."""
    rows_from: str
    """`manifest`, `footers`, `card` or `unknown`."""
    ranks: tuple[tuple[int, int], ...]
    """(rows, steps) of each rank in an epoch; empty when the rows are not known."""
    batch: int
    cached: bool
    """True when this node's store has the manifest already: the run moves nothing from the Hub."""
    partial: bool = False
    """True when only the ranges of some columns would come, which no hash can vouch for."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The inputs of `cost`: one split's items with what is known about the bytes they become."""

    items: Sequence[WorkItem]
    shard_bytes: Mapping[int, int]
    """item index -> estimated bytes of its shards."""
    fetches: Mapping[int, Fetch] = field(default_factory=dict)
    """item index -> what bringing it takes, where that is not all of its files."""


def cost(
    splits: Iterable[Cost],
    nodes: Mapping[NodeId, float],
    *,
    part_bytes: int,
    streams: int,
    replicas: int,
    reads_all: bool,
) -> tuple[NodePlan, ...]:
    """What each node does when the items are placed by `place.assign`. `nodes` maps node -> weight.

    `reads_all` says that every node's ranks read every shard (true for an exact shuffle and for source order).
    """
    tallies = {node: [0, 0, 0, 0, 0, 0] for node in nodes}  # items, hub bytes, peer bytes, own bytes, requests, biggest
    everything = 0
    seen: set[str] = set()
    for split in splits:
        homes = assign(split.items, nodes)
        for item in split.items:
            one = tallies[homes[item.index]]
            one[0] += 1
            if item.key in seen:  # the same content under another name: whoever comes second finds it done
                continue
            seen.add(item.key)
            fetch = split.fetches.get(item.index) or item_fetch(item.files, {}, part_bytes=part_bytes, streams=streams)
            one[1] += fetch.size
            made = split.shard_bytes[item.index]
            everything += made
            one[3] += made
            one[4] += fetch.requests
            one[5] = max(one[5], fetch.size)
    copies = max(0, min(replicas, len(nodes)) - 1)
    plans = []
    for node, (items, hub, _, own, requests, biggest) in tallies.items():
        replica_bytes = (everything - own) * copies // max(1, len(nodes) - 1)
        pulled = everything - own - replica_bytes if reads_all else 0
        plans.append(
            NodePlan(
                node=node,
                items=items,
                hub_bytes=hub,
                peer_bytes=replica_bytes + pulled,
                disk_bytes=own + replica_bytes,
                requests=requests,
                peak_disk_bytes=own + replica_bytes + pulled + biggest,
            )
        )
    return tuple(plans)
