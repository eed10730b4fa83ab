"""One HTTP client for the Hub: who gets the token, what is tried again, how long to wait. Sends nothing when offline.

The official client has no hook for a shared backoff and no way to count what it sends, and crucible must know both,
so the three read calls it makes go through here. What happens to a reply is decided by pure functions.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

import httpx

from crucible.config import Settings
from crucible.errors import (
    BadCredentials,
    CrucibleError,
    DisabledRepo,
    EntryNotFound,
    GatedRepo,
    OfflineMode,
    RepoNotFound,
    RevisionNotFound,
    SourceUnavailable,
)
from crucible.hub import wire
from crucible.hub.budget import SAID_CAP_S as SAID_CAP_S
from crucible.hub.budget import backoff as backoff
from crucible.hub.budget import said_wait as said_wait
from crucible.hub.governor import Governor, local_governor
from crucible.printable import printable
from crucible.refs import RepoRef
from crucible.report import Tally

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses that say "not now". Every other 4xx says "not you" or "not this", and asking again cannot help."""
MAX_REDIRECTS = 20
ANSWER_S = "crucible.answer_s"
"""Extension of a streamed reply: seconds from the request to the head of the reply, without the wait for a turn."""
REDIRECT_BYTES = 8 << 10
"""A redirect with a longer body, or one without a length, ends its connection."""
T = TypeVar("T")


def origin(url: str) -> tuple[str, str, int]:
    """(scheme, host, port): where a request really goes. The token never leaves the Hub's own."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def bucket_of(url: str, endpoint: str) -> str:
    """Which of the Hub's quotas a request spends; `cdn` for any other origin, which is bounded by connections only."""
    if origin(url) != origin(endpoint):
        return "cdn"
    path = urlsplit(url).path.removeprefix(urlsplit(endpoint).path)
    if "/resolve/" in path or path.startswith("/api/resolve-cache/"):
        return "resolvers"
    return "api" if path.startswith("/api/") else "pages"


class Refusal(Exception):
    """A reply that is not the thing asked for. Stays inside crucible: callers turn it into a named error."""

    def __init__(self, status: int | None, headers: Mapping[str, str], reason: str) -> None:
        super().__init__(status, headers, reason)
        self.status, self.headers, self.reason = status, headers, printable(reason)  # a server wrote part of it

    @property
    def retryable(self) -> bool:
        return self.status is None or self.status in RETRIED


