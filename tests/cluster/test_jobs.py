"""What a coordinator that was started again does about a token that only the driver has."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

from crucible.cluster.jobs import HELD, REMEMBERED, Job, Jobs
from crucible.cluster.prepare import Prepared
from crucible.config import Token
from crucible.errors import ClusterError
from crucible.refs import DataRequest, RepoRef, WorkItem

REQUEST = DataRequest(RepoRef("ann/private", "main"), None, None)
HUB = "http://127.0.0.1:9"


def gone_on(jobs: Jobs) -> Job:
    """A job that was found in the journal, whose driver had given a token."""
    record = jobs.add("job", REQUEST, HUB, None)
    assert record is not None
    record.forgotten = True
    return record


def test_a_job_that_goes_on_after_a_restart_begins_when_its_driver_is_back_with_the_token() -> None:
    jobs = Jobs()
    record = gone_on(jobs)
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(record.await_token, 60.0)
        assert jobs.add("job", REQUEST, HUB, Token("hf_given_again")) is None, "it is known already"
        assert begun.result(30) == "hf_given_again"
    assert not record.forgotten, "a repo that is not there is not one that lacks a token"


def test_a_job_whose_driver_is_gone_goes_on_without_the_token() -> None:
    record = gone_on(Jobs())
    assert record.await_token(0.01) is None
    assert record.forgotten


def test_a_job_that_never_had_a_token_waits_for_none() -> None:
    record = Jobs().add("job", REQUEST, HUB, None)
    assert record is not None
    assert record.await_token(3600.0) is None


def end(jobs: Jobs, name: str) -> Job:
    record = jobs.add(name, REQUEST, HUB, None)
    assert record is not None
    record.error = ClusterError("it broke")
    jobs.ended(record)
    return record


def test_what_a_job_was_about_is_let_go_of_when_others_have_ended_after_it() -> None:
    """A listing of a million files takes hundreds of megabytes, and a coordinator lives for weeks."""

    class Items(list[WorkItem]):
        """A list that can be watched."""

    jobs = Jobs()
    record = jobs.add("job", REQUEST, HUB, None)
    assert record is not None
    items = Items()
    gone = weakref.ref(items)
    prepared = Prepared(REQUEST, REQUEST.repo, "main", (), (items,), (), {})
    record.readers.begin(prepared, lambda: None)
    del items, prepared
    jobs.ended(record)
    for number in range(REMEMBERED):
        assert gone() is not None
        end(jobs, f"job {number}")
    gc.collect()
    assert gone() is None
    assert record.readers.wish(["k" * 64] * 3) == {"state": "unknown"}
    assert jobs.opening(REQUEST, HUB) == {"state": "none"}


def test_the_oldest_ends_are_forgotten_and_never_what_has_not_ended() -> None:
    jobs = Jobs()
    assert jobs.add("runs", REQUEST, HUB, None) is not None
    for number in range(HELD + 3):
        end(jobs, f"job {number}")
    assert set(jobs.all()) == {"runs", *(f"job {number}" for number in range(3, HELD + 3))}
