"""A Hub that cannot be asked what a revision is: readers go on with what their node knows, and say so."""

from __future__ import annotations

import json
import logging

import pytest

import crucible
from crucible import errors
from tests.hubserver.faults import FaultyHub

LINES = {"train.jsonl": b"".join(json.dumps({"id": number}).encode() + b"\n" for number in range(50))}


@pytest.fixture
def known(hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> FaultyHub:
    """A Hub that `org/data` was read from, and that from now on has no answer."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("CRUCIBLE_TRIES", "2")
    monkeypatch.setenv("CRUCIBLE_BACKOFF_CAP", "0.01")
    hub.import_files("org/data", LINES)
    crucible.load_dataset("org/data", split="train")
    return hub


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("kind", "status"), [("status", 503), ("reset", 0)])
def test_a_reader_goes_on_with_the_commit_that_its_node_knows_and_says_so(
    known: FaultyHub, caplog: pytest.LogCaptureFixture, kind: str, status: int, streaming: bool
) -> None:
    known.add(kind, status=status)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        rows = crucible.load_dataset("org/data", split="train", streaming=streaming)
        assert [row["id"] for row in rows] == list(range(50))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "org/data" in said
    assert "reading commit " in said


def test_what_the_hub_refuses_is_not_read_from_the_store_instead(known: FaultyHub) -> None:
    known.add("status", status=401)
    with pytest.raises(errors.RepoError):
        crucible.load_dataset("org/data", split="train")


def test_what_the_node_does_not_know_or_has_not_whole_is_an_error_as_ever(known: FaultyHub) -> None:
    known.import_files("org/other", LINES)
    known.add("status", status=503)
    with pytest.raises(errors.SourceUnavailable):
        crucible.load_dataset("org/other", split="train")
    with pytest.raises(errors.SourceUnavailable):
        crucible.load_dataset("org/data", split="train", revision="another")
    with pytest.raises(errors.SourceUnavailable):
        crucible.load_dataset("org/data", split="train", columns=["id"])


def test_a_commit_that_the_hub_named_is_never_replaced_by_an_older_one(known: FaultyHub) -> None:
    known.import_files("org/data", {"train.jsonl": LINES["train.jsonl"] * 2})
    known.add("status", status=503, path="*/tree/*")
    with pytest.raises(errors.SourceUnavailable):
        crucible.load_dataset("org/data", split="train")
