"""The admin's commands on a running cluster: what they do to its nodes, what they print, when they end with 1 or 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import crucible
from crucible.cache.store import Store
from crucible.cli.app import cli
from crucible.cluster import manage
from crucible.hashing import shard_digest
from crucible.manifest import Manifest
from crucible.workers.serve import read_address
from tests.hubserver.faults import FaultyHub
from tests.ray.jobs import chat_files, file_bytes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

OPERATION = {
    *("operation", "kind", "phase", "remakes", "remade", "copies", "copied", "drops", "dropped", "bytes", "bytes_done"),
    *("wrong", "problems", "left", "findings", "seconds", "waiting_for", "moved"),
}


class Shell:
    """Commands against one cluster, by this process, which is connected to it."""

    def __init__(self, nodes: Any) -> None:
        self._where = ("--address", nodes.address)
        self.json("repair", "--dry-run")  # so that the coordinator forgets what earlier tests took from its stores

    def json(self, *args: str, code: int = 0) -> list[dict[str, Any]]:
        result = CliRunner().invoke(cli, [*args, *self._where, "--json"])
        assert result.exit_code == code, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    def table(self, *args: str, code: int = 0) -> str:
        """What a person sees in 80 columns."""
        result = CliRunner().invoke(cli, [*args, *self._where], env={"COLUMNS": "80"})
        assert result.exit_code == code, result.output
        lines = [line for line in result.stdout.splitlines() if not line.startswith("store ")]  # a path may be long
        assert [line for line in lines if len(line) > 80] == []
        return str(result.output)


def held(home: Path, manifest: Manifest) -> list[int]:
    """The shards that a store has, with the right bytes."""
    store = Store(home)
    return [
        number
        for number, shard in enumerate(manifest.shards)
        if store.has_shard(shard) and shard_digest(store.shard_path(shard.key)) == shard.digest
    ]


def test_an_admin_looks_repairs_and_empties_a_cluster(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=6, rows=2000))
    nodes = start_nodes(2, hub.endpoint)
    crucible.prefetch("org/chat", split="train", address=nodes.address)
    (manifest,) = Store(nodes.homes[0]).manifests()
    count = len(manifest.shards)
    shell = Shell(nodes)

    # what there is
    listed = shell.json("nodes")
    assert {"node", "url", "alive", "state", "rack", "shards", "bytes", "free_bytes", "usage", "notes"} <= set(
        listed[0]
    )
    assert sum(one["shards"] for one in listed) == count
    assert listed[0]["node"][:8] in shell.table("nodes")
    (status,) = shell.json("status")
    told = status["cluster"]
    assert (told["nodes"], told["drained"], told["shards"], told["lost"], told["under"]) == (2, 0, count, 0, 0)
    (line,) = told["manifests"]
    assert (line["manifest"], line["replicas"], line["copies"]) == (manifest.id, 1, count)
    assert "2 nodes" in shell.table("status")
    jobs = shell.json("jobs", "--limit", "1")
    assert (jobs[0]["repo"], jobs[0]["phase"], jobs[0]["replicas"]) == ("org/chat", "finished", 1)
    assert "org/chat" in shell.table("jobs")
    page = shell.json("locate", "org/chat", "--limit", "2")
    assert [(one["shard"], len(one["nodes"]), len(one["urls"])) for one in page] == [(0, 1, 1), (1, 1, 1)]
    assert f"and {count - 2} more" in shell.table("locate", "org/chat", "--limit", "2")

    # the same by this node's agent, for a shell that has no Ray
    asked = {name: manage.near(name) for name in ("summary", "nodes", "jobs")}
    assert [one["node"] for one in asked["nodes"]] == [one["node"] for one in listed]
    assert asked["jobs"][-1] == jobs[0]
    assert {**asked["summary"], "operations": []} == {**told, "operations": []}
    by_agent = json.loads(CliRunner().invoke(cli, ["status", "--json"]).stdout)
    assert by_agent.keys() == status.keys()
    assert by_agent["manifests"] == status["manifests"]
    assert by_agent["shards"] == status["shards"] == by_agent["cluster"]["manifests"][0]["here"]
    monkeypatch.setattr("crucible.cluster.look.BIG_BYTES", 0)  # then the coordinator's figures are shown
    assert json.loads(CliRunner().invoke(cli, ["status", "--json"]).stdout)["manifests"] == status["manifests"]
    assert manage.near("start_drain", [listed[0]["node"]]) is None, "nothing that changes anything"
    assert manage.near("locate", [manifest.id], 0, 2)["shards"] == page

    # more replicas, and fewer again
    planned = shell.json("repair", "org/chat", "--replicas", "2", "--dry-run")[0]
    assert (set(planned), planned["phase"], planned["copies"]) == (OPERATION, "planned", count)
    assert shell.json("status")[0]["cluster"]["manifests"][0]["replicas"] == 1, "a dry run changes nothing"
    done = shell.json("repair", "org/chat", "--replicas", "2", "-q")[0]
    assert (set(done), done["phase"], done["copied"], done["left"]) == (OPERATION, "done", count, 0)
    assert [held(home, manifest) for home in nodes.homes] == [list(range(count))] * 2
    assert shell.table("repair") == "nothing to do\n"
    assert "-y" in shell.table("repair", "--trim", "--replicas", "1", code=2)
    shell.table("repair", "--trim", "--replicas", "1", "-y")
    assert sorted(number for home in nodes.homes for number in held(home, manifest)) == list(range(count))

    # a flipped byte is found, named and healed: from the other replica
    shell.json("repair", "org/chat", "--replicas", "2", "-q")
    victim = Store(nodes.homes[1]).shard_path(manifest.shards[2].key)
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 3] ^= 4
    victim.write_bytes(raw)
    hub.clear_log()
    assert "wrong bytes" in shell.table("verify", "--deep", "-q", code=1)
    (checked,) = shell.json("verify", "org/chat", "--deep", "--repair", "-q")
    assert set(checked) == {"checked", "bytes", "findings", "left", "problems"}
    assert (checked["left"], checked["problems"]) == (0, [])
    assert [held(home, manifest) for home in nodes.homes] == [list(range(count))] * 2
    assert file_bytes(hub) == 0

    # a node that goes, by the name of its own store
    shell.json("repair", "--trim", "--replicas", "1", "-y", "-q")
    own = read_address(Store(nodes.homes[0]))
    assert own is not None
    mine = len(held(nodes.homes[0], manifest))
    drained = shell.json("drain", "--self", "--grace", "60", "-q")[0]
    assert (drained["copied"], drained["left"]) == (mine, 0)
    assert held(nodes.homes[1], manifest) == list(range(count))
    assert "drained" in shell.table("nodes")
    assert shell.json("drain", "--self", "--undo") == [{"undrained": [own.node]}]
    assert "drained" not in shell.table("nodes")
    assert shell.table("drain", "nobody", code=2).count("no node") == 1


def test_what_is_pinned_stays_and_what_is_evicted_is_given_up(hub: FaultyHub, tmp_path: Path, start_nodes: Any) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=4, rows=2000))
    nodes = start_nodes(2, hub.endpoint)
    crucible.prefetch("org/chat", split="train", address=nodes.address, replicas=2)
    (manifest,) = Store(nodes.homes[0]).manifests()
    shell = Shell(nodes)
    assert shell.json("pin", "org/chat", "--note", "run 17")[0]["nodes"] == 2
    assert shell.json("status")[0]["cluster"]["manifests"][0]["pinned"] is True
    kept = shell.json("evict", "org/chat", "--node", shell.json("nodes")[0]["node"][:10], "-y")[0]
    assert [(one["shards"], one["kept"]) for one in kept["nodes"]] == [(0, len(manifest.shards))]
    shell.table("unpin", manifest.id[:12])
    dry = shell.json("evict", "org/chat", "--dry-run")[0]
    assert len(dry["nodes"]) == 2
    assert sum(one["shards"] for one in dry["nodes"]) == 2 * len(manifest.shards)
    assert "-y" in shell.table("evict", "org/chat", code=2)
    gone = shell.json("evict", "org/chat", "-y")[0]
    assert gone["nodes"] == dry["nodes"], "their source answers, so even the last copies go"
    assert [held(home, manifest) for home in nodes.homes] == [[], []]
    hub.clear_log()
    assert shell.table("repair") == "nothing to do\n", "it was given up"
    (line,) = shell.json("status")[0]["cluster"]["manifests"]
    assert (line["replicas"], line["lost"], line["copies"]) == (0, len(manifest.shards), 0)
    assert shell.json("gc", "--dry-run")[0]["dry_run"] is True
    # a prefetch wants it again
    crucible.prefetch("org/chat", split="train", address=nodes.address)
    assert sorted(number for home in nodes.homes for number in held(home, manifest)) == list(
        range(len(manifest.shards))
    )
    assert shell.json("status")[0]["cluster"]["manifests"][0]["replicas"] == 1
