"""The schedule of a mix, as properties: what `Mix.at` promises of every position, and where a mix ends.

The oracle for turns is `datasets.interleave_datasets` over iterables. With weights `datasets` draws from a generator,
which cannot be entered at a position; there the oracle is what a stopping strategy means, checked on whole walks.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any, cast, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.errors import UsageError
from crucible.mix import BLOCK, Mix, MixSpec, Stop

unhurried = settings(deadline=None, max_examples=60)  # a slow machine is not a failure

stops = st.sampled_from(get_args(Stop))
seeds = st.integers(0, 2**70)


@st.composite
def specs(draw: st.DrawFn, weighted: bool | None = None) -> MixSpec:
    """Mixes of up to 12 sources and about 60,000 rows; some sources are empty, some weights a thousandth of others."""
    count, stop = draw(st.integers(1, 12)), draw(stops)
    if not (draw(st.booleans()) if weighted is None else weighted):
        return MixSpec(tuple(draw(st.lists(st.integers(0, 400), min_size=count, max_size=count))), None, 0, stop)
    rows = st.integers(1 if stop == "first_exhausted" else 0, 30 if stop == "all_exhausted" else 4000)
    weight = st.sampled_from([1.0, 2.0, 3.0, 0.7, 0.1, 1 / 3, 0.01, 0.001])
    lengths = draw(st.lists(rows, min_size=count, max_size=count))
    weights = draw(st.lists(weight, min_size=count, max_size=count))
    lanes = draw(st.none() | st.lists(st.sampled_from([1, 4, 6]), min_size=count, max_size=count))
    return MixSpec(tuple(lengths), tuple(weights), draw(seeds), stop, tuple(lanes) if lanes else None)


def walk(mix: Mix) -> tuple[list[int], list[int]]:
    source, index = mix.at(np.arange(mix.total))
    return source.tolist(), index.tolist()


def lasts(source: list[int], count: int) -> list[int]:
    """The position of each source's last row; -1 without one."""
    found = [-1] * count
    for position, number in enumerate(source):
        found[number] = position
    return found


def thousands() -> Mix:
    return Mix(MixSpec((10**12,) * 3, (0.5, 0.3, 0.2), 5))


