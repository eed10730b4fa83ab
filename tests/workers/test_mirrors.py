"""A mirror is asked before the Hub, gets no token, and is dropped for the Hub when it fails, lacks the file or lies."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import crucible
from crucible.config import Settings
from crucible.hub.server import HubOptions
from crucible.hub.server.access import User
from tests.hubserver.faults import FaultyHub

ROWS = "".join(f'{{"id": {number}, "text": "{random.Random(number).random()}"}}\n' for number in range(500)).encode()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FaultyHub]:
    """The Hub, which knows the user."""
    with FaultyHub(tmp_path / "hub", options=HubOptions(tokens={"hf_secret": User("ann")})) as server:
        yield server


@pytest.fixture
def mirror(tmp_path: Path, hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyHub]:
    """A second Hub with the same repo, at the same commit, that CRUCIBLE_MIRRORS names."""
    commit = hub.import_files("org/rows", {"train.jsonl": ROWS}, lfs=True)
    with FaultyHub(tmp_path / "mirror") as second:
        assert second.import_files("org/rows", {"train.jsonl": ROWS}, lfs=True) == commit
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("CRUCIBLE_MIRRORS", f"{second.endpoint}/")
        monkeypatch.setenv("CRUCIBLE_BACKOFF_CAP", "0.05")
        yield second


def ids() -> list[int]:
    return [row["id"] for row in crucible.load_dataset("org/rows", split="train", streaming=True)]


def test_the_mirror_serves_the_file_and_never_sees_the_token(hub: FaultyHub, mirror: FaultyHub) -> None:
    assert ids() == list(range(500))
    assert mirror.bytes_sent() == len(ROWS)
    assert hub.bytes_sent() == 0
    assert any(record.had_token for record in hub.log), "the Hub itself was asked with the token"
    assert not any(record.had_token for record in mirror.log)


@pytest.mark.parametrize("fault", ["status", "flip", "reset", "missing"])
def test_a_mirror_that_fails_lacks_the_file_or_lies_is_left_for_the_hub(
    hub: FaultyHub, mirror: FaultyHub, fault: str
) -> None:
    match fault:
        case "status":
            mirror.add("status", status=503)
        case "flip":
            mirror.add("flip", origin="cdn", after=100)
        case "reset":
            mirror.add("reset", origin="cdn")
        case _:
            mirror.add("status", status=404)
    assert ids() == list(range(500))
    assert hub.bytes_sent() == len(ROWS)


def test_a_mirror_must_be_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUCIBLE_MIRRORS", "http://a.example, not an address")
    with pytest.raises(crucible.CrucibleError, match="not an address"):
        Settings.from_env()
