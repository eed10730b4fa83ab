"""What one address may ask of an agent, and how much of it: connections, requests, failures. The clock is given.

Memory is bounded: only so many addresses are remembered, and of those without a connection whoever was heard of longest
ago makes way. A right secret is never refused for another's wrong ones: many readers may share an address
(a node's ranks, a NAT), and 256 random bits need no ban to be safe. What failures cost is the connection.
"""

from __future__ import annotations

import ipaddress
import resource
from collections import OrderedDict
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an agent allows. The defaults are for a cluster of a thousand nodes with eight ranks each."""

    connections: int = 2048
    """At once, from everybody; each may hold a file too (`bounds_here`)."""
    connections_each: int = 512
    """At once from one address: a node's ranks and tasks, each with the connections of its own pool."""
    requests_s: float = 1000.0
    """Requests a second from one address, over a longer time."""
    burst: int = 4000
    """And at once."""
    failures: int = 20
    """Requests with a wrong secret from one address that are answered as fast as others..."""
    failures_s: float = 60.0
    """... in this time. More of them wait, and few at a time."""
    tarpit_s: float = 1.0
    tarpitted: int = 32
    """Answers that wait at once; further ones are not given."""
    addresses: int = 4096
    """How many are remembered."""
    head_s: float = 10.0
    """For the head of a request to arrive whole, a TLS handshake included."""
    body_s: float = 10.0
    """For a question to arrive whole, and for each piece of a range that is pushed here."""
    idle_s: float = 60.0
    """A connection without a request for so long is closed. A client of ours uses none that rested for 30 s."""
    piece_s: float = 60.0
    """For a reader to take one MiB of a reply: slower than 17 KiB/s, it is cut off, and may ask for the rest."""
    head_bytes: int = 8190
    """The longest request line, and the longest header."""
    headers: int = 64
    question_bytes: int = 4 << 20
    depth: int = 64
    """Of a question's JSON."""


def bounds_here() -> Bounds:
    """The defaults, with no more connections than this process may have files open for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = Bounds().connections if soft == resource.RLIM_INFINITY else min(Bounds().connections, max(1, soft // 3))
    return replace(Bounds(), connections=most)


@dataclass(slots=True)
class _Caller:
    connections: int = 0
    allowance: float = 0.0
    """Requests that it may make at once, at the time `at`."""
    at: float = 0.0
    failures: float = 0.0
    failed_at: float = 0.0


class Doors:
    """Who is inside, and who has been asking. Used from one event loop."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._callers: OrderedDict[str, _Caller] = OrderedDict()
        self.inside = 0

    def __len__(self) -> int:
        return len(self._callers)

    def enter(self, who: str, now: float) -> str:
        """ "" for a connection that may come in, and it counts until `leave`; else why not."""
        caller = self._caller(who, now)
        if self.inside >= self._bounds.connections:
            return f"this agent has {self.inside} connections, and takes no more"
        if caller.connections >= self._bounds.connections_each:
            return f"there are {caller.connections} connections from {who}, and no more may be"
        caller.connections += 1
        self.inside += 1
        return ""

    def leave(self, who: str) -> None:
        """A connection that had come in has ended."""
        self.inside -= 1
        self._callers[who].connections -= 1

    def request(self, who: str, now: float) -> bool:
        """May this address ask once more now? It counts if so."""
        caller, bounds = self._caller(who, now), self._bounds
        caller.allowance = min(bounds.burst, caller.allowance + (now - caller.at) * bounds.requests_s)
        caller.at = now
        if caller.allowance < 1:
            return False
        caller.allowance -= 1
        return True

    def failed(self, who: str, now: float) -> bool:
        """A wrong secret from this address. True when there were too many of late."""
        caller, bounds = self._caller(who, now), self._bounds
        faded = (now - caller.failed_at) * bounds.failures / bounds.failures_s
        caller.failures = min(max(0.0, caller.failures - faded) + 1, 2.0 * bounds.failures)
        caller.failed_at = now
        return caller.failures > bounds.failures

    def _caller(self, who: str, now: float) -> _Caller:
        caller = self._callers.pop(who, None) or _Caller(allowance=self._bounds.burst, at=now, failed_at=now)
        self._callers[who] = caller
        if len(self._callers) > self._bounds.addresses:
            idle = next(
                (name for name, one in self._callers.items() if not one.connections and one is not caller), None
            )
            if idle is not None:  # else each has a connection, and of these there is a bound too
                del self._callers[idle]
        return caller


def address_of(host: str) -> str:
    """Whom an address stands for: itself, and of IPv6 its network of 64 bits, of which one machine has all."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        if not address.is_loopback:
            return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
