"""The measures of how well an order mixes, on orders of which the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from crucible.errors import UsageError
from crucible.order import OrderSpec
from crucible.quality import measured, quality
from crucible.streams import Shuffled, Source

ROWS = np.full(100, 50, dtype=np.int64)
SPLIT = Source("a", ROWS)


def test_the_sources_order_and_its_reverse_are_not_mixed_at_all() -> None:
    forward = quality(np.arange(5000), ROWS, 25)
    assert forward == pytest.approx((1.0, 4900 / 4999, 1.0))
    assert quality(np.arange(5000)[::-1], ROWS, 25).rank_correlation == pytest.approx(-1.0)


def test_a_round_through_the_shards_is_told_from_a_shuffle_by_its_correlation() -> None:
    around = np.arange(5000).reshape(100, 50).T.ravel()
    found = quality(around, ROWS, 100)
    assert found.same_shard_next == 0
    assert found.shards_per_batch == 100
    assert found.rank_correlation < 0.1


def test_the_lanes_mix_a_global_batch_as_chance_would() -> None:
    found, chance = measured(Shuffled(SPLIT, OrderSpec("lanes", 3, 0, 16, 16)).at(0), ROWS, batch=64)
    assert abs(found.rank_correlation) < 0.2
    assert found.same_shard_next < 3 * chance.same_shard_next
    assert found.shards_per_batch > 0.8 * chance.shards_per_batch


def test_one_rank_sees_a_window_of_shards_at_a_time() -> None:
    walk = Shuffled(SPLIT, OrderSpec("lanes", 3, 0, 16, 4)).at(0)
    found, chance = measured(walk, ROWS, batch=64, rank=5, world_size=16)
    assert 1 < found.shards_per_batch <= 8 < chance.shards_per_batch


def test_too_few_rows_to_say_anything_are_refused() -> None:
    with pytest.raises(UsageError):
        quality(np.arange(1), ROWS, 5)
