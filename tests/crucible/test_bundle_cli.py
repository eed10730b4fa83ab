"""Bundles as a person or a script meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from crucible.cli.app import cli
from tests.crucible.bundle_cases import Sides, everything
from tests.crucible.bundle_cases import sides as sides

KEYS = {"bundle", "lock", "repo", "commit", "config", "splits", "shards", "files", "bytes", "reused"}


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args, prog_name="crucible", env={"COLUMNS": "80"})


def test_json_has_the_keys_that_are_documented(sides: Sides, tmp_path: Path) -> None:
    sides.at(sides.outside)
    sent = json.loads(run("export", "org/data", "--out", str(tmp_path / "b"), "--json", "-q").stdout)
    seen = json.loads(run("verify", "--bundle", str(tmp_path / "b"), "--json", "-q").stdout)
    sides.at(sides.inside, offline=True)
    came = json.loads(run("import", str(tmp_path / "b"), "--json", "-q").stdout)
    for told in (sent, seen, came):
        assert set(told) == KEYS
        assert [split["rows"] for split in told["splits"]] == [600, 50]
        assert set(told["splits"][0]) == {"split", "manifest", "rows"}
        assert told["lock"] == sent["lock"]
    assert len(everything()["train"][1]) == 600


def test_a_person_reads_what_went_and_came_in_80_columns(sides: Sides, tmp_path: Path) -> None:
    sides.at(sides.outside)
    done = run("export", "org/data", "--out", str(tmp_path / "b.tar"))
    assert done.exit_code == 0
    assert "rows    train 600, test 50" in done.stdout
    assert "started" in done.stderr
    sides.at(sides.inside, offline=True)
    taken = run("import", str(tmp_path / "b.tar"))
    lines = [line for line in taken.stdout.splitlines() if not line.startswith("bundle")]
    assert max(map(len, lines)) <= 80
    assert "there already" in run("import", str(tmp_path / "b.tar")).stdout


def test_a_tar_goes_through_a_pipe_and_stdout_has_nothing_else(sides: Sides, tmp_path: Path) -> None:
    sides.at(sides.outside)
    command = [sys.executable, "-m", "crucible"]
    sent = subprocess.run([*command, "export", "org/data", "--out", "-"], capture_output=True, timeout=60)
    assert sent.returncode == 0, sent.stderr
    run("export", "org/data", "--out", str(tmp_path / "b.tar"))
    assert sent.stdout == (tmp_path / "b.tar").read_bytes()
    inside = {**os.environ, "CRUCIBLE_HOME": str(sides.inside), "HF_HUB_OFFLINE": "1"}
    taken = subprocess.run(
        [*command, "import", "-", "--json"], input=sent.stdout, capture_output=True, timeout=60, env=inside
    )
    assert taken.returncode == 0, taken.stderr
    assert json.loads(taken.stdout)["shards"] > 3
    cut = subprocess.run(
        [*command, "verify", "--bundle", "-"], input=sent.stdout[:-600], capture_output=True, timeout=60, env=inside
    )
    assert cut.returncode == 1
    assert b"Error: bundle standard input" in cut.stderr


def test_a_lock_file_alone_is_small_and_canonical(sides: Sides, tmp_path: Path) -> None:
    sides.at(sides.outside)
    one = run("export", "org/data", "--lock-only", "--out", str(tmp_path / "one.json"), "--json", "-q")
    two = run("export", "org/data", "--lock-only", "--out", str(tmp_path / "two.json"), "-q")
    assert (one.exit_code, two.exit_code) == (0, 0)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    told = json.loads((tmp_path / "one.json").read_bytes())
    assert told["digest"] == json.loads(one.stdout)["lock"]
    assert told["commit"] == json.loads(one.stdout)["commit"]
    files = [file["path"] for manifest in told["manifests"] for item in manifest["items"] for file in item["files"]]
    assert files == ["data/a.jsonl", "data/b.jsonl", "test.jsonl"]


def test_what_is_wrong_is_one_line_and_exit_code_1_and_wrong_usage_is_2(sides: Sides, tmp_path: Path) -> None:
    sides.at(sides.outside)
    run("export", "org/data", "--out", str(tmp_path / "b"), "-q")
    shard = sorted((tmp_path / "b" / "shards").rglob("*.arrow"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    seen = run("verify", "--bundle", str(tmp_path / "b"), "-q")
    sides.at(sides.inside, offline=True)
    for done in (seen, run("import", str(tmp_path / "b"), "-q")):
        assert done.exit_code == 1
        assert done.stderr.count("\n") == 1
        assert shard.name in done.stderr
    for args in (
        ("export", "org/data"),
        ("export", "org/data", "--out", "-", "--json"),
        ("verify", "org/data", "--bundle", "x"),
        ("prefetch",),
        ("prefetch", "org/data", "--lock", "x"),
        ("prefetch", "--lock", "x", "--split", "train"),
    ):
        assert run(*args).exit_code == 2, args
