"""Where bytes come from: the Hub or a mirror of it, a peer's agent. One protocol: `download` sees no difference.

A source opens a file at an offset and says where its bytes really begin. It raises `Refusal` for what may pass, and a
typed error for what will not. It decides nothing about other sources.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol
from urllib.parse import urljoin

import httpx

from crucible.errors import ChecksumMismatch, SizeMismatch, SourceUnavailable, VersionSkew
from crucible.hub import lfs, wire
from crucible.hub.budget import read_limit
from crucible.hub.client import resolve_url
from crucible.hub.http import ANSWER_S, MAX_REDIRECTS, HubHttp, Refusal, named_error, origin, refusal_of, user_agent
from crucible.refs import RepoRef, SourceFile
from crucible.report import Tally
from crucible.versions import check_reply
from crucible.workers.tls import Trust, reason_of

_PAST_END = re.compile(r"bytes \*/(\d+)")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
BATCH_FAILURES = 2
"""Broken replies after which no more links are asked for in batches: the way without them is never closed."""
BATCHES_SPARED = 8
"""Requests of its quota that batches leave over: more than are under way at once, so that none waits for a window."""
BAD_LINKS = 16
"""Links of batches that did not work, in a row, after which none is used any more."""
PACE_S = 10.0
LEAST_RATE = 4 << 10
"""Bytes a second. A peer that gives less over `PACE_S` is left for another: a thousand readers of one link of 100
Mbit/s have three times as much each."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Body:
    """Bytes on their way: `chunks` begins at offset `start` of the file, which is 0 when the range was ignored."""

    start: int
    chunks: Iterator[memoryview | bytes]
    """Each valid until the next is asked for: see `crucible.hub.wire.chunks`."""
    whole: bool = False
    """True when the range was ignored: what comes is the whole file, whatever was asked for."""
    etag: str = ""
    """What the place the bytes come from calls this version of the file; empty where it has no name for it."""
    total: int | None = None
    """The file's size in bytes, where the reply to a range says it."""
    cut: Callable[[], None] = lambda: None
    """End the reading from another thread: who waits for a chunk gets an error at once, not at its timeout."""
    answer_s: float | None = None
    """Seconds that the place the bytes come from took to begin its reply, where that is known: how far away it is."""


def paced(chunks: Iterator[memoryview | bytes], pace_s: float) -> Iterator[memoryview | bytes]:
    """The same chunks. Raises Refusal when in `pace_s` seconds fewer bytes came than `LEAST_RATE` would bring."""
    began, got = time.monotonic(), 0
    for chunk in chunks:
        got += len(chunk)
        yield chunk
        if (passed := time.monotonic() - began) >= pace_s:
            if got < LEAST_RATE * passed:
                raise Refusal(None, {}, f"it gave {got / passed:,.0f} bytes a second")
            began, got = time.monotonic(), 0


class LinkExpired(Refusal):
    """The CDN refused a signed link. Asking the Hub again gives a fresh one, and there is nothing to wait for."""

    def __init__(self, status: int) -> None:
        super().__init__(None, {}, f"the CDN refused the link (HTTP {status})")
        self.args = (status,)


class Source(Protocol):
    """One place a file can be read from. `name` appears in errors."""

    name: str

    def open(self, file: SourceFile, start: int, stop: int) -> AbstractContextManager[Body]:
        """Begin to read bytes [start, stop) of `file`. Raises Refusal (may pass) or a CrucibleError (will not)."""
        ...

    def refused(self, file: SourceFile, refusal: Refusal) -> Exception:
        """The typed error for a refusal that did not pass."""
        ...

    def count(self, size: int) -> None:
        """Say that `size` bytes of this source's arrived."""
        ...


