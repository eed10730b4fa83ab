"""A job comes out of the journal as it went in: what was asked, how it ended, and no token."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crucible.cluster.journal import ENDED, Cell, from_lines, to_lines
from crucible.cluster.remembered import (
    SHOWN,
    accepted,
    error_of,
    must_go_on,
    options_of,
    progress_of,
    report_of,
    request_of,
    shown,
    with_end,
    with_progress,
)
from crucible.config import Settings, Token
from crucible.errors import ClusterError, CrucibleError
from crucible.refs import DataRequest, NodeId, RepoRef
from crucible.report import Counts, JobReport, Progress, SplitReport
from crucible.workers.fencing import Epoch
from crucible.workers.tasks import JobOptions
from tests.test_errors import CLASSES, example

REQUEST = DataRequest(
    RepoRef("org/chat", "v1"),
    "main",
    "train[:10%]",
    ("id", "text"),
    (("train", ("a/*.csv", "b.csv")),),
    "data",
    builder="csv",
    settings=(("sep", '";"'),),
    partial=True,
)
SETTINGS = Settings(Path("/home"), token=Token("hf_secret"), mirrors=("http://m",))
OPTIONS = replace(JobOptions.of(SETTINGS, keep_raw=True, revision="v1"), epoch=Epoch("session", 3, "me"))


def value(**changes: Any) -> dict[str, Any]:
    made = accepted(REQUEST, OPTIONS, 2, 5, token=True, epoch=Epoch("session", 3, "me"), embedded=False, now=1.5)
    return {**made, **changes}


def journalled(record: dict[str, Any]) -> Any:
    return from_lines(to_lines({"job/a": Cell((1, 1, "a"), record)}))["job/a"].value


def test_what_was_asked_comes_back_and_the_token_never_went_in() -> None:
    record = journalled(value())
    assert request_of(record) == REQUEST
    other = Settings(Path("/elsewhere"))
    assert options_of(record, other) == replace(OPTIONS, epoch=None)
    assert "hf_secret" not in json.dumps(record)
    known = dict(record, options={name: one for name, one in record["options"].items() if name != "tries"})
    known["options"]["of a later version"] = 1
    assert options_of(known, replace(other, tries=9)).tries == 9, "what is not said is as this node has it"


def test_a_report_comes_back_whole() -> None:
    report = JobReport(
        "a",
        "org/chat",
        "c" * 40,
        "main",
        (SplitReport("train", "m" * 64, 7, 2, 900, 1000),),
        Counts(hub_requests=3, peer_bytes=9),
        1.25,
        ((NodeId("n1"), 2, 900), (NodeId("n2"), 0, 0)),
        copies=2,
        reused_items=1,
        partial=True,
        notes=("a node was left out",),
    )
    record = journalled(with_end(value(), "finished", 9.0, report, None))
    assert report_of(record) == report
    assert error_of(record) is None
    assert report_of(dict(record, report={"written by": "another version"})) is None
    assert report_of(dict(record, report=None)) is None


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_comes_back_as_itself_or_with_its_words(cls: type[CrucibleError]) -> None:
    error = example(cls)
    found = error_of(journalled(with_end(value(), "failed", 9.0, None, error)))
    assert str(found) == str(error)
    assert type(found) in (cls, ClusterError)


def test_an_error_of_another_version_keeps_its_words() -> None:
    for kind in ("NoSuchError", "annotations", "Sequence", "UnsafePath"):
        record = value(error={"type": kind, "args": [1, 2, 3, 4, 5, 6], "text": "what was wrong"})
        assert str(error_of(journalled(record))) == "what was wrong"


def test_what_goes_on_is_what_has_not_ended_where_it_can() -> None:
    for phase in ("resolve", "items", "copies"):
        assert must_go_on(value(phase=phase), "another session")
        assert must_go_on(value(phase=phase, embedded=True), "session"), "the process that has it is still there"
        assert not must_go_on(value(phase=phase, embedded=True), "another session")
    assert not any(must_go_on(value(phase=phase), "session") for phase in ENDED)


def test_people_see_the_same_keys_of_every_job() -> None:
    begun = shown("a", journalled(value()))
    ended = shown("a", journalled(with_end(value(), "failed", 9.0, None, ClusterError("it broke"))))
    assert tuple(begun) == tuple(ended) == SHOWN
    assert (begun["error"], ended["error"]) == ("", "it broke")
    far = with_progress(value(), Progress("a", "items", 2, 5, 70, 100))
    assert progress_of("a", journalled(far)) == Progress("a", "items", 2, 5, 70, 100)
