"""A coordinator that cannot live where it was is started where it can. Two real raylets, a store each."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import crucible
from crucible.cluster.connect import cluster
from crucible.errors import ClusterError
from tests.hubserver.faults import FaultyHub
from tests.ray.jobs import chat_files, start_coordinator_on
from tests.ray.test_main_job import children, home_of

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def no_journal(home: Path) -> Path:
    """Keep a store from being written to where the coordinator has its journal, as a broken disk would."""
    folder = home / "coordinator"
    if folder.is_dir():
        folder.rename(home / "coordinator-before")
    folder.write_text("in the way")
    return folder


def test_a_coordinator_whose_disk_broke_is_started_on_another_node(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=4, rows=200))
    nodes = start_nodes(2, hub.endpoint)
    with cluster(nodes.address):
        start_coordinator_on(nodes.nodes[1].node_id)
        assert home_of("ray::CoordinatorCore") == nodes.homes[1]
        in_the_way = no_journal(nodes.homes[1])
        try:
            before = children("ray::CoordinatorCore")[0].pid
            os.kill(before, signal.SIGKILL)
            assert crucible.prefetch("org/chat", split="train", address=nodes.address).rows == 800
            assert home_of("ray::CoordinatorCore") == nodes.homes[0]
        finally:
            in_the_way.unlink()


def test_a_coordinator_that_can_live_nowhere_says_which_disk_is_in_its_way(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "data", files=1, rows=20))
    nodes = start_nodes(2, hub.endpoint)
    with cluster(nodes.address):
        start_coordinator_on(nodes.nodes[0].node_id)
        in_the_way = no_journal(nodes.homes[0])
        try:
            os.kill(children("ray::CoordinatorCore")[0].pid, signal.SIGKILL)
            with pytest.raises(ClusterError, match=str(in_the_way)) as caught:
                crucible.prefetch("org/chat", split="train", address=nodes.address)
        finally:
            in_the_way.unlink()
        assert "\n" not in str(caught.value)
        assert "\x1b" not in str(caught.value)
