"""The admin's commands on one node's store, without Ray: what they say, in 80 columns and as JSON; when they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from crucible.cache.store import Store
from crucible.cli.app import cli
from crucible.cluster import manage
from crucible.manifest import Manifest
from tests.hubserver.faults import FaultyHub


def run(*args: str) -> Result:
    result = CliRunner().invoke(cli, args, prog_name="crucible", env={"COLUMNS": "80"})
    assert "--json" in args or [line for line in result.stdout.splitlines() if len(line) > 80] == []
    return result


def told(*args: str, code: int = 0) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def home(hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with a dataset of three shards, and one of one."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        table = pa.table({"id": list(range(40_000)), "text": [f"{number}{n}" * 9 for n in range(40_000)]})
        pq.write_table(table, folder / f"train-{number:05d}-of-00003.parquet", compression="none")
    hub.import_folder("org/big", folder)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "test.csv").write_text("a,b\n1,2\n")
    hub.import_folder("org/small", tmp_path / "small")
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for repo, split in (("org/big", "train"), ("org/small", "test")):
        assert run("data", "head", repo, "--split", split, "-n", "1", "-q", "--json").exit_code == 0
    return tmp_path / "home"


def manifest_of(home: Path, repo: str = "org/big") -> Manifest:
    return next(one for one in Store(home).manifests() if one.repo.repo_id == repo)


def spoil(home: Path, number: int = 1) -> str:
    """Flip a byte of a shard; its key."""
    key = manifest_of(home).shards[number].key
    path = Store(home).shard_path(key)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    return key


def test_a_sound_store_verifies_and_a_flipped_byte_is_named_put_aside_and_brought_anew(home: Path) -> None:
    sound = told("verify", "--deep")
    assert set(sound) == {"checked", "bytes", "findings", "left", "problems"}
    assert (sound["checked"], sound["findings"], sound["left"]) == (4, [], 0)
    key = spoil(home)
    assert told("verify", "org/small", "--deep")["checked"] == 1, "the other one was not looked at"
    wrong = told("verify", "org/big", "--deep", code=1)
    (finding,) = wrong["findings"]
    assert (finding["kind"], finding["key"], finding["quarantined"]) == ("wrong bytes", key, True)
    assert set(finding) == {"node", "kind", "key", "path", "expected", "found", "manifest", "quarantined"}
    assert wrong["left"] == 1
    shown = run("verify", "org/big")
    assert shown.exit_code == 1, "it is missing until it is brought anew"
    assert "missing" in shown.stdout
    spoil(home, number=2)
    mended = run("verify", "--deep", "--repair")
    assert mended.exit_code == 0
    assert "wrong bytes" in mended.stdout
    assert told("verify", "--deep")["findings"] == []


def test_what_is_evicted_was_asked_about_and_is_counted(home: Path) -> None:
    refused = run("evict", "org/big")
    assert refused.exit_code == 2
    assert "-y" in refused.stderr
    assert run("evict").exit_code == 2
    assert run("evict", "org/big", "--bytes", "1MB").exit_code == 2
    dry = told("evict", "org/big", "--dry-run")
    assert dry["dry_run"] is True
    assert [(one["node"], one["shards"], one["kept"]) for one in dry["nodes"]] == [("local", 3, 0)]
    assert told("locate", "org/small", "--split", "test")["nodes"] == ["local"]
    assert told("verify")["checked"] == 4, "a dry run removes nothing"
    gone = told("evict", "org/big", "-y")
    assert gone["nodes"] == dry["nodes"]
    assert told("verify")["checked"] == 1
    assert run("evict", "org/none", "-y").exit_code == 2, "nothing of that name"


def test_what_is_pinned_stays(home: Path) -> None:
    pinned = told("pin", "org/big", "--note", "run 17")
    assert pinned == {"manifests": [manifest_of(home).id], "nodes": 1, "problems": {}}
    (one,) = [told("pin")]
    assert (one["manifest"], one["note"]) == (manifest_of(home).id, "run 17")
    assert "run 17" in run("pin").stdout
    kept = told("evict", "org/big", "-y")
    assert [(line["shards"], line["kept"]) for line in kept["nodes"]] == [(0, 3)]
    assert told("unpin", manifest_of(home).id[:10])["manifests"] == [manifest_of(home).id]
    assert told("evict", "--bytes", "1KB", "-y")["nodes"][0]["shards"] >= 1


def test_litter_is_listed_and_removed_when_somebody_agreed(home: Path) -> None:
    assert told("gc", "--dry-run") == {"dry_run": True, "litter": [], "problems": {}}
    assert run("gc").stdout == "nothing to remove\n"
    (home / "tmp" / "nohost-1-dead").mkdir(parents=True)
    item = next((home / "items").glob("*/*.json"))
    shards = json.loads(item.read_bytes())["shards"]
    for shard in shards:
        Store(home).shard_path(shard["key"]).unlink()
    dry = told("gc", "--dry-run")
    assert {"record without shards"} <= {one["kind"] for one in dry["litter"]}
    assert set(dry["litter"][0]) == {"node", "path", "kind", "bytes", "why"}
    refused = run("gc")
    assert refused.exit_code == 2
    assert "-y" in refused.stderr
    assert item.exists()
    assert told("gc", "-y")["litter"] == dry["litter"]
    assert not item.exists()


def test_where_shards_are_is_shown_by_the_page(home: Path) -> None:
    lines = run("locate", "org/big", "--limit", "0", "--json").stdout.splitlines()
    assert [json.loads(line)["shard"] for line in lines] == [0, 1, 2]
    assert set(json.loads(lines[0])) == {"split", "shard", "key", "rows", "size", "nodes", "urls"}
    Store(home).shard_path(json.loads(lines[0])["key"]).unlink()
    shown = run("locate", "org/big", "--limit", "2").stdout
    assert "3 shards" in shown
    assert "1 not there" in shown
    assert "and 1 more" in shown
    assert "nobody" in shown
    missing = run("locate", "org/none")
    assert missing.exit_code == 1
    assert "org/none: is not in" in missing.stderr


@pytest.mark.parametrize("args", [("repair", "--after", "soon"), ("drain",), ("drain", "x", "--self")])
def test_what_makes_no_sense_is_refused_before_anything_is_asked(args: tuple[str, ...]) -> None:
    assert run(*args).exit_code == 2


def test_a_node_without_an_agent_cannot_drain_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path))
    result = run("drain", "--self")
    assert result.exit_code == 1
    assert "no agent" in result.stderr


@pytest.mark.parametrize("command", ["status", "verify", "gc", "pin", "pin org/big", "evict --bytes 1KB -y"])
def test_a_home_that_is_no_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    (tmp_path / "file").write_text("not a store")
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    refused = run(*command.split())
    assert refused.exit_code == 1
    assert f"{tmp_path / 'file'} (on " in refused.stderr
    assert "use a CRUCIBLE_HOME" in refused.stderr


def test_what_is_only_untidy_does_not_count_as_wrong(home: Path) -> None:
    assert run("evict", "org/big", "-y").exit_code == 0
    shown = run("verify")
    assert shown.exit_code == 0
    assert "0 found wrong or lost; 3 things noted" in shown.stdout, "records of items that are not here"
    assert run("pin").stdout == "nothing is pinned on this node\n"


def test_when_a_cluster_repairs_is_said_back(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[float | None] = []
    monkeypatch.setattr(manage, "set_repair_after", lambda seconds, _: said.append(seconds))
    assert run("repair", "--after", "600").stdout == "the cluster repairs 600 s after a loss\n"
    assert told("repair", "--after", "off") == {"repair_after": None}
    assert said == [600.0, None]


def test_a_new_secret_is_not_made_where_nobody_can_be_asked() -> None:
    refused = run("rotate-secret")
    assert refused.exit_code == 2
    assert "give -y to go ahead" in refused.stderr
    assert "dry-run" not in refused.stderr
