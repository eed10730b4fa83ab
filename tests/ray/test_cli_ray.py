"""The commands that need Ray: a prefetch that embeds it, and looking at a running cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from crucible import load_dataset
from crucible.cli.app import cli
from crucible.hashing import sha256_file
from tests.hubserver.faults import FaultyHub

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

ROWS = b"".join(b'{"n": %d}\n' % n for n in range(1000))


def crucible(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "crucible", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def kept(home: Path) -> dict[str, str]:
    """What a store holds of data, by its path there."""
    files = (path for kind in ("shards", "manifests", "refs") for path in (home / kind).rglob("*.*") if path.is_file())
    return {str(path.relative_to(home)): sha256_file(path) for path in files}


def test_an_embedded_prefetch_leaves_the_bytes_of_a_process_without_ray_and_a_second_one_moves_nothing(
    hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.import_files("org/toy", {"train.jsonl": ROWS, "test.jsonl": ROWS[:90]})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "plain"))
    load_dataset("org/toy")
    hub.clear_log()
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "ray"))
    first = crucible("prefetch", "org/toy", "--json")
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    assert (told["rows"], told["hub_ratio"]) == (1010, 1.0)
    assert told["requests"] == len(hub.log)
    assert sum(node["shards"] for node in told["nodes"]) == sum(split["shards"] for split in told["splits"])
    assert re.fullmatch(r"org/toy: started\norg/toy: done in \d+\.\d s\n", first.stderr)

    assert kept(tmp_path / "ray") == kept(tmp_path / "plain")
    assert len(kept(tmp_path / "ray")) >= 5

    second = crucible("prefetch", "org/toy", "-q")
    assert second.returncode == 0, second.stderr
    assert re.search(r"^from the Hub +0 B of ", second.stdout, re.MULTILINE)
    assert second.stderr == ""


def test_ctrl_c_ends_a_prefetch_with_130(hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.import_files("org/toy", {"train.jsonl": ROWS})
    hub.add("stall", path="*train.jsonl")
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    child = subprocess.Popen(
        [sys.executable, "-m", "crucible", "prefetch", "org/toy"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )
    deadline = time.monotonic() + 90
    while not hub.requests("*train.jsonl") and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    try:
        stdout, stderr = child.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGABRT)  # it says where all of its threads are
        stdout, stderr = child.communicate(timeout=20)
    assert child.returncode == 130, stderr
    assert "Interrupted" in stderr
    assert "Traceback" not in stderr
    assert stdout == ""


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nonsense"])
def test_a_wrong_address_is_one_line_and_soon(address: str) -> None:
    result = CliRunner().invoke(cli, ["nodes", "--address", address])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: no Ray cluster at {address!r}: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("noted", "said"),
    [("127.0.0.1:1", "Connection refused"), (None, "Could not find any running Ray instance")],
)
def test_auto_without_a_cluster_gives_one_line_at_once(tmp_path: Path, noted: str | None, said: str) -> None:
    """Ray's note of its newest cluster outlives the cluster; Ray itself would then try for minutes."""
    if any(process.info["name"] == "gcs_server" for process in psutil.process_iter(["name"])):
        pytest.skip("another Ray cluster runs on this machine, and `auto` finds it")
    if noted:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(noted)
    done = crucible("prefetch", "org/toy", "--address", "auto", "-q", RAY_TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert re.fullmatch(r"Error: no Ray cluster at 'auto': .*\n", done.stderr)
    assert said in done.stderr


def test_a_running_cluster_is_filled_and_looked_at(start_nodes: Any, hub: FaultyHub) -> None:
    hub.import_files("org/toy", {f"train-{n:05d}-of-00004.jsonl": ROWS for n in range(4)})
    nodes = start_nodes(2, hub.endpoint)
    where = ("--address", nodes.address)

    def ask(*args: str) -> list[dict[str, Any]]:
        reply = crucible(*args, *where, "--json")
        assert reply.returncode == 0, reply.stderr
        return [json.loads(line) for line in reply.stdout.splitlines()]

    (report,) = ask("prefetch", "org/toy", "-q")
    assert report["rows"] == 4000
    listed = ask("nodes")
    assert [node["alive"] for node in listed] == [True, True]
    assert sum(node["shards"] for node in listed) == sum(split["shards"] for split in report["splits"])
    located = ask("locate", "org/toy")
    assert {url for shard in located for url in shard["urls"]} <= {node["url"] for node in listed}
    assert all(shard["urls"] for shard in located)
    (status,) = ask("status")
    newest = status["jobs"][-1]
    assert (newest["phase"], newest["repo"]) == ("finished", "org/toy")
    for command in (["nodes"], ["locate", "org/toy"], ["status"]):
        shown = crucible(*command, *where, COLUMNS="80")
        assert shown.returncode == 0, shown.stderr
        lines = [line for line in shown.stdout.splitlines() if not line.startswith("store ")]  # a path may be long
        assert max(map(len, lines)) <= 80, shown.stdout
    same = ("org/toy", "--data-files", "train-00003*", "--set", "on_mixed_types=error", "--columns", "n")
    assert "org/toy: is not in" in crucible("locate", *same, *where).stderr
    assert ask("prefetch", *same, "-q")[0]["rows"] == 1000
    assert all(shard["urls"] for shard in ask("locate", *same))
