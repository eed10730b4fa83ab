"""A set of byte ranges does what a set of bytes would."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.cache.ranges import Ranges

TOP = 60
pairs = st.tuples(st.integers(0, TOP), st.integers(0, TOP)).map(lambda pair: (min(pair), max(pair)))
many = st.lists(pairs, max_size=12)
unhurried = settings(deadline=None, max_examples=300)


def model(ranges: list[tuple[int, int]]) -> set[int]:
    return {byte for start, stop in ranges for byte in range(start, stop)}


def normal(ranges: Ranges) -> list[tuple[int, int]]:
    """The ranges, after a look that they are sorted, not empty, and apart from each other."""
    flat = [edge for pair in ranges for edge in pair]
    assert all(left < right for left, right in itertools.pairwise(flat))
    return list(ranges)


@unhurried
@given(many, st.integers(0, TOP + 5), pairs)
def test_ranges_are_a_set_of_bytes(ranges: list[tuple[int, int]], size: int, asked: tuple[int, int]) -> None:
    bytes_there = model(ranges)
    found = Ranges.of(ranges)
    assert model(normal(found)) == bytes_there
    assert found.size == len(bytes_there)
    assert model(list(found.missing(size))) == set(range(size)) - bytes_there
    assert normal(Ranges.of(found.missing(size))) == list(found.missing(size))
    assert found.frontier == next(byte for byte in range(TOP + 2) if byte not in bytes_there)
    assert model(list(found.gaps(*asked))) == set(range(*asked)) - bytes_there
    assert normal(Ranges.of(found.gaps(*asked))) == list(found.gaps(*asked))
    assert found.covers(*asked) == (set(range(*asked)) <= bytes_there)
    assert bool(found) == bool(bytes_there)


@unhurried
@given(many)
def test_adding_one_by_one_is_adding_all_at_once_in_any_order(ranges: list[tuple[int, int]]) -> None:
    grown = Ranges()
    for at, (start, stop) in enumerate(ranges):
        before = list(grown)
        bigger = grown.add(start, stop)
        assert list(grown) == before, "a set of ranges never changes"
        grown = bigger
        assert model(normal(grown)) == model(ranges[: at + 1])
    assert grown == Ranges.of(ranges) == Ranges.of(reversed(ranges))


@pytest.mark.parametrize("wrong", [(-1, 3), (4, 3)])
def test_what_is_no_range_is_refused(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="start <= stop"):
        Ranges().add(*wrong)
    with pytest.raises(ValueError, match="start <= stop"):
        Ranges.of([wrong])
    with pytest.raises(ValueError, match="start <= stop"):
        Ranges().covers(*wrong)
