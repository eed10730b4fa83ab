"""A rate-limit bucket's budget: the rules one at a time, and as a property against a simulated Hub in virtual time."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.hub.budget import (
    LOOK_AGAIN_S,
    SAID_CAP_S,
    SLOW_START,
    SPREAD_S,
    Budget,
    backoff,
    may_send,
    quiet,
    read_limit,
    replied,
    said_wait,
    sent,
)
from crucible.hub.governor import Key, Ledger
from crucible.hub.server.ratelimit import limit_headers


def says(left: int, reset_s: int, quota: int = 100) -> dict[str, str]:
    """A reply's headers, with the names as httpx gives them."""
    headers = limit_headers("api", quota=quota, left=left, reset_s=reset_s, window_s=300)
    return {name.lower(): value for name, value in headers.items()}


def after(budget: Budget, *replies: tuple[int | None, dict[str, str]], now: float = 0.0) -> Budget:
    """Send as many as there are replies, then take these in order."""
    for _ in replies:
        budget = sent(budget, now)
    for status, headers in replies:
        budget = replied(budget, status, headers, now, now)
    return budget


# --- item 51: a refusal that says how long is kept; item 28, 29: how it is said


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (429, says(0, 55), 56),
        (429, {**says(7, 55), "retry-after": "3"}, 4),
        (429, says(7, 55), None),
        (429, {"ratelimit": '"api";r=0;t=0'}, 1),
        (429, {"ratelimit": '"api";r=5;t=9, "day";r=0;t=70'}, 71),
        (429, says(0, 4000), SAID_CAP_S),
        (429, {"ratelimit": '"api";r=0;t=-5', "retry-after": "2"}, 3),
        (429, {"ratelimit": '"api";r=0;t=' + "9" * 5000}, None),
        (503, {"retry-after": "9"}, 10),
        (503, {"retry-after": "9" * 400}, None),
        (503, {"retry-after": "-9"}, None),
        (503, {"retry-after": "soon"}, None),
        (503, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT", "date": "Wed, 21 Oct 2026 07:27:50 GMT"}, 11),
        (503, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, 6),  # by the clock that is given
        (429, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 1),
        (429, {"retry-after": "Wed, 21 Oct 9999 07:28:00 GMT"}, SAID_CAP_S),
        (500, {"retry-after": "9"}, None),
        (200, says(0, 55), None),
        (None, {}, None),
    ],
)
def test_what_a_reply_asks_for(status: int | None, headers: dict[str, str], expected: float | None) -> None:
    assert said_wait(status, headers, now=1792567675.0) == expected


def test_without_a_word_the_wait_doubles_up_to_its_cap_and_has_jitter() -> None:
    for attempt, base in [(0, 1), (1, 2), (2, 4), (3, 8), (4, 16), (10, 60), (10_000, 60)]:
        waits = {backoff(attempt, 60) for _ in range(20)}
        assert len(waits) > 1
        assert all(base <= wait <= 1.5 * base for wait in waits)


def test_a_refusal_makes_the_bucket_quiet_until_a_second_after_the_reset() -> None:
    budget = after(Budget(), (429, says(0, 55)))
    assert may_send(budget, 0) == 56
    assert may_send(budget, 55.9) > 0
    assert may_send(budget, 56) == 0


def test_after_the_quiet_time_one_request_goes_first_and_a_good_reply_lets_the_others_go() -> None:
    budget = sent(after(Budget(), (429, says(0, 55))), 57)
    assert may_send(budget, 57) == LOOK_AGAIN_S
    assert quiet(budget, 57) == 0, "it waits for a reply, not for the Hub"
    fine = replied(budget, 200, says(99, 299), 58, 57)
    assert may_send(fine, 58) == 0
    assert fine.left == 99
    refused = replied(budget, 429, says(0, 299), 58, 57)
    assert may_send(refused, 58) == 300
    broken = replied(budget, None, {}, 58, 57)
    assert may_send(broken, 58) == 0
    assert may_send(sent(broken, 58), 58) > 0, "still one at a time"


def test_a_good_reply_from_before_the_refusal_does_not_end_the_quiet_entry() -> None:
    budget = sent(sent(Budget(), 0), 0)
    budget = replied(budget, 503, {"retry-after": "9"}, 1, 0)
    budget = replied(budget, 200, {}, 2, 0)
    assert may_send(budget, 2) == 9
    assert may_send(budget, 11) == 0
    assert may_send(sent(budget, 11), 11) > 0


def test_keepers_that_cannot_speak_to_each_other_do_not_wake_together() -> None:
    waits = [may_send(after(Budget(spread=spread), (429, says(0, 299))), 0) for spread in (0.0, 0.5, 0.99)]
    assert waits[0] == 300
    assert waits == sorted(set(waits))
    assert waits[-1] <= 300 + SPREAD_S


