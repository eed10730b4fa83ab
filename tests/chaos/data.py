"""The data of a story, and what a run without faults makes of it: rows, order, shards, manifest."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import crucible
from crucible.cache.store import Store
from tests.chaos.rank import SEED
from tests.chaos.schedule import Story


@dataclass(frozen=True)
class Truth:
    """What has to come out, whatever happens."""

    texts: tuple[str, ...]
    """The text of the row with each id."""
    order: tuple[tuple[int, ...], ...]
    """Epoch -> ids by global position."""
    manifest: str
    """The manifest's id."""
    shards: dict[str, str]
    """Shard key -> digest."""
    items: dict[str, tuple[int, int]]
    """Shard key -> number and source bytes of the work item that makes it."""
    source_bytes: int
    largest_item: int
    """Source bytes of the largest work item: what a worker that dies may have brought in vain."""


def repo_files(story: Story, folder: Path) -> dict[str, bytes | Path]:
    """The repo of a story: path in the repo -> a file in `folder`. Every row has an id of its own."""
    folder.mkdir(parents=True)
    made: dict[str, bytes | Path] = {}
    dice = random.Random(f"data {story.seed}")
    for number in range(story.files):
        ids = range(number * story.rows, (number + 1) * story.rows)
        texts = ["".join(_noise(story.seed, i, part) for part in range(dice.randint(1, 7))) for i in ids]
        path = folder / f"{number}.{story.form}"
        _write(path, story.form, list(ids), texts)
        made[f"data/train-{number:05d}-of-{story.files:05d}.{story.form}"] = path
    return made


def _noise(*of: int) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()


def _write(path: Path, form: str, ids: list[int], texts: list[str]) -> None:
    if form == "parquet":
        table = pa.table({"id": ids, "text": texts})
        pq.write_table(table, path, compression="none", use_dictionary=False, row_group_size=200)
    elif form == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("id", "text"), *zip(ids, texts)])
    else:
        data = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in zip(ids, texts)).encode()
        path.write_bytes(gzip.compress(data, mtime=0) if form.endswith("gz") else data)


def truth_of(repo: str, story: Story, files: dict[str, bytes | Path], home: Path) -> Truth:
    """Load the repo here, one reader with a store of its own and nothing going wrong, and take it down.

    The environment says which store and which Hub.
    """
    dataset = crucible.load_dataset(repo, split="train", streaming=True)
    assert isinstance(dataset, crucible.IterableDataset)
    shuffled = dataset.shuffle(seed=SEED).with_format("arrow").batch(500)
    texts = [""] * story.total
    order = []
    for epoch in range(story.epochs):
        shuffled.set_epoch(epoch)
        ids: list[int] = []
        for batch in shuffled:
            rows = batch.to_pydict()
            ids += rows["id"]
            for number, text in zip(rows["id"], rows["text"]):
                texts[number] = text
        assert sorted(ids) == list(range(story.total)), "the run without faults is wrong"
        order.append(tuple(ids))
    (manifest,) = Store(home).manifests()
    sizes = [Path(str(path)).stat().st_size for path in files.values()]
    shards = {shard.key: shard.digest for shard in manifest.shards}
    items = {shard.key: (shard.item, manifest.items[shard.item].size) for shard in manifest.shards}
    return Truth(
        tuple(texts), tuple(order), manifest.id, shards, items, sum(sizes), max(size for _, size in items.values())
    )
