"""How well the shuffle mixes: rank correlation, neighbours of one shard and shards in a batch, beside pure chance.

    python -m scripts.bench.shuffle
    python -m scripts.bench.shuffle --shards 40 --rows 25000 --world 8

Nothing is timed and nothing is read: an order is arithmetic.
"""

from __future__ import annotations

import argparse

import numpy as np

from crucible.order import LANES, WINDOW, OrderSpec
from crucible.quality import Quality, measured
from crucible.streams import Shuffled, Source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1000, help="rows of a shard")
    parser.add_argument("--world", type=int, default=64)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lanes", type=int, default=LANES)
    parser.add_argument("--window", type=int, default=WINDOW)
    asked = parser.parse_args()
    rows = np.full(asked.shards, asked.rows, dtype=np.int64)
    split = Source("bench", rows)
    orders = {
        "source": split.at(0),
        "lanes": Shuffled(split, OrderSpec("lanes", 7, 0, asked.lanes, asked.window)).at(0),
        "exact": Shuffled(split, OrderSpec("exact", 7)).at(0),
    }
    print(f"{asked.shards:,} shards of {asked.rows:,} rows, {asked.lanes} lanes, windows of {asked.window}\n")
    print(f"| order | read by | rank correlation | next of the same shard | shards in a batch of {asked.batch} |")
    print("|---|---|---|---|---|")
    chance: Quality | None = None
    for reader, world in (("all ranks", 1), (f"rank 0 of {asked.world}", asked.world)):
        for name, walk in orders.items():
            found, chance = measured(walk, rows, batch=asked.batch, world_size=world)
            print(f"| {name} | {reader} | {_row(found)} |")
        assert chance is not None
        print(f"| chance | {reader} | {_row(chance)} |")


def _row(found: Quality) -> str:
    return f"{found.rank_correlation:+.3f} | {found.same_shard_next:.4f} | {found.shards_per_batch:.1f}"


if __name__ == "__main__":
    main()
