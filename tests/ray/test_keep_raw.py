"""`prefetch --keep-raw` in a real Ray: the official client then has the source files, and the next job too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hubserver.faults import FaultyHub
from tests.hubserver.official import run_client

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

ROWS = b"".join(b'{"n": %d}\n' % n for n in range(200_000))


def prefetch(*args: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "crucible", "prefetch", "org/toy", "--json", "-q", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report


def test_raw_files_are_kept_for_the_official_client_and_serve_a_lost_store(
    hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.import_files("org/toy", {"train.jsonl": ROWS, "test.jsonl": ROWS[:90], "unused.bin": b"x" * 99})
    home, store = tmp_path / "client", tmp_path / "store"
    home.mkdir()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("CRUCIBLE_HOME", str(store))
    first = prefetch("--keep-raw")
    assert (first["commit"], first["hub_ratio"]) == (commit, 1.0)
    hub.clear_log()
    run_client(
        hub,
        home,
        f"""
        from huggingface_hub import hf_hub_download, scan_cache_dir
        for name, size in (("train.jsonl", {len(ROWS)}), ("test.jsonl", 90)):
            path = hf_hub_download("org/toy", name, repo_type="dataset", revision={commit!r})
            assert len(open(path, "rb").read()) == size
            assert hf_hub_download("org/toy", name, repo_type="dataset", local_files_only=True) == path
        info = scan_cache_dir()
        assert info.warnings == [] and not info.incomplete_files
        assert [revision.refs for repo in info.repos for revision in repo.revisions] == [{{"main"}}]
        """,
    )
    assert hub.log == []
    shutil.rmtree(store)
    again = prefetch()
    assert again["hub_ratio"] == 0.0
    counts = again["counts"]
    assert isinstance(counts, dict)
    assert (counts["cached_bytes"], counts["hub_bytes"]) == (len(ROWS) + 90, 0)
    assert not hub.requests("*/resolve/*")
