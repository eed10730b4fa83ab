"""The same repos on a Hub: what crucible loads from it is what the official `datasets` loads from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import crucible
from crucible.errors import CrucibleError
from tests.cluster.resolve_calls import CALLS, EXTRA, ROWS
from tests.cluster.resolve_cases import CARDS, CONVENTIONS, LEGACY, card, content
from tests.hubserver.faults import FaultyHub
from tests.hubserver.official import run_client

CASES: dict[str, tuple[dict[str, str], str | None, dict[str, Any]]] = {
    "folders": (CONVENTIONS["split folders with separators"], None, {}),
    "sharded": (CONVENTIONS["sharded names"], None, {}),
    "hidden": (CONVENTIONS["hidden and special folders"], None, {}),
    "twice": (CONVENTIONS["one name for two splits"], None, {}),
    "sorted": (*ROWS["a folder sorts beside files"], {}),
    "marked": (CARDS["a marked default"][0], CARDS["a marked default"][1], {}),
    "infos": (LEGACY["one info of any name"][0], None, {}),
    "extra": (EXTRA["alone"][0], EXTRA["alone"][1], {}),
    "files": CALLS["splits"],
    "mixed": CALLS["mixed formats are not filtered"],
    "folder": CALLS["a folder's own conventions"],
    "folder-files": CALLS["a folder and mixed files are filtered"],
    "folder-hidden": CALLS["a hidden folder"],
    "missing": CALLS["a missing file"],
    "named": CALLS["a named config keeps its settings"],
    "convert": (CONVENTIONS["one file at the top"], None, {"revision": "refs/convert/parquet"}),
    "convert-config": (
        CONVENTIONS["one file at the top"],
        None,
        {"revision": "refs/convert/parquet", "data_dir": "default"},
    ),
}

CONVERTED = ROWS["the layout of a convert branch"][0]


def test_a_hub_is_read_as_datasets_reads_it(hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    calls: dict[str, dict[str, Any]] = {}
    for name, (files, text, arguments) in CASES.items():
        data: dict[str, bytes | Path] = {path: content(path, said) for path, said in files.items()}
        hub.import_files(f"org/{name}", data | ({} if text is None else {"README.md": card(text).encode()}))
        if "revision" in arguments:
            converted: dict[str, bytes | Path] = {path: content(path, said) for path, said in CONVERTED.items()}
            hub.import_files(f"org/{name}", converted, delete=list(files), branch="refs/convert/parquet")
        calls[name] = arguments
    home = tmp_path / "client"
    home.mkdir()
    said = run_client(
        hub,
        home,
        f"""
        import json, datasets
        datasets.disable_progress_bars()
        found = {{}}
        for name, arguments in {calls!r}.items():
            try:
                splits = datasets.load_dataset(f"org/{{name}}", **arguments)
                found[name] = [[str(split), list(rows), rows.features.to_dict()] for split, rows in splits.items()]
            except Exception as error:
                found[name] = "error"
        print("FOUND", json.dumps(found))
        """,
    )
    expected = json.loads(said.partition("FOUND ")[2])
    assert sum(one != "error" for one in expected.values()) == len(CASES) - 1
    for name, arguments in calls.items():
        try:
            splits = crucible.load_dataset(f"org/{name}", **arguments)
            got: Any = [[split, list(rows), dict(rows.features)] for split, rows in splits.items()]
        except CrucibleError:
            got = "error"
        assert json.loads(json.dumps(got)) == expected[name], name
