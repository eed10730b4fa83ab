"""What may still be sent to one rate-limit bucket of a Hub, from what its replies said. Pure: given time and replies.

The Hub counts requests in fixed windows and tells on every reply how many are left (`RateLimit: "api";r=12;t=55`). The
replies of one window may arrive in any order, but the smallest `r` among them is of the request that was counted last,
and whatever was counted after it is still in flight. So `low - in_flight` may be sent safely, however many send, and
it falls short of the truth by no more than what is in flight. Others may use the same quota: nothing is ever assumed
beyond what a reply said, and a window of which nothing was heard yet is entered with a few requests.

A refusal that says how long (429 with r=0, `Retry-After`) makes the bucket quiet; after that it is entered with one
request until a reply says that it is fine. No header makes anyone wait much longer than `SAID_CAP_S` at once, and none
raises.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime

SAID_CAP_S = 900.0
"""No reply makes us wait longer at once: three of the Hub's own rate-limit windows of 300 s."""
SLOW_START = 8
"""Requests in flight to a bucket of which nothing was heard in this window."""
LOOK_AGAIN_S = 1.0
"""Upper bound of a wait for a reply, after which one may look again; the reply itself wakes earlier."""
SPREAD_S = 5.0
"""Keepers that cannot speak to each other come back spread over a tenth of their wait, but not over more than this."""
_REMAINING = re.compile(r";\s*r=(\d{1,15})(?!\d)")
_RESET = re.compile(r";\s*t=(\d{1,15})(?!\d)")
_QUOTA = re.compile(r";\s*q=(\d{1,15})(?!\d)")
_SECONDS = re.compile(r"\d{1,15}")


@dataclass(frozen=True, slots=True)
class Limit:
    """What one reply said of its bucket."""

    remaining: int
    reset_s: float
    """Until the window ends; the Hub rounds it to whole seconds, in which direction is its own affair."""
    quota: int | None


def read_limit(headers: Mapping[str, str]) -> Limit | None:
    """The tightest limit of a reply's `RateLimit` and `RateLimit-Policy`; None when there is none that makes sense."""
    found: list[tuple[int, float]] = []
    for item in headers.get("ratelimit", "").split(","):
        remaining, reset = _REMAINING.search(item), _RESET.search(item)
        if remaining and reset:
            found.append((int(remaining[1]), -min(SAID_CAP_S, float(reset[1]))))
    if not found:
        return None
    remaining_least, reset_longest = min(found)
    quota = _QUOTA.search(headers.get("ratelimit-policy", ""))
    return Limit(remaining_least, -reset_longest, int(quota[1]) if quota else None)


def said_wait(status: int | None, headers: Mapping[str, str], *, now: float | None = None) -> float | None:
    """Seconds that a refusal asks to wait, up to `SAID_CAP_S`; None when no header speaks.

    429 with `RateLimit` r=0 means t+1 s. Else `Retry-After` on 429 and 503 means that + 1 s: whole seconds, or a date,
    which is compared with the reply's own `Date` (else with `now`, Unix seconds, by default this machine's clock).
    """
    if status not in (429, 503):
        return None
    said: float | None = None
    limit = read_limit(headers) if status == 429 else None
    if limit is not None and limit.remaining == 0:
        said = limit.reset_s
    elif after := headers.get("retry-after", "").strip():
        said = float(after) if _SECONDS.fullmatch(after) else _until(after, headers.get("date", ""), now)
    return None if said is None else min(SAID_CAP_S, max(0.0, said) + 1.0)


def backoff(attempt: int, cap_s: float) -> float:
    """Seconds before try `attempt + 1` (the first try is 0) where no header spoke: 1, 2, 4, 8, 16 s up to `cap_s`, and
    up to half as much again by chance, so that those that failed together do not return together."""
    return min(cap_s, float(2 ** min(attempt, 30))) * (1 + 0.5 * random.random())


@dataclass(frozen=True, slots=True)
class Budget:
    """What is known of one bucket. Times are the keeper's own monotonic seconds."""

    spread: float = 0.0
    """In [0, 1): where this keeper stands among those that wake at the same moment."""
    in_flight: int = 0
    """Sent, and no reply yet."""
    low: int | None = None
    """The smallest number that a reply of this window said was left; None when none did."""
    quota: int | None = None
    reset_from: float = -math.inf
    reset_by: float = math.inf
    """The window ends between these two, by all replies of it together."""
    since: float = -math.inf
    """When the first reply of this window came."""
    blocked_until: float = -math.inf
    entering: int | None = SLOW_START
    """Requests that may be in flight until a reply says that it is fine; None once one has."""

    @property
    def left(self) -> int | None:
        """What may surely still be sent in this window; None when it is not known."""
        return None if self.low is None else self.low - self.in_flight


