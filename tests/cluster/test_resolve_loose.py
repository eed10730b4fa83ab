"""`load_dataset("csv", data_files=...)`: files anywhere on this disk, read by the format, as `datasets` 5.2 does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import crucible
from crucible.errors import CrucibleError, UnsupportedFormat, UsageError
from tests.cluster.resolve_cases import CSV, JSONL, TXT, csvs, lay_out
from tests.oracle import datasets

FILES = {
    **csvs("x/a.csv", "x/b.csv", "x/.hidden.csv", "x/y/train.csv", "x/y/test.csv", "x/__s__/c.csv", "z/data.weird"),
    "x/c.jsonl": JSONL,
    "x/d.txt": TXT,
    "x/e.tsv": "a,b\n1,x\n",
    "x/README.md": "---\nconfigs:\n- config_name: m\n  data_files: b.csv\n---\n",
    "w/a.csv.gz": CSV,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a file": ("csv", {"data_files": "x/a.csv"}),
    "an absolute path": ("csv", {"data_files": "/HERE/x/b.csv"}),
    "files far apart": ("csv", {"data_files": ["x/a.csv", "w/a.csv.gz", "x/y/test.csv"]}),
    "splits": ("csv", {"data_files": {"train": ["x/b.csv", "x/a.csv"], "dev": "x/y/*.csv"}}),
    "a glob": ("csv", {"data_files": "x/*.csv"}),
    "a double star": ("csv", {"data_files": "x/**/*.csv"}),
    "an unknown extension": ("csv", {"data_files": "z/*"}),
    "another extension": ("csv", {"data_files": "x/e.tsv"}),
    "a path that goes up": ("csv", {"data_files": "x/../x/a.csv"}),
    "a delimiter": ("csv", {"data_files": "x/e.tsv", "delimiter": "\t"}),
    "lines": ("json", {"data_files": "x/c.jsonl", "split": "train[:1]"}),
    "text": ("text", {"data_files": {"test": "x/d.txt"}}),
    "a folder": ("csv", {"data_dir": "x/y"}),
    "a folder and files": ("csv", {"data_dir": "x", "data_files": "a.csv"}),
    "a folder and an absolute file": ("csv", {"data_dir": "x", "data_files": "/HERE/x/y/test.csv"}),
    "a name": ("csv", {"name": "mine", "data_files": "x/a.csv"}),
    "a hidden file": ("csv", {"data_files": "x/.hidden.csv"}),
    "a missing file": ("csv", {"data_files": "x/nope.csv"}),
    "a glob without a hit": ("csv", {"data_files": "x/nope*.csv"}),
    "a glob that cannot be": ("csv", {"data_files": "x/a**.csv"}),
    "another format": ("parquet", {"data_files": "x/a.csv"}),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "here"
    lay_out(folder, FILES, None)
    monkeypatch.chdir(folder)
    return folder


def load(module: Any, format: str, arguments: dict[str, Any], **more: Any) -> Any:
    try:
        found = module.load_dataset(format, **arguments, **more)
    except (CrucibleError, OSError, ValueError, datasets.exceptions.DatasetGenerationError):
        return "error"
    splits = found if isinstance(found, dict) else {"one": found}
    return {
        split: (
            [dict(row) for row in rows],
            json.loads(json.dumps(datasets.Features.from_dict(_plain(rows)).to_dict())),
        )
        for split, rows in splits.items()
    }


def _plain(rows: Any) -> dict[str, Any]:
    return rows.features.to_dict() if hasattr(rows.features, "to_dict") else dict(rows.features)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_files_are_read_as_the_format_that_is_named(case: str, here: Path, tmp_path: Path) -> None:
    format, arguments = CASES[case]
    arguments = json.loads(json.dumps(arguments).replace("/HERE", str(here)))
    expected = load(datasets, format, arguments, cache_dir=str(tmp_path / "theirs"))
    got = load(crucible, format, arguments)
    assert got == expected
    assert list(got) == list(expected)


def test_only_the_files_that_are_named_are_looked_at(here: Path, tmp_path: Path) -> None:
    (tmp_path / "linked.csv").write_text(CSV)
    (here / "x/link.csv").symlink_to(tmp_path / "linked.csv")
    assert len(crucible.load_dataset("csv", data_files=["x/link.csv", "x/a.csv"], split="train")) == 4
    manifest = crucible.load_dataset("csv", data_files="x/a.csv", split="train").manifest
    (here / "x/b.csv").write_text("changed")
    assert crucible.load_dataset("csv", data_files="x/a.csv", split="train").manifest.id == manifest.id
    (here / "x/a.csv").write_text("a\n7\n")
    assert crucible.load_dataset("csv", data_files="x/a.csv", split="train")[0] == {"a": 7}


def test_what_cannot_be_read_says_so() -> None:
    with pytest.raises(UsageError, match="neither a path on this disk nor an address in a dataset repo"):
        crucible.load_dataset("json", data_files="https://example.com/a.json")
    with pytest.raises(UnsupportedFormat, match="xml"):
        crucible.load_dataset("xml", data_files="x/a.csv")
    with pytest.raises(UsageError, match="empty"):
        crucible.load_dataset("csv", data_files=[])
