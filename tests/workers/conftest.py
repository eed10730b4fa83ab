"""A Hub with `org/data`, and the folder that both crucible and the official client have as HF_HOME."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hubserver.faults import FaultyHub
from tests.workers.pull_cases import FILES


@pytest.fixture
def hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "client"
    made.mkdir()
    monkeypatch.setenv("HF_HOME", str(made))
    return made


@pytest.fixture
def org_data(hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> FaultyHub:
    hub.import_files("org/data", FILES)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("CRUCIBLE_BACKOFF_CAP", "0.05")
    return hub
