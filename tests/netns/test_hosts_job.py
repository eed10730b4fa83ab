"""A prefetch over three hosts with addresses of their own, and plain ranks that read what it left there."""

from __future__ import annotations

import stat
from collections.abc import Callable

import pytest

from tests.netns.fleet import PORT, Fleet, result
from tests.ray.jobs import file_bytes

pytestmark = pytest.mark.timeout(400)
OF_RAY = ("raylet", "gcs_server", "ray::RuntimeEnv", "ray::IDLE")
"""What listens as Ray has it, which the firewall's part of docs/operations.md is about."""


def test_three_hosts_fetch_each_byte_once_and_their_ranks_read_each_row_once(
    fleet: Fleet, chat: Callable[..., int]
) -> None:
    size = chat()
    beta = fleet.network["beta"]
    report = result(fleet.prefetch(beta, "org/chat"))
    assert (report["rows"], report["counts"]["hub_bytes"], len(report["nodes"])) == (36_000, size, 3)
    assert file_bytes(fleet.hub) == size

    ranks = [fleet.rank(host, "org/chat", rank, 3) for rank, host in enumerate(fleet.network.hosts)]
    told = [result(rank) for rank in ranks]
    assert sorted(row for rank in told for row in rank["ids"]) == list(range(36_000))
    assert sum(rank["note"]["hub_shards"] for rank in told) == 0
    assert sum(rank["note"]["peer_shards"] for rank in told) > 0, "the shards are not all where they are read"
    assert file_bytes(fleet.hub) == size, "reading moved no file from the Hub"

    for host in fleet.network.hosts:
        secret = host.store / "secret"
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        own = {name: where for name, where in host.listening().items() if not name.startswith(OF_RAY)}
        assert all(name.startswith("ray::") for name in own), own
        for name, where in own.items():  # an agent and a coordinator are Ray workers too: each has Ray's own port
            ours = [at for at in where if at.startswith(f"{host.address}:")]
            assert len(ours) == name.startswith("ray::AgentCore"), f"{host.name}: {name} {where}"
            assert len(where) - len(ours) == 1, f"{host.name}: {name} {where}"
        assert any(name.startswith("ray::AgentCore") for name in own)
    listed = fleet.head.crucible("nodes", "--address", f"{fleet.head.address}:{PORT}").output()
    assert all(f"http://{host.address}:" in listed for host in fleet.network.hosts)
