"""How many connections a client of the Hub opens: each costs a handshake, and on a far Hub that is most of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from crucible.config import Settings
from crucible.hub.client import HubRepo
from crucible.hub.connection import Connection
from crucible.hub.http import HubHttp
from crucible.refs import RepoRef
from crucible.report import Tally
from crucible.workers.sources import HubSource
from tests.hubserver.faults import FaultyHub

FILES: dict[str, bytes | Path] = {f"{number}.bin": bytes([number]) * 5000 for number in range(20)}


@pytest.fixture
def connects(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the port of every connection that is opened."""
    ports: list[str] = []
    connect = Connection.connect

    def counted(self: Connection) -> None:
        ports.append(str(self.port))
        connect(self)

    monkeypatch.setattr(Connection, "connect", counted)
    return ports


def read_all(hub: FaultyHub, tmp_path: Path) -> None:
    http = HubHttp(Settings(tmp_path / "home", endpoint=hub.endpoint), Tally())
    repo = HubRepo(http)
    pinned = repo.pin(RepoRef("org/data"))
    source = HubSource(http, pinned)
    for file in repo.files(pinned):
        with source.open(file, 0, file.size) as body:
            assert b"".join(bytes(chunk) for chunk in body.chunks) == FILES[file.path]
    http.close()


def test_redirects_of_lfs_files_share_one_connection(hub: FaultyHub, tmp_path: Path, connects: list[str]) -> None:
    hub.import_files("org/data", FILES, lfs=True)
    read_all(hub, tmp_path)
    assert sorted(connects) == sorted([str(hub.port), str(hub.cdn_port)])


def test_a_redirect_whose_words_never_come_only_costs_its_connection(
    hub: FaultyHub, tmp_path: Path, connects: list[str]
) -> None:
    hub.import_files("org/data", FILES, lfs=True)
    hub.add("cut", path="*/resolve/*", after=10, times=5)
    read_all(hub, tmp_path)
    assert connects.count(str(hub.port)) == 6
