"""The ingest benchmark still runs, at sizes that say nothing about speed, and finds the peers' rows equal to ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent / "scripts" / "bench" / "ingest.py"
TINY = ["--rounds", "1", "--rows", "60", "--small-files", "12", "--json", "-q"]


def run(*argv: str) -> tuple[dict[str, object], list[dict[str, object]]]:
    """(about the machine, the rows)"""
    done = subprocess.run([sys.executable, str(BENCH), *argv], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    first, *rows = map(json.loads, done.stdout.splitlines())
    return first, rows


def test_ours_and_the_peer_are_found_to_read_the_same_rows(tmp_path: Path) -> None:
    _, rows = run(*TINY, "--scratch", str(tmp_path), "--work", "t,many", "--only", "load_dataset,num_proc=1,limit")
    assert [(row["work"], row["rows"]) for row in rows] == [*[("t", 60)] * 3, *[("many", 120)] * 2]
    assert all(row["times_datasets"] for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_is_not_there_is_wrong_usage() -> None:
    done = subprocess.run([sys.executable, str(BENCH), "--only", "spark"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "crucible.load_dataset" in done.stderr
