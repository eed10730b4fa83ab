"""A training process in a host: reads its share of a split, one batch after the other. Run as a program; needs no Ray.

    python rank.py '{"load": [repo, config], "split": ..., "seed": ..., "batch": ..., "stop_at": ..., "gate": folder}'

At batch `stop_at` it makes the file `gate/at` and waits for `gate/go`. It prints one line of JSON: the ids of its rows
in their order, a digest of all that is in them, and where its shards came from. What it logs goes to stderr.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import crucible


def read(
    load: list[str], split: str, seed: int | None, batch: int, stop_at: int = -1, gate: str = ""
) -> dict[str, Any]:
    dataset = crucible.load_dataset(*load, split=split, streaming=True)
    assert isinstance(dataset, crucible.IterableDataset)
    dataset = dataset.shuffle(seed=seed) if seed is not None else dataset
    ids: list[int] = []
    content = hashlib.sha256()
    for number, rows in enumerate(dataset.shard().with_format("arrow").batch(batch)):
        if number == stop_at:
            (Path(gate) / "at").touch()
            while not (Path(gate) / "go").exists():
                time.sleep(0.02)
        ids += rows["id"].to_pylist()
        content.update(repr(rows.to_pylist()).encode())
    assert "ray" not in sys.modules
    return {"ids": ids, "content": content.hexdigest(), "note": dict(dataset.read_counts())}


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    print(json.dumps(read(**json.loads(sys.argv[1]))))
