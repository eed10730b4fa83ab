"""The benchmark of early reading still runs, at sizes that say nothing about speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "scripts" / "bench" / "early.py"


@pytest.mark.slow
def test_every_way_to_the_first_batch_begins_with_the_same_row(tmp_path: Path) -> None:
    argv = ["--rounds", "1", "--rows", "1200", "--only", "alone", "--json", "-q", "--scratch", str(tmp_path)]
    done = subprocess.run([sys.executable, str(BENCH), *argv], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    _, *rows = map(json.loads, done.stdout.splitlines())
    assert [row["method"] for row in rows] == ["one shard", "alone", "whole"]
    assert list(tmp_path.iterdir()) == []