def test_an_unknown_bucket_starts_slowly_and_a_hub_without_quotas_is_not_held_back() -> None:
    budget = Budget()
    for _ in range(SLOW_START):
        assert may_send(budget, 0) == 0
        budget = sent(budget, 0)
    assert may_send(budget, 0) == LOOK_AGAIN_S
    budget = replied(budget, 200, {}, 0.1, 0)
    for _ in range(1000):
        assert may_send(budget, 0.2) == 0
        budget = sent(budget, 0.2)


def test_what_is_left_is_the_smallest_word_less_what_is_in_flight_in_any_order_of_replies() -> None:
    budget = Budget()
    for _ in range(8):
        budget = sent(budget, 0)
    for remaining in (5, 9, 2, 7):  # 8 were sent, the reply with 2 was counted last of these
        budget = replied(budget, 200, says(remaining, 100), 0.1, 0)
    assert budget.left == 2 - 4
    assert may_send(budget, 0.2) == LOOK_AGAIN_S
    for remaining in (8, 6, 4, 3):
        budget = replied(budget, 200, says(remaining, 100), 0.3, 0)
    assert budget.left == 2


def test_a_used_up_window_is_quiet_without_any_refusal() -> None:
    budget = after(Budget(), (200, says(0, 40)))
    assert may_send(budget, 0) == quiet(budget, 0) == 41


def test_a_request_that_was_lost_counts_as_used() -> None:
    budget = after(after(Budget(), (200, says(2, 40))), (None, {}), (None, {}))
    assert quiet(budget, 0) > 0


def test_a_late_reply_of_the_window_before_says_nothing_of_this_one() -> None:
    budget = sent(after(Budget(), (200, says(50, 3))), 1)
    budget = replied(sent(budget, 3.5), 200, says(99, 300), 3.6, 3.5)
    assert budget.left == 98, "the old request is still in flight"
    late = replied(budget, 200, says(0, 1), 3.7, 1)
    assert late.left == 99


def test_a_hub_that_changes_its_mind_is_believed() -> None:
    budget = after(Budget(), (200, says(50, 300)))
    budget = replied(sent(budget, 5), 200, says(0, 10), 5, 5)
    assert 0 < quiet(budget, 5) <= 11
    assert may_send(budget, 16.1) == 0


TEXT = st.one_of(
    st.text(max_size=60),
    st.builds(
        lambda r, t, q: f'"api";r={r};t={t};q={q}',
        *[st.one_of(st.integers(), st.floats(), st.text(max_size=5)) for _ in range(3)],
    ),
    st.from_regex(r'("x";r=\d{1,30};t=\d{1,30},? ?){1,3}', fullmatch=True),
    st.dates().map(lambda d: d.strftime("%a, %d %b %Y 00:00:00 GMT")),
)
HEADERS = st.dictionaries(st.sampled_from(["ratelimit", "ratelimit-policy", "retry-after", "date"]), TEXT)
STATUS = st.one_of(st.none(), st.sampled_from([200, 302, 404, 408, 429, 429, 500, 503, 503, 999]))


@given(st.lists(st.tuples(st.booleans(), STATUS, HEADERS, st.floats(0, 100)), max_size=30), st.floats(0, 0.99))
def test_no_header_crashes_or_silences_for_longer_than_the_cap(
    steps: list[tuple[bool, int | None, dict[str, str], float]], spread: float
) -> None:
    budget, now = Budget(spread=spread), 0.0
    for send, status, headers, passes in steps:
        now += passes
        budget = sent(budget, now) if send else replied(budget, status, headers, now, now - passes)
        assert 0 <= may_send(budget, now) <= SAID_CAP_S + 1 + SPREAD_S
    for _ in range(budget.in_flight):
        budget = replied(budget, None, {}, now, now)
    late = now + SAID_CAP_S + 1 + SPREAD_S
    assert may_send(budget, late) == 0, "whatever was said, somebody may ask again at last"


@given(HEADERS)
def test_reading_a_limit_never_raises(headers: dict[str, str]) -> None:
    limit = read_limit(headers)
    assert limit is None or (limit.remaining >= 0 and 0 <= limit.reset_s <= SAID_CAP_S)


# --- items 51 and 54 as properties: a Hub in virtual time


@dataclass(frozen=True)
class World:
    """A Hub with fixed windows, those who ask through one ledger, and others who eat from the same quota."""

    quota: int
    window: int
    phase: float
    latency: float
    """Longest way of a request or of a reply, seconds; each takes a random part of it."""
    body: float
    clients: int
    each: int
    connections: int
    others: int
    """At most so many requests of others in each window, at random times."""
    rounding: Callable[[float], int]
    seed: int


@dataclass
class Seen:
    refusals: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """Window -> how many of ours were refused in it."""
    in_flight_at_first: dict[int, int] = field(default_factory=dict)
    sent_while_quiet: int = 0
    most_held: int = 0
    done: int = 0
    ended: float = 0.0


