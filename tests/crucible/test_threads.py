"""Work ahead of a consumer: in order, within a bound on memory, and gone with the consumer."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.images import Claim
from crucible.threads import MOST_AHEAD, Job, Pool

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60.0


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def threads() -> int:
    return sum(thread.name == "crucible-decode" for thread in threading.enumerate())


def number(value: int, claim: Claim, size: int = 0) -> int:
    claim(size)
    return value


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 150), max_size=80),
    workers=st.integers(0, 5),
    fails=st.sets(st.integers(0, 79)),
)
def test_results_and_errors_come_in_order_and_nothing_waits_for_ever(
    sizes: list[int], workers: int, fails: set[int]
) -> None:
    """Jobs may claim more than there is room for, alone and together."""
    pool = Pool(workers, most_bytes=100)

    def fail(value: int, _claim: Claim) -> int:
        raise KeyError(value)

    def jobs() -> Iterator[Job[int]]:
        for value, size in enumerate(sizes):
            yield partial(fail, value) if value in fails else partial(number, value, size=size)

    expected = list(range(len(sizes)))
    first = min((value for value in fails if value < len(sizes)), default=None)
    if first is None:
        assert list(pool.in_order(jobs())) == expected
    else:
        results = pool.in_order(jobs())
        assert [next(results) for _ in range(first)] == expected[:first]
        with pytest.raises(KeyError, match=str(first)):
            next(results)
    until(lambda: pool.held == 0)


def test_what_is_ready_and_in_the_making_stays_within_the_bound() -> None:
    pool = Pool(4, most_bytes=1000)
    results = pool.in_order(partial(number, value, size=90) for value in range(300))
    for value in range(40):  # each lets two more be begun
        assert next(results) == value
        assert pool.held <= 1000 + 90  # the next one to be delivered is always let in
    until(lambda: pool.held > 900)
    for value in range(40, 300):
        assert next(results) == value
        assert pool.held <= 1000 + 90


def test_jobs_are_drawn_a_little_faster_than_results_are_taken() -> None:
    drawn = 0

    def jobs() -> Iterator[Job[int]]:
        nonlocal drawn
        for drawn in range(1, 10_000):
            yield partial(number, drawn)

    results = Pool(2).in_order(jobs())
    for taken in range(1, 1000):
        next(results)
        assert drawn <= min(2 * taken + 4, taken + MOST_AHEAD)
    results.close()


def test_an_error_of_the_source_comes_after_the_results_before_it() -> None:
    def jobs() -> Iterator[Job[int]]:
        yield from (partial(number, value) for value in range(3))
        raise OSError("the disk is gone")

    results = Pool(2).in_order(jobs())
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)


def test_threads_are_there_while_somebody_consumes_and_are_shared() -> None:
    pool = Pool(3)
    until(lambda: threads() == 0)
    consumers = [pool.in_order(partial(number, value) for value in range(1000)) for _ in range(5)]
    for consumer in consumers:
        assert next(consumer) == 0
    assert 0 < threads() <= 3
    consumers[0].close()
    assert next(consumers[1]) == 1
    assert threads() > 0
    del consumers, consumer  # dropped, not closed
    gc.collect()
    until(lambda: threads() == 0)


def test_a_consumer_gets_its_own_first_job_done_when_all_threads_wait_for_room() -> None:
    pool = Pool(2, most_bytes=100)
    greedy = pool.in_order(partial(number, value, size=80) for value in range(50))
    assert next(greedy) == 0
    until(lambda: pool.held > 0)
    other = pool.in_order(partial(number, value, size=80) for value in range(50))
    assert list(other) == list(range(50))
    assert list(greedy) == list(range(1, 50))


def test_threads_that_are_abandoned_in_the_middle_of_a_job_end() -> None:
    pool, going, go = Pool(2, most_bytes=10), threading.Event(), threading.Event()

    def slow(value: int, claim: Claim) -> int:
        if value:
            going.set()
            assert go.wait(WAIT_S)
            claim(5)
        return value

    results = pool.in_order(partial(slow, value) for value in range(10))
    assert next(results) == 0
    assert going.wait(WAIT_S)
    results.close()
    assert threads() > 0
    go.set()
    until(lambda: threads() == 0)
    assert pool.held == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_copy_of_an_iterator_goes_on_by_itself() -> None:
    code = """
import os, sys
from functools import partial
from crucible.threads import Pool
def job(value, claim):
    claim(10)
    return value
results = Pool(3, most_bytes=50).in_order(partial(job, value) for value in range(200))
assert [next(results) for _ in range(20)] == list(range(20))
child = os.fork()
if not child:
    os._exit(0 if list(results) == list(range(20, 200)) else 1)
assert list(results) == list(range(20, 200))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    for _ in range(3):
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=WAIT_S).returncode == 0


@pytest.mark.parametrize("ending", ["pass", "raise SystemExit", "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"])
def test_an_interpreter_ends_in_the_middle_of_an_iteration(ending: str) -> None:
    code = f"""
import os, signal, time
from functools import partial
from crucible.threads import process_pool
def job(value, claim):
    claim(1 << 26)
    time.sleep(0.001)
    return value
results = process_pool().in_order(partial(job, value) for value in range(10_000))
assert next(results) == 0
{ending}
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=WAIT_S, capture_output=True)
    assert ended.returncode == (-signal.SIGINT if "kill" in ending else 0), ended.stderr
    assert b"Fatal" not in ended.stderr
