"""A Hub that counts how many requests it works on at once, and lets another client eat from the same quota."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import httpx
from aiohttp import web
from aiohttp.typedefs import Handler

from crucible.hub.server import HubOptions, HubServer, RequestRecord
from tests.hubserver.faults import FaultList

OTHER = "somebody-else"


class CountingHub(HubServer):
    """`peak` is the largest number of requests that were being answered at the same time, by this Hub and its CDN.

    A request is counted until its reply is about to leave, so it never overlaps with what its sender sends next.
    """

    def __init__(self, root: str | os.PathLike[str], *, options: HubOptions, takes_s: float) -> None:
        self._guard = threading.Lock()
        self._now, self.peak, self._takes_s = 0, 0, takes_s
        self.faults = FaultList([])
        super().__init__(root, options=options, middlewares=[self._counting, self.faults.middleware])

    @property
    def _counting(self) -> Any:
        @web.middleware
        async def counting(request: web.Request, handler: Handler) -> web.StreamResponse:
            ours = request.headers.get("User-Agent") != OTHER
            with self._guard:
                self._now += ours
                self.peak = max(self.peak, self._now)
            try:
                await asyncio.sleep(self._takes_s)
                return await handler(request)
            finally:
                with self._guard:
                    self._now -= ours

        return counting

    def ours(self, bucket: str) -> list[RequestRecord]:
        """What crucible asked of a bucket, in the order it came."""
        return sorted((r for r in self.log if r.bucket == bucket and r.user_agent != OTHER), key=lambda r: r.time)

    def eat(self, url: str) -> None:
        """Spend a window's whole quota as somebody else with the same address, with more than a second of it to go."""
        with httpx.Client(headers={"User-Agent": OTHER}, trust_env=False) as client:
            for _ in range(10_000):
                reply = client.head(url)
                if reply.status_code == 429 and int(reply.headers["ratelimit"].rpartition("t=")[2]) >= 2:
                    return
        raise AssertionError("the quota never ended")

    def refused(self, bucket: str, window_s: int) -> dict[int, tuple[int, int]]:
        """Window -> (requests of ours that got 429, requests of ours that came after the first of these)."""
        found: dict[int, tuple[int, int]] = {}
        for record in self.ours(bucket):
            window = int(record.time // window_s)
            if record.status == 429 or window in found:
                refusals, later = found.get(window, (0, -1))
                found[window] = refusals + (record.status == 429), later + 1
        return found