def simulate(world: World, limit_s: float) -> Seen:
    """Run until every client has its replies, or until `limit_s` of virtual time has passed."""
    chance = random.Random(world.seed)
    ledger, key, seen = Ledger(chance.random), Key("hub", "api"), Seen()
    used: dict[int, int] = defaultdict(int)
    events: list[tuple[float, int, Callable[[float], None]]] = []
    order = itertools.count()
    remaining = {f"{client}": world.each for client in range(world.clients)}
    flying: set[str] = set()
    quiet_until = -1.0

    def at(time: float, act: Callable[[float], None]) -> None:
        heapq.heappush(events, (time, next(order), act))

    def window(now: float) -> int:
        return math.floor((now + world.phase) / world.window)

    def spend(now: float) -> tuple[int, dict[str, str], int]:
        number = window(now)
        allowed = used[number] < world.quota
        used[number] += allowed
        left = (number + 1) * world.window - world.phase - now
        return 200 if allowed else 429, says(world.quota - used[number], world.rounding(left), world.quota), number

    def travel() -> float:
        return chance.uniform(0, world.latency)

    def arrives(now: float, client: str) -> None:
        answer = spend(now)
        at(now + travel(), lambda later: returns(later, client, *answer))

    def returns(now: float, client: str, status: int, headers: Mapping[str, str], number: int) -> None:
        nonlocal quiet_until
        flying.discard(client)
        if status == 429:
            seen.in_flight_at_first.setdefault(number, len(flying))
            seen.refusals[number] += 1
            quiet_until = max(quiet_until, now + (said_wait(status, headers) or 0.0) - 1)
        ledger.replied(client, status, headers, now)
        at(now + (chance.uniform(0, world.body) if status == 200 else 0), lambda later: ends(later, client, status))

    def ends(now: float, client: str, status: int) -> None:
        ledger.end(client, now)
        if status == 200:
            remaining[client] -= 1
            seen.done += 1
            seen.ended = now
        if remaining[client]:
            ledger.ask(client, key, world.connections)

    for client in remaining:
        ledger.ask(client, key, world.connections)
    for number in range(math.ceil(limit_s / world.window) + 1):
        for _ in range(chance.randint(0, world.others)):
            at(max(0.0, (number + chance.random()) * world.window - world.phase), lambda now: spend(now) and None)
    at(0.0, lambda _: None)
    while events and any(remaining.values()):
        now, _, act = heapq.heappop(events)
        if now > limit_s:
            break
        act(now)
        granted, again = ledger.grant(now)
        for client in granted:
            seen.sent_while_quiet += now < quiet_until
            flying.add(client)
            at(now + travel(), lambda later, client=client: arrives(later, client))  # type: ignore[misc]
        seen.most_held = max(seen.most_held, ledger.connections_in_use)
        if not math.isinf(again):
            at(now + again, lambda _: None)
    return seen


WORLDS = st.builds(
    World,
    quota=st.integers(1, 300),
    window=st.integers(8, 60),
    phase=st.floats(0, 60),
    latency=st.floats(0.001, 0.5),
    body=st.floats(0, 1),
    clients=st.integers(1, 80),
    each=st.integers(1, 6),
    connections=st.integers(1, 64),
    others=st.integers(0, 200),
    rounding=st.sampled_from([math.ceil, math.floor, round]),
    seed=st.integers(0, 2**32),
)


def patience(world: World) -> float:
    """Seconds in which all must be done: whole windows, of which quota, others and latency leave each a part."""
    turn = 2 * world.latency + world.body
    useful = world.window - 3 - min(SPREAD_S, 0.1 * world.window) - 4 * turn
    at_once = min(world.connections, world.clients, SLOW_START)
    a_window = max(1, min(world.quota - world.others, int(max(0.0, useful) / turn) * at_once))
    return (math.ceil(world.clients * world.each / a_window) + 3) * (world.window + 2 * turn + 3)


@settings(max_examples=100, deadline=None)
@given(WORLDS)
def test_a_cluster_alone_uses_its_quota_up_and_is_never_refused_once_it_knows_it(world: World) -> None:
    world = replace(world, others=0)
    seen = simulate(world, patience(world))
    assert seen.done == world.clients * world.each
    assert sum(seen.refusals.values()) <= max(0, SLOW_START - world.quota)
    assert seen.most_held <= world.connections
    assert seen.sent_while_quiet == 0


@settings(max_examples=100, deadline=None)
@given(WORLDS)
def test_with_others_on_the_quota_a_window_costs_one_refusal_beyond_those_in_flight(world: World) -> None:
    world = replace(world, others=min(world.others, world.quota // 2))
    seen = simulate(world, patience(world))
    assert seen.done == world.clients * world.each, "nobody waits for ever, nothing starves"
    for number, refusals in seen.refusals.items():
        assert refusals <= 1 + seen.in_flight_at_first[number]
    assert seen.most_held <= world.connections
    assert seen.sent_while_quiet == 0


def test_the_quota_of_a_long_window_is_used_nearly_all_the_time() -> None:
    """3,000 requests in windows of 500 take six windows, as they must."""
    world = World(500, 60, 20.0, 0.05, 0.1, 64, 47, 64, 0, math.ceil, 7)
    seen = simulate(world, 1000)
    assert seen.done == 64 * 47
    assert seen.ended <= 7 * 60
