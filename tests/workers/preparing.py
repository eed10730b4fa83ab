"""A repo on disk through resolution, planning and conversion, and the same repo through `datasets`."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets.table import embed_table_storage

from crucible.cache.store import Store
from crucible.casts import cast_batch, unify
from crucible.cluster.prepare import Prepared, prepare
from crucible.config import Settings
from crucible.hub.client import repo_ref
from crucible.refs import DataRequest
from crucible.report import Tally
from crucible.workers.convert import convert
from tests.oracle import datasets
from tests.workers.media_cases import Content, packed


def lay_out(folder: Path, files: Mapping[str, Content]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(packed(content))
    return folder


def prepared(folder: Path, home: Path, **asked: Any) -> Prepared:
    settings = Settings(home=home, **{key: asked.pop(key) for key in ("shard_bytes",) if key in asked})
    return prepare(DataRequest(repo_ref(str(folder), None), **asked), settings, Store(home), Tally())


def ours(folder: Path, home: Path, **asked: Any) -> dict[str, pa.Table]:
    """Split -> all its rows, under the schema a reader of the manifest has."""
    ready = prepared(folder, home, **asked)
    tables = {}
    for split, items in zip(ready.splits, ready.items, strict=True):
        shards = []
        for item in items:
            assert item.size == sum(file.size for file in item.files)
            out = home / "out" / split.name / str(item.index)
            out.mkdir(parents=True)
            shards += list(convert(item, [folder / file.path for file in item.files], out))
        schema = unify([(str(shard.path), shard.schema) for shard in shards])
        batches = []
        for shard in shards:
            with pa.ipc.open_file(shard.path) as reader:
                batches += [cast_batch(batch, schema) for batch in reader.read_all().to_batches()]
        tables[split.name] = pa.Table.from_batches(batches, schema)
    return tables


def theirs(folder: Path, *, embed: bool = False) -> dict[str, pa.Table]:
    """What `datasets` loads; `embed` puts the files that its rows point to into the rows, as when it writes parquet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves files open
        # one cache for all would give one repo the rows of another: it goes by the folder's name and the card
        loaded = datasets.load_dataset(str(folder), cache_dir=str(folder.parent / "oracle"))
        gc.collect()
    tables = {name: split.data.table.combine_chunks() for name, split in loaded.items()}
    return {name: embed_table_storage(table) for name, table in tables.items()} if embed else tables


def features(table: pa.Table) -> Any:
    return datasets.Features.from_arrow_schema(table.schema)
