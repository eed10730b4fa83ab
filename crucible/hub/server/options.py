"""How a local Hub behaves: one frozen object, made by the caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .access import User
from .ratelimit import RateLimits


@dataclass(frozen=True, slots=True)
class HubOptions:
    """Settings of a `HubServer`; the defaults are the Hub's own habits."""

    tokens: Mapping[str, User] = field(default_factory=dict, repr=False)
    """Bearer token to user. No token is ever logged."""
    limits: RateLimits = field(default_factory=RateLimits)
    page_size: int = 1000
    """Entries in a page of a listing."""
    expand_page_size: int = 50
    """Entries in a page of a tree with `expand`."""
    link_ttl_s: int = 3600
    """How long a signed link to a blob is good."""
    resolve_cache_below: int = 0
    """Regular files smaller than this many bytes are answered with a relative 307 first; 0 turns that off."""
    public_url: str = ""
    """What clients call this server, when a proxy stands before it; else the Host header says."""
    public_cdn_url: str = ""
    log_path: Path | None = None
    """File that gets one JSON line a request."""
    log_keep: int = 100_000
    """Requests kept in memory for `.log`."""
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        if (
            min(self.page_size, self.expand_page_size, self.link_ttl_s, self.log_keep) < 1
            or self.resolve_cache_below < 0
        ):
            raise ValueError("page sizes, link_ttl_s and log_keep must be at least 1, resolve_cache_below at least 0")
