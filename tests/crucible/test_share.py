"""Which positions each rank and worker reads, and how the epoch ends on all of them."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.errors import UsageError
from crucible.share import End, Share, check_end

unhurried = settings(deadline=None, max_examples=60)
ENDS = st.sampled_from(get_args(End))
totals, worlds, sizes, starts = st.integers(0, 200), st.integers(1, 5), st.integers(1, 9), st.integers(0, 40)


@unhurried
@given(totals, worlds, st.integers(1, 4), sizes, starts, ENDS)
def test_workers_together_read_the_units_of_their_rank_in_turn(
    total: int, world: int, workers: int, unit: int, start: int, end: End
) -> None:
    """A DataLoader's consumer takes a unit from each worker in turn, and sees the stream of the rank alone."""
    for rank in range(world):
        alone = Share(rank, world, unit=unit, start=start, end=end)
        expected = [alone.positions(total, k, k + 1).tolist() for k in range(alone.units(total))]
        team = [Share(rank, world, worker, workers, unit, start, end) for worker in range(workers)]
        units = [share.units(total) for share in team]
        seen = [team[k % workers].positions(total, k // workers, k // workers + 1).tolist() for k in range(sum(units))]
        assert seen == expected
        assert all(len(one) == unit for one in (expected[:-1] if end == "exact" else expected))


@unhurried
@given(totals, worlds, sizes, starts, ENDS)
def test_every_row_comes_as_often_as_the_end_says(total: int, world: int, unit: int, start: int, end: End) -> None:
    shares = [Share(rank, world, unit=unit, start=start, end=end) for rank in range(world)]
    units = [share.units(total) for share in shares]
    positions = [share.positions(total, 0, count).tolist() for share, count in zip(shares, units)]
    seen = Counter(position for one in positions for position in one)
    left = set(range(start, total))
    assert set(seen.values()) <= {1}
    if end == "exact":
        assert set(seen) == left
        assert max(units) - min(units) <= 1
        return
    assert len(set(units)) == 1, "all ranks make as many steps"
    if end == "drop":
        assert set(seen) == set(range(start, start + units[0] * unit * world))
        assert len(left) - len(seen) < unit * world
    else:
        assert left <= set(seen)
        assert len(seen) - len(left) < unit * world
        assert min(set(seen) - left, default=total) >= total, "padding is told by its position"


@pytest.mark.parametrize("bad", [{"rank": 1}, {"worker": 1}, {"unit": 0}, {"start": -1}])
def test_a_share_that_makes_no_sense_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Share(**bad)  # type: ignore[arg-type]


def test_an_unknown_end_is_refused_and_the_others_are_named() -> None:
    with pytest.raises(UsageError, match="exact, drop, pad, mask"):
        check_end("repeat")
