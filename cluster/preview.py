"""What a prefetch would move, before a byte of data does: the numbers behind `crucible plan`.

Exact where the Hub's listing is exact (files, bytes, requests) and where parquet footers are (rows); an estimate, and
named as one, for the bytes of shards that nobody has made yet.
"""

from __future__ import annotations

from dataclasses import replace

from crucible.cluster.plan import Cost, Plan, cost
from crucible.cluster.prepare import Prepared, footers
from crucible.config import Settings
from crucible.hub.client import is_folder, open_repo
from crucible.manifest import Manifest
from crucible.order import steps
from crucible.refs import NodeId
from crucible.report import Tally
from crucible.splits import count


def preview(
    prepared: Prepared, settings: Settings, tally: Tally, nodes: int, ranks_per_node: int, batch: int, replicas: int
) -> Plan:
    """The plan of a prepared request for `nodes` nodes that have nothing yet. Reads footers; moves no data.

    Of a slice the rows are its own; all else is about its whole split, which is what moves.

    `tally` holds what preparing cost: the run will send those requests too, but not the ones for footers.
    """
    spent = tally.counts.requests
    names = {NodeId(f"node-{number}"): 1.0 for number in range(nodes)}
    rows: int | None
    if prepared.cached:
        rows, source = count(prepared.request.split, {m.split: m.rows for m in prepared.manifests}), "manifest"
        splits = tuple(m.split for m in prepared.manifests)
        items = tuple(m.items for m in prepared.manifests)
        made = [_known_bytes(manifest) for manifest in prepared.manifests]
    else:
        rows, source, made = _estimate(prepared, settings)
        splits = tuple(split.name for split in prepared.splits)
        items = prepared.items
    costs = [Cost(part, sizes) for part, sizes in zip(items, made, strict=True)]
    per_node = cost(
        costs,
        names,
        part_bytes=settings.part_bytes,
        streams=settings.streams,
        replicas=replicas,
        reads_all=True,
    )
    if prepared.cached:  # nothing comes from the Hub again
        per_node = tuple(replace(node, hub_bytes=0, requests=0) for node in per_node)
    elif is_folder(prepared.repo.repo_id):
        per_node = tuple(replace(node, requests=0) for node in per_node)
    world = nodes * ranks_per_node
    epoch = steps(rows, world, batch) if rows is not None else None
    return Plan(
        repo=prepared.request.repo.repo_id,
        commit=prepared.repo.revision,
        config=prepared.config,
        splits=splits,
        nodes=per_node,
        files=sum(len(item.files) for part in items for item in part),
        source_bytes=sum(item.size for part in items for item in part),
        requests=spent + sum(node.requests for node in per_node),
        rows=rows,
        rows_from=source,
        ranks=tuple(zip(epoch.rows, epoch.steps, strict=True)) if epoch else (),
        batch=batch,
        cached=prepared.cached,
    )


def _known_bytes(manifest: Manifest) -> dict[int, int]:
    sizes = {item.index: 0 for item in manifest.items}
    for shard in manifest.shards:
        sizes[shard.item] += shard.size
    return sizes


def _estimate(prepared: Prepared, settings: Settings) -> tuple[int | None, str, list[dict[int, int]]]:
    """(rows, where from, per split: item -> estimated shard bytes), from footers where there are any."""
    rows: dict[str, int] = {}
    source = "footers"
    made: list[dict[int, int]] = []
    for split, items in zip(prepared.splits, prepared.items, strict=True):
        if split.options.builder == "parquet":
            with open_repo(prepared.repo, settings, Tally()) as repo:
                read = footers(repo, prepared.repo, split.files)
            counted: int | None = sum(footer.rows for footer in read.values())
            made.append(
                {i.index: sum(sum(size for _, size in read[f.path].row_groups) for f in i.files) for i in items}
            )
        else:
            counted = split.declared_rows
            source = "card" if counted is not None and source != "unknown" else "unknown"
            made.append({item.index: item.size for item in items})
        if counted is not None:
            rows[split.name] = counted
    known = len(rows) == len(prepared.splits)
    return count(prepared.request.split, rows) if known else None, source if known else "unknown", made
