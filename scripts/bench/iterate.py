"""Rows per second of the loader beside `datasets`, on a generated chat corpus.

Example: python scripts/bench/iterate.py --rows 100000 --rounds 5

Every case reads the same rows from mapped Arrow files, in the batches that its writer makes, one round after another
with the cases interleaved, so that a busy neighbour slows them alike. Printed are medians and all rounds; quote ratios,
not rows per second. `limit` is pyarrow's own conversion, 1,000 rows at a time, with nothing around it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from crucible.dataset import IterableDataset
from tests.fakes.shards import write_split

BATCH_ROWS = 1000
Case = Callable[[], Iterable[object]]


def chat_tables(rows: int, shards: int) -> list[pa.Table]:
    """Rows like a chat corpus: an id, a source, two to four messages of Zipf words, a score. About 1.5 KB each."""
    rng = random.Random(7)
    words = [f"w{number}" for number in range(5000)]
    texts = [
        " ".join(words[min(4999, int(rng.paretovariate(0.7)))] for _ in range(rng.randint(30, 120)))
        for _ in range(4000)
    ]
    tables, start = [], 0
    for number in range(shards):
        count = rows // shards + (number < rows % shards)
        made = [
            {
                "id": row,
                "source": f"s{row % 7}",
                "messages": [
                    {"role": ("user", "assistant")[turn % 2], "content": texts[rng.randrange(4000)]}
                    for turn in range(2 + row % 3)
                ],
                "score": row * 0.5,
            }
            for row in range(start, start + count)
        ]
        tables.append(pa.Table.from_pylist(made))
        start += count
    return tables


def stream_file(path: Path, table: pa.Table) -> str:
    """The same rows as `datasets` keeps them: an Arrow stream of batches of 1,000 rows."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=BATCH_ROWS)
    return str(path)


def mapped_slices(path: Path) -> list[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    return [batch.slice(start, 1000) for batch in batches for start in range(0, batch.num_rows, 1000)]


def cases(folder: Path, rows: int, shards: int) -> dict[str, tuple[Case, int]]:
    """Name to (case, rows it reads)."""
    import datasets

    datasets.disable_progress_bars()
    tables = chat_tables(rows, shards)
    manifest, source = write_split(folder, tables, batch_rows=10_000)  # about what the converter writes
    ours = IterableDataset(manifest, source)
    exact = IterableDataset(replace(manifest, local_bytes=1 << 40), source)
    mapped = datasets.concatenate_datasets(
        [
            datasets.Dataset.from_file(stream_file(folder / f"{number}.arrows", table))
            for number, table in enumerate(tables)
        ]
    )
    streamed = mapped.to_iterable_dataset(num_shards=shards)
    few = min(rows, 20_000)
    slices = [part for shard in manifest.shards for part in mapped_slices(source.path(manifest, shard))]
    return {
        "rows: limit": (lambda: (row for part in slices for row in part.to_pylist()), rows),
        "rows: datasets mapped": (lambda: mapped, rows),
        "rows: datasets streamed": (lambda: streamed, rows),
        "rows: crucible": (lambda: ours, rows),
        "shuffled: datasets mapped": (lambda: islice(mapped.shuffle(seed=1), few), few),
        "shuffled: datasets streamed": (lambda: streamed.shuffle(seed=1), rows),
        "shuffled: crucible lanes": (lambda: ours.shuffle(1), rows),
        "shuffled: crucible lanes, rank 1 of 8": (lambda: ours.shuffle(1).shard(1, 8), rows // 8),
        "shuffled: crucible exact": (lambda: exact.shuffle(1), rows),
        "batches of 1,000: datasets": (lambda: mapped.iter(1000), rows),
        "batches of 1,000: crucible": (lambda: ours.batch(1000), rows),
        "batches of 1,000: crucible lanes": (lambda: ours.shuffle(1).batch(1000), rows),
        "arrow batches of 1,000: datasets": (lambda: mapped.with_format("arrow").iter(1000), rows),
        "arrow batches of 1,000: crucible": (lambda: ours.with_format("arrow").batch(1000), rows),
    }


def resume_seconds(folder: Path) -> float:
    """From a loaded state to the next row, in the middle of a shuffled epoch."""
    manifest, source = write_split(folder, chat_tables(20_000, 16))
    stream = IterableDataset(manifest, source).shuffle(1)
    state = stream.state_after(9_999)
    fresh = IterableDataset(manifest, source).shuffle(1)
    start = time.perf_counter()
    fresh.load_state_dict(state)
    next(iter(fresh))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = {
            name: case
            for name, case in cases(Path(folder), options.rows, options.shards).items()
            if options.only in name
        }
        rates: dict[str, list[float]] = {name: [] for name in chosen}
        for _ in range(options.rounds):
            for name, (case, rows) in chosen.items():
                start = time.perf_counter()
                for _ in case():
                    pass
                rates[name].append(rows / (time.perf_counter() - start))
        for name, runs in rates.items():
            print(
                json.dumps(
                    {"case": name, "rows_per_s": round(statistics.median(runs)), "runs": [round(run) for run in runs]}
                )
            )
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"case": "resume to the next row, ms", "ms": round(resume_seconds(Path(folder)) * 1e3, 2)}))


if __name__ == "__main__":
    main()
