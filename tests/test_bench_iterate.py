"""The loader benchmark still runs, at sizes that say nothing about speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent / "scripts" / "bench" / "iterate.py"


def test_a_library_is_measured_and_one_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    nothing = tmp_path / "python"
    nothing.write_text("#!/bin/sh\nexit 1\n")
    nothing.chmod(0o755)
    sizes = ["--rounds", "1", "--rows", "40", "--seconds", "0.1", "--work", "i", "--case", "decoded rows"]
    argv = [sys.executable, str(BENCH), *sizes, "--only", "crucible,litdata", "--peers", str(nothing)]
    done = subprocess.run(
        [*argv, "--json", "--scratch", str(tmp_path)], capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr
    about, *rows = map(json.loads, done.stdout.splitlines())
    assert about["machine"]["cpu"]
    assert [(row["case"], row["library"], row["crucible_is_times"]) for row in rows] == [
        ("decoded rows", "crucible", 1.0)
    ]
    assert rows[0]["anon_mb"] > 0
    assert "litdata is left out" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_a_library_that_is_not_known_is_wrong_usage() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH), "--only", "spark"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "crucible, datasets" in done.stderr
