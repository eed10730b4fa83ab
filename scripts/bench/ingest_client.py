"""One timed ingest in a process of its own, with homes of its own: start first, then the clock, then the comparison.

    ingest_client.py '{"method": "load_dataset", "repo": "bench/t", "workers": 2, "warm": 0}'

Prints one line of JSON: `start_s` (imports, and for `prefetch` the start of Ray, of its workers and of our agent),
`wall_s` of the ingest itself, `cpu_s` of all processes that this one started (Ray's own and its workers too) and of
itself, `peak_mb` of the biggest of them, `rows`, and `digest` of all rows in order, which is equal for equal rows
whoever made them. It and its processes run on `cores`.

`warm` bytes are written and removed when everything has started, right before the clock: what a virtual machine has
not written for some seconds it has given back to its host, and Ray starts for longer than that.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
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
    """The peer as its own package brings it: it writes no hash and no fsync.

    Where `isal` is installed, as it is for us, fsspec gives it gzip 2.8 times as fast. Nothing that it depends on
    brings that, so it does without here; `datasets_isal` is the other row.
    """
    modules: dict[str, Any] = sys.modules
    modules["isal"] = None
    from fsspec.compression import compr  # it looks for isal when it is imported; processes are forked after that

    del modules["isal"]
    if getattr(compr["gzip"], "__name__", "") == "isal":
        raise AssertionError("fsspec was there before, with isal")
    return datasets_isal(spec)


def datasets_isal(spec: Spec) -> Ingest:
    """The peer with everything that is installed for us."""
    from datasets import load_dataset

    def ingest() -> Callable[[], Any]:
        made = load_dataset(spec["repo"], split="train", num_proc=spec["workers"])
        return lambda: made.data.table

    return ingest


def limit(spec: Spec) -> Ingest:
    """What the work itself costs on this machine; see `ingest_limit`."""
    from scripts.bench import ingest_limit

    return ingest_limit.method(spec)


METHODS: dict[str, Callable[[Spec], Ingest]] = {
    "limit": limit,
    "load_dataset": load_dataset,
    "prefetch": prefetch,
    "datasets": datasets,
    "datasets_isal": datasets_isal,
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


TICKS = os.sysconf("SC_CLK_TCK")


def family() -> list[Path]:
    """The folder in /proc of this process and of all that descend from it."""
    children: dict[str, list[str]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            children.setdefault(_fields(folder)[1], []).append(folder.name)
    found, todo = [], [str(os.getpid())]
    while todo:
        found.append(Path("/proc") / (pid := todo.pop()))
        todo += children.get(pid, [])
    return found


def _fields(folder: Path) -> list[str]:
    """What /proc says of a process, from its state on: the name before that may hold anything."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def cpu_s() -> float:
    """Of all that run, and of those that have ended and were waited for; where there is no /proc without Ray's."""
    total = 0.0
    for folder in family():
        with suppress(OSError):
            total += sum(map(int, _fields(folder)[11:15])) / TICKS
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return total or sum(used.ru_utime + used.ru_stime for used in both)


def peak_mb() -> float:
    """Of the biggest process at its biggest."""
    both = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    for folder in family():
        with suppress(OSError):
            lines = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            both.append(int(lines.get("VmHWM", "0").split()[0]))
    return max(both) / 1024


def main(spec: Spec) -> None:
    if spec.get("cores"):
        os.sched_setaffinity(0, spec["cores"])
    begun = time.perf_counter()
    ingest = METHODS[spec["method"]](spec)
    start_s = time.perf_counter() - begun
    if spec.get("warm"):
        from scripts.bench.transfer import warm

        warm(Path(os.environ["HF_HOME"]).with_name("warm"), spec["warm"])
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
