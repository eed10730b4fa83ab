"""Work whose process died is begun again at its place, while the place is there; every other end stands."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.cluster.again import MOST, again_here


class Died(Exception):
    pass


class Refused(Exception):
    pass


@settings(deadline=None)
@given(st.lists(st.sampled_from(["died", "refused", "done"]), max_size=5), st.lists(st.booleans(), max_size=5))
def test_it_ends_as_the_last_try_did_and_only_deaths_are_followed_by_another(
    ends: list[str], there: list[bool]
) -> None:
    begun: list[str] = []
    answers = iter([*there, *[True] * 9])

    def start() -> Future[str]:
        work: Future[str] = Future()
        end = (ends + ["done"] * 9)[len(begun)]
        begun.append(end)
        if end == "done":
            work.set_result("done")
        else:
            work.set_exception(Died() if end == "died" else Refused())
        return work

    work = again_here(start, lambda error: isinstance(error, Died), lambda: next(answers))
    expected: list[str] = []
    for number, end in enumerate(ends + ["done"] * 9):
        expected.append(end)
        if end != "died" or number == MOST or not [*there, *[True] * 9][number]:
            break
    error = work.exception(timeout=30)
    assert begun == expected
    assert {"done": type(None), "died": Died, "refused": Refused}[expected[-1]] is type(error)


def test_what_goes_wrong_while_it_is_begun_again_is_told() -> None:
    dead: Future[str] = Future()
    dead.set_exception(Died())
    tries = iter([dead])
    with pytest.raises(RuntimeError):  # a StopIteration inside of a generator's consumer
        again_here(lambda: next(tries), lambda _: True, fails).result(timeout=30)


def fails() -> bool:
    raise RuntimeError("nobody knows")