class TestEveryPosition:
    @unhurried
    @given(specs(), st.integers(0, 3), st.data())
    def test_means_the_same_wherever_and_in_whatever_order_one_asks(
        self, spec: MixSpec, epoch: int, data: st.DataObject
    ) -> None:
        source, index = walk(Mix(spec, epoch))
        total = len(source)
        for _ in range(3):
            low = data.draw(st.integers(0, total))
            high = data.draw(st.integers(low, min(total, low + 3000)))
            step = data.draw(st.sampled_from([1, 2, 7, 64]))
            asked = np.arange(low, high)[::step]
            asked = asked[np.argsort((asked * 7919) % 10007)]
            sources, indexes = Mix(spec, epoch).at(asked)
            assert sources.tolist() == [source[p] for p in asked]
            assert indexes.tolist() == [index[p] for p in asked]

    @unhurried
    @given(specs(), st.integers(0, 3))
    def test_takes_the_next_row_of_its_source(self, spec: MixSpec, epoch: int) -> None:
        """With lanes: of those that go to the lane, and a block of the mix has the next rows of each source."""
        mix = Mix(spec, epoch)
        source, index = (np.array(found) for found in walk(mix))
        lanes = max(spec.lanes or (1,))
        for number in range(len(spec.lengths)):
            mine = index[source == number]
            assert np.array_equal(np.sort(mine), np.arange(len(mine)))
            assert (np.abs(mine - np.arange(len(mine))) < mix.block).all()
            for lane in range(lanes):
                assert (np.diff(index[lane::lanes][source[lane::lanes] == number]) > 0).all()

    @unhurried
    @given(specs(), st.integers(0, 3), st.data())
    def test_comes_after_as_many_rows_of_each_source_as_before_says(
        self, spec: MixSpec, epoch: int, data: st.DataObject
    ) -> None:
        mix = Mix(spec, epoch)
        source, _ = walk(mix)
        for position in (0, mix.total, *data.draw(st.lists(st.integers(0, mix.total), max_size=5))):
            assert mix.before(position).tolist() == [
                source[:position].count(number) for number in range(len(spec.lengths))
            ]

    def test_comes_back_in_the_shape_of_what_was_asked(self) -> None:
        mix = thousands()
        source, index = mix.at(np.arange(12).reshape(3, 4))
        assert source.shape == index.shape == (3, 4)
        assert source.reshape(-1).tolist() == mix.at(np.arange(12))[0].tolist()
        assert [a.shape for a in mix.at(np.empty(0, dtype=np.int64))] == [(0,), (0,)]

    def test_outside_of_the_mix_is_an_index_error(self) -> None:
        mix = Mix(MixSpec((3, 5)))
        for position in (-1, 5):
            with pytest.raises(IndexError, match=r"\[0, 5\)"):
                mix.at(np.array([position]))
        with pytest.raises(IndexError, match=r"\[0, 5\]"):
            mix.before(6)

    def test_is_the_same_for_all_threads_and_in_another_process(self) -> None:
        mix = Mix(MixSpec((10**6,) * 4, (4, 3, 2, 1), 3, "all_exhausted_without_replacement", (4,) * 4), 2)
        asked = [np.arange(rank, 60 * BLOCK, 16) for rank in range(16)]
        fresh = [Mix(mix.spec, 2).at(p) for p in asked]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(mix.at, asked * 2))
        for found, wanted in zip(together, fresh * 2, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
        blob = pickle.dumps(mix)
        assert len(blob) < 400, "what it remembers does not travel"
        assert (
            walk(pickle.loads(pickle.dumps(Mix(MixSpec((50, 60), (2, 1))))))[0]
            == walk(Mix(MixSpec((50, 60), (2, 1))))[0]
        )

    def test_never_changes_between_releases(self) -> None:
        """A state saved today must mean the same rows next year. If this fails, raise STATE_FORMAT."""
        mix = Mix(MixSpec((9, 7, 4), (0.5, 0.3, 0.2), 7, "all_exhausted_without_replacement"), 2)
        assert "".join(map(str, walk(mix)[0])) == GOLDEN
        source, index = thousands().at(10**11 + np.arange(0, 3000, 300))
        assert list(zip(source.tolist(), (index - 2 * 10**10).tolist(), strict=True)) == GOLDEN_FAR
        lanes = Mix(MixSpec((900, 500), (2, 1), 7, lanes=(4, 1)))
        assert "".join(map(str, lanes.at(np.arange(40))[0])) == GOLDEN_LANES


class TestTurns:
    @pytest.mark.parametrize("stop", get_args(Stop))
    @pytest.mark.parametrize(
        "lengths", [(3, 5), (5, 3), (0, 4), (4, 0), (0, 0), (3, 3), (1, 1), (2,), (0,), (1, 0, 3), (2, 4, 3)]
    )
    def test_equal_those_of_datasets_at_the_edges(self, lengths: tuple[int, ...], stop: Stop) -> None:
        assert turns(lengths, stop) == interleaved(lengths, stop)

    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.integers(0, 9), min_size=1, max_size=6).map(tuple), stops)
    def test_equal_those_of_datasets(self, lengths: tuple[int, ...], stop: Stop) -> None:
        assert turns(lengths, stop) == interleaved(lengths, stop)

    def test_depend_on_neither_seed_nor_epoch(self) -> None:
        assert walk(Mix(MixSpec((5, 3), seed=1), 4)) == walk(Mix(MixSpec((5, 3))))