def ranged(response: httpx.Response, file: SourceFile, start: int) -> int:
    """Where the bytes of a reply to `Range: bytes=start-` begin. Raises Refusal when the reply contradicts itself.

    200 means that the range was ignored: the body is the whole file. 206 must say the range that was asked for, of a
    file of the promised size; a server or a cache that answers with another range would silently shift the bytes.
    """
    if response.status_code == 200:
        return 0
    if response.status_code == 416 and (past := _PAST_END.fullmatch(response.headers.get("content-range", ""))):
        raise SizeMismatch(file.path, str(response.url.copy_with(query=None)), file.size, int(past[1]))
    if response.status_code != 206:
        raise refusal_of(response)
    said = response.headers.get("content-range", "")
    match = _CONTENT_RANGE.fullmatch(said)
    if match is None or int(match[1]) != start or match[3] not in ("*", str(file.size)):
        raise Refusal(None, {}, f"asked for bytes {start}- of {file.size}, the reply says {said or 'nothing'!r}")
    return start


def body_of(response: httpx.Response, file: SourceFile, start: int) -> Body:
    """The body of a reply to `Range: bytes=start-`. Raises as `ranged` does."""
    begins = ranged(response, file, start)
    etag = str(response.headers.get("etag", ""))
    said = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    total = int(said[3]) if said is not None and said[3] != "*" else None
    whole, answer_s = response.status_code == 200, response.extensions.get(ANSWER_S)
    return Body(begins, wire.chunks(response), whole, etag, total, lambda: wire.cut(response), answer_s)


class HubSource:
    """The Hub, or a mirror of it: resolve, then wherever it redirects to.

    The redirect's target is kept per file, so a file in many ranges is resolved once, also when they all begin at the
    same time; a signed link that has expired (401 or 403 from another origin than the Hub's) is resolved anew, once for
    all of them. Links to small files may be asked for before, many in one request: `prime`. Such a link is used once.

    Concurrency: usable from any number of threads.
    """

    def __init__(self, http: HubHttp, repo: RepoRef) -> None:
        self._http, self._repo = http, repo
        self.name = http.settings.endpoint
        self._links: dict[str, str] = {}
        self._lock = threading.Lock()
        self._resolving: dict[str, threading.Lock] = {}
        self._primed: dict[str, str] = {}
        self._batches_left, self._bad_links, self._no_batches_until = BATCH_FAILURES, 0, 0.0

    def prime(self, files: Sequence[SourceFile]) -> None:
        """Ask for the links of a batch (`crucible.parts.link_batches`) in one request. Each is used once.

        Never raises: whatever gets no link is resolved when it is opened. A Hub that has no batches is not asked again,
        one that is broken now only once more, one that will have to be waited for not before the time that it said.
        """
        if self._batches_left <= 0 or time.monotonic() < self._no_batches_until or self._http.settings.offline:
            return
        try:
            found = lfs.links(self._http, self._repo, files, self._hear)
        except Refusal as refusal:
            self._batches_left -= 1 if refusal.retryable else BATCH_FAILURES
            _log.info("%s: no links from %s (%s); asking file by file", self._repo, self.name, refusal.reason)
            return
        if not found:
            self._batches_left = 0
        with self._lock:
            if self._bad_links < BAD_LINKS:
                self._primed |= {file.path: found[file.oid] for file in files if file.oid in found}

    def _hear(self, headers: Mapping[str, str]) -> None:
        """A quota that is nearly used up is left alone: resolving spends another one, and goes on meanwhile."""
        limit = read_limit(headers)
        if limit is not None and limit.remaining < BATCHES_SPARED:
            self._no_batches_until = time.monotonic() + limit.reset_s

    @contextmanager
    def open(self, file: SourceFile, start: int, stop: int) -> Iterator[Body]:
        headers = {"range": f"bytes={start}-{stop - 1}"} if (start, stop) != (0, file.size) else {}
        with self._lock:
            primed = self._primed.pop(file.path, None)
            resolving = self._resolving.setdefault(file.path, threading.Lock())
        if primed is not None:
            works = False
            try:
                with self._http.stream(primed, headers) as response:
                    if response.status_code in (200, 206):
                        works = True
                        yield body_of(response, file, start)
                        return
            finally:
                self._judge_link(works)
            # expired, or no address of it: the Hub is asked as ever
        with ExitStack() as stack:
            held = ExitStack()  # who resolves lets the others wait until it has a link, or a body
            stack.enter_context(held)
            if (url := self._links.get(file.path)) is None:
                held.enter_context(resolving)
                url = self._links.get(file.path) or resolve_url(self.name, self._repo, file.path)
            for _ in range(MAX_REDIRECTS):
                with self._http.stream(url, headers) as response:
                    if response.is_redirect and "location" in response.headers:
                        self._check(file, response)
                        url = urljoin(url, response.headers["location"])
                        if origin(url) != origin(self.name):
                            self._links[file.path] = url
                            held.close()
                        continue
                    held.close()
                    if response.status_code in (401, 403) and origin(url) != origin(self.name):
                        with self._lock:
                            if self._links.get(file.path) == url:  # else another thread has a new one already
                                del self._links[file.path]
                        raise LinkExpired(response.status_code)
                    yield body_of(response, file, start)
                    return
            raise Refusal(None, {}, f"more than {MAX_REDIRECTS} redirects")

    def _judge_link(self, works: bool) -> None:
        with self._lock:
            self._bad_links = 0 if works else self._bad_links + 1
            if self._bad_links >= BAD_LINKS:
                self._batches_left = 0
                self._primed.clear()

    def _check(self, file: SourceFile, response: httpx.Response) -> None:
        """The redirect of an LFS file says which content it leads to: another one is not worth a byte."""
        linked = response.headers.get("x-linked-etag", "").removeprefix("W/").strip('"')
        if file.lfs and linked and linked != file.oid:
            raise ChecksumMismatch(file.path, self.name, file.oid, linked)

    def refused(self, file: SourceFile, refusal: Refusal) -> Exception:
        signed_in = self._http.settings.token is not None
        return named_error(refusal, self._repo, self.name, path=file.path, signed_in=signed_in)

    def count(self, size: int) -> None:
        self._http.tally.add(hub_bytes=size)


