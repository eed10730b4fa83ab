"""What a prefetch would move, before a byte of data does: the numbers behind `crucible plan`.

Exact where the Hub's listing is exact (files, bytes, requests) and where parquet footers are (rows); an estimate, and
named as one, for the bytes of shards that nobody has made yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from crucible.cluster.plan import Cost, Fetch, Plan, cost, item_fetch
from crucible.cluster.prepare import FOOTERS_AT_ONCE, Prepared, footers
from crucible.config import Settings
from crucible.errors import CorruptFile
from crucible.formats.chunks import Layout, parse_layout
from crucible.formats.chunks import fetches as fetches_of
from crucible.formats.cuts import known_from_footers
from crucible.formats.footer import footer_tail
from crucible.hub.client import Repo, is_folder, open_repo
from crucible.manifest import Manifest
from crucible.order import steps
from crucible.parts import SMALL_BYTES, part_size
from crucible.refs import ByteRange, NodeId, SourceFile, WorkItem
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
    fetches: list[dict[int, Fetch]]
    items: tuple[Sequence[WorkItem], ...]
    if prepared.cached:
        rows, source = count(prepared.request.split, {m.split: m.rows for m in prepared.manifests}), "manifest"
        splits = tuple(m.split for m in prepared.manifests)
        items = tuple(m.items for m in prepared.manifests)
        made = [_known_bytes(manifest) for manifest in prepared.manifests]
        fetches = [{} for _ in items]
    else:
        rows, source, made, fetches = _estimate(prepared, settings)
        splits = tuple(split.name for split in prepared.splits)
        items = prepared.items
    costs = [Cost(*split) for split in zip(items, made, fetches, strict=True)]
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
        partial=prepared.request.partial,
    )


def _known_bytes(manifest: Manifest) -> dict[int, int]:
    sizes = {item.index: 0 for item in manifest.items}
    for shard in manifest.shards:
        sizes[shard.item] += shard.size
    return sizes


def _estimate(
    prepared: Prepared, settings: Settings
) -> tuple[int | None, str, list[dict[int, int]], list[dict[int, Fetch]]]:
    """(rows, where from, per split: item -> estimated shard bytes, item -> what bringing some columns of it takes).

    From footers where there are any.
    """
    rows: dict[str, int] = {}
    source = "footers"
    made: list[dict[int, int]] = []
    fetches: list[dict[int, Fetch]] = []
    for split, items in zip(prepared.splits, prepared.items, strict=True):
        fetches.append({})
        if split.options.partial:
            with open_repo(prepared.repo, settings, Tally()) as repo:
                columns = split.options.columns or ()
                found = _layouts(repo, prepared, split.files, columns)
            counted: int | None = sum(layout.footer.rows for layout, _ in found.values())
            fetches[-1] = _fetches(items, found, settings)
            made.append({index: fetch.size for index, fetch in fetches[-1].items()})
        elif split.options.builder == "parquet":
            with open_repo(prepared.repo, settings, Tally()) as repo:
                read = footers(repo, prepared.repo, split.files)
            if known_from_footers(split.options):
                counted = sum(footer.rows for footer in read.values())
            else:  # its filters leave rows out
                counted, source = split.declared_rows, "card"
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
    return count(prepared.request.split, rows) if known else None, source if known else "unknown", made, fetches


def _layouts(
    repo: Repo, prepared: Prepared, files: Sequence[SourceFile], columns: Sequence[str]
) -> dict[str, tuple[Layout, list[ByteRange]]]:
    """path -> where the chunks of `columns` lie, by the file's footer, and the ranges that were read for it."""

    def layout(file: SourceFile) -> tuple[Layout, list[ByteRange]]:
        read = [footer_tail(file.size)]
        for _ in range(3):
            found = parse_layout(file.path, file.size, repo.read(prepared.repo, file, read[-1]), columns)
            if not isinstance(found, ByteRange):
                return found, read
            read.append(found)
        raise CorruptFile(file.path, "its end", "the parquet footer never fits its own length")

    with ThreadPoolExecutor(FOOTERS_AT_ONCE, thread_name_prefix="crucible-footer") as pool:
        return dict(zip([file.path for file in files], pool.map(layout, files), strict=True))


def _fetches(
    items: Sequence[WorkItem], found: Mapping[str, tuple[Layout, list[ByteRange]]], settings: Settings
) -> dict[int, Fetch]:
    """item -> what bringing the wanted columns of its files takes, by what their footers say."""
    part_bytes, streams = settings.part_bytes, settings.streams
    fetches = {}
    for item in items:
        ranges = {
            file.path: Fetch(*fetches_of(file, *found[file.path], most=part_size(file.size, streams, part_bytes)))
            for file in item.files
            if file.size >= SMALL_BYTES  # smaller ones come whole
        }
        fetches[item.index] = item_fetch(item.files, ranges, part_bytes=part_bytes, streams=streams)
    return fetches
