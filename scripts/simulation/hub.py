"""A Hub that counts requests, asked through the governor's own ledger, in virtual time.

The ledger is the product's (`crucible.hub.governor.Ledger`, `crucible.hub.budget`): what it grants is sent. The Hub
counts in fixed windows, tells on every reply how many are left, and answers 429 beyond the quota, which others use too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from crucible.hub.governor import Key, Ledger
from scripts.simulation.broken import Broken

KEY = Key("account", "resolvers")
CONNECTIONS = 4096
LATENCY_S = 0.05
After = Callable[[float, Callable[[], None]], None]
"""Do something so many seconds from now."""


class Hub:
    """`ask` calls back when a request was answered well. Without a quota that is at once."""

    def __init__(
        self,
        chance: random.Random,
        quota: int | None,
        window_s: float,
        others: float,
        clock: Callable[[], float],
        after: After,
    ) -> None:
        self._chance, self._quota, self._window_s, self._others = chance, quota, window_s, others
        self._clock, self._after = clock, after
        self._ledger = Ledger(chance.random)
        self._waiting: dict[str, Callable[[], None]] = {}
        self._window, self._left, self._theirs = -1, 0, 0
        self._pumping_at = math.inf
        self._quiet_until = -math.inf
        self.requests = self.refusals = self.asked = 0

    def ask(self, answered: Callable[[], None]) -> None:
        """One more request, when the governor lets it."""
        if self._quota is None:
            self.requests += 1
            self._after(2 * LATENCY_S, answered)
            return
        self.asked += 1
        ticket = str(self.asked)
        self._waiting[ticket] = answered
        self._ledger.ask(ticket, KEY, CONNECTIONS)
        self._pump()

    def _pump(self) -> None:
        now = self._clock()
        granted, again = self._ledger.grant(now)
        for ticket in granted:
            if now < self._quiet_until:
                raise Broken("quiet", f"a request was sent {self._quiet_until - now:.1f} s before the Hub wanted any")
            self._after(LATENCY_S, lambda ticket=ticket: self._arrive(ticket))
        if again < math.inf and now + again < self._pumping_at:
            self._pumping_at = now + again
            self._after(again, self._pump_again)

    def _pump_again(self) -> None:
        self._pumping_at = math.inf
        self._pump()

    def _arrive(self, ticket: str) -> None:
        assert self._quota is not None
        now = self._clock()
        window = int(now // self._window_s)
        if window != self._window:
            self._window, self._left = window, self._quota
            self._theirs = int(self._quota * self._others * self._chance.random())
        if self._theirs and self._chance.random() < 0.5:
            share = min(self._left, self._theirs, self._chance.randint(1, 1 + self._quota // 4))
            self._left, self._theirs = self._left - share, self._theirs - share
        reset = math.ceil((window + 1) * self._window_s - now)
        status = 200 if self._left > 0 else 429
        self._left = max(0, self._left - 1)
        self.requests += 1
        headers = {"ratelimit": f'"resolvers";r={self._left if status == 200 else 0};t={reset}'}
        self._after(LATENCY_S, lambda: self._replied(ticket, status, headers, reset))

    def _replied(self, ticket: str, status: int, headers: dict[str, str], reset: int) -> None:
        now = self._clock()
        self._ledger.replied(ticket, status, headers, now)
        self._ledger.end(ticket, now)
        answered = self._waiting.pop(ticket)
        if status == 429:
            self.refusals += 1
            self._quiet_until = max(self._quiet_until, now + reset)
            self.ask(answered)
        else:
            answered()
            self._pump()
