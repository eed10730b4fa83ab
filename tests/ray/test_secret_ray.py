"""The cluster's secret on real raylets: changed while readers read, and seen by nobody."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from click.testing import CliRunner

import crucible
from crucible.cache.store import Store
from crucible.cli.app import cli
from crucible.config import Settings
from crucible.session import rotate_secret
from crucible.workers.fetch import NodeShards
from crucible.workers.secret import Secret, keep_secret, load_numbered
from crucible.workers.serve import read_address
from tests.hubserver.faults import FaultyHub
from tests.ray.jobs import chat_files

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

WAIT_S = 60


def known(home: Path) -> Secret:
    found = load_numbered(Store(home))
    assert found is not None
    return found


def status(home: Path, secret: str) -> int:
    agent = read_address(Store(home))
    assert agent is not None
    return httpx.get(
        f"{agent.url}/v1/status", headers={"authorization": f"Bearer {secret}"}, timeout=WAIT_S
    ).status_code


def visible(scratch: Path, homes: list[Path], words: list[bytes]) -> list[str]:
    """Where any of the words can be read by who has no business with it."""
    found = []
    for process in psutil.process_iter():
        for name in ("cmdline", "environ"):
            with suppress(OSError):
                if any(word in Path(f"/proc/{process.pid}/{name}").read_bytes() for word in words):
                    found.append(f"{name} of {process.pid}")
    for folder in (scratch, *homes):
        for path in folder.rglob("*"):
            if path.name not in ("secret", "secret.old") and path.is_file() and not path.is_symlink():
                with suppress(OSError):
                    if any(word in path.read_bytes() for word in words):
                        found.append(str(path))
    return found


def test_readers_go_on_while_the_secret_changes_and_nobody_sees_it(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=6, rows=200))
    nodes = start_nodes(2, hub.endpoint)
    crucible.prefetch("org/chat", split="train", address=nodes.address, replicas=2)
    stores = [Store(home) for home in nodes.homes]
    (manifest,) = stores[0].manifests()
    far = [shard for shard in manifest.shards if stores[1].has_shard(shard)]
    assert far, "node 1 has nothing that node 0 could ask it for"
    hub.add("status", status=500)  # so that nothing but the peer can have it
    words = [known(home).text for home in nodes.homes]
    assert words[0] == words[1]
    before = known(nodes.homes[0])
    problems: list[BaseException] = []
    over, read = threading.Event(), [0]
    source = NodeShards(replace(Settings.from_env(), home=nodes.homes[0], tries=1))

    def keep_reading() -> None:
        try:
            while not over.is_set():
                for shard in far:
                    stores[0].shard_path(shard.key).unlink(missing_ok=True)
                    source.path(manifest, shard)
                    read[0] += 1
        except BaseException as error:
            problems.append(error)

    reader = threading.Thread(target=keep_reading)
    reader.start()
    try:
        for turn in range(3):
            count = read[0]
            told = rotate_secret(nodes.address, overlap_s=120)
            assert (told["number"], told["missed"]) == (before.number + turn + 1, {})
            words.append(known(nodes.homes[0]).text)
            deadline = time.monotonic() + WAIT_S
            while read[0] < count + 2 * len(far) and not problems:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        over.set()
        reader.join(WAIT_S)
    assert problems == []
    assert source.note()["hub_shards"] == 0
    assert len(set(words)) == 4
    for home in nodes.homes:
        assert known(home).text == words[-1]
        assert [status(home, word) for word in words] == [200] * len(words), "the old ones are good for two minutes"
    asked = ["rotate-secret", "--address", nodes.address, "--overlap", "0", "--json"]
    refused = CliRunner().invoke(cli, asked, input="n\n")
    assert (refused.exit_code, known(nodes.homes[0]).text) == (2, words[-1])
    done = CliRunner().invoke(cli, [*asked, "-y"])
    assert (done.exit_code, json.loads(done.stdout)["missed"]) == (0, {}), done.output
    words.append(known(nodes.homes[1]).text)
    for home in nodes.homes:
        assert [status(home, word) for word in words] == [401] * (len(words) - 1) + [200]
        for path in home.glob("secret*"):
            assert path.stat().st_mode & 0o777 == 0o600
    assert visible(nodes.scratch, [], [b"crucible-agent"]), "Ray's logs are elsewhere: this would show nothing"
    assert visible(nodes.scratch, nodes.homes, [word.encode() for word in words]) == []


def test_a_coordinator_that_missed_a_change_learns_it_from_the_agents(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    import ray

    from crucible.workers.tasks import coordinator

    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=2, rows=20))
    nodes = start_nodes(2, hub.endpoint)
    crucible.prefetch("org/chat", split="train", address=nodes.address)
    old = known(nodes.homes[0])
    told = rotate_secret(nodes.address, overlap_s=600)
    new = known(nodes.homes[0])
    assert new.number == told["number"] == old.number + 1
    keep_secret(Store(nodes.homes[0]), old.text, old.number)  # as if this node had been away
    ray.kill(coordinator(), no_restart=False)
    deadline = time.monotonic() + WAIT_S
    while known(nodes.homes[0]) != new:
        assert time.monotonic() < deadline, json.dumps([known(home).number for home in nodes.homes])
        time.sleep(0.1)
    assert [status(home, new.text) for home in nodes.homes] == [200, 200]


def test_a_node_whose_secret_others_may_read_is_refused_by_name_and_the_others_go_on(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=2, rows=20))
    nodes = start_nodes(2, hub.endpoint)
    open_home = tmp_path / "open"
    keep_secret(Store(open_home), "known-to-all")
    (open_home / "secret").chmod(0o644)
    nodes.join(open_home)
    report = crucible.prefetch("org/chat", split="train", address=nodes.address, replicas=3)
    assert report.rows == 40
    found = {node["alive"]: node for node in crucible.session.nodes(nodes.address)}
    assert f"{open_home}/secret: has mode 0644" in found[False]["problem"]
    assert found[True]["shards"]
    assert load_text(open_home) == "known-to-all 1", "it was not written over"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command on this machine")
def test_a_cluster_with_tls_listens_where_it_may_and_keeps_its_keys(hub: FaultyHub, tmp_path: Path) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=1, rows=20))
    home = tmp_path / "home"
    environment = {"HF_ENDPOINT": hub.endpoint, "CRUCIBLE_HOME": str(home), "CRUCIBLE_TLS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "crucible", "prefetch", "org/chat", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment, "CRUCIBLE_AGENT_PORT": "20100-20900"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 20
    agent = read_address(Store(home))
    assert agent is not None
    where, port = agent.url.rsplit(":", 1)
    assert where == "https://127.0.0.1"
    assert 20100 <= int(port) <= 20900
    modes = {path.name: path.stat().st_mode & 0o777 for path in (home / "tls").iterdir()}
    assert modes.keys() >= {"ca.crt", "ca.key", "node.crt", "node.key"}
    assert modes["ca.key"] == modes["node.key"] == 0o600


def load_text(home: Path) -> str:
    return (home / "secret").read_text().strip()
