"""A dataset repo on a Hub to rows that can be read: ours beside `datasets.load_dataset`.

Example: python scripts/bench/ingest.py
         python scripts/bench/ingest.py --full --rounds 5 --work t,j --json > rows.json

Everything runs on this machine: our own Hub in a process of its own with its pages in the page cache, each client in a
fresh process with fresh homes, the methods interleaved round by round so that a busy neighbour slows them alike. A
client has the first two cores (--cores), the Hub has the others where there are any: it is not what is measured. The
start of interpreter, imports and Ray is not in the time and stands in a column of its own. Printed are medians, all
times and ratios; quote ratios. `datasets` writes no hash and no fsync, ours does both; it reads gzip by Python's own
module, as its package comes, and in a row of its own by our ISA-L. After the clock has stopped all rows are compared:
one digest over every column's values and types, equal for equal rows whoever made them. `limit` is a bare loop that
does the work itself and no more (`ingest_limit.py`): about what there is to win on this machine.

--work   t (chat rows, 12 parquet files of 82 MB), i (JPEG images, 8 parquet files of 73 MB), j (chat rows, 4 jsonl.gz
         of 53 MB), many (20,000 jsonl files of 2 KB); without --full fewer rows in fewer files
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import corpora
from scripts.bench.links import HERE, Processes, Server, ended_by_signals, loopback
from scripts.bench.transfer import machine, say, scratch_folder

MB = 10**6
METHODS: dict[str, tuple[str, int]] = {
    "crucible.load_dataset": ("load_dataset", 0),
    "crucible.prefetch, 2 workers": ("prefetch", 2),
    "datasets, num_proc=1": ("datasets", 1),
    "datasets, num_proc=2": ("datasets", 2),
    "datasets with isal, num_proc=2": ("datasets_isal", 2),
    "limit, 2 processes": ("limit", 2),
}
"""Name to the method of `ingest_client.py` and its workers."""
LIMIT = "limit, 2 processes"
WITH_ISAL = "datasets with isal, num_proc=2"
"""Not how it comes, and another thing only where gzip is read."""
PEERS = tuple(name for name in METHODS if name.startswith("datasets,"))
WORKS = ("t", "i", "j", "many")
SPACE = 4
"""Disk cache that a run uses, in sizes of the corpus: the files, and what they unpack to."""


@dataclass
class Row:
    """All runs of one method on one corpus."""

    work: str
    method: str
    source_bytes: int
    runs: list[dict[str, Any]] = field(default_factory=list)

    def median(self, key: str) -> float:
        return statistics.median(run[key] for run in self.runs)

    def record(self, others: Sequence[Row]) -> dict[str, Any]:
        """The row for a machine, with how many times faster it is than the faster of the two peers."""
        best = min((row.median("wall_s") for row in others if row.method in PEERS), default=None)
        return {
            "work": self.work,
            "method": self.method,
            "bytes": self.source_bytes,
            "rows": self.runs[0]["rows"],
            "wall_s": round(self.median("wall_s"), 3),
            "walls_s": [round(run["wall_s"], 3) for run in self.runs],
            "mb_per_s": round(self.source_bytes / MB / self.median("wall_s"), 1),
            "start_s": round(self.median("start_s"), 2),
            "cpu_s": round(self.median("cpu_s"), 2),
            "peak_mb": round(max(run["peak_mb"] for run in self.runs), 1),
            "times_datasets": None if best is None else round(best / self.median("wall_s"), 2),
            "digest": self.runs[0]["digest"],
        }


@contextmanager
def apart(count: int) -> Iterator[list[int]]:
    """This process, and the servers that it starts, on other cores than the first `count`; those, for the clients."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[count:] or cores)
    try:
        yield cores[:count]
    finally:
        os.sched_setaffinity(0, cores)


