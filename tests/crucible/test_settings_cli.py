"""`--features` and `--set`: what a dataset was loaded with in Python names it on the command line too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import crucible
from crucible.cli.app import cli
from crucible.features import ClassLabel, Features, Value

FEATURES = Features({"a": Value("int8"), "b": ClassLabel(names=["x", "y"])})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "home"))
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "train.csv").write_text("a;b\n1;x\n2;y\n")
    return tmp_path / "repo"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="crucible")


def told(*arguments: str) -> list[Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_dataset_that_python_loaded_is_found_with_the_same_words(folder: Path) -> None:
    crucible.load_dataset(str(folder), sep=";", features=FEATURES)
    repo, same = str(folder), ("--set", "sep=;", "--features", json.dumps(FEATURES.to_dict()))
    assert told("plan", repo, *same)[0]["cached"]
    assert not told("plan", repo, "--set", "sep=;")[0]["cached"]
    assert told("data", "head", repo, *same) == [{"a": 1, "b": 0}, {"a": 2, "b": 1}]
    assert told("data", "schema", repo, *same)[0]["features"] == FEATURES.to_dict()
    assert [column["column"] for column in told("data", "stats", repo, *same)] == ["a", "b"]


@pytest.mark.parametrize("form", ["dict", "dataset_info.json", "card"])
def test_features_come_from_a_file_in_the_forms_there_are(form: str, folder: Path, tmp_path: Path) -> None:
    said: Any = FEATURES.to_dict()
    if form == "dataset_info.json":
        said = {"citation": "", "features": said}
    elif form == "card":
        labels = {"class_label": {"names": {"0": "x", "1": "y"}}}
        said = [{"name": "a", "dtype": "int8"}, {"name": "b", "dtype": labels}]
    (tmp_path / "features.json").write_text(json.dumps(said))
    arguments = ("--set", "sep=;", "--features", str(tmp_path / "features.json"))
    assert told("data", "schema", str(folder), *arguments)[0]["features"] == FEATURES.to_dict()


def test_settings_are_json_or_text(folder: Path) -> None:
    (folder / "train.csv").write_text("x\nm\tn\n1\tNA\n2\t-\n")
    arguments = ("--set", "sep=\\t", "--set", "skiprows=1", "--set", 'na_values=["-"]')
    assert told("data", "head", str(folder), *arguments) == [{"m": 1, "n": None}, {"m": 2, "n": None}]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--set", "sep"), "is not NAME=VALUE"),
        (("--set", "sep=,", "--set", "sep=;"), "'sep' is set twice"),
        (("--set", "split=test"), "there is --split"),
        (("--set", "colour=red"), "colour= is no argument, and no setting of csv files"),
        (("--features", "{"), "is not JSON"),
        (("--features", "nowhere.json"), "neither JSON nor a file"),
        (("--features", "[1]"), "card's form"),
        (("--features", '{"a": 1}'), "features are a dict"),
        (("--features", '{"a": {"dtype": "int7", "_type": "Value"}}'), "int7"),
    ],
)
def test_what_is_no_setting_is_wrong_usage(arguments: tuple[str, ...], says: str, folder: Path) -> None:
    for command in (("plan",), ("data", "head")):
        result = run(*command, str(folder), *arguments)
        assert (result.exit_code, says in result.stderr) == (2, True), result.stderr
