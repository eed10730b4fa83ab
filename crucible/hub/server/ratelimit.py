"""The Hub's quotas: fixed windows, one a bucket and caller, told on every reply. No I/O; the clock is given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Bucket = Literal["api", "resolvers", "pages"]


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Requests a caller may make in one window, by bucket."""

    api: int = 100_000
    resolvers: int = 100_000
    pages: int = 100_000
    window_s: int = 300
    """The Hub's windows are five minutes."""

    def __post_init__(self) -> None:
        if min(self.api, self.resolvers, self.pages, self.window_s) < 1:
            raise ValueError(f"quotas and the window must be at least 1, got {self}")

    def quota(self, bucket: Bucket) -> int:
        return {"api": self.api, "resolvers": self.resolvers, "pages": self.pages}[bucket]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the quota says to one request."""

    allowed: bool
    headers: dict[str, str]


def bucket_of(path: str) -> Bucket:
    """Which quota a raw path spends."""
    if "/resolve/" in path or path.startswith("/api/resolve-cache/"):
        return "resolvers"
    return "api" if path.startswith("/api/") else "pages"


def limit_headers(bucket: Bucket, *, quota: int, left: int, reset_s: int, window_s: int) -> dict[str, str]:
    return {
        "RateLimit": f'"{bucket}";r={left};t={reset_s}',
        "RateLimit-Policy": f'"fixed window";"{bucket}";q={quota};w={window_s}',
    }


class RateLimiter:
    """Counts requests. Concurrency: one thread, the server's. Memory: one entry a caller seen in this window."""

    def __init__(self, limits: RateLimits) -> None:
        self.limits = limits
        self._window = -1
        self._used: dict[tuple[str, Bucket], int] = {}

    def spend(self, caller: str, bucket: Bucket, now: float) -> Verdict:
        """Count one request of `caller`; a refused one costs nothing."""
        window = int(now // self.limits.window_s)
        if window != self._window:
            self._window = window
            self._used.clear()
        quota, used = self.limits.quota(bucket), self._used.get((caller, bucket), 0)
        allowed = used < quota
        if allowed:
            used += 1
            self._used[caller, bucket] = used
        reset_s = max(1, math.ceil((window + 1) * self.limits.window_s - now))
        return Verdict(
            allowed,
            limit_headers(bucket, quota=quota, left=quota - used, reset_s=reset_s, window_s=self.limits.window_s),
        )
