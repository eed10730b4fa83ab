"""Files of the Hub by their address: `load_dataset("csv", data_files="hf://datasets/...")` reads them there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

import crucible
from crucible.cli.app import cli
from crucible.data_files import data_request
from crucible.errors import UsageError
from crucible.urls import HubPlace, hub_place
from tests.hubserver.faults import FaultyHub

CSV = b"a;b\n1;x\n2;y\n"


@pytest.fixture
def data(hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> FaultyHub:
    card = b"---\nconfigs:\n- config_name: m\n  data_files: nothing.csv\n---\n"
    hub.import_files("org/data", {"README.md": card, "x/1.csv": CSV, "x/2.csv": CSV, "y.tsv": CSV})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    return hub


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("hf://datasets/org/data/x/*.csv", HubPlace("org/data", None, "x/*.csv")),
        ("hf://datasets/org/data@v1/a.csv", HubPlace("org/data", "v1", "a.csv")),
        ("hf://datasets/org/data@feature%2Fx/a b.csv", HubPlace("org/data", "feature/x", "a b.csv")),
        (
            "hf://datasets/org/data@refs/convert/parquet/d/0.parquet",
            HubPlace("org/data", "refs/convert/parquet", "d/0.parquet"),
        ),
        (
            "https://huggingface.co/datasets/org/data/resolve/main/x/a%20b.csv?download=true",
            HubPlace("org/data", "main", "x/a b.csv"),
        ),
        (
            "https://huggingface.co/datasets/org/data/resolve/refs%2Fpr%2F3/a.csv",
            HubPlace("org/data", "refs/pr/3", "a.csv"),
        ),
        ("https://huggingface.co/org/model/resolve/main/a.csv", None),
        ("https://example.com/datasets/org/data/resolve/main/a.csv", None),
        ("hf://datasets/org/data", None),
        ("hf://models/org/data/a.csv", None),
        ("x/a.csv", None),
    ],
)
def test_addresses_are_taken_apart(address: str, place: HubPlace | None) -> None:
    assert hub_place(address) == place


def test_files_are_read_as_the_format_says_whatever_the_card_does(data: FaultyHub) -> None:
    base = "hf://datasets/org/data"
    rows = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert list(crucible.load_dataset("csv", data_files=f"{base}/x/1.csv", split="train", sep=";")) == rows
    files = {"train": [f"{base}@main/x/*.csv"], "test": f"{base}/y.tsv"}
    both = crucible.load_dataset("csv", data_files=files, sep=";")
    assert (list(both["train"]), list(both["test"])) == (rows * 2, rows)
    web = "https://huggingface.co/datasets/org/data/resolve/main/y.tsv"
    assert len(crucible.load_dataset("text", data_files=web, split="train")) == 3
    assert not data.requests("https*")
    shown = CliRunner().invoke(
        cli, ["data", "head", "csv", "--data-files", f"{base}/y.tsv", "--set", "sep=;", "--json"]
    )
    assert [json.loads(line) for line in shown.stdout.splitlines()] == rows


def test_the_revision_of_an_address_is_that_of_the_request() -> None:
    def asked(files: Any, revision: str | None = None) -> Any:
        return data_request("csv", None, split=None, revision=revision, columns=None, data_files=files).repo

    assert asked("hf://datasets/org/data@v1/a.csv").revision == "v1"
    assert asked("hf://datasets/org/data/a.csv", "v2").revision == "v2"
    assert asked("hf://datasets/org/data@v1/a.csv", "v1").revision == "v1"
    with pytest.raises(UsageError, match=r"revision is 'v2', but .* names 'v1'"):
        asked("hf://datasets/org/data@v1/a.csv", "v2")


@pytest.mark.parametrize(
    ("repo", "files", "says"),
    [
        ("csv", ["hf://datasets/org/data/a.csv", "hf://datasets/org/other/a.csv"], "several places"),
        ("csv", ["hf://datasets/org/data/a.csv", "hf://datasets/org/data@v1/a.csv"], "several places"),
        ("csv", ["hf://datasets/org/data/a.csv", "a.csv"], "several places"),
        ("csv", ["a.csv", "hf://datasets/org/data/a.csv"], "neither a path on this disk"),
        ("csv", "https://example.com/a.csv", "no hash vouches"),
        ("csv", "hf://datasets/org/data/../other/a.csv", "outside"),
        ("org/data", "https://example.com/a.csv", "no hash vouches"),
        ("org/data", "hf://datasets/org/other/a.csv", "load 'org/other', or name their format"),
    ],
)
def test_what_leads_elsewhere_is_refused_with_what_to_do(repo: str, files: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        data_request(repo, None, split=None, revision=None, columns=None, data_files=files)
