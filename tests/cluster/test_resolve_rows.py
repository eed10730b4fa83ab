"""Whole loads against `datasets` 5.2: configs, splits, rows in their order, values and features of generated repos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import crucible
from crucible.cluster.prepare import survey_repo
from crucible.config import Settings
from crucible.errors import CrucibleError, UnsupportedFormat
from crucible.hub.client import open_repo, repo_ref
from crucible.report import Tally
from tests.cluster.resolve_calls import CALLS, EXTRA, ROWS
from tests.cluster.resolve_cases import CARDS, CONVENTIONS, LEGACY, card, lay_out
from tests.oracle import datasets

LAYOUTS: dict[str, tuple[dict[str, str], str | None]] = {
    **{f"convention: {name}": (files, None) for name, files in CONVENTIONS.items()},
    **{f"card: {name}": (files, card(yaml)) for name, (files, yaml) in CARDS.items()},
    **{
        f"{kind}: {name}": (files, None if yaml is None else card(yaml))
        for kind, cases in (("legacy", LEGACY), ("extra", EXTRA), ("rows", ROWS))
        for name, (files, yaml) in cases.items()
    },
}

DIFFERENCES = {
    "legacy: two infos": "a config means the same whether it is named or not",
    "rows: columns in another order": "columns of several files may come in any order",
}
"""Layouts that crucible reads otherwise, and what docs/differences.md says of it."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "home"))


def facts(splits: Any) -> dict[str, Any]:
    """Splits in their order, with rows and features."""
    return {
        name: ([dict(row) for row in split], json.loads(json.dumps(_features(split)))) for name, split in splits.items()
    }


def _features(split: Any) -> Any:
    found = split.features
    return found.to_dict() if hasattr(found, "to_dict") else dict(found)


def ours(folder: Path, *name: str, **arguments: Any) -> Any:
    try:
        return facts(crucible.load_dataset(str(folder), *name, **arguments))
    except UnsupportedFormat:
        pytest.skip("no reader for this format")
    except CrucibleError:
        return "error"


def theirs(folder: Path, *name: str, **arguments: Any) -> Any:
    # a cache of its own: two folders of one name with one card share their place in it, whatever their files are
    cache = str(folder.parent / "theirs")
    try:
        return facts(datasets.load_dataset(str(folder), *name, cache_dir=cache, **arguments))
    except Exception:
        return "error"


def config_names(folder: Path) -> list[str]:
    ref = repo_ref(str(folder), None)
    try:
        with open_repo(ref, Settings.from_env(), Tally()) as repo:
            return [config.name for config in survey_repo(repo, repo.pin(ref))]
    except CrucibleError:
        return []


def their_config_names(folder: Path) -> list[str]:
    try:
        return list(datasets.get_dataset_config_names(str(folder)))
    except Exception:
        return []


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_a_repo_has_the_rows_that_datasets_gives(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    files, text = LAYOUTS[case]
    lay_out(folder, files, text)
    got: dict[Any, Any] = {None: ours(folder)}
    expected: dict[Any, Any] = {None: theirs(folder)}
    names, their_names = config_names(folder), their_config_names(folder)
    if len(their_names) > 1:
        got |= {name: ours(folder, name) for name in names}
        expected |= {name: theirs(folder, name) for name in their_names}
    if case in DIFFERENCES:
        assert got != expected, "is equal by now: take it out of DIFFERENCES"
        return
    assert got == expected
    assert [list(one) for one in got.values()] == [list(one) for one in expected.values()], "order of the splits"
    assert names == their_names or not their_names  # one config that cannot be used does not spoil the others


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_arguments_choose_the_files_that_datasets_chooses(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    files, yaml, arguments = CALLS[case]
    lay_out(folder, files, None if yaml is None else card(yaml))
    got, expected = ours(folder, **arguments), theirs(folder, **arguments)
    assert got == expected
    assert list(got) == list(expected)
