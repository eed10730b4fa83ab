"""A store with a split of several shards, and what may happen to their files."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crucible.cache.store import Store
from crucible.config import Settings
from crucible.hashing import shard_digest
from crucible.manifest import Manifest
from crucible.session import data_request, local_job

FILES, ROWS = 4, 400


def lay_out(folder: Path, files: int = FILES, rows: int = ROWS) -> Path:
    """A repo that is a folder, its rows say its name. Each file is big enough to be an item, and becomes a shard."""
    folder.mkdir(parents=True)
    for number in range(files):
        lines = (
            json.dumps({"id": number * rows + at, "text": f"{folder.name[0]}{number} {at} " * 100}) + "\n"
            for at in range(rows)
        )
        (folder / f"train-{number:03d}.jsonl").write_text("".join(lines))
    return folder


def make(folder: Path, home: Path, **settings: Any) -> tuple[Settings, Manifest]:
    """All of a repo in a store."""
    made = Settings(home, shard_bytes=4 << 20, **settings)
    manifests, _ = local_job(data_request(str(folder), None, split="train", revision=None, columns=None), made)
    return made, manifests[0]


def flip(path: Path, seed: int) -> int:
    """Change one byte somewhere in the file. Returns its offset."""
    with path.open("r+b") as file:
        at = random.Random(seed).randrange(path.stat().st_size)
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << seed % 8)]))
    return at


def wrong(store: Store, manifest: Manifest) -> list[str]:
    """Keys of visible shards whose bytes are not those of the manifest."""
    expected = {shard.key: shard.digest for shard in manifest.shards}
    return [key for key, _ in store.shards() if shard_digest(store.shard_path(key)) != expected.get(key)]


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of its own of `size` bytes; the test is skipped where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("a small tmpfs needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], timeout=20, check=True)