class PeerSource:
    """A shard in another node's store, served by its agent. `file.path` is the shard's key."""

    def __init__(
        self,
        url: str,
        secret: str,
        tally: Tally,
        *,
        timeout_s: float,
        trust: Trust | None = None,
        pace_s: float = PACE_S,
    ) -> None:
        self.name = url
        self._secret, self._tally, self._trust, self._pace_s = secret, tally, trust or Trust(), pace_s
        self._timeout = httpx.Timeout(timeout_s)

    @contextmanager
    def open(self, file: SourceFile, start: int, stop: int) -> Iterator[Body]:
        headers = {
            "authorization": f"Bearer {self._secret}",
            "range": f"bytes={start}-{stop - 1}",
            "accept-encoding": "identity",
            "user-agent": user_agent(),
        }
        self._tally.add(peer_requests=1)
        try:
            # no proxy between nodes, and no credentials out of ~/.netrc
            shard = f"{self.name}/v1/shards/{file.path}"
            with self._trust.client(self.name).stream("GET", shard, headers=headers, timeout=self._timeout) as response:
                check_reply(response.headers, self.name)
                if "content-encoding" in response.headers:
                    raise Refusal(None, {}, "it packs what it was asked for as it is")
                # a peer that drips is no better than one that is silent: there is another, or the Hub
                body = body_of(response, file, start)
                yield replace(body, chunks=paced(body.chunks, self._pace_s))
        except (httpx.TransportError, httpx.InvalidURL, httpx.DecodingError) as error:
            raise Refusal(None, {}, reason_of(error)) from error
        except VersionSkew as skew:
            raise Refusal(None, {}, str(skew)) from skew
        except Refusal as refusal:
            # no governor hears what a peer says of waiting: it is tried again like one that said nothing
            raise Refusal(refusal.status, {}, refusal.reason) from refusal

    def refused(self, file: SourceFile, refusal: Refusal) -> Exception:
        return SourceUnavailable(f"shard {file.path[:12]}", self.name, refusal.reason)

    def count(self, size: int) -> None:
        self._tally.add(peer_bytes=size)
