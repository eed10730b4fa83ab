"""Convert a small sample and say what it gave: nodes that answer the same make the same shards, as far as one can see.

Another pyarrow may parse, cast or write otherwise; mostly it does not (19.0, 21.0 and 26.0 agree). Whether it does is
asked only where the versions differ. Raises what `convert` raises, when this node cannot even do that.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from crucible.refs import ReadOptions, RepoRef, SourceFile, WorkItem
from crucible.workers.convert import convert

ROWS = 300


def sample_digest(folder: Path) -> str:
    """64 hex digits over the shards of a file of each text format and a parquet file, written to an empty `folder`."""
    found = hashlib.sha256()
    for builder, write in (("json", _json), ("csv", _csv), ("text", _text), ("parquet", _parquet)):
        path = folder / f"sample.{builder}"
        write(path)
        data = path.read_bytes()
        # of parquet the file differs from writer to writer, and what it says does not: its hash is not part of a shard
        file = SourceFile(path.name, len(data), hashlib.sha256(data).hexdigest(), lfs=True)
        item = WorkItem(0, RepoRef("crucible/sample", "0" * 40), (file,), ReadOptions(builder), 1 << 20)
        drafts = folder / builder
        drafts.mkdir()
        for draft in convert(item, [path], drafts, threads=1):
            found.update(f"{draft.rows} {draft.size} {draft.digest}\n".encode())
    return found.hexdigest()


def _json(path: Path) -> None:
    lines = (
        {
            "number": i,
            "fraction": i / 7,
            "text": "\u00e9" * (i % 5),
            "perhaps": None if i % 3 else i,
            "list": [i, i + 1],
            "nested": {"a": str(i), "b": [{"c": i % 2 == 0}]},
            "time": f"2024-01-{i % 28 + 1:02d}T00:00:00",
            "empty": [],
        }
        for i in range(ROWS)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _csv(path: Path) -> None:
    rows = (f'{i},{i / 7},"a, {i}",{"true" if i % 2 else "false"},2024-01-{i % 28 + 1:02d},\n' for i in range(ROWS))
    path.write_text("number,fraction,text,flag,date,nothing\n" + "".join(rows))


def _text(path: Path) -> None:
    path.write_text("".join(f"line {i}\n" for i in range(ROWS)))


def _parquet(path: Path) -> None:
    numbers = list(range(ROWS))
    table = pa.table(
        {
            "number": pa.array(numbers, pa.int32()),
            "word": pa.array([f"w{i % 7}" for i in numbers]).dictionary_encode(),
            "flag": [i % 2 == 0 for i in numbers],
            "large": pa.array([str(i) for i in numbers], pa.large_string()),
            "list": [[i] * (i % 4) for i in numbers],
            "struct": [{"a": i, "b": None if i % 2 else "x"} for i in numbers],
            "time": pa.array([datetime(2024, 1, 1, tzinfo=UTC)] * ROWS, pa.timestamp("us", "UTC")),
            "price": pa.array([Decimal(i) / 4 for i in numbers], pa.decimal128(12, 2)),
            "bytes": [bytes([i % 256]) for i in numbers],
        }
    )
    pq.write_table(table, path, row_group_size=100)
