"""The corpora of the ingest benchmark: T (chat rows, parquet), I (JPEG images, parquet), J (chat rows, jsonl.gz).

Each is a repo in a folder for our Hub. The same sizes give the same bytes.

Text is words drawn by Zipf's law from a vocabulary of 50,000, so that it compresses about as text does.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import string
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from crucible.hub.server import import_files

pc: Any = pyarrow.compute
VOCABULARY = 50_000
WORDS_A_MESSAGE = 88
MESSAGES = (2, 6)
"""Fewest and most of a row."""
IMAGE_SIDE = 256
PICTURES = 48
"""Distinct ones; each row's file ends with its own number, so no two are equal."""
WORTH_PROCESSES = 1000
"""Rows of a corpus that is not made before a process has started."""


@dataclass(frozen=True)
class Sizes:
    """Rows of each corpus, and the number of files they are in."""

    t: tuple[int, int]
    i: tuple[int, int]
    j: tuple[int, int]


QUICK = Sizes((96_000, 4), (4_000, 4), (47_000, 4))
FULL = Sizes((576_000, 12), (20_000, 8), (188_000, 4))


def vocabulary() -> pa.Array:
    rng = random.Random(1)
    words = {"".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 10))) for _ in range(2 * VOCABULARY)}
    return pa.array(sorted(words)[:: len(words) // VOCABULARY][:VOCABULARY])


def chats(rows: int, seed: int) -> pa.Table:
    """Chat rows: `id`, and `messages` of a role and a content each."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(*MESSAGES, endpoint=True, size=rows)
    messages = int(counts.sum())
    lengths = rng.poisson(WORDS_A_MESSAGE, messages)
    ranks = np.exp(rng.random(int(lengths.sum())) * np.log(VOCABULARY)).astype(np.int64) - 1  # p(rank) ~ 1 / rank
    words = vocabulary().take(pa.array(np.random.default_rng(2).permutation(VOCABULARY)[ranks]))
    content = pc.binary_join(pa.ListArray.from_arrays(_offsets(lengths), words), " ")
    turns = np.arange(messages) - np.repeat(np.cumsum(counts) - counts, counts)
    roles = pa.array(["user", "assistant"]).take(pa.array(turns % 2))
    pairs = pa.StructArray.from_arrays([roles, content], ["role", "content"])
    ids = pa.array([f"{seed:03}-{number:06}" for number in range(rows)])
    return pa.table({"id": ids, "messages": pa.ListArray.from_arrays(_offsets(counts), pairs)})


def _offsets(lengths: Any) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())


def pictures() -> list[bytes]:
    """JPEG files of about 29 KB."""
    from PIL import Image

    rng = np.random.default_rng(3)
    made = []
    for _ in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).resize((IMAGE_SIDE, IMAGE_SIDE))
        fine = rng.integers(-24, 24, (IMAGE_SIDE, IMAGE_SIDE, 3))
        pixels = np.clip(np.asarray(coarse, np.int64) + fine, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=80)
        made.append(file.getvalue())
    return made


def _t(path: Path, rows: int, seed: int) -> None:
    pq.write_table(chats(rows, seed), path, compression="snappy", row_group_size=1000)


def _i(path: Path, rows: int, seed: int) -> None:
    known, names = pictures(), [f"{seed:03}-{number:06}" for number in range(rows)]
    images = [{"bytes": known[n % PICTURES] + name.encode(), "path": f"{name}.jpg"} for n, name in enumerate(names)]
    features = {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": images, "label": np.arange(rows)}).replace_schema_metadata(metadata)
    pq.write_table(table, path, compression="snappy", row_group_size=100)


def _j(path: Path, rows: int, seed: int) -> None:
    with gzip.open(path, "wt", compresslevel=6) as file:
        for batch in chats(rows, seed).to_batches(1000):
            file.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())


CORPORA: dict[str, tuple[Callable[[Path, int, int], None], str]] = {
    "t": (_t, "parquet"),
    "i": (_i, "parquet"),
    "j": (_j, "jsonl.gz"),
}


def make(name: str, folder: Path, rows: int, files: int) -> tuple[str, int]:
    """Write a corpus as the repo `bench/<name>` of the Hub in `folder`/hub; (repo, bytes of its files)."""
    write, ending = CORPORA[name]
    paths = [folder / f"{name}-{number:05}" for number in range(files)]
    counts = [rows // files + (number < rows % files) for number in range(files)]
    if rows < WORTH_PROCESSES:
        list(map(write, paths, counts, range(files)))
    else:
        # spawned: a process that was forked with pyarrow's threads running may hang in them
        with ProcessPoolExecutor(min(4, files), mp_context=get_context("spawn")) as pool:
            list(pool.map(write, paths, counts, range(files)))
    contents: dict[str, bytes | Path] = dict(zip(_names(files, ending), paths))
    size = sum(path.stat().st_size for path in paths)
    import_files(folder / "hub", f"bench/{name}", contents, lfs=True, durable=False)
    for path in paths:
        path.unlink()
    return f"bench/{name}", size


def _names(files: int, ending: str) -> Iterator[str]:
    for number, total in enumerate(repeat(files, files)):
        yield f"data/train-{number:05}-of-{total:05}.{ending}"


def small_files(folder: Path, count: int) -> tuple[str, int]:
    """`count` jsonl files of ten rows each as the repo `bench/many`; they are regular files, not LFS."""
    rng = random.Random(count)
    contents: dict[str, bytes | Path] = {}
    for number in range(count):
        rows = [json.dumps({"n": number * 10 + k, "text": rng.randbytes(80).hex()}) for k in range(10)]
        contents[f"data/part-{number // 1000:03}/{number:06}.jsonl"] = ("\n".join(rows) + "\n").encode()
    import_files(folder / "hub", "bench/many", contents, lfs=False, durable=False)
    return "bench/many", sum(len(content) for content in contents.values() if isinstance(content, bytes))


def warm(folder: Path) -> None:
    """The repo `bench/warm`: two files that are two items, so that two workers have imported all they need."""
    lines = b'{"text": "something to read"}\n' * 12_000
    import_files(folder / "hub", "bench/warm", {"a.jsonl": lines, "b.jsonl": lines + lines}, lfs=False, durable=False)
