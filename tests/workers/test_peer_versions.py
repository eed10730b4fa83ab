"""An agent of another protocol: a reader says so, takes nothing from it, and goes elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from crucible.cache.store import Store
from crucible.config import Settings
from crucible.errors import TransferError
from crucible.manifest import Manifest
from crucible.refs import NodeId
from crucible.report import Tally
from crucible.versions import HEADER, PROTOCOL
from crucible.workers import serve
from crucible.workers.asking import Line
from crucible.workers.fetch import NodeShards
from crucible.workers.secret import ensure_secret, keep_secret
from crucible.workers.serve import AgentAddress, AgentServer, write_address
from crucible.workers.work import Workplace, copy_shard
from tests.workers.test_serve import made as made
from tests.workers.test_serve import repo as repo

Made = tuple[Settings, Manifest]


@pytest.fixture
def foreign(made: Made, monkeypatch: pytest.MonkeyPatch) -> Iterator[AgentServer]:
    """An agent that has the shards, and speaks another protocol than its readers."""
    monkeypatch.setattr(serve, "PROTOCOL", 99)
    store = Store(made[0].home)
    server = AgentServer(store, ensure_secret(store), NodeId("foreign"), "127.0.0.1", 0, lambda _: [])
    yield server
    server.close()


def test_every_reply_says_the_protocol_whoever_asks(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(made[0].home)
    server = AgentServer(store, ensure_secret(store), NodeId("full"), "127.0.0.1", 0, lambda _: [])
    try:
        for path in ("/v1/status", "/nothing"):
            for secret in ("wrong", ensure_secret(store)):
                reply = httpx.get(server.url + path, headers={"authorization": f"Bearer {secret}"}, timeout=10)
                assert reply.headers[HEADER] == str(PROTOCOL)
    finally:
        server.close()


def test_nothing_is_taken_from_it_and_the_error_names_both(made: Made, foreign: AgentServer, tmp_path: Path) -> None:
    store = Store(tmp_path / "reader")
    place = Workplace(store, Settings(store.home, tries=1), NodeId("reader"))
    shard = made[1].shards[0]
    with pytest.raises(TransferError) as raised:
        copy_shard(shard, [foreign.url], ensure_secret(Store(made[0].home)), place, Tally())
    assert foreign.url in str(raised.value)
    assert f"speaks protocol 99, here it is {PROTOCOL}; install the same crucible" in str(raised.value)
    assert not store.has_shard(shard)


def test_a_reader_goes_elsewhere_and_hears_no_answers_from_it(
    made: Made, foreign: AgentServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, manifest = made
    store = Store(tmp_path / "reader")
    keep_secret(store, ensure_secret(Store(settings.home)))
    write_address(store, AgentAddress(foreign.url, NodeId("foreign"), 1, (foreign.url,)))
    reader = NodeShards(Settings(store.home, tries=1))
    reader.path(manifest, manifest.shards[0])  # made again from its source
    assert (reader.note()["peer_shards"], reader.note()["hub_shards"]) == (0, 1)
    assert Line(Settings(store.home)).wish("job", ["0" * 64]) is None
    assert "speaks protocol 99" in caplog.text
