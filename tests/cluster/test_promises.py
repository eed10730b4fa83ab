"""No order of questions lets nodes drop all copies of a shard whose source does not answer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from crucible.cluster.promises import KEPT_S, Promises
from crucible.refs import NodeId

KEYS = ("x", "y")
NODES = tuple(NodeId(f"node-{number}") for number in range(4))
asking = st.tuples(
    st.sampled_from(NODES),
    st.sets(st.sampled_from(KEYS), min_size=1),
    st.sampled_from(["at once", "never", "late", "reported meanwhile"]),
    st.floats(0, KEPT_S),
)


@given(
    held=st.fixed_dictionaries({key: st.sets(st.sampled_from(NODES), min_size=1) for key in KEYS}),
    asks=st.lists(asking, max_size=12),
    fetchable=st.sets(st.sampled_from(KEYS)),
)
def test_the_last_copy_stays_unless_its_source_answers(
    held: dict[str, set[NodeId]], asks: list[tuple[NodeId, set[str], str, float]], fetchable: set[str]
) -> None:
    """Nodes ask, and drop at once, late (but in time) or not at all; a store may be asked before it has dropped."""
    promises = Promises()
    believed = {key: set(there) for key, there in held.items()}
    due: list[tuple[float, NodeId, str]] = []
    now = 0.0

    def drop(until: float) -> None:
        for when, node, key in [one for one in due if one[0] <= until]:
            due.remove((when, node, key))
            held[key].discard(node)
            believed[key].discard(node)
            assert held[key] or key in fetchable

    for node, keys, how, passes in asks:
        mine = sorted(key for key in keys if node in held[key])
        allowed = promises.could(node, mine, lambda key: believed[key], set(NODES), fetchable.__contains__, now)
        promises.give(node, allowed, now)
        for key in allowed:
            believed[key].discard(node)
            if how == "reported meanwhile":  # it is still there, and is counted anew
                believed[key].add(node)
            if how != "never":
                due.append((now if how == "at once" else now + KEPT_S * 0.999, node, key))
        drop(now)
        now += passes
        drop(now)
        for key in KEYS:  # what stays is found again, sooner or later
            believed[key] |= {one for one in held[key] if (one, key) not in {(n, k) for _, n, k in due}}
    drop(float("inf"))


def test_a_node_that_goes_does_not_vouch_and_old_promises_are_forgotten() -> None:
    promises = Promises()
    holders = {"x": {NODES[0], NODES[1]}}
    never = set[str]().__contains__
    assert promises.could(NODES[0], ["x"], holders.__getitem__, {NODES[0]}, never, 0.0) == []
    assert promises.could(NODES[0], ["x"], holders.__getitem__, set(NODES), never, 0.0) == ["x"]
    promises.give(NODES[0], ["x"], 0.0)
    assert promises.could(NODES[1], ["x"], holders.__getitem__, set(NODES), never, 1.0) == []
    assert promises.could(NODES[1], ["x"], holders.__getitem__, set(NODES), never, KEPT_S) == ["x"], "it was not used"
    promises.give(NODES[2], ["y"], 2 * KEPT_S)
    assert len(promises) == 1


def test_one_that_does_not_know_what_was_promised_before_lets_go_only_what_its_source_has() -> None:
    held = {"x": set(NODES), "y": set(NODES)}
    promises = Promises(unsure_until=KEPT_S)
    for now, allowed in ((0.0, ["y"]), (KEPT_S - 1, ["y"]), (KEPT_S, ["x", "y"])):
        found = promises.could(NODES[0], KEYS, held.__getitem__, set(NODES), {"y"}.__contains__, now)
        assert found == allowed