class HubHttp:
    """GET from one Hub and from where it redirects.

    Concurrency: usable from any number of threads. Not picklable: a process makes its own.
    """

    def __init__(
        self,
        settings: Settings,
        tally: Tally,
        governor: Governor | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.settings, self.tally = settings, tally
        self.governor: Governor = local_governor(settings) if governor is None else governor.at(settings)
        self._sleep = sleep
        self._hub = origin(settings.endpoint)
        self._client = wire.client(
            settings.timeout_s, max_connections=settings.connections, proxies=_proxies(settings.endpoint)
        )

    def close(self) -> None:
        self._client.close()

    @contextmanager
    def stream(
        self, url: str, headers: Mapping[str, str] | None = None, *, method: str = "GET", content: bytes | None = None
    ) -> Iterator[httpx.Response]:
        """One request, no retry, no redirect, once the governor lets it go. Holds a connection until the `with` ends.

        The body is still on the wire. Raises Refusal, or OfflineMode.
        """
        if self.settings.offline:
            raise OfflineMode(urlsplit(url).path)
        own = origin(url) == self._hub
        sent = {"accept-encoding": "identity", "user-agent": user_agent(), **(headers or {})}
        if own and self.settings.token:
            sent["authorization"] = "Bearer " + self.settings.token
        try:
            with self.governor.request(bucket_of(url, self.settings.endpoint)) as replied:
                asked = time.monotonic()
                self.tally.add(**{"hub_requests" if own else "cdn_requests": 1})
                with self._client.stream(method, url, headers=sent, content=content) as response:
                    response.extensions[ANSWER_S] = time.monotonic() - asked
                    replied(response.status_code, response.headers)
                    yield response
                    if response.is_redirect:
                        _drain(response)
        except (httpx.TransportError, httpx.InvalidURL, httpx.DecodingError) as error:
            raise Refusal(
                None, {}, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            ) from error

    def read(self, url: str, headers: Mapping[str, str] | None = None, *, limit: int) -> httpx.Response:
        """GET a small body, redirects and retries included. Raises Refusal when the last try was refused."""
        return self.retrying(lambda: self._read_once(url, headers or {}, limit))

    def retrying(self, attempt: Callable[[], T]) -> T:
        """Call `attempt` until it does not raise a retryable Refusal, at most `settings.tries` times."""
        for number in range(self.settings.tries):
            try:
                return attempt()
            except Refusal as refused:
                if not refused.retryable or number + 1 == self.settings.tries:
                    raise
                self.pause(refused, number)
        raise AssertionError("settings.tries is at least 1")

    def pause(self, refused: Refusal, number: int) -> None:
        """Back off before the next try, unless the refusal said how long to wait: the governor keeps that, for all."""
        self.tally.add(retries=1)
        if said_wait(refused.status, refused.headers) is None:
            self._sleep(backoff(number, self.settings.backoff_cap_s))

    def _read_once(self, url: str, headers: Mapping[str, str], limit: int) -> httpx.Response:
        asked = origin(url)
        for _ in range(MAX_REDIRECTS):
            with self.stream(url, headers) as response:
                if response.is_redirect and "location" in response.headers:
                    url = urljoin(url, response.headers["location"])
                    continue
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > limit:
                        raise Refusal(response.status_code, response.headers, f"reply of more than {limit:,} bytes")
                if response.status_code in (401, 403) and origin(url) != asked:
                    # not the Hub's word about the file: a signed link that has expired, and the Hub gives a fresh one
                    raise Refusal(None, {}, f"the CDN refused the link (HTTP {response.status_code})")
                if response.status_code >= 300:
                    raise refusal_of(response)
                return httpx.Response(
                    response.status_code, headers=plain_headers(response.headers), content=bytes(body)
                )
        raise Refusal(None, {}, f"more than {MAX_REDIRECTS} redirects")


def _drain(response: httpx.Response) -> None:
    """Read the few words of a redirect that nobody wants: a connection with unread bytes cannot serve again.

    Every LFS file costs a redirect, so without this every one would cost a connection, and on https a handshake.
    """
    length = response.headers.get("content-length", "")
    if length.isdecimal() and int(length) <= REDIRECT_BYTES and not response.is_closed:
        with suppress(httpx.TransportError):
            for _ in response.iter_raw():
                pass


def refusal_of(response: httpx.Response) -> Refusal:
    """What a reply of 300 and more says, from its headers (a HEAD-like body is never needed)."""
    said = response.headers.get("x-error-message", "") or response.reason_phrase
    return Refusal(response.status_code, response.headers, f"HTTP {response.status_code} {said}".strip())


def named_error(
    refused: Refusal, repo: RepoRef, endpoint: str, *, path: str = "", signed_in: bool = False
) -> CrucibleError:
    """The typed error for a final refusal, in the order the official client dispatches (X-Error-Code before status)."""
    code = refused.headers.get("x-error-code", "")
    message = refused.headers.get("x-error-message", "")
    if code == "RevisionNotFound":
        return RevisionNotFound(repo.repo_id, repo.revision)
    if code == "EntryNotFound":
        return EntryNotFound(repo.repo_id, repo.revision, path)
    if code == "GatedRepo":
        return GatedRepo(repo.repo_id, endpoint, signed_in)
    if message == "Access to this resource is disabled.":
        return DisabledRepo(repo.repo_id)
    if refused.status == 401 and message.startswith("Invalid credentials in Authorization header"):
        return BadCredentials(endpoint)
    if code == "RepoNotFound" or refused.status == 401:
        return RepoNotFound(repo.repo_id, endpoint)
    return SourceUnavailable(f"{repo}/{path}".rstrip("/"), endpoint, refused.reason)


def plain_headers(headers: httpx.Headers) -> dict[str, str]:
    """Headers of a body that was read already: without those that describe how it was encoded on the wire."""
    return {k: v for k, v in headers.items() if k not in ("content-encoding", "content-length", "transfer-encoding")}


@cache
def user_agent() -> str:
    try:
        return f"crucible/{version('crucible-data')}"
    except PackageNotFoundError:
        return "crucible"


def _proxies(endpoint: str) -> dict[str, str]:
    """The proxies of the environment, except for a Hub on this machine."""
    if (urlsplit(endpoint).hostname or "") in ("127.0.0.1", "localhost", "::1"):
        return {}
    return {scheme: url for scheme, url in urllib.request.getproxies().items() if scheme in ("http", "https")}
