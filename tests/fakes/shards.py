"""A split on disk without a Hub, a store or a cluster: Arrow files a test writes, and a source that finds them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from crucible.errors import SourceUnavailable
from crucible.hashing import shard_digest
from crucible.manifest import Manifest, pack_schema
from crucible.refs import RepoRef, ShardInfo


@dataclass
class FolderSource:
    """Shards as `<key>.arrow` in a folder. Counts what it was asked for."""

    folder: Path
    asked: Counter[str] = field(default_factory=Counter)

    def path(self, manifest: Manifest, shard: ShardInfo) -> Path:
        path = self.folder / f"{shard.key}.arrow"
        if not path.exists():
            raise SourceUnavailable(path.name, "the test's folder", "it was never written")
        self.asked[shard.key] += 1
        return path

    def note(self) -> Mapping[str, int]:
        return {"disk": self.asked.total()}


def write_split(
    folder: Path,
    tables: Sequence[pa.Table],
    *,
    schema: pa.Schema | None = None,
    features: str | None = None,
    batch_rows: int | None = None,
    local_bytes: int = 0,
) -> tuple[Manifest, FolderSource]:
    """One shard a table, in record batches of `batch_rows`. `local_bytes` 0 means: too big for the exact shuffle."""
    shards, schemas = [], {}
    target = tables[0].schema if schema is None else schema
    for number, table in enumerate(tables):
        key = hashlib.sha256(f"shard {number}".encode()).hexdigest()
        path = folder / f"{key}.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table.combine_chunks(), max_chunksize=batch_rows)
        digest, packed = pack_schema(table.schema)
        schemas[digest] = packed
        content = path.read_bytes()
        shards.append(ShardInfo(key, table.num_rows, len(content), shard_digest(path), digest, number, 0))
    digest, packed = pack_schema(target)
    schemas[digest] = packed
    manifest = Manifest(
        repo=RepoRef("test/split", "0" * 40),
        config="default",
        split="train",
        features=features,
        schema=digest,
        schemas=tuple(sorted(schemas.items())),
        items=(),
        shards=tuple(shards),
        local_bytes=local_bytes,
    )
    return manifest, FolderSource(folder)


def number_split(
    folder: Path, rows: Sequence[int], *, batch_rows: int | None = None, local_bytes: int = 0
) -> tuple[Manifest, FolderSource]:
    """Shards of these many rows; a row is its own id, and a text that says so."""
    tables, start = [], 0
    for count in rows:
        tables.append(pa.table(number_columns(start, start + count)))
        start += count
    return write_split(folder, tables, batch_rows=batch_rows, local_bytes=local_bytes)


def number_columns(start: int, stop: int) -> dict[str, Any]:
    return {
        "id": pa.array(range(start, stop), pa.int64()),
        "text": pa.array([f"row {number}" for number in range(start, stop)], pa.string()),
    }
