"""The order contract of docs/order.md, as properties, each with the proof it tests.

Notation: N rows, R ranks, P lanes, W portions a window, start s. `order.rows(p)` is the row id at position p.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.errors import UsageError
from crucible.order import EpochOrder, OrderSpec, deal, shards_of_rank, steps

unhurried = settings(deadline=None, max_examples=60)  # a slow machine is not a failure

shard_counts = st.lists(st.integers(0, 40), min_size=0, max_size=30)
specs = st.one_of(
    st.builds(OrderSpec, mode=st.just("source")),
    st.builds(OrderSpec, mode=st.just("exact"), seed=st.integers(0, 2**70), epoch=st.integers(0, 3)),
    st.builds(
        OrderSpec,
        mode=st.just("lanes"),
        seed=st.integers(0, 2**70),
        epoch=st.integers(0, 3),
        lanes=st.integers(1, 80),
        window=st.integers(1, 8),
        reshuffle=st.sampled_from(["local", "global"]),
    ),
)


def whole(order: EpochOrder) -> list[int]:
    return [int(row) for row in order.rows(np.arange(order.total))]


def rank_rows(order: EpochOrder, rank: int, world: int, start: int = 0) -> list[int]:
    mine = deal(order.total, rank, world, start=start)
    return [int(row) for row in order.rows(mine.first + mine.stride * np.arange(mine.rows))]


class TestTheOrderOfAnEpoch:
    @unhurried
    @given(shard_counts, specs)
    def test_every_row_stands_at_exactly_one_position(self, rows: list[int], spec: OrderSpec) -> None:
        """Proof for lanes: p -> (p mod P, p div P) is one-to-one, and reaches offset o of lane l just when oP + l < N,
        which is how long lane l is; lanes tile the stream; portions tile a lane in any order; a Feistel round adds to
        one half a function of the other, which can be undone; walking a cycle of a bijection of [0, ab) from inside
        [0, n) to the next point inside is a bijection of [0, n).
        """
        order = EpochOrder(rows, spec)
        assert sorted(whole(order)) == list(range(sum(rows)))

    @unhurried
    @given(shard_counts, specs, st.data())
    def test_a_position_means_the_same_row_wherever_one_starts_reading(
        self, rows: list[int], spec: OrderSpec, data: st.DataObject
    ) -> None:
        order = EpochOrder(rows, spec)
        everything = whole(order)
        for _ in range(3):
            low = data.draw(st.integers(0, order.total))
            high = data.draw(st.integers(low, order.total))
            assert EpochOrder(rows, spec).rows(np.arange(low, high)).tolist() == everything[low:high]

    def test_unshuffled_is_the_source_order(self) -> None:
        assert whole(EpochOrder([3, 0, 4], OrderSpec())) == list(range(7))

    @unhurried
    @given(shard_counts, st.integers(1, 80))
    def test_longer_lanes_come_first_and_differ_by_one_row(self, rows: list[int], lanes: int) -> None:
        """Lane l is read at positions l, l + P, ...: its length is the number of those below N."""
        total = sum(rows)
        lengths = [len(range(lane, total, lanes)) for lane in range(lanes)]
        assert sum(lengths) == total
        assert lengths == sorted(lengths, reverse=True)
        assert max(lengths) - min(lengths) <= 1
        one_window = OrderSpec("lanes", 5, lanes=lanes, window=10**6)
        ids = whole(EpochOrder(rows, one_window))
        later = whole(EpochOrder(rows, OrderSpec("lanes", 5, 1, lanes, 10**6)))
        for lane in range(
            lanes
        ):  # `local`: each lane keeps its rows in another epoch, so it really is a set of its own
            assert sorted(ids[lane::lanes]) == sorted(later[lane::lanes])

    def test_epochs_and_seeds_differ(self) -> None:
        rows = [50] * 20
        seen = {
            tuple(whole(EpochOrder(rows, OrderSpec(mode, seed, epoch, lanes))))  # type: ignore[arg-type]
            for mode, lanes in (("exact", 1), ("lanes", 8))
            for seed in (0, 1)
            for epoch in (0, 1, 2)
        }
        assert len(seen) == 12

    def test_a_global_reshuffle_moves_shards_between_lanes_and_a_local_one_does_not(self) -> None:
        def lanes_rows(epoch: int, reshuffle: str) -> list[set[int]]:
            order = EpochOrder([10] * 40, OrderSpec("lanes", 1, epoch, 4, 2, reshuffle))  # type: ignore[arg-type]
            return [set(whole(order)[lane::4]) for lane in range(4)]

        assert lanes_rows(0, "local") == lanes_rows(3, "local")
        assert lanes_rows(0, "global") != lanes_rows(3, "global")

    @pytest.mark.parametrize("seed", [0, 7, 42])
    @pytest.mark.parametrize("rows", [1, 2, 10, 1000])
    def test_exact_equals_the_shuffle_of_datasets(self, seed: int, rows: int) -> None:
        datasets = pytest.importorskip("datasets")
        theirs = datasets.Dataset.from_dict({"id": list(range(rows))}).shuffle(seed=seed)["id"]
        assert whole(EpochOrder([rows], OrderSpec("exact", seed))) == list(theirs)

    def test_the_lanes_order_never_changes_between_releases(self) -> None:
        """A state saved today must mean the same rows next year. If this fails, raise STATE_FORMAT."""
        order = EpochOrder([7, 3, 10, 1, 4], OrderSpec("lanes", 7, 2, 4, 2))
        assert whole(order) == GOLDEN

    def test_a_window_never_holds_more_portions_than_it_may(self) -> None:
        rows, lanes, window = [10] * 200, 4, 5
        order = EpochOrder(rows, OrderSpec("lanes", 1, 0, lanes, window))
        ids = np.array(whole(order))
        for rank in range(4):
            shards = ids[rank::4] // 10
            spans = [np.flatnonzero(shards == shard) for shard in np.unique(shards)]
            # a shard is open from its first row to its last; no more than a window's portions are open at one time
            open_at = np.zeros(len(shards), dtype=int)
            for span in spans:
                open_at[span[0] : span[-1] + 1] += 1
            assert open_at.max() <= window == order.open_shards(rank, 4)

    def test_rows_of_a_window_are_mixed_as_by_chance(self) -> None:
        """Against a true permutation: rank correlation near 0, neighbours of one shard as rare as chance has it."""
        shards, per_shard = 64, 200
        order = EpochOrder([per_shard] * shards, OrderSpec("lanes", 3, 0, 4, 16))
        ids = np.array(whole(order))
        correlation = np.corrcoef(ids, np.arange(len(ids)))[0, 1]
        adjacent = np.mean(np.diff(ids // per_shard) == 0)
        assert abs(correlation) < 0.2
        assert adjacent < 3 / shards

    def test_any_position_of_a_billion_rows_is_found_at_once(self) -> None:
        """As quickly as the first position, whatever was read before it: 3 ms each on an idle core."""
        rows = np.full(15_000, 66_667)
        near, far = (min(_timed(lambda at=at: _restore(rows, at)) for _ in range(7)) for at in (0, 999_000_000))
        assert far < 5 * near

    def test_positions_outside_the_epoch_are_refused(self) -> None:
        order = EpochOrder([3], OrderSpec())
        with pytest.raises(IndexError):
            order.rows(np.array([3]))
        with pytest.raises(IndexError):
            order.rows(np.array([-1]))

    @pytest.mark.parametrize("bad", [{"seed": -1}, {"mode": "x"}, {"lanes": 0}, {"lanes": 2}, {"window": 0}])
    def test_an_order_that_makes_no_sense_is_refused_when_made(self, bad: dict[str, int]) -> None:
        with pytest.raises(UsageError):
            OrderSpec(**bad)  # type: ignore[arg-type]


class TestDealingToRanks:
    @unhurried
    @given(shard_counts, specs, st.integers(1, 9), st.integers(1, 8), st.data())
    def test_a_global_batch_is_the_same_rows_for_every_number_of_ranks(
        self, rows: list[int], spec: OrderSpec, world: int, per_rank: int, data: st.DataObject
    ) -> None:
        """Rank r's k-th batch of n rows is the positions r + R(kn), ..., r + R(kn + n - 1). Over all r these are the
        integers [kG, (k+1)G), G = nR: any R neighbours hold each residue once. R and n enter only by their product.
        """
        order = EpochOrder(rows, spec)
        everything, size = whole(order), world * per_rank
        ranks = [rank_rows(order, rank, world) for rank in range(world)]
        for batch in range(-(-order.total // size)):
            got = [row for mine in ranks for row in mine[batch * per_rank : (batch + 1) * per_rank]]
            assert sorted(got) == sorted(everything[batch * size : (batch + 1) * size])

    @unhurried
    @given(shard_counts, specs, st.integers(1, 50), st.integers(1, 9))
    def test_ranks_deliver_each_row_once_and_differ_by_at_most_one_row(
        self, rows: list[int], spec: OrderSpec, world: int, batch: int
    ) -> None:
        order = EpochOrder(rows, spec)
        ranks = [rank_rows(order, rank, world) for rank in range(world)]
        assert sorted(row for mine in ranks for row in mine) == list(range(order.total))
        plan = steps(order.total, world, batch)
        assert list(plan.rows) == [len(mine) for mine in ranks]
        assert max(plan.rows) - min(plan.rows) <= 1
        assert list(plan.steps) == [-(-count // batch) for count in plan.rows]
        assert plan.whole_steps == order.total // (world * batch)

    @unhurried
    @given(st.integers(0, 300), st.lists(st.tuples(st.integers(1, 20), st.integers(0, 10)), max_size=5))
    def test_one_position_restores_all_ranks_at_every_world_size(self, total: int, runs: list[tuple[int, int]]) -> None:
        """From s, rank r's k-th position is the k-th p >= s with p = r (mod R). Of each R neighbours a rank has one, so
        k rows a rank are exactly [s, s + kR) and the next run, of any R', starts at s + kR. By induction over runs.
        """
        start, seen = 0, []
        for world, count in [*runs, (5, total)]:
            for rank in range(world):
                mine = deal(total, rank, world, start=start)
                assert mine.rows == len(range(mine.first, total, world))
                seen += [mine.first + world * number for number in range(min(count, mine.rows))]
            start = min(total, start + world * count)
        assert sorted(seen) == list(range(total))

    @pytest.mark.parametrize("world", [1, 2, 5, 16])
    def test_seven_ranks_resume_as_other_numbers_of_ranks_at_every_position(self, world: int) -> None:
        order = EpochOrder([9, 1, 30, 17], OrderSpec("lanes", 3, 1, 8, 2))
        everything = whole(order)
        for delivered in range(9):
            position = min(order.total, 7 * delivered)
            first = [row for rank in range(7) for row in rank_rows(order, rank, 7)[:delivered]]
            rest = [row for rank in range(world) for row in rank_rows(order, rank, world, start=position)]
            assert sorted(first) == sorted(everything[:position])
            assert sorted(rest) == sorted(everything[position:])

    @unhurried
    @given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 70))
    def test_a_rank_reads_the_same_lanes_whatever_its_batch_size(self, share: int, world: int, total: int) -> None:
        """p = r (mod R) and R | P give p mod P = r (mod R): P/R lanes, for ever. In general l = r (mod gcd(R, P))."""
        lanes = share * world
        for rank in range(world):
            mine = deal(total, rank, world)
            met = {(mine.first + world * number) % lanes for number in range(mine.rows)}
            assert met <= set(range(rank, lanes, world))

    @unhurried
    @given(shard_counts, specs, st.integers(1, 20))
    def test_shards_of_a_rank_are_those_its_rows_lie_in(self, rows: list[int], spec: OrderSpec, world: int) -> None:
        order = EpochOrder(rows, spec)
        stops = np.cumsum(rows)
        for rank in range(world):
            listed = shards_of_rank(rows, rank, world, spec).tolist()
            assert len(set(listed)) == len(listed)
            read = set(np.searchsorted(stops, rank_rows(order, rank, world), side="right").tolist())
            assert read <= set(listed)
            if spec.mode == "lanes" and spec.lanes % world == 0:
                assert read == set(listed)

    def test_shards_needed_first_are_listed_first(self) -> None:
        spec = OrderSpec("lanes", 3, 0, 2, 1)
        order = EpochOrder([10] * 20, spec)
        mine = [row // 10 for row in rank_rows(order, 1, 2)]
        assert order.shards_of_rank(1, 2).tolist() == list(dict.fromkeys(mine))

    def test_more_ranks_than_rows_leaves_some_without(self) -> None:
        assert [deal(3, rank, 1000).rows for rank in range(1000)] == [1] * 3 + [0] * 997
        assert steps(3, 1000, 8).whole_steps == 0

    def test_shards_of_one_row_and_of_none_are_fine(self) -> None:
        order = EpochOrder([1, 0, 1, 1, 0, 0, 1], OrderSpec("lanes", 9, 0, 3, 2))
        assert sorted(whole(order)) == [0, 1, 2, 3]
        assert 1 not in order.shards_of_rank(0, 1)

    @pytest.mark.parametrize(("rank", "world"), [(-1, 2), (2, 2), (0, 0)])
    def test_a_rank_outside_the_world_is_refused(self, rank: int, world: int) -> None:
        with pytest.raises(UsageError):
            deal(10, rank, world)


def _restore(rows: np.ndarray, at: int) -> None:
    EpochOrder(rows, OrderSpec("lanes", 7, 3, 64, 16)).rows(np.arange(at, at + 1024))


def _timed(call) -> float:  # type: ignore[no-untyped-def]
    start = time.thread_time()
    call()
    return time.thread_time() - start


GOLDEN = [9, 2, 11, 18, 7, 23, 14, 19, 8, 3, 15, 16, 20, 0, 12, 22, 5, 24, 10, 17, 6, 1, 13, 21, 4]
