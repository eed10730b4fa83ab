"""What a caller may say about files and splits, on a local Hub: `data_files`, `data_dir`, slices; and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import crucible
from crucible.cache.store import Store
from crucible.cli.app import cli
from crucible.config import Settings
from crucible.data_files import data_request
from crucible.errors import NoDataFiles, OfflineMode, SplitNotFound, UsageError
from crucible.refs import RepoRef
from tests.hubserver.faults import FaultyHub

CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train*
  - split: test
    path: main/test*
---
"""


def jsonl(rows: int, tag: str) -> bytes:
    return "".join(json.dumps({"id": i, "text": f"{tag}{i}"}) + "\n" for i in range(rows)).encode()


@pytest.fixture
def data(hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> FaultyHub:
    files = {"main/train.jsonl": jsonl(70, "m"), "main/test.jsonl": jsonl(13, "t"), "more/a.jsonl": jsonl(5, "a")}
    hub.import_files("org/data", {"README.md": CARD.encode(), **files})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    return hub


def request(repo: str = "org/data", **arguments: Any) -> Any:
    return data_request(repo, None, **{"split": None, "revision": None, "columns": None, **arguments})


def test_files_of_a_request_are_kept_beside_those_of_the_card(data: FaultyHub) -> None:
    one = {"data_files": "more/*.jsonl"}
    other = {"data_files": {"train": "main/test.jsonl", "extra": ["more/a.jsonl"]}}
    for _ in range(2):
        assert len(crucible.load_dataset("org/data", split="train")) == 70
        assert len(crucible.load_dataset("org/data", **one, split="train")) == 5
        assert crucible.load_dataset("org/data", **other).num_rows == {"train": 13, "extra": 5}
        assert crucible.load_dataset("org/data", data_dir="main").num_rows == {"train": 70, "test": 13}
        data.clear_log()
    crucible.load_dataset("org/data", **other)
    assert len(data.log) == 1, "the branch was asked for, and nothing else"
    assert len(data.requests("*/tree/*")) == 0
    with pytest.raises(SplitNotFound, match="train, extra"):
        crucible.load_dataset("org/data", **other, split="test")


def test_files_of_a_request_open_offline_once_they_are_here(data: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"data_files": "more/a.jsonl", "split": "train[1:3]"}
    assert [row["text"] for row in crucible.load_dataset("org/data", **arguments)] == ["a1", "a2"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [row["text"] for row in crucible.load_dataset("org/data", **arguments, streaming=True)] == ["a1", "a2"]
    with pytest.raises(OfflineMode):
        crucible.load_dataset("org/data", data_files="main/test.jsonl")
    with pytest.raises(OfflineMode):
        crucible.load_dataset("org/data")


def test_files_cost_one_listing_and_only_what_they_name(data: FaultyHub) -> None:
    crucible.load_dataset("org/data", data_files={"dev": "more/a.jsonl"})
    assert len(data.requests("*/tree/*")) == 1
    assert not data.requests("*/resolve/*main/*")


def test_a_slice_brings_its_own_split_and_no_other(data: FaultyHub) -> None:
    rows = crucible.load_dataset("org/data", split="test[-3:]", streaming=True)
    assert [row["text"] for row in rows] == ["t10", "t11", "t12"]
    assert not data.requests("*/resolve/*train.jsonl")
    store = Store(Settings.from_env().home)
    assert [manifest.split for manifest in store.manifests()] == ["test"], "what is kept is the whole split"


def test_a_plan_of_a_slice_counts_its_rows_and_moves_its_split(data: FaultyHub) -> None:
    crucible.load_dataset("org/data")
    plan = crucible.plan("org/data", split="train[:10%]+test[:3]", nodes=2)
    assert (plan.rows, plan.splits, plan.ranks) == (10, ("train", "test"), ((5, 5), (5, 5)))
    assert crucible.plan("org/data", data_files="more/a.jsonl").files == 1


def test_the_command_takes_slices_files_and_folders(data: FaultyHub) -> None:
    def head(*arguments: str) -> list[str]:
        result = CliRunner().invoke(cli, ["data", "head", "org/data", "--json", *arguments], prog_name="crucible")
        assert result.exit_code == 0, result.stderr
        return [json.loads(line)["text"] for line in result.stdout.splitlines()]

    assert head("--split", "test[3:5]") == ["t3", "t4"]
    assert head("--data-files", "more/*", "-n", "1") == ["a0"]
    files = ("--data-files", "dev:more/a.jsonl", "--data-files", "main/test.jsonl")
    assert head(*files, "--split", "dev[:1]+train[:1]") == ["a0", "t0"]
    assert head("--data-dir", "main", "--split", "test[:1]") == ["t0"]
    refused = CliRunner().invoke(cli, ["data", "head", "org/data", "--data-files", "https://x.org/a.csv"])
    assert (refused.exit_code, "outside org/data" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"data_files": "https://example.com/a.csv"},
            "outside org/data; give a path or a pattern relative to the repo",
        ),
        ({"data_files": "hf://datasets/other/data/a.csv"}, "outside org/data"),
        ({"data_files": "hf://datasets/org/data@v2/a.csv"}, "outside org/data"),
        ({"data_files": {"train": ["a.csv", "../b.csv"]}}, r"'\.\./b\.csv' is outside"),
        ({"data_files": "/etc/passwd"}, "outside"),
        ({"data_files": "zip://a.csv::b.zip"}, "outside"),
        ({"data_dir": "../up"}, "outside"),
        ({"data_files": {}}, "empty"),
        ({"data_files": {"train": []}}, "'train' needs a path"),
        ({"data_files": {"a-b": "x.csv"}}, "'a-b' is not a split name"),
        ({"data_files": 5}, "must be a path"),
        ({"data_files": [5]}, "must be a string"),
        ({"data_files": [{"split": "a", "file": "x"}]}, "needs `split` and `path`"),
        ({"split": "train[", "data_files": None}, "cannot be read"),
    ],
)
def test_a_request_that_makes_no_sense_says_why(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        request(**arguments)


def test_other_ways_to_write_a_path_of_the_repo_mean_the_same(tmp_path: Path) -> None:
    plain = request(data_files={"test": "x/*.csv"})
    assert plain == request(data_files={"test": ["hf://datasets/org/data/x/*.csv"]})
    assert plain == request(data_files=[{"split": "test", "path": "hf://datasets/org/data@main/x/*.csv"}])
    assert request("hf://datasets/org/data") == request("org/data")
    folder = str(tmp_path)
    assert request(folder, data_files="x.csv") == request(folder, data_files=tmp_path / "x.csv")
    assert request(folder, data_dir="a/b") == request(folder, data_dir=f"{folder}/a//b/.")
    assert request(folder, data_dir=folder) == request(folder)


def test_settings_of_a_format_make_another_entry_and_typos_are_named(data: FaultyHub) -> None:
    data.import_files("org/csv", {"a.csv": b"a;b\n1;x\n"})
    assert crucible.load_dataset("org/csv", split="train").column_names == ["a;b"]
    for _ in range(2):
        assert crucible.load_dataset("org/csv", split="train", sep=";")[0] == {"a": 1, "b": "x"}
    with pytest.raises(
        UsageError, match="num_proc= is no argument, and no setting of csv files; it has sep, delimiter"
    ):
        crucible.load_dataset("org/csv", num_proc=4)
    with pytest.raises(UsageError, match="must be text"):
        crucible.load_dataset("org/csv", sep=object())


def test_a_file_that_is_not_there_is_named(data: FaultyHub) -> None:
    with pytest.raises(NoDataFiles, match=r"data_files names nope\.jsonl, which is not there"):
        crucible.load_dataset("org/data", data_files=["main/test.jsonl", "nope.jsonl"])
    with pytest.raises(NoDataFiles, match="nothing in nope"):
        crucible.load_dataset("org/data", data_dir="nope")


def test_a_request_for_other_files_is_another_entry_of_the_store(tmp_path: Path) -> None:
    plain, chosen = request(), request(data_files="a.csv")
    assert plain.variant == ""
    assert chosen.variant != request(data_files="b.csv").variant != request(data_dir="b").variant
    store = Store(tmp_path / "store")
    ref = RepoRef("org/data")
    for survey in ({"commit": "1", "configs": {}}, {"commit": "2", "configs": {}, "variant": chosen.variant}):
        store.put_survey(ref, survey)
    assert [store.get_survey(ref, one.variant)["commit"] for one in (plain, chosen)] == ["1", "2"]  # type: ignore[index]
    assert store.get_survey(ref, "0" * 16) is None
