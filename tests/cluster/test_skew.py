"""What a node of other versions may do: nothing, hold and serve, or all."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible.cluster.skew import CLOCK_BOUND_S, Clock, check_coordinator, judge
from crucible.errors import VersionSkew
from crucible.refs import CONVERSION_VERSION
from crucible.versions import HEADER, PROTOCOL, Versions, check_conversion, check_reply, versions_here

MINE = Versions("0.2.0", 3, 5, "26.0.1", "3.11.7", "2.60.0")


def test_the_same_versions_and_clocks_are_not_worth_a_word() -> None:
    verdict = judge(MINE, MINE, clock=Clock(0.3, 0.1))
    assert (verdict.works, verdict.refused, verdict.reasons) == (True, None, [])


@pytest.mark.parametrize(("field", "other"), [("protocol", 2), ("protocol", 0), ("conversion", 6)])
def test_another_protocol_or_conversion_is_refused_by_name(field: str, other: int) -> None:
    told = {**MINE.told(), field: other}
    verdict = judge(MINE, Versions.heard(told), same_bytes=True)
    assert verdict.refused is not None
    assert not verdict.works
    said = str(verdict.refused)
    assert field in said
    assert str(other or "unknown") in said
    assert "install crucible 0.2.0" in said


def test_another_pyarrow_works_only_if_a_sample_gave_the_same_bytes() -> None:
    theirs = replace(MINE, pyarrow="19.0.1")
    unknown, other, same = (judge(MINE, theirs, same_bytes=answer) for answer in (None, False, True))
    assert [one.works for one in (unknown, other, same)] == [False, False, True]
    assert all(one.refused is None for one in (unknown, other, same))
    assert all("19.0.1" in one.reasons[0] and "26.0.1" in one.reasons[0] for one in (unknown, other, same))


def test_a_store_that_its_node_cannot_read_is_refused_with_the_reason() -> None:
    verdict = judge(MINE, MINE, store_problem="/data: a store of layout '9'")
    assert "layout '9'" in str(verdict.refused)


def test_another_crucible_python_or_ray_of_the_same_protocol_is_said_and_works() -> None:
    verdict = judge(MINE, replace(MINE, crucible="0.2.1", python="3.12.0"))
    assert verdict.works
    assert len(verdict.reasons) == 2
    assert judge(MINE, replace(MINE, python="3.11.9")).reasons == []


@given(st.floats(-1e6, 1e6), st.floats(0, 100), st.floats(0, 1e9))
def test_a_clock_is_named_only_if_no_delay_explains_it(offset: float, delay: float, now: float) -> None:
    """However the delay was split between the way there and the way back."""
    for there in (0.0, delay / 2, delay):
        clock = Clock.compared(now, now + there + offset, now + delay)
        said = judge(MINE, MINE, clock=clock).reasons
        assert judge(MINE, MINE, clock=clock).works
        if said:
            assert abs(offset) > CLOCK_BOUND_S - 1e-3
            assert "clock" in said[0]
            assert ("ahead" in said[0]) == (offset > 0)
        elif delay < 1:
            assert abs(offset) <= CLOCK_BOUND_S + delay + 1e-3


def test_versions_cross_to_processes_that_know_more_names_or_fewer() -> None:
    told = versions_here().told()
    assert Versions.heard(told) == versions_here()
    assert Versions.heard({**told, "sideband": [1], "clock": 3.5}) == versions_here()
    assert Versions.heard({}) == Versions()
    odd = Versions.heard({"protocol": "1", "conversion": True, "pyarrow": None, "crucible": "1"})
    assert odd == Versions(crucible="1")
    assert {field.name for field in fields(Versions)} == set(told)


def test_a_reply_of_another_protocol_is_refused_and_one_that_says_nothing_is_not() -> None:
    check_reply({HEADER: str(PROTOCOL)}, "http://10.0.0.2:1")
    check_reply({}, "http://10.0.0.2:1")
    with pytest.raises(VersionSkew, match=r"http://10\.0\.0\.2:1.*protocol 99, here it is"):
        check_reply({HEADER: "99"}, "http://10.0.0.2:1")


def test_work_of_another_conversion_is_refused() -> None:
    check_conversion(CONVERSION_VERSION, "the job")
    with pytest.raises(VersionSkew, match="conversion 4"):
        check_conversion(4, "the job")


def test_a_process_that_does_not_understand_the_coordinator_is_told_before_it_asks_for_anything() -> None:
    check_coordinator(versions_here())
    check_coordinator(replace(versions_here(), pyarrow="1.0.0", crucible="9.9.9", python="3.99.1"))
    with pytest.raises(VersionSkew) as raised:
        check_coordinator(replace(versions_here(), protocol=99, crucible="9.9.9"))
    said = str(raised.value)
    assert f"it has protocol 99, here it is {PROTOCOL}; install crucible 9.9.9 here" in said
    with pytest.raises(VersionSkew, match="protocol unknown"):
        check_coordinator(Versions())