def may_send(budget: Budget, now: float) -> float:
    """0 when one more request may go, else the seconds after which to ask again if no reply came before."""
    budget = _rolled(budget, now)
    if (silence := _silence(budget, now)) > 0:
        return silence
    if budget.entering is not None and budget.in_flight >= budget.entering:
        return LOOK_AGAIN_S
    return 0.0 if budget.left is None or budget.left > 0 else LOOK_AGAIN_S


def quiet(budget: Budget, now: float) -> float:
    """Seconds for which the Hub wants to hear nothing; 0 where one may send, or waits for replies only."""
    return _silence(_rolled(budget, now), now)


def why(budget: Budget) -> str:
    """What to tell a person about a quiet time."""
    if budget.low is None:
        return "as it said"
    return f"{max(0, budget.low)} of {budget.quota} left" if budget.quota else f"{max(0, budget.low)} left"


def sent(budget: Budget, now: float) -> Budget:
    """One more request is on its way."""
    budget = _rolled(budget, now)
    return replace(budget, in_flight=budget.in_flight + 1)


def replied(
    budget: Budget, status: int | None, headers: Mapping[str, str], now: float, sent_at: float | None = None
) -> Budget:
    """A request has its answer. `status` None: the connection broke, and nobody knows whether it was counted.

    `sent_at` is when `sent` was called for it; without it the reply is taken to have come at once.
    """
    began = now if sent_at is None else min(sent_at, now)
    budget = _rolled(replace(budget, in_flight=max(0, budget.in_flight - 1)), now)
    limit = read_limit(headers)
    if limit is not None:
        budget = _heard(budget, limit, now, began)
    elif budget.low is not None:
        budget = replace(budget, low=max(0, budget.low - 1))
    said = said_wait(status, headers)
    if said is not None:
        return hushed(budget, now + said + _spread(budget, said))
    if status == 429 and limit is None:
        return replace(budget, entering=1)
    orderly = status is not None and status != 429 and (limit is not None or status < 500)
    # a reply that was on its way before the quiet time says nothing about what comes after it
    return replace(budget, entering=None) if orderly and began >= budget.blocked_until else budget


def hushed(budget: Budget, until: float) -> Budget:
    """Quiet until then, and entered with one request after it."""
    return replace(budget, blocked_until=max(budget.blocked_until, until), entering=1)


def _heard(budget: Budget, limit: Limit, now: float, began: float) -> Budget:
    """Take what a reply said of its window: this one, a later one, or one that is over."""
    # the Hub wrote the reply at some moment between `began` and `now`, and rounded by less than a second
    first, last = began + limit.reset_s - 1, now + limit.reset_s + 1
    quota = limit.quota if limit.quota is not None else budget.quota
    before = last < budget.reset_from
    if before and began < budget.since:
        return budget  # it was counted in the window before, and only now is here
    if budget.low is None or first > budget.reset_by or before:
        return replace(budget, low=limit.remaining, quota=quota, reset_from=first, reset_by=last, since=now)
    return replace(
        budget,
        low=min(budget.low, limit.remaining),
        quota=quota,
        reset_from=max(first, budget.reset_from),
        reset_by=min(last, budget.reset_by),
    )


def _rolled(budget: Budget, now: float) -> Budget:
    """The window is over: nothing is known of the next one until a reply of it is here."""
    if now < _release(budget):
        return budget
    used_up = budget.left is not None and budget.left <= 0
    entering = 1 if used_up or budget.entering == 1 else max(1, min(SLOW_START, budget.quota or SLOW_START))
    return replace(budget, low=None, reset_from=-math.inf, reset_by=math.inf, since=-math.inf, entering=entering)


def _silence(budget: Budget, now: float) -> float:
    wait = budget.blocked_until - now
    if budget.left is not None and budget.left <= 0 and budget.in_flight == 0:
        wait = max(wait, _release(budget) - now)
    return max(0.0, wait)


def _release(budget: Budget) -> float:
    """When the next window has surely begun, for this keeper."""
    if math.isinf(budget.reset_by):
        return math.inf
    return budget.reset_by + _spread(budget, budget.reset_by - budget.since)


def _spread(budget: Budget, wait: float) -> float:
    return budget.spread * min(SPREAD_S, 0.1 * wait)


def _until(date: str, server_now: str, now: float | None) -> float | None:
    try:
        then = parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError, TypeError):
        return None
    try:
        return then - parsedate_to_datetime(server_now).timestamp()
    except (ValueError, OverflowError, TypeError):
        return then - (time.time() if now is None else now)
