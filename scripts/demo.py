"""The whole way of the data on this machine: Hub -> two Ray nodes -> two rank processes. Run it by `./scripts/demo`.

Real parts throughout: a Hub on a socket, two raylets with a store each, agents that serve peers, and two plain
processes (no Ray in them) that read what a training script would read. Exits with 1 if a single row is missing, doubled
or wrong, or if the Hub was asked for a byte twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NODES = 2
EPOCHS = 2
SEED = 7
REPO = "demo/chat"
RANK_TIMEOUT_S = 300
_SENTENCE = "the model reads every shard once and each rank sees its own rows while peers serve what its disk lacks"


def main() -> int:
    options = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.splitlines()[0])
    options.add_argument(
        "--data", type=Path, metavar="DIR", help="a folder of a dataset's files; generated if left out"
    )
    options.add_argument("--split", help="which split the ranks read (default: the first)")
    options.add_argument("--config", help="which config, where the data has several")
    options.add_argument("--rows", type=int, default=24_000, help="rows to generate (default: 24000)")
    arguments = options.parse_args()
    if arguments.data is not None and not arguments.data.is_dir():
        options.error(f"{arguments.data} is not a folder")
    with tempfile.TemporaryDirectory(prefix="crucible-demo-") as work:
        return run(Path(work), arguments.data, arguments.config, arguments.split, arguments.rows)


def run(work: Path, data: Path | None, config: str | None, split: str | None, rows: int) -> int:
    # Ray on the loopback address, where nobody else can reach it; must be set before Ray is imported
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    homes = [work / f"node-{number}" for number in range(NODES)]
    # a folder of its own: Ray notes its newest cluster in the shared one, where `--address auto` would find the demo's
    os.environ.update(HOME=str(work), RAY_TMPDIR=str(work), HF_HOME=str(work / "hf"), CRUCIBLE_HOME=str(homes[0]))
    for name in ("HF_TOKEN", "RAY_ADDRESS", "RANK", "WORLD_SIZE", "HF_HUB_OFFLINE", "CRUCIBLE_AGENT"):
        os.environ.pop(name, None)

    from crucible.errors import CrucibleError
    from crucible.hub.server import HubServer, import_folder

    if data is None:
        data = work / "data"
        say(f"make    {rows:,} chat rows in 8 parquet files")
        generate(data, rows)
    root = work / "hub"
    import_folder(root, REPO, data)
    with HubServer(root) as hub:
        os.environ["HF_ENDPOINT"] = hub.endpoint
        say(f"hub     {hub.endpoint} serves {data}")
        try:
            return through(hub, homes, config, split)
        except CrucibleError as error:
            print(f"Error: {error}", file=sys.stderr)
            return 1


def through(hub: Any, homes: Sequence[Path], config: str | None, split: str | None) -> int:
    """Plan, prefetch, read; then hold what was counted against what must be."""
    import crucible

    split = split or crucible.plan(REPO, config).splits[0]
    planned = crucible.plan(REPO, config, split=split, nodes=NODES, batch=64)
    before = len(hub.log)
    say(f"plan    split {split}: {planned.requests} requests, {size(planned.source_bytes)}, {planned.rows or '?'} rows")
    began = time.monotonic()
    with RayCluster(homes, hub.endpoint) as address:
        say(f"ray     {NODES} nodes, a store each ({seconds(began)})")
        began = time.monotonic()
        report = crucible.prefetch(REPO, config, split=split, address=address)
        say(f"fetch   {report.rows:,} rows in {sum(s.shards for s in report.splits)} shards ({seconds(began)})")
        sent = hub_counts(hub, before)
        began = time.monotonic()
        ranks = read_with_ranks(homes, config, split)
        say(f"read    {EPOCHS} epochs on {NODES} ranks ({seconds(began)})")
        after = hub_counts(hub, before)
        reference = Counter(row_digests(crucible.load_dataset(REPO, config, split=split, streaming=True)))
    return table(planned, report, ranks, reference, sent, after)


def table(planned: Any, report: Any, ranks: Any, reference: Counter[str], sent: Any, after: Any) -> int:
    print(f"\n{'':14}{'rows/epoch':>12}{'from disk':>14}{'from a peer':>14}{'from the Hub':>14}")
    for number, rank in enumerate(ranks):
        counts = "/".join(str(len(epoch)) for epoch in rank["epochs"])
        note = rank["note"]
        print(
            f"rank/node {number}".ljust(14)
            + f"{counts:>12}{size(note['disk_bytes']):>14}{size(note['peer_bytes']):>14}{size(note['hub_bytes']):>14}"
        )
    exact = [sum((Counter(rank["epochs"][epoch]) for rank in ranks), Counter()) == reference for epoch in range(EPOCHS)]
    requests, moved = sent
    ratio = moved / report.source_bytes if report.source_bytes else 1.0
    checks = {
        "every row exactly once, in each epoch": all(exact) and reference.total() == report.rows,
        "the epochs differ in order": ranks[0]["epochs"][0] != ranks[0]["epochs"][1] or report.rows < 10,
        f"Hub bytes over repo bytes is 1.00 ({ratio:.4f})": 0.995 <= ratio <= 1.01,
        f"requests as planned ({planned.requests}, counted {requests})": planned.requests == requests,
        "reading asked the Hub for no file": after[1] == moved,
        f"rows as planned ({planned.rows})": planned.rows in (None, report.rows),
    }
    print(f"\nfiles verified: {report.counts.verified_files}; shards: {sum(s.shards for s in report.splits)}; ", end="")
    print(f"prefetch {report.seconds:.1f} s, of it {size(report.source_bytes)} from the Hub\n")
    for what, holds in checks.items():
        print(f"  {'ok  ' if holds else 'FAIL'} {what}")
    return 0 if all(checks.values()) else 1


class RayCluster:
    """Two raylets on this machine, each with a store of its own. Ends what it started, by its own ids."""

    def __init__(self, homes: Sequence[Path], endpoint: str) -> None:
        self._homes, self._endpoint = homes, endpoint

    def __enter__(self) -> str:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        for home in self._homes:
            variables = {"CRUCIBLE_HOME": str(home), "HF_ENDPOINT": self._endpoint}
            self._cluster.add_node(
                num_cpus=1, object_store_memory=80 << 20, env_vars=variables, include_dashboard=False
            )
        return str(self._cluster.address)

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()


def read_with_ranks(homes: Sequence[Path], config: str | None, split: str) -> list[dict[str, Any]]:
    """One plain process a rank, each on its node's store, as torchrun would start them."""
    script = f"from demo import rank_main; rank_main({config!r}, {split!r})"
    processes = []
    for rank, home in enumerate(homes):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(homes)), "CRUCIBLE_HOME": str(home)}
        environment["PYTHONPATH"] = str(Path(__file__).parent)
        processes.append(
            subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        )
    results = []
    try:
        for process in processes:
            out, _ = process.communicate(timeout=RANK_TIMEOUT_S)
            if process.returncode != 0:
                raise SystemExit(f"rank process {process.pid} ended with {process.returncode}")
            results.append(json.loads(out))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return results


