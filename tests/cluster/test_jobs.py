"""What a coordinator that was started again does about a token that only the driver has."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from crucible.cluster.jobs import Job, Jobs
from crucible.config import Token
from crucible.refs import DataRequest, RepoRef

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
