"""A /dev/shm of a few megabytes, as containers have it: what crucible sends through Ray is small, so it is enough."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = "mount -t tmpfs -o size=4m tmpfs /dev/shm && exec {python} -m crucible prefetch {repo} --json"
WAIT_S = 180


@pytest.mark.slow
def test_a_prefetch_works_on_a_small_shm_and_the_warning_names_it(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a /dev/shm of its own needs the right to mount")
    repo = tmp_path / "repo"
    repo.mkdir()
    for number in range(3):
        lines = (json.dumps({"id": number * 5000 + at, "text": "x" * 1000}) + "\n" for at in range(5000))
        (repo / f"train-{number}.jsonl").write_text("".join(lines))
    environment = {**os.environ, "CRUCIBLE_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", SCRIPT.format(python=sys.executable, repo=repo)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    if "unshare failed" in done.stderr:
        pytest.skip("no mount namespace here")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["splits"][0]["rows"] == 15_000
    assert "/dev/shm" in done.stderr
