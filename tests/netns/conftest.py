"""The hosts that all tests here share. They need root; without it, or without the tools, the tests say so and skip."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hubserver.faults import FaultyHub
from tests.netns.fleet import ENVIRONMENT, Fleet
from tests.netns.hosts import why_not
from tests.netns.network import Network
from tests.ray.jobs import chat_files

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    reason = why_not() if mine else ""
    for item in mine:
        item.add_marker(pytest.mark.netns)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="package")
def _fleet() -> Iterator[Fleet]:
    with (
        tempfile.TemporaryDirectory(prefix="cr-", ignore_cleanup_errors=True) as folder,
        Network(Path(folder), ["alpha", "beta", "gamma"], ENVIRONMENT) as network,
        FaultyHub(Path(folder) / "hub", host=network.here) as hub,
    ):
        yield Fleet(network, hub)


@pytest.fixture
def fleet(_fleet: Fleet) -> Iterator[Fleet]:
    """Three hosts with Ray on them and empty stores, whatever the test before did to them."""
    _fleet.start()
    _fleet.empty()
    yield _fleet
    for host in _fleet.network.hosts:
        host.close_commands(but=_fleet.watch)
        _fleet.network.restore(host)
    _fleet.hub.clear_faults()
    _fleet.hub.clear_log()


@pytest.fixture
def chat(_fleet: Fleet, tmp_path: Path) -> Callable[..., int]:
    """`chat(files, rows)` puts `org/chat` on the Hub and gives the number of its bytes. A file is one shard."""

    def make(files: int = 9, rows: int = 4000) -> int:
        folder = chat_files(tmp_path / "data", files, rows)
        _fleet.hub.import_folder("org/chat", folder)
        return sum(path.stat().st_size for path in folder.iterdir())

    return make
