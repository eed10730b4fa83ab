"""What an ingest costs at the least: a bare loop over the files in two processes, and nothing else.

Each file into memory that is used again, hashed as the Hub promises, decoded by pyarrow, written as an Arrow file,
synced and renamed. No store, no journal, no resumption, no bound on memory, no digest of what it wrote, no look at
types. What is much faster than this does less work, or waits less: a process here does one file after the other.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

READ_BYTES = 1 << 20
BLOCK_BYTES = 16 << 20
"""Of JSON lines that are parsed at once."""
_POOL: dict[str, Any] = {}
_ROOM = bytearray()


def started(workers: int) -> ProcessPoolExecutor:
    """The processes, with all their imports done."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    for ready in [pool.submit(_import) for _ in range(4 * workers)]:
        ready.result()
    return pool


def ingest(pool: ProcessPoolExecutor, endpoint: str, repo: str, folder: Path) -> list[Path]:
    """All files of the repo, each as an Arrow file in `folder`, in the repo's order."""
    folder.mkdir(parents=True)
    base = f"{endpoint}/datasets/{repo}/resolve/main/"
    listed = json.loads(_http().request("GET", f"{endpoint}/api/datasets/{repo}/tree/main?recursive=true").data)
    files = [(base + one["path"], one["size"], one["lfs"]["oid"]) for one in listed if "lfs" in one]
    outs = [folder / f"{number:05}.arrow" for number in range(len(files))]
    return list(pool.map(_one, files, outs))


def _import() -> None:
    import isal.igzip  # noqa: F401
    import pyarrow.json
    import pyarrow.parquet  # noqa: F401

    _http()


def _http() -> Any:
    if "http" not in _POOL:
        import urllib3

        _POOL["http"] = urllib3.PoolManager()
    return _POOL["http"]


def _one(file: tuple[str, int, str], out: Path) -> Path:
    import pyarrow as pa

    url, size, oid = file
    content = _fetched(url, size, oid)
    batches = _lines(content) if url.endswith(".gz") else _parquet(content)
    first = next(batches)
    draft = out.with_suffix(".draft")
    with draft.open("wb", buffering=0) as raw:
        with pa.ipc.new_file(pa.PythonFile(raw, "w"), first.schema) as writer:
            writer.write(first)
            for batch in batches:
                writer.write(batch)
        os.fsync(raw.fileno())
    draft.rename(out)
    return out


def _fetched(url: str, size: int, oid: str) -> memoryview:
    """The file, in memory that the next one will lie in."""
    if len(_ROOM) < size:
        _ROOM.extend(bytes(size - len(_ROOM)))
    room, digest, at = memoryview(_ROOM)[:size], hashlib.sha256(), 0
    reply = _http().request("GET", url, preload_content=False)
    while at < size and (got := reply.readinto(room[at : at + READ_BYTES])):
        digest.update(room[at : at + got])
        at += got
    reply.release_conn()
    if digest.hexdigest() != oid:
        raise AssertionError(f"{url}: other bytes than the Hub promised")
    return room


def _parquet(content: memoryview) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(pa.BufferReader(pa.py_buffer(content))) as file:
        yield from file.iter_batches(10_000, use_threads=False)


def _lines(content: memoryview) -> Iterator[Any]:
    import isal.igzip
    import pyarrow as pa
    import pyarrow.json

    options = pyarrow.json.ReadOptions(use_threads=False, block_size=2 * BLOCK_BYTES)
    with isal.igzip.open(io.BytesIO(content)) as lines:
        rest = b""
        while piece := lines.read(BLOCK_BYTES):
            whole, newline, rest = (rest + piece).rpartition(b"\n")
            yield from pyarrow.json.read_json(pa.BufferReader(whole + newline), options).combine_chunks().to_batches()


def method(spec: dict[str, Any]) -> Callable[[], Callable[[], Any]]:
    """For `ingest_client`."""
    pool = started(spec["workers"])

    def work() -> Callable[[], Any]:
        folder = Path(os.environ["HF_HOME"]).with_name("limit")
        made = ingest(pool, os.environ["HF_ENDPOINT"], spec["repo"], folder)
        return lambda: _read(pool, made)

    return work


def _read(pool: ProcessPoolExecutor, made: list[Path]) -> Any:
    import pyarrow as pa

    pool.shutdown()
    return pa.concat_tables([pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in made])
