"""Streams made of others: what each position holds, compared with lists that are built by walking."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.errors import UsageError
from crucible.mix import MixSpec
from crucible.order import EpochOrder, OrderSpec
from crucible.streams import (
    PASS,
    Mixed,
    Repeated,
    Shuffled,
    Slice,
    Source,
    Stream,
    Sum,
    check_exact,
    digest,
    even_pieces,
    slice_of,
)

unhurried = settings(deadline=None, max_examples=80)


def source(rows: list[int], first: int = 0, name: str = "a") -> Source:
    return Source(name, np.asarray(rows, dtype=np.int64), first)


def listed(stream: Stream, epoch: int = 0) -> list[int]:
    """An epoch by walking through the tree, with lists."""
    match stream:
        case Source():
            return list(range(stream.first, stream.first + stream.total))
        case Shuffled():
            order = EpochOrder(stream.of.pieces, OrderSpec(**{**spec_of(stream), "epoch": epoch}))
            inner = listed(stream.of, epoch)
            return [inner[place] for place in order.rows(np.arange(stream.total)).tolist()]
        case Slice():
            return listed(stream.of, 0)[stream.start : stream.stop]
        case Sum():
            return [row for part in stream.parts for row in listed(part, epoch)]
        case Repeated():
            return [row for turn in range(stream.times) for row in listed(stream.of, epoch + turn * PASS)]
        case Mixed():
            from crucible.mix import Mix

            sources, inside = Mix(stream.spec, epoch).at(np.arange(stream.total))
            found = []
            for number, index in zip(sources.tolist(), inside.tolist()):
                part = stream.parts[number]
                found.append(listed(part, epoch + index // part.total * PASS)[index % part.total])
            return found
    raise AssertionError(stream)


def spec_of(stream: Shuffled) -> dict[str, Any]:
    names = ("mode", "seed", "lanes", "window", "reshuffle")
    return {name: getattr(stream.spec, name) for name in names}


SPECS = st.one_of(
    st.builds(lambda seed: OrderSpec("exact", seed), st.integers(0, 5)),
    st.builds(
        lambda seed, lanes, window, reshuffle: OrderSpec("lanes", seed, 0, lanes, window, reshuffle),
        st.integers(0, 5),
        st.integers(1, 5),
        st.integers(1, 4),
        st.sampled_from(["local", "global"]),
    ),
)


def grown(inner: st.SearchStrategy[Stream]) -> st.SearchStrategy[Stream]:
    return st.one_of(
        st.builds(Shuffled, inner, SPECS),
        st.builds(lambda of, a, b: slice_of(of, min(a, b), max(a, b)), inner, st.integers(0, 60), st.integers(0, 60)),
        st.builds(lambda one, other: Sum((one, other.shifted(100))), inner, inner),
        st.builds(lambda of, times: Repeated(of, times), inner, st.integers(0, 3)),
        st.builds(mixed, inner, inner, st.integers(0, 3), st.floats(0.1, 5)),
    )


def mixed(one: Stream, other: Stream, seed: int, weight: float) -> Stream:
    parts = (one, other.shifted(100))
    if not all(part.total for part in parts):
        return Sum(parts)
    return Mixed(parts, MixSpec(tuple(part.total for part in parts), (1.0, weight), seed, "all_exhausted"))


LEAVES = st.builds(source, st.lists(st.integers(0, 9), max_size=6), st.just(0))
TREES: st.SearchStrategy[Stream] = st.recursive(LEAVES, grown, max_leaves=4)


@unhurried
@given(TREES, st.integers(0, 3), st.data())
def test_any_positions_hold_what_a_walk_from_the_start_meets(tree: Stream, epoch: int, data: st.DataObject) -> None:
    if tree.total > 3000:
        return
    everything = listed(tree, epoch)
    assert len(everything) == tree.total == int(tree.pieces.sum())
    if not everything:
        return
    wanted = data.draw(st.lists(st.integers(0, len(everything) - 1), min_size=1, max_size=30))
    assert tree.at(epoch).rows(np.asarray(wanted, dtype=np.int64)).tolist() == [everything[place] for place in wanted]


@unhurried
@given(TREES, st.integers(0, 2))
def test_a_copy_in_another_process_gives_the_same_order_and_name(tree: Stream, epoch: int) -> None:
    copy = pickle.loads(pickle.dumps(tree))
    positions = np.arange(min(tree.total, 200))
    assert copy.at(epoch).rows(positions).tolist() == tree.at(epoch).rows(positions).tolist()
    assert digest(copy) == digest(tree)


@unhurried
@given(LEAVES, SPECS, st.integers(0, 40), st.integers(0, 5))
def test_what_take_and_skip_part_stays_parted_in_every_epoch(
    leaf: Source, spec: OrderSpec, cut: int, epoch: int
) -> None:
    shuffled = Shuffled(leaf, spec)
    held, rest = slice_of(shuffled, 0, cut), slice_of(shuffled, cut, shuffled.total)
    now = [set(part.at(epoch).rows(np.arange(part.total)).tolist()) for part in (held, rest)]
    if 0 < cut < shuffled.total:
        first = [set(part.at(0).rows(np.arange(part.total)).tolist()) for part in (held, rest)]
        assert now == first
    assert sorted([*now[0], *now[1]]) == list(range(leaf.total))


def test_other_trees_have_other_names() -> None:
    one, other = source([3, 4]), source([3, 4], name="b")
    trees: list[Stream] = [
        one,
        other,
        Shuffled(one, OrderSpec("exact", 1)),
        Shuffled(one, OrderSpec("exact", 2)),
        Slice(one, 0, 3),
        Slice(one, 1, 3),
        Sum((one, other.shifted(7))),
        Sum((other, one.shifted(7))),
        Repeated(one, 2),
        Mixed((one, other.shifted(7)), MixSpec((7, 7), (1.0, 2.0))),
        Mixed((one, other.shifted(7)), MixSpec((7, 7), (1.0, 3.0))),
    ]
    assert len({digest(tree) for tree in trees}) == len(trees)


def test_an_exact_permutation_that_would_not_fit_is_refused_with_its_size() -> None:
    assert check_exact(1 << 20, asked=False)
    assert not check_exact(1 << 30, asked=False)
    with pytest.raises(UsageError, match=r"8\.0 GiB of every process"):
        check_exact(1 << 30, asked=True)


@given(st.integers(0, 5000))
def test_even_pieces_add_up(total: int) -> None:
    pieces = even_pieces(total)
    assert int(pieces.sum()) == total
    assert all(pieces > 0)
