"""One timed ingest in a process of its own, with homes of its own: start first, then the clock, then the comparison.

    ingest_client.py '{"method": "load_dataset" | "prefetch" | "datasets", "repo": "bench/t", "workers": 2}'

Prints one line of JSON: `start_s` (imports, and for `prefetch` the start of Ray, of its workers and of our agent),
`wall_s` of the ingest itself, `cpu_s` of the whole process with its children, `peak_mb` of the biggest process,
`rows`, and `digest` of all rows in order, which is equal for equal rows whoever made them.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

Spec = dict[str, Any]
Ingest = Callable[[], Callable[[], Any]]
"""Does the work; what it returns gives the rows as a `pyarrow.Table` or the like, after the clock has stopped."""
WARM = "bench/warm"
"""A repo of a few rows: what runs first on a cluster that has just started."""


def load_dataset(spec: Spec) -> Ingest:
    """Ours without Ray: the local executor with its own threads."""
    import pyarrow.parquet  # noqa: F401 - an import is not ingest, here or for `datasets`

    import crucible
    import crucible.session
    import crucible.workers.work

    def ingest() -> Callable[[], Any]:
        made = crucible.load_dataset(spec["repo"], split="train")
        return lambda: _shards(made)

    return ingest


def prefetch(spec: Spec) -> Ingest:
    """Ours on a Ray cluster of one node with `workers` CPUs that runs already."""
    import ray

    import crucible

    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on the loopback address only
    ray.init(num_cpus=spec["workers"], include_dashboard=False, namespace="crucible", log_to_driver=False)
    crucible.prefetch(WARM)

    def ingest() -> Callable[[], Any]:
        crucible.prefetch(spec["repo"])
        return lambda: _shards(crucible.load_dataset(spec["repo"], split="train"))

    return ingest


def _shards(made: Any) -> Any:
    """Where our rows are: every shard as it was committed, mapped."""
    import pyarrow as pa

    from crucible.cache.store import Store
    from crucible.config import Settings

    store = Store(Settings.from_env().home)
    paths = [store.shard_path(shard.key) for shard in made.manifest.shards]
    tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths]
    return pa.concat_tables(tables, promote_options="default")


def datasets(spec: Spec) -> Ingest:
    """The peer: it writes no hash and no fsync."""
    from datasets import load_dataset

    def ingest() -> Callable[[], Any]:
        made = load_dataset(spec["repo"], split="train", num_proc=spec["workers"])
        return lambda: made.data.table

    return ingest


METHODS: dict[str, Callable[[Spec], Ingest]] = {
    "load_dataset": load_dataset,
    "prefetch": prefetch,
    "datasets": datasets,
}


def digest(table: Any, step: int = 1000) -> str:
    """Of all rows in order, and of the columns' types. The layout in batches does not matter."""
    from crucible.workers.canonical import canonical_batch

    hasher = hashlib.sha256()
    for name in sorted(table.column_names):
        hasher.update(f"{name} {table.schema.field(name).type}\n".encode())
    for start in range(0, table.num_rows, step):
        part = table.slice(start, step).select(sorted(table.column_names)).combine_chunks()
        for batch in part.to_batches():
            for buffer in _buffers(canonical_batch(batch)):
                hasher.update(buffer)
    return hasher.hexdigest()


def _buffers(batch: Any) -> Iterator[Any]:
    for column in batch.columns:
        yield from (buffer for buffer in column.buffers() if buffer is not None)


def cpu_s() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in both)


def peak_mb() -> float:
    both = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(both) / 1024


def main(spec: Spec) -> None:
    begun = time.perf_counter()
    ingest = METHODS[spec["method"]](spec)
    start_s = time.perf_counter() - begun
    cpu = cpu_s()
    if spec.get("profile"):
        from scripts.bench.sampling import profiled

        with profiled(Path(spec["profile"])):
            ingest()
        return
    started = time.perf_counter()
    rows = ingest()
    wall, cpu, peak = time.perf_counter() - started, cpu_s() - cpu, peak_mb()
    said: Spec = {"start_s": start_s, "wall_s": wall, "cpu_s": cpu, "peak_mb": peak}
    if spec.get("compare", True):
        table = rows()
        said |= {"rows": table.num_rows, "digest": digest(table)}
    if spec["method"] == "prefetch":
        import ray

        ray.shutdown()
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