def run_once(
    row: Row, repo: str, server: Server, scratch: Path, processes: Processes, cores: list[int], profile: Path | None
) -> None:
    """One run: fresh homes, the method, the comparison, and a disk that is quiet again for the next."""
    folder = scratch / "run"
    folder.mkdir()
    method, workers = METHODS[row.method]
    spec = {
        "cores": cores,
        "method": method,
        "repo": repo,
        "workers": workers,
        "warm": SPACE * row.source_bytes,
        "profile": str(profile) if profile else None,
    }
    try:
        argv = [sys.executable, str(HERE / "ingest_client.py"), json.dumps(spec)]
        ended = processes.run([argv], env=environment(server.endpoint, folder))
        if profile is None:
            row.runs.append(json.loads(ended.out.splitlines()[-1]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()


def environment(endpoint: str, folder: Path) -> dict[str, str]:
    """Nobody's tokens, caches and clusters; this server as the Hub."""
    foreign = ("HF_", "HUGGING", "CRUCIBLE_", "RAY_", "XDG_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    ours = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "CRUCIBLE_HOME": str(folder / "crucible"),
        "NO_PROXY": "*",
        "no_proxy": "*",
    }
    return kept | ours


def measure(
    work: str, options: argparse.Namespace, scratch: Path, processes: Processes, cores: list[int]
) -> list[dict[str, Any]]:
    say(options, f"making {work}")
    folder = Path(tempfile.mkdtemp(prefix=f"{work}-", dir=scratch))
    if work == "many":
        repo, size = corpora.small_files(folder, options.small_files)
    else:
        repo, size = corpora.make(work, folder, *options.sizes[work])
    corpora.warm(folder)
    os.sync()
    names = [name for name in METHODS if any(part in name for part in options.only.split(","))]
    if work == "many":
        names = [name for name in names if name != LIMIT]  # small files ask for another loop
    if work != "j":
        names = [name for name in names if name != WITH_ISAL]
    rows = [Row(work, name, size) for name in names]
    with loopback(processes).open({"kind": "hub", "root": str(folder / "hub")}) as server:
        for number in range(options.rounds):
            for row in rows:
                say(options, f"{work} round {number + 1}: {row.method}")
                run_once(row, repo, server, scratch, processes, cores, None)
        for row in rows if options.profile else ():
            if row.method == "crucible.load_dataset":
                path = options.profile / f"ingest-{work}.txt"
                run_once(row, repo, server, scratch, processes, cores, path)
                say(options, f"profile: {path}")
    shutil.rmtree(folder)
    counts = {run["rows"] for row in rows for run in row.runs}
    # a bare loop takes the types as the files have them, which makes another digest of the same rows
    digests = {run["digest"] for row in rows if row.method != LIMIT for run in row.runs}
    if len(counts) != 1 or len(digests) > 1:
        raise AssertionError(f"{work}: the rows differ: {[(row.method, row.runs) for row in rows]}")
    return [row.record(rows) for row in rows]


def table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown, a table for each corpus."""
    heads = ("method", "median s", "source MB/s", "x datasets", "start s", "CPU s", "peak MB", "all s")
    keys = ("method", "wall_s", "mb_per_s", "times_datasets", "start_s", "cpu_s", "peak_mb")
    first = records[0]
    yield f"\n{first['work']}: {first['rows']:,} rows, {first['bytes'] / MB:,.0f} MB\n"
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for record in records:
        cells = ["" if record[key] is None else str(record[key]) for key in keys]
        yield "| " + " | ".join([*cells, " ".join(f"{wall:g}" for wall in record["walls_s"])]) + " |"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="576k rows of t, 20k of i, 188k of j, 20,000 small files")
    parser.add_argument("--cores", type=int, default=2, help="of each client (default 2)")
    parser.add_argument("--work", default=",".join(WORKS), help="comma list (default all)")
    parser.add_argument("--only", default="", help="methods whose name contains one of these, comma list")
    parser.add_argument("--rows", type=int, help="rows of t, i and j each, in two files")
    parser.add_argument("--small-files", type=int, help="how many files `many` has")
    parser.add_argument("--scratch", type=Path, help="where to write; default is the temporary folder")
    parser.add_argument("--profile", type=Path, help="also run ours under a profiler; texts go to this folder")
    parser.add_argument("--json", action="store_true", help="a line for the machine, then a line for each row")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    options = parser.parse_args(argv)
    options.work = options.work.split(",")
    unknown = {*options.work} - {*WORKS}
    if unknown or min(options.rounds, options.cores) < 1:
        parser.error(
            f"no such work: {', '.join(sorted(unknown))}" if unknown else "--rounds and --cores are at least 1"
        )
    if not any(part in name for name in METHODS for part in options.only.split(",")):
        parser.error(f"--only {options.only} leaves no method; there are: {'; '.join(METHODS)}")
    chosen = corpora.FULL if options.full else corpora.QUICK
    options.sizes = {name: (options.rows, 2) if options.rows else getattr(chosen, name) for name in corpora.CORPORA}
    options.small_files = options.small_files or (20_000 if options.full else 2000)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    if options.profile:
        options.profile.mkdir(parents=True, exist_ok=True)
    with (
        ended_by_signals(),
        scratch_folder(options.scratch) as scratch,
        Processes() as processes,
        apart(options.cores) as cores,
    ):
        about = {"machine": machine()}
        print(json.dumps(about) if options.json else about["machine"], flush=True)
        for work in options.work:
            records = measure(work, options, Path(scratch), processes, cores)
            print("\n".join(map(json.dumps, records) if options.json else table(records)), flush=True)


if __name__ == "__main__":
    main()