class TestWhereAMixByWeightsEnds:
    @unhurried
    @given(specs(weighted=True), st.integers(0, 3))
    def test_is_with_the_row_that_its_strategy_waits_for(self, spec: MixSpec, epoch: int) -> None:
        source, index = walk(Mix(spec, epoch))
        full = [rows for rows in spec.lengths if rows]
        through = [
            position
            for position, (number, row) in enumerate(zip(source, index, strict=True))
            if row + 1 == spec.lengths[number]
        ]
        if spec.stop == "first_exhausted":
            assert through == [len(source) - 1]
            return
        assert len(through) == len(full), "each source is through once"
        assert not source or through[-1] == len(source) - 1
        if spec.stop == "all_exhausted_without_replacement":
            rows = [(number, row) for number, length in enumerate(spec.lengths) for row in range(length)]
            assert sorted(zip(source, index, strict=True)) == rows

    @unhurried
    @given(specs(weighted=True), seeds, st.integers(1, 100))
    def test_does_not_depend_on_seed_or_epoch(self, spec: MixSpec, seed: int, epoch: int) -> None:
        other = Mix(MixSpec(spec.lengths, spec.weights, seed, spec.stop, (8,) * len(spec.lengths)), epoch)
        assert other.total == Mix(spec).total
        assert other.before(other.total).tolist() == Mix(spec).before(other.total).tolist()

    def test_is_found_by_arithmetic(self) -> None:
        """A walk over so many rows would not end; neither would a look-up that replays."""
        lengths = tuple(10**9 * (number + 1) for number in range(50))
        weights = tuple(1.0 + number % 7 for number in range(50))
        for stop in get_args(Stop):
            mix = Mix(MixSpec(lengths, weights, 1, stop))
            taken = mix.before(mix.total)
            at_end = [number for number, rows in enumerate(lengths) if taken[number] == rows]
            assert len(at_end) == (50 if stop == "all_exhausted_without_replacement" else 1)
            source, index = mix.at(np.array([mix.total - 1, 0, mix.total // 2]))
            assert source[0] in at_end
            assert index[0] == lengths[source[0]] - 1

    def test_is_the_end_of_the_only_source(self) -> None:
        for stop in get_args(Stop):
            assert walk(Mix(MixSpec((2500,), (0.25,), 3, stop))) == ([0] * 2500, list(range(2500)))

    def test_an_empty_source_is_passed_over_where_it_does_not_end_the_mix(self) -> None:
        for stop in ("all_exhausted", "all_exhausted_without_replacement"):
            source, _ = walk(Mix(MixSpec((0, 3, 0), (1, 1, 1), 0, stop)))
            assert source == [1, 1, 1]
            assert Mix(MixSpec((0, 0), (1, 1), 0, stop)).total == 0


class TestShares:
    @unhurried
    @given(
        st.lists(st.floats(1e-9, 1), min_size=1, max_size=40), st.integers(0, 2**40), seeds, st.sampled_from([1, 64])
    )
    def test_are_exact_to_two_rows_at_every_block(
        self, weights: list[float], block: int, seed: int, lanes: int
    ) -> None:
        """Proof: in the head of crucible/mix.py. Weights are kept to 2**-31 of their sum, hence the second term."""
        mix = Mix(MixSpec((2**55,) * len(weights), tuple(weights), seed, lanes=(lanes,) * len(weights)))
        position = min(block, mix.total // mix.block) * mix.block
        taken = mix.before(position)
        assert int(taken.sum()) == position
        total = sum(map(Fraction, weights))
        for rows, weight in zip(taken.tolist(), weights, strict=True):
            assert abs(rows - Fraction(weight) * position / total) < 2 + Fraction(position * (len(weights) + 2), 2**31)

    @unhurried
    @given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(0, 1000))
    def test_never_fall(self, weights: list[int], block: int) -> None:
        mix = Mix(MixSpec((2**55,) * len(weights), tuple(weights)))
        steps = [mix.before(position * BLOCK) for position in range(block, block + 20)]
        assert all((after >= before).all() for before, after in itertools.pairwise(steps))

    def test_of_sources_too_light_for_every_block_come_at_an_even_pace(self) -> None:
        mix = Mix(MixSpec((2**60, 2**60), (1, 1e-4), 9))
        source, _ = mix.at(np.arange(1_000_000))
        gaps = np.diff(np.flatnonzero(source == 1))
        assert 98 <= len(gaps) <= 101
        assert 10_000 - 2 * BLOCK <= gaps.min() <= gaps.max() <= 10_000 + 2 * BLOCK

    def test_of_the_others_stay_in_proportion_when_a_source_drops_out(self) -> None:
        lengths, weights = (40_000, 5_000, 90_000, 60_000), (4, 3, 2, 1)
        mix = Mix(MixSpec(lengths, weights, 8, "all_exhausted_without_replacement"))
        source, _ = walk(mix)
        ends = sorted(lasts(source, 4))
        left, start = set(range(4)), 0
        for end in ends:
            rows = end + 1 - start
            taken = mix.before(end + 1) - mix.before(start)
            whole = sum(weights[number] for number in left)
            for number in left:
                assert abs(taken[number] - Fraction(weights[number] * rows, whole)) < 2
            left, start = left - {source[end]}, end + 1
        assert left == set()


class TestLanes:
    """Rank r of R reads the positions p = r (mod R), and with P lanes holds those l = r (mod R) of every source."""

    @staticmethod
    def kept(mix: Mix, positions: np.ndarray[Any, np.dtype[np.int64]], held: list[int]) -> float:
        """The part of the rows of the sources `held` that go to a rank which holds them."""
        source, index = mix.at(positions)
        lanes = max(mix.spec.lanes or ())
        mine = np.isin(source, held)
        row = index[mine] % np.array(mix.spec.lengths)[source[mine]]
        return float((row % lanes == positions[mine] % lanes).mean())

    @pytest.mark.parametrize("stop", get_args(Stop))
    def test_keep_rows_with_the_ranks_that_hold_them(self, stop: Stop) -> None:
        """By chance one row in P = 64 would be; also where sources begin again, or others dropped out."""
        lengths, weights = (50_001, 70_777, 33_333, 90_001), (4, 3, 2, 1)
        mix = Mix(MixSpec(lengths, weights, 4, stop, (64,) * 4))
        assert self.kept(mix, np.arange(mix.total), [0, 1, 2, 3]) > 0.99

    def test_of_many_sources_still_keep_most(self) -> None:
        lengths = tuple(10**6 + 997 * number for number in range(40))
        mix = Mix(MixSpec(lengths, tuple(1.0 + number % 7 for number in range(40)), 4, lanes=(64,) * 40))
        assert self.kept(mix, np.arange(10 * mix.block), list(range(40))) > 0.99

    def test_leave_sources_that_lie_everywhere_to_fill_the_gaps(self) -> None:
        mix = Mix(MixSpec((10**7,) * 3, (0.5, 0.3, 0.2), 4, lanes=(64, 1, 64)))
        positions = np.arange(5 * mix.block)
        assert self.kept(mix, positions, [0, 2]) == 1.0
        source, _ = mix.at(positions)
        quarters = [source[quarter * mix.block // 4 :][: mix.block // 4] for quarter in range(20)]
        assert all(0.25 < float((quarter == 1).mean()) < 0.35 for quarter in quarters)

    def test_of_one_are_no_lanes(self) -> None:
        spec = MixSpec((3000, 4000), (2, 1), 3)
        assert walk(Mix(MixSpec((3000, 4000), (2, 1), 3, lanes=(1, 1)))) == walk(Mix(spec))


class TestNearby:
    """The arrangement is fixed by the seed, so these numbers are the same on each run; the bounds are for one seed."""

    @pytest.mark.parametrize("lanes", [1, 64])
    @pytest.mark.parametrize("apart", [1, 2, 7, 64, BLOCK])
    def test_a_row_says_nothing_of_another(self, apart: int, lanes: int) -> None:
        source, _ = Mix(MixSpec((10**12,) * 3, (0.5, 0.3, 0.2), 5, lanes=(lanes,) * 3)).at(np.arange(400 * BLOCK))
        pairs = source[: (len(source) // (2 * apart)) * 2 * apart].reshape(-1, 2, apart)
        first, second = pairs[:, 0].reshape(-1), pairs[:, 1].reshape(-1)
        seen = np.bincount(first * 3 + second, minlength=9).reshape(3, 3)
        expected = np.outer([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]) * len(first)
        assert float(((seen - expected) ** 2 / expected).sum()) < 26  # 8 degrees of freedom: one seed in a thousand

    def test_runs_of_one_source_are_as_long_as_chance_makes_them(self) -> None:
        source, _ = thousands().at(np.arange(400 * BLOCK))
        runs = np.diff(np.flatnonzero(np.diff(source) != 0))
        heavy = runs[source[np.flatnonzero(np.diff(source) != 0)[:-1] + 1] == 0]
        lengths = np.bincount(np.minimum(heavy, 10), minlength=11)[1:]
        expected = len(heavy) * np.array([0.5**length for length in range(1, 10)] + [0.5**9])
        assert float(((lengths - expected) ** 2 / expected).sum()) < 28  # 9 degrees of freedom

    def test_seeds_epochs_and_blocks_differ(self) -> None:
        spec = MixSpec((10**6,) * 2, (1, 1))
        first = np.arange(BLOCK)
        mixes = [Mix(MixSpec(spec.lengths, spec.weights, seed), epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
        seen = {tuple(mix.at(block * BLOCK + first)[0].tolist()) for mix in mixes for block in range(5)}
        assert len(seen) == 30


class TestWhatIsNoMix:
    @pytest.mark.parametrize(
        ("spec", "says"),
        [
            ({"lengths": ()}, "at least one source"),
            ({"lengths": (3, -1)}, "lengths of 0 or more"),
            ({"lengths": (3, 4), "weights": (1.0,)}, "2 sources need as many weights, got 1"),
            ({"lengths": (3, 4), "weights": (1.0, 0.0)}, "source 1 has weight 0.0.*leave the source out"),
            ({"lengths": (3, 4), "weights": (-1.0, 1.0)}, "source 0 has weight -1.0"),
            ({"lengths": (3, 4), "weights": (float("nan"), 1.0)}, "source 0 has weight nan"),
            ({"lengths": (3, 4), "weights": (float("inf"), 1.0)}, "source 0 has weight inf"),
            ({"lengths": (3, 0), "weights": (1.0, 1.0)}, "source 1 has no rows.*leave the source out"),
            ({"lengths": (3, 4), "stop": "never"}, "no such stopping strategy: 'never'; there are first_exhausted"),
            ({"lengths": (3, 4), "seed": -1}, "seed .* got -1"),
            ({"lengths": (3, 4), "lanes": (64,)}, "2 sources need as many lanes"),
            ({"lengths": (3, 4), "lanes": (64, 0)}, "lanes of 1 or more"),
        ],
    )
    def test_is_refused_by_name(self, spec: dict[str, Any], says: str) -> None:
        with pytest.raises(UsageError, match=says):
            MixSpec(**spec)

    def test_is_refused_where_it_would_not_end(self) -> None:
        with pytest.raises(UsageError, match="raise the smallest weight"):
            Mix(MixSpec((5, 10**11), (1, 1e-9), stop="all_exhausted"))
        with pytest.raises(UsageError, match="epoch must be 0 or more"):
            Mix(MixSpec((5, 3)), -1)

    def test_numbers_of_numpy_are_plain_numbers(self) -> None:
        lengths: Any = np.array([10**12, 10**12])
        spec = MixSpec(lengths, cast(Any, np.array([0.5, 0.5])))
        assert spec == MixSpec((10**12, 10**12), (0.5, 0.5))
        assert {type(rows) for rows in spec.lengths} == {int}
        assert Mix(spec).total == Mix(MixSpec((10**12, 10**12), (1, 1))).total


def turns(lengths: tuple[int, ...], stop: Stop) -> list[tuple[int, int]]:
    source, index = walk(Mix(MixSpec(lengths, stop=stop)))
    return [(number, row % lengths[number]) for number, row in zip(source, index, strict=True)]


def interleaved(lengths: tuple[int, ...], stop: Stop) -> list[tuple[int, int]]:
    """(source, row) as `datasets` interleaves generators of so many rows."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"source": datasets.Value("int64"), "row": datasets.Value("int64")})
    sources = [
        datasets.IterableDataset.from_generator(rows_of, features, {"number": number, "rows": rows})
        for number, rows in enumerate(lengths)
    ]
    return [(row["source"], row["row"]) for row in datasets.interleave_datasets(sources, stopping_strategy=stop)]


def rows_of(number: int, rows: int) -> Iterator[dict[str, int]]:
    for row in range(rows):
        yield {"source": number, "row": row}


GOLDEN = "00100110001222010121"
GOLDEN_FAR = [
    (2, 19),
    (0, 30000000127),
    (2, 148),
    (2, 201),
    (0, 30000000609),
    (1, 10000000430),
    (2, 370),
    (1, 10000000616),
    (0, 30000001211),
    (1, 10000000789),
]
GOLDEN_LANES = "0000001010000000010101001100000110000110"
