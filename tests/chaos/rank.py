"""One rank of a training, as a plain process without Ray: reads batches, says what it received, saves its state.

    python -m tests.chaos.rank '{"repo": ..., "rank": 0, "world": 2, ...}'

Every batch is a line in `<folder>/rows-<run>-<rank>.jsonl`, in the kernel before the next batch is asked for, so a
SIGKILL loses none that the loop had. Its states lie beside it, each in a file of its own named by the place it is of.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

SEED = 7
FAST = "fast"
"""As long as this file is not in the folder, a rank takes its time for each batch: there is something to strike at."""
PLANTED = os.environ.get("CHAOS_PLANTED", "")
"""Lose a batch (`dropped`), or spoil a row (`altered`): what the suite has to find out by itself."""


def digest_of(ids: list[int], texts: list[str]) -> str:
    """What a batch's rows hold, all columns of them."""
    return hashlib.blake2b(repr([ids, texts]).encode(), digest_size=12).hexdigest()


def main(arguments: dict[str, Any]) -> None:
    import crucible

    folder, rank, world = Path(arguments["folder"]), int(arguments["rank"]), int(arguments["world"])
    dataset = crucible.load_dataset(arguments["repo"], split="train", streaming=True)
    assert isinstance(dataset, crucible.IterableDataset)
    dataset = dataset.shuffle(seed=SEED).shard(rank, world).batch(arguments["batch"])
    dataset = dataset.certify(folder / "records")
    begin, start = 0, 0
    if arguments["state"] is not None:
        state = json.loads(Path(arguments["state"]).read_text())
        dataset.load_state_dict(state)
        begin, start = state["epoch"], state["position"]
    run = arguments["run"]
    out = os.open(folder / f"rows-{run:02d}-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for epoch in range(begin, arguments["epochs"]):
        dataset.set_epoch(epoch)
        for unit, batch in enumerate(dataset):
            if PLANTED == "dropped" and unit == 3:
                continue
            if PLANTED == "altered" and unit == 3:
                batch["text"][0] = batch["text"][0][1:]
            ids = [int(number) for number in batch["id"]]
            told = {"epoch": epoch, "start": start, "unit": unit, "ids": ids, "digest": digest_of(ids, batch["text"])}
            os.write(out, json.dumps(told).encode() + b"\n")
            if (unit + 1) % arguments["save_every"] == 0:
                save(folder, dataset.state_dict(), run, rank)
            if not (folder / FAST).exists():
                time.sleep(arguments["pace"])
        start = 0
        dataset.set_epoch(epoch + 1)
        save(folder, dataset.state_dict(), run, rank)
    assert "ray" not in sys.modules


def save(folder: Path, state: dict[str, Any], run: int, rank: int) -> None:
    """By rename: a state is there whole or not at all, as every training saves its own."""
    name = f"state-{run:02d}-{rank}-{state['epoch']}-{state['position']}.json"
    draft = folder / f".{name}.{os.getpid()}"
    draft.write_text(json.dumps(state))
    draft.rename(folder / name)


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    main(json.loads(sys.argv[1]))
