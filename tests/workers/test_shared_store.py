"""Two processes without Ray that want the same at the same time, from one store: the bytes come once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hubserver.faults import FaultyHub

WAIT_S = 120
NO_LOCKS = "import fcntl; fcntl.flock = lambda *_: None\n"
"""As on a network disk that grants every lock to everybody."""
LOAD = (
    "import sys, crucible\n"
    "print('ready', flush=True); sys.stdin.readline()\n"
    "rows = crucible.load_dataset('org/chat', split='train', streaming=True)\n"
    "print(sum(row['id'] for row in rows))\n"
)
FILES, ROWS = 3, 3000


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no-locks"])
def test_two_processes_download_once(hub: FaultyHub, tmp_path: Path, locks: bool) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    noise = np.random.default_rng(3)
    for number in range(FILES):  # of more than 1 MiB each: smaller ones are cheaper twice than a lease
        data = [row.tobytes() for row in noise.integers(0, 256, (ROWS, 1024), dtype=np.uint8)]
        table = pa.table({"id": np.arange(number * ROWS, (number + 1) * ROWS), "noise": data})
        pq.write_table(table, folder / f"train-{number:05d}-of-{FILES:05d}.parquet", compression="none")
    size = sum(path.stat().st_size for path in folder.iterdir())
    hub.import_folder("org/chat", folder)
    hub.add("slow", origin="cdn", piece=256 << 10, wait=0.05)
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "CRUCIBLE_HOME": str(tmp_path / "store")}
    command = [sys.executable, "-c", LOAD if locks else NO_LOCKS + LOAD]
    processes = [
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            out, problem = process.communicate(timeout=WAIT_S)
            assert process.returncode == 0, problem
            assert int(out) == sum(range(FILES * ROWS))
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    assert hub.bytes_sent() == size
