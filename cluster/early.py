"""What a split's manifest will be, before its data has moved: parquet's footers tell the rows of every shard.

An early manifest lacks what only making the shards tells, their digests and sizes; all else is as the job will make it,
because the same functions make both. So an order, and a reader's state in it, hold before and after.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from crucible.cache.store import Store
from crucible.cluster.drive import build_manifest, check_rows
from crucible.cluster.prepare import Prepared, footers
from crucible.config import Settings
from crucible.errors import ManifestError
from crucible.formats.cuts import RowGroup, known_from_footers, shard_rows
from crucible.formats.footer import ParquetFooter
from crucible.hub.client import open_repo
from crucible.hub.governor import Governor
from crucible.manifest import Manifest, manifest_from_json, pack_schema
from crucible.refs import NodeId, ShardInfo, WorkItem, canonical_json, digest_of
from crucible.report import ItemResult, Tally
from crucible.workers.convert import schema_of_item

MOST_FOOTERS = 4096
"""Files whose footers are read for a reader that will not wait: each costs the Hub a request or two."""
SMALL = 64
"""A file of less than this part of a shard is small."""
FOLDER = "early"
"""Of the store: early manifests that a process of this node has made, for the others."""


def early_manifests(
    prepared: Prepared, settings: Settings, store: Store, tally: Tally, governor: Governor | None = None
) -> tuple[Manifest, ...] | None:
    """One manifest a split, in their order; None where rows or types are known only once all is converted.

    None too where to ask for them is not worth it: for less than a shard, and for files so small that their footers are
    as dear as they are. The footers are read once a node. Raises what `prepare` does, RowsMismatch or CorruptFile.
    """
    items = [item for part in prepared.items for item in part]
    files, size = sum(len(item.files) for item in items), sum(item.size for item in items)
    if not all(prepared.items) or not all(known_from_footers(item.options) for item in items):
        return None
    if files > MOST_FOOTERS or size <= items[0].shard_bytes or size < files * items[0].shard_bytes // SMALL:
        return None
    name = digest_of({"commit": prepared.repo.revision, "config": prepared.config, "items": [i.key for i in items]})
    with store.lock(f"early-{name[:32]}"):
        if (known := _kept(store, name, prepared)) is not None:
            check_rows(prepared, known)
            return known
        with open_repo(prepared.repo, settings, tally, governor) as repo:
            read = footers(repo, prepared.repo, tuple(file for item in items for file in item.files))
        made: list[Manifest] = []
        for split, part in zip(prepared.splits, prepared.items, strict=True):
            manifest = _early(prepared, split.name, part, read, store)
            if manifest is None:
                return None
            made.append(manifest)
        check_rows(prepared, made)
        store.write_small(f"{FOLDER}/{name}.json", canonical_json([one.to_dict() for one in made]))
    return tuple(made)


def _kept(store: Store, name: str, prepared: Prepared) -> tuple[Manifest, ...] | None:
    data = store.read_small(f"{FOLDER}/{name}.json")
    try:
        made = [manifest_from_json(canonical_json(one)) for one in json.loads(data)] if data else []
    except (ValueError, TypeError, ManifestError):
        return None
    return tuple(made) if [one.split for one in made] == [split.name for split in prepared.splits] else None


def _early(
    prepared: Prepared, split: str, items: Sequence[WorkItem], read: Mapping[str, ParquetFooter], store: Store
) -> Manifest | None:
    schema = _schema(items, read, store)
    if schema is None:
        return None
    digest, packed = pack_schema(schema)
    results = []
    for item in items:
        shards = [
            ShardInfo(item.shard_key(number), rows, size, "", digest, item.index, number)
            for number, (rows, size) in enumerate(_shards(item, read))
        ]
        results.append(ItemResult(item.index, item.key, NodeId(""), tuple(shards), ((digest, packed),)))
    return build_manifest(prepared, split, items, results)


def _shards(item: WorkItem, read: Mapping[str, ParquetFooter]) -> list[tuple[int, int]]:
    """(rows, about how many bytes) of each shard of an item."""
    groups: list[RowGroup] = []
    for file in item.files:
        unpacked = read[file.path].unpacked
        start, stop = item.options.param("row_groups", (0, len(unpacked)))
        groups += unpacked[start:stop]
    rows, size = sum(rows for rows, _ in groups), sum(size for rows, size in groups if rows)
    return [(count, size * count // rows) for count in shard_rows(groups, item.shard_bytes)]


def _schema(items: Iterable[WorkItem], read: Mapping[str, ParquetFooter], store: Store) -> pa.Schema | None:
    """What all shards look like; None when files differ in it, because then shards may.

    Found by converting an empty file, so that it is what conversion gives, whatever it does with types and columns.
    """
    items = list(items)
    first = read[items[0].files[0].path].schema
    alike = all(read[f.path].schema.equals(first, check_metadata=True) for item in items for f in item.files)
    if not alike and items[0].options.features is None:
        return None
    options = replace(items[0].options, params=tuple(p for p in items[0].options.params if p[0] != "row_groups"))
    example = replace(items[0], files=items[0].files[:1], options=options)
    with store.workspace() as folder:
        path = Path(folder, "empty.parquet")
        pq.write_table(first.empty_table(), path)
        return schema_of_item(example, [path], folder)
