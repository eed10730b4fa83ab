"""Rows and splits that `dataset_info` declares are held against those there are, as in `datasets` 5.2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import crucible
from crucible.cli.app import cli
from crucible.errors import CrucibleError, InvalidCard, RowsMismatch, UsageError
from tests.oracle import datasets


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "home"))


def repo(folder: Path, declared: dict[str, int]) -> str:
    """Splits `train` of two rows and `test` of one, whose card says `declared`."""
    (folder / "repo").mkdir(exist_ok=True)
    (folder / "repo" / "train.csv").write_text("a,b\n1,x\n2,y\n")
    (folder / "repo" / "test.csv").write_text("a,b\n3,z\n")
    splits = "".join(f"  - name: {name}\n    num_examples: {rows}\n" for name, rows in declared.items())
    (folder / "repo" / "README.md").write_text(f"---\ndataset_info:\n  splits:\n{splits}---\n")
    return str(folder / "repo")


@pytest.mark.parametrize(
    "declared",
    [
        {"train": 2, "test": 1},
        {"train": 3, "test": 1},
        {"train": 2, "test": 0},
        {"train": 2},
        {"train": 2, "test": 1, "dev": 5},
    ],
)
@pytest.mark.parametrize("mode", [None, "basic_checks", "no_checks", datasets.VerificationMode.NO_CHECKS])
def test_what_a_card_declares_is_checked_when_datasets_checks_it(
    declared: dict[str, int], mode: Any, tmp_path: Path
) -> None:
    path = repo(tmp_path, declared)
    arguments = {} if mode is None else {"verification_mode": mode}
    try:
        wanted = datasets.load_dataset(path, **arguments).num_rows
    except Exception:
        with pytest.raises(CrucibleError, match="no_checks"):
            crucible.load_dataset(path, **arguments)
        return
    assert crucible.load_dataset(path, **arguments).num_rows == wanted


def test_the_error_names_each_split_and_nothing_is_converted_twice(tmp_path: Path) -> None:
    path = repo(tmp_path, {"train": 20, "test": 10})
    with pytest.raises(RowsMismatch, match=r"train has 2 of 20 rows, test has 1 of 10 rows") as error:
        crucible.load_dataset(path)
    assert error.value.mismatches == (("train", 20, 2), ("test", 10, 1))
    with pytest.raises(RowsMismatch):
        crucible.load_dataset(path, split="test")
    files = sorted((tmp_path / "home").rglob("*.arrow"))
    assert crucible.load_dataset(path, verification_mode="no_checks").num_rows == {"train": 2, "test": 1}
    assert sorted((tmp_path / "home").rglob("*.arrow")) == files
    assert crucible.load_dataset(path).num_rows == {"train": 2, "test": 1}, "what is here is not checked again"


def test_splits_are_checked_before_anything_is_converted(tmp_path: Path) -> None:
    path = repo(tmp_path, {"train": 2, "test": 1, "dev": 5})
    with pytest.raises(InvalidCard, match=r"declares the splits dev, test, train, the files give test, train"):
        crucible.load_dataset(path, split="train")
    assert not list((tmp_path / "home").rglob("*.arrow"))


def test_files_of_the_call_are_not_those_that_the_card_is_about(tmp_path: Path) -> None:
    path = repo(tmp_path, {"train": 20, "dev": 10})
    assert crucible.load_dataset(path, data_files="test.csv").num_rows == {"train": 1}


def test_the_command_line_can_leave_it_out(tmp_path: Path) -> None:
    path = repo(tmp_path, {"train": 20, "test": 1})
    failed = CliRunner().invoke(cli, ["data", "schema", path])
    assert (failed.exit_code, "--set verification_mode=no_checks" in failed.stderr) == (1, True)
    assert CliRunner().invoke(cli, ["data", "schema", path, "--set", "verification_mode=no_checks"]).exit_code == 0


def test_another_mode_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="all_checks, basic_checks or no_checks"):
        crucible.load_dataset(repo(tmp_path, {}), verification_mode="some_checks")
