"""How soon the first batch comes of a corpus that is being brought cold (goal P14: one shard's time and a second).

Example: python scripts/bench/early.py
         python scripts/bench/early.py --full --rounds 5 --json > rows.json

Chat rows in parquet (T of `corpora`), from our own Hub in a process of its own. Each run is a fresh process with a
fresh home; the methods are interleaved round by round. The clock starts when interpreter, imports and Ray are there.

one shard     a repo of one file that makes one shard, brought whole, to its first batch: what the goal is counted from
alone         `load_dataset(streaming=True)`, beside no job: to the first batch
beside        the same in a process whose node's cluster has just begun to prefetch the corpus, with two workers
whole         the corpus brought whole, as `load_dataset` without streaming does: to the first batch
datasets      `datasets.load_dataset`, which also brings it whole
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

BATCH = 256
METHODS = ("one shard", "alone", "beside", "whole", "datasets")
ONE_SHARD_ROWS = 24_000
"""Of T: about 64 MiB of Arrow data."""


# --- in the process that is measured


def first_batch(method: str, repo: str) -> dict[str, Any]:
    """Seconds to the first batch, and how far the job beside it had come by then."""
    ingest: Callable[[], Any]
    if method == "datasets":
        import datasets

        def ingest() -> Any:
            return datasets.load_dataset(repo, split="train")[:BATCH]

        return timed(ingest)
    import pyarrow.parquet  # noqa: F401 - an import is neither's work

    import crucible
    import crucible.session
    import crucible.workers.convert

    load: Any = crucible.load_dataset

    def stream() -> Any:
        return next(iter(load(repo, split="train", streaming=True).batch(BATCH)))

    if method != "beside":
        return timed(stream if method == "alone" else lambda: load(repo, split="train")[:BATCH])
    import ray

    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on the loopback address only
    ray.init(num_cpus=2, include_dashboard=False, namespace="crucible", log_to_driver=False)
    crucible.prefetch("bench/warm")
    seen: list[Any] = []
    job = threading.Thread(target=lambda: crucible.prefetch(repo, on_progress=seen.append))
    job.start()
    while not (seen and seen[-1].phase == "items"):
        time.sleep(0.01)
    found = timed(stream)
    found["items_done"], found["items"] = seen[-1].items_done, seen[-1].items
    job.join()
    return found


def timed(work: Callable[[], Any]) -> dict[str, Any]:
    began = time.perf_counter()
    batch = work()
    wall = time.perf_counter() - began
    assert len(batch["id"]) == BATCH
    return {"wall_s": wall, "first": batch["id"][0]}


# --- around it


def measure(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    from scripts.bench import corpora
    from scripts.bench.ingest import environment
    from scripts.bench.links import Processes, loopback
    from scripts.bench.transfer import say, warm

    with Processes() as processes:
        sizes = corpora.FULL.t if options.full else corpora.QUICK.t
        if options.rows:
            sizes = (options.rows, 4)
        made = {}
        for name, (rows, files) in (("corpus", sizes), ("one", (min(ONE_SHARD_ROWS, sizes[0]), 1))):
            say(options, f"making {name}")
            (scratch / name).mkdir()
            made[name] = corpora.make("t", scratch / name, rows, files)
            corpora.warm(scratch / name)
        os.sync()
        chosen = [method for method in METHODS if method in ("one shard", "whole", *options.only)]
        runs: dict[str, list[dict[str, Any]]] = {method: [] for method in chosen}
        with (
            loopback(processes).open({"kind": "hub", "root": str(scratch / "corpus" / "hub")}) as corpus,
            loopback(processes).open({"kind": "hub", "root": str(scratch / "one" / "hub")}) as one,
        ):
            for number in range(options.rounds):
                for method in chosen:
                    say(options, f"round {number + 1}: {method}")
                    server, (repo, size) = (one, made["one"]) if method == "one shard" else (corpus, made["corpus"])
                    folder = scratch / "run"
                    folder.mkdir()
                    warm(folder / "warm", 4 * size)
                    try:
                        argv = [sys.executable, __file__, "--client", method, "--repo", repo]
                        ended = processes.run([argv], env=environment(server.endpoint, folder))
                        runs[method].append(json.loads(ended.out.splitlines()[-1]))
                    finally:
                        shutil.rmtree(folder, ignore_errors=True)
                        os.sync()
    assert len({run["first"] for method in chosen[1:] for run in runs[method]}) == 1, "all began with the same row"
    middle = {method: statistics.median(run["wall_s"] for run in found) for method, found in runs.items()}
    return [
        {
            "method": method,
            "wall_s": round(middle[method], 3),
            "over_one_shard_s": round(middle[method] - middle["one shard"], 3),
            "of_whole": round(middle[method] / middle["whole"], 3),
            "walls_s": [round(run["wall_s"], 3) for run in found],
            "items_done": [[run["items_done"], run["items"]] for run in found if "items" in run],
        }
        for method, found in runs.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="576k rows in 12 files")
    parser.add_argument("--only", default=",".join(METHODS), help="comma list of methods beside one shard and whole")
    parser.add_argument("--rows", type=int, help="so many rows in four files")
    parser.add_argument("--scratch", type=Path, help="where to write; default is the temporary folder")
    parser.add_argument("--json", action="store_true", help="a line for the machine, then a line for each method")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--client", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--repo", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(METHODS):
        parser.error(f"no such method: {', '.join(sorted(unknown))}; there are: {', '.join(METHODS)}")
    if options.client:
        print(json.dumps(first_batch(options.client, options.repo)), flush=True)
        return
    from scripts.bench.links import ended_by_signals
    from scripts.bench.transfer import machine, scratch_folder

    with ended_by_signals(), scratch_folder(options.scratch) as scratch:
        about = {"machine": machine()}
        print(json.dumps(about) if options.json else about["machine"], flush=True)
        for record in measure(options, Path(scratch)):
            shown = "{method:10} {wall_s:8} s  {over_one_shard_s:+8} s over one shard  {of_whole} of whole  {walls_s}"
            print(json.dumps(record) if options.json else shown.format(**record), flush=True)


if __name__ == "__main__":
    main()
