"""Folders of images and archives on a Hub: what crucible loads is what the official `datasets` loads from it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import crucible
from crucible import session
from tests.hubserver.faults import FaultyHub
from tests.hubserver.official import run_client
from tests.workers.media_cases import Content, packed, png, tar, zipped

IMAGES = {f"{kind}/{n:02}.png": png(n) for n, kind in enumerate(["cat", "dog"] * 10)}
REPOS: dict[str, dict[str, Content]] = {
    "labels": {f"{split}/{name}": data for split in ("train", "test") for name, data in IMAGES.items()},
    "metadata": {**IMAGES, "metadata.csv": "file_name,n\n" + "".join(f"{name},{len(name)}\n" for name in IMAGES)},
    "zipped": {"data/train.zip": zipped({"metadata.jsonl": '{"file_name":"1.png","t":"x"}\n', "1.png": png(7)})},
    "tables": {"train.zip": zipped({"b/a.csv": "a\n1\n", "a.csv": "a\n2\n"}), "test.zip": zipped({"a.csv": "a\n3\n"})},
    "tars": {f"train-{n}.tar": tar([(f"{n}.png", png(n)), (f"{n}.json", f'{{"n": {n}}}')]) for n in range(3)},
}

CLIENT = """
import hashlib, json, datasets
from datasets.table import embed_table_storage
datasets.disable_progress_bars()

def plain(value):
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if key not in ("path", "__url__")}
    return value

found = {}
for name in %r:
    splits = datasets.load_dataset(f"org/{name}")
    found[name] = {
        split: [rows.features.to_dict(), [plain(row) for row in embed_table_storage(rows.data.table).to_pylist()]]
        for split, rows in splits.items()
    }
print("FOUND", json.dumps(found))
"""


def plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if key not in ("path", "__url__")}
    return value


def loaded(name: str) -> dict[str, Any]:
    splits = crucible.load_dataset(f"org/{name}")
    found = {}
    for split, rows in splits.items():
        table: pa.Table = rows.with_format("arrow")[:]
        found[split] = [json.loads(json.dumps(dict(rows.features))), [plain(row) for row in table.to_pylist()]]
    return found


def test_media_on_a_hub_are_those_of_datasets(hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    for name, files in REPOS.items():
        hub.import_files(f"org/{name}", {path: packed(data) for path, data in files.items()})
    (tmp_path / "client").mkdir()
    said = run_client(hub, tmp_path / "client", CLIENT % (list(REPOS),))
    expected = json.loads(said.partition("FOUND ")[2])
    before = len(hub.requests("*/resolve/*metadata.csv"))
    for name in REPOS:
        assert loaded(name) == expected[name], name
    # once for the plan, and once for its only item
    assert len(hub.requests("*/resolve/*metadata.csv")) == before + 2


def test_what_was_pulled_is_planned_and_read_offline(
    hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    online = {}
    for name, files in REPOS.items():
        hub.import_files(f"org/{name}", {path: packed(data) for path, data in files.items()})
        session.pull(f"org/{name}")
        online[name] = loaded(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "another"))
    assert {name: loaded(name) for name in REPOS} == online
