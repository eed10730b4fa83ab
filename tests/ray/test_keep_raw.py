"""`prefetch --keep-raw` in a real Ray: the official client then has the source files, and the next job too."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from crucible.cli.app import cli
from tests.hubserver.faults import FaultyHub
from tests.hubserver.official import run_client
from tests.ray.conftest import empty

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

ROWS = b"".join(b'{"n": %d}\n' % n for n in range(200_000))


def test_raw_files_are_kept_for_the_official_client_and_serve_a_lost_store(hub: FaultyHub, start_nodes: Any) -> None:
    commit = hub.import_files("org/toy", {"train.jsonl": ROWS, "test.jsonl": ROWS[:90], "unused.bin": b"x" * 99})
    nodes = start_nodes(2, hub.endpoint)
    home = nodes.hf_home

    def prefetch(*args: str) -> dict[str, object]:
        done = CliRunner().invoke(cli, ["prefetch", "org/toy", "--json", "-q", "--address", nodes.address, *args])
        assert done.exit_code == 0, done.stderr
        report: dict[str, object] = json.loads(done.stdout)
        return report

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
    for store in nodes.homes:
        empty(store)
    again = prefetch()
    assert again["hub_ratio"] == 0.0
    counts = again["counts"]
    assert isinstance(counts, dict)
    assert (counts["cached_bytes"], counts["hub_bytes"]) == (len(ROWS) + 90, 0)
    assert not hub.requests("*/resolve/*")