def rank_main(config: str | None, split: str) -> None:
    """What a training script does, on one rank: load, shuffle, shard, iterate. Prints what it saw as JSON."""
    import crucible

    dataset: Any = crucible.load_dataset(REPO, config, split=split, streaming=True).shuffle(seed=SEED).shard()
    epochs = []
    for epoch in range(EPOCHS):
        dataset.set_epoch(epoch)
        epochs.append(row_digests(dataset))
    assert "ray" not in sys.modules, "a rank needs no Ray"
    print(json.dumps({"epochs": epochs, "note": dict(dataset.read_counts())}))


def row_digests(dataset: Any) -> list[str]:
    """One short hash a row, over its values as they lie in the shards (images as their bytes)."""
    import hashlib

    return [
        hashlib.blake2b(repr(row).encode(), digest_size=8).hexdigest()
        for batch in dataset.with_format("arrow").batch(64)
        for row in batch.to_pylist()
    ]


def hub_counts(hub: Any, since: int) -> tuple[int, int]:
    """(requests, bytes of data files) that the Hub and its CDN answered since the log had `since` entries."""
    records = hub.log[since:]
    files = [record for record in records if "/resolve/" in record.path or record.origin == "cdn"]
    return len(records), sum(record.sent for record in files if record.status in (200, 206))


def generate(folder: Path, rows: int) -> None:
    """Chat rows from a seed, in the column layout of the cookbook's chat datasets."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    source = random.Random(SEED)
    text: Callable[[], str] = lambda: " ".join(source.choices(_SENTENCE.split(), k=source.randrange(8, 80)))  # noqa: E731
    files = 8
    for number in range(files):
        count = rows // files + (number < rows % files)
        messages = [
            [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}] for _ in range(count)
        ]
        ids = list(range(number * 1_000_000, number * 1_000_000 + count))
        table = pa.table({"id": ids, "messages": messages})
        pq.write_table(table, folder / f"train-{number:05d}-of-{files:05d}.parquet", row_group_size=1000)


def say(line: str) -> None:
    print(line, flush=True)


def seconds(began: float) -> str:
    return f"{time.monotonic() - began:.1f} s"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())
