"""An agent that hangs, as a stopped process does: it takes what is sent to it and never answers."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import crucible
from crucible.cache.store import Store
from crucible.cli.app import cli
from crucible.cluster.coordinator import reach_coordinator
from crucible.cluster.roster import AGENT_TIMEOUT_S
from crucible.workers.serve import AgentAddress, read_address
from tests.hubserver.faults import FaultyHub
from tests.ray.jobs import chat_files, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@contextmanager
def stopped(home: Path) -> Iterator[AgentAddress]:
    """The agent of this store is stopped inside."""
    agent = read_address(Store(home))
    assert agent is not None
    os.kill(agent.pid, signal.SIGSTOP)
    try:
        yield agent
    finally:
        os.kill(agent.pid, signal.SIGCONT)


def shown(nodes: Any, node: str) -> dict[str, Any]:
    """The node's line of `crucible nodes`."""
    result = CliRunner().invoke(cli, ["nodes", "--address", nodes.address, "--json"])
    assert result.exit_code == 0, result.output
    found = {line["node"]: line for line in map(json.loads, result.stdout.splitlines())}
    assert len(found) == 2
    told: dict[str, Any] = found[node]
    return told


def test_a_hung_agent_holds_up_no_job_and_no_table_and_is_taken_in_when_it_answers(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    import ray

    for rows, name in enumerate(("chat", "more", "again"), 2000):  # others in each: equal files would be one item
        hub.import_folder(f"org/{name}", chat_files(tmp_path / name, files=6, rows=rows))
    nodes = start_nodes(2, hub.endpoint)
    first = crucible.prefetch("org/chat", split="train", address=nodes.address)
    manifest = first.splits[0].manifest
    assert len(first.nodes) == 2
    with stopped(nodes.homes[1]) as hung:
        began = time.monotonic()
        listed = shown(nodes, hung.node)
        assert (listed["alive"], listed["shards"]) == (False, len(dict(Store(nodes.homes[1]).shards())))
        more = crucible.prefetch("org/more", split="train", address=nodes.address)
        assert time.monotonic() - began < AGENT_TIMEOUT_S, "as long as it took to fail"
        assert [node for node, _, _ in more.nodes] == [node for node, _, _ in first.nodes if node != hung.node], (
            "the other does all of it"
        )
        (note,) = [note for note in more.notes if hung.node[:12] in note]
        assert "does not answer" in note
        assert "kill" in note, "and what to do"
        listed = shown(nodes, hung.node)
        assert (listed["state"], listed["alive"]) == ("silent", False)
        # what only that node holds cannot be had from it: whoever asks for it now gets it made again
        chat = crucible.prefetch("org/chat", split="train", address=nodes.address)
        assert chat.splits == first.splits
        assert 0 < chat.reused_items < len(Store(nodes.homes[0]).get_manifest(chat.splits[0].manifest).items)
        assert all(map(Store(nodes.homes[0]).has_shard, Store(nodes.homes[0]).get_manifest(manifest).shards))
        # nor does one that has never heard of it wait for it
        ray.kill(reach_coordinator(embedded=False), no_restart=False)
        until(lambda: shown(nodes, hung.node)["state"] == "silent", "a new coordinator finds that out by itself")
    until(lambda: shown(nodes, hung.node)["state"] == "works", "it is taken in")
    until(lambda: more.splits[0].manifest in Store(nodes.homes[1]).names(), "it hears what it missed")
    again = crucible.prefetch("org/again", split="train", address=nodes.address)
    assert {node for node, _, _ in again.nodes} == {node for node, _, _ in first.nodes}
    assert not again.notes
