"""How a file is cut into the ranges it is asked for in. Pure: the plan counts with it what the download then sends."""

from __future__ import annotations

SMALL_BYTES = 1 << 20
"""Below this a file comes in one request and one write: a lease and a journal would cost more than to ask again."""
LEAST_PART = 8 << 20
"""Smaller ranges cost more in round trips than they gain in parallelism."""


def part_size(size: int, streams: int, most: int) -> int:
    """Bytes of one range of a file: a share for every stream, at least `LEAST_PART`, never more than `most`."""
    if size < SMALL_BYTES:
        return max(1, size)
    share = -(-size // max(1, streams))
    return max(1, min(most, max(LEAST_PART, share)))
