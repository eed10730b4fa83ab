"""All small files of a commit in one packfile, over git's own protocol: two requests instead of one for each file.

A Hub serves each repo to `git clone` as well. A shallow fetch of a commit brings its regular files, and git's sha1 of
each is the very oid that the tree listing promised, so whatever comes is checked like any other download. LFS files are
pointers there and are not for this. It is an offer: whatever goes wrong is one SourceUnavailable, what the sink was
given before it is good, and the caller asks for the rest file by file. Only a Hub that says "not now" is asked again.

Two kinds of pack, whichever brings less that nobody wants: the whole commit (`deepen 1`, big blobs filtered out where
the server can), or the wanted blobs by their oids, which git's servers allow in protocol 2. Protocol 0 is spoken where
the server does not know 2, for whole commits.

Checked against git's own upload-pack and crucible's Hub. Not checked against huggingface.co, of which users report that
shallow fetches of a commit and `filter` work and that blobs by oid do not (July 2026), and whose documents show Basic
where a Bearer header goes here. So no filter is sent where none is needed, and a refusal costs the two requests.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import httpx

from crucible.errors import SourceUnavailable
from crucible.hub.http import HubHttp, Refusal, refusal_of, user_agent
from crucible.hub.packfile import PackError, PackLimits, Sink, unpack
from crucible.hub.pktline import FATAL, PACK, FramingError, Mark, Packets, packet
from crucible.refs import RepoRef, SourceFile

WORTH_FILES = 64
"""Below this many files, plain requests in parallel are as quick, and a pack brings a whole commit."""
WORTH_BYTES = 2 << 30
WASTE = 2
"""A whole commit is taken when it has at most this many times the bytes that are wanted."""
ADVERTISEMENT_LIMIT = 16 << 20
"""Bytes of a server's greeting. In protocol 0 that is all its refs."""
WANTS_MOST = 20_000
"""Blobs asked for by oid in one request: 50 bytes each, below the 1 MiB that proxies commonly let through."""
T = TypeVar("T")


def worth_a_pack(wanted: Sequence[SourceFile]) -> bool:
    """Whether these regular files are enough of them, and not too much, to be asked for as one pack."""
    return len(wanted) >= WORTH_FILES and sum(file.size for file in wanted) <= WORTH_BYTES


def whole_commit(wanted: Sequence[SourceFile], listing: Iterable[SourceFile], *, filtered: bool) -> bool:
    """Whether a pack of the commit, whose files are `listing`, holds little that nobody wants.

    `filtered`: the server leaves out what is bigger than the biggest wanted file.
    """
    useful = sum(file.size for file in wanted)
    most = max((file.size for file in wanted), default=0)
    coming = sum(file.size for file in listing if not file.lfs and not (filtered and file.size > most))
    return coming <= min(WORTH_BYTES, WASTE * useful + (1 << 20))


def pack_limits(listing: Iterable[SourceFile]) -> PackLimits:
    """What a pack of this commit can need at most. Deltas may be made again when memory is short, hence the factor."""
    files = folders = content = 0
    for file in listing:
        files += 1
        folders += file.path.count("/")
        # a regular file's own bytes, or a pointer; and the file's and its folders' lines in the trees
        content += (256 if file.lfs else file.size) + 2 * len(file.path.encode()) + 128
    size = (16 << 20) + content + content // 64
    return PackLimits(size=size, objects=files + folders + 16, work=8 * size)


def fetch_blobs(
    http: HubHttp,
    repo: RepoRef,
    wanted: Sequence[SourceFile],
    listing: Sequence[SourceFile],
    sink: Sink,
    *,
    folder: Path | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> list[SourceFile]:
    """Bring `wanted`, regular files of a pinned commit whose files are `listing`; what did not come is returned.

    `sink` is called in this thread, once for each oid, with bytes that hash to it; the view is good during the call.
    The pack lies in a nameless file in `folder` (None: the system's) meanwhile; `on_bytes` hears of its bytes as they
    arrive. Raises SourceUnavailable for whatever makes plain requests the better way, OfflineMode, and what the two
    callables raise.
    """
    missing = {file.oid: file for file in wanted if not file.lfs}
    exchange, limits = _Exchange(http, repo), pack_limits(listing)
    with ExitStack() as stack:
        try:
            request = exchange.request(list(missing.values()), listing)
            stream = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            cut = exchange.receive(request, stream, limits, on_bytes)
        except Refusal as refused:
            raise exchange.unavailable(refused.reason) from refused
        except FramingError as error:
            raise exchange.unavailable(f"the answer is not git's protocol: {error}") from error
        except OSError as error:
            raise exchange.unavailable(f"its pack could not be written here ({error})") from error
        before = len(missing)
        try:
            unpack(stream, missing, sink, limits, cut=cut)
        except PackError as error:
            raise exchange.unavailable(str(error)) from error
        finally:
            http.tally.add(verified_files=before - len(missing))
    return [file for file in wanted if file.lfs or file.oid in missing]


@dataclass(frozen=True, slots=True)
class _Greeting:
    """What a server says of itself."""

    version: int
    features: frozenset[str]
    """Of the fetch command; of the server in protocol 0."""
    sha1: bool
    """Whether the object format has to be said."""


class _Exchange:
    """The two requests about one repo."""

    def __init__(self, http: HubHttp, repo: RepoRef) -> None:
        self._http, self._repo = http, repo
        prefix = "" if repo.repo_type == "model" else f"{repo.repo_type}s/"
        self._url = f"{http.settings.endpoint}/{prefix}{repo.repo_id}.git"

    def unavailable(self, reason: str) -> SourceUnavailable:
        return SourceUnavailable(f"{self._repo} by git", self._http.settings.endpoint, reason)

    def request(self, wanted: Sequence[SourceFile], listing: Sequence[SourceFile]) -> tuple[int, bytes]:
        """(protocol, body) of the request for the pack, after the server said what it can. One request."""
        greeting = self._patiently(self._greeting)
        filtered = "filter" in greeting.features
        if "shallow" not in greeting.features:
            raise self.unavailable("it gives no shallow clones")
        if whole_commit(wanted, listing, filtered=filtered):
            most = max((file.size for file in wanted), default=0)
            helps = filtered and any(file.size > most for file in listing if not file.lfs)
            below = most + 1 if helps else None
            return greeting.version, fetch_request(greeting, [self._repo.revision], depth=1, below=below)
        if greeting.version != 2 or len(wanted) > WANTS_MOST:
            raise self.unavailable("most of the commit's bytes are not wanted")
        return greeting.version, fetch_request(greeting, [file.oid for file in wanted], depth=None, below=None)

    def _greeting(self) -> _Greeting:
        url = f"{self._url}/info/refs?service=git-upload-pack"
        with self._http.stream(url, {"git-protocol": "version=2"}) as response:
            self._check(response, "advertisement")
            said = bytearray()
            for piece in response.iter_bytes():
                said += piece
                if len(said) > ADVERTISEMENT_LIMIT:
                    raise self.unavailable(f"its greeting has more than {ADVERTISEMENT_LIMIT:,} bytes")
            return read_greeting(bytes(said))

    def _check(self, response: httpx.Response, kind: str) -> None:
        """A redirect is a refusal too: it leads to a login, or to a repo's new name, which is the caller's matter."""
        if response.status_code != 200:
            raise refusal_of(response)
        if response.headers.get("content-type", "") != f"application/x-git-upload-pack-{kind}":
            raise self.unavailable("it does not speak git's protocol here")

    def _patiently(self, attempt: Callable[[], T]) -> T:
        """Like `HubHttp.retrying`, but what is broken is not worth a wait: there is another way to the files."""
        for number in range(self._http.settings.tries - 1):
            try:
                return attempt()
            except Refusal as refused:
                if refused.status not in (429, 503):
                    raise
                self._http.pause(refused, number)
        return attempt()

    def receive(
        self, request: tuple[int, bytes], stream: IO[bytes], limits: PackLimits, on_bytes: Callable[[int], None]
    ) -> bool:
        """Write the pack to `stream`; True if the connection broke before its end."""
        version, body = request

        def attempt() -> bool:
            headers = {
                "content-type": "application/x-git-upload-pack-request",
                "accept": "application/x-git-upload-pack-result",
                **({"git-protocol": "version=2"} if version == 2 else {}),
            }
            with self._http.stream(f"{self._url}/git-upload-pack", headers, method="POST", content=body) as response:
                self._check(response, "result")
                return self._write(response, version, stream, limits.size, on_bytes)

        return self._patiently(attempt)

    def _write(
        self, response: httpx.Response, version: int, stream: IO[bytes], most: int, on_bytes: Callable[[int], None]
    ) -> bool:
        came = 0
        try:
            for piece in pack_of(Packets(response.iter_bytes()), version):
                came += len(piece)
                if came > most:
                    raise self.unavailable(f"its pack has more than {most:,} bytes, which cannot be this commit")
                stream.write(piece)
                on_bytes(len(piece))
        except (httpx.TransportError, FramingError):
            if not came:
                raise
            return True  # each blob proves itself, so what came is worth its reading
        except _Said as said:
            raise self.unavailable(str(said)) from None
        finally:
            stream.flush()
            self._http.tally.add(hub_bytes=came)
        return False


class _Said(Exception):
    """The server's own words for why there is no pack."""


def read_greeting(content: bytes) -> _Greeting:
    """What a server answers to info/refs. Raises FramingError."""
    lines = Packets([content])
    line = lines.text()
    if isinstance(line, str) and line.startswith("# service="):
        lines.next()  # the flush after it
        line = lines.text()
    if line == "version 2":
        said = [line for line in iter(lines.text, None) if isinstance(line, str)]
        features = next((line[6:].split() for line in said if line.startswith("fetch=")), [])
        return _Greeting(2, frozenset(features), any(line.startswith("object-format=") for line in said))
    if line == "version 1":
        line = lines.text()
    if not isinstance(line, str) or "\0" not in line:
        raise FramingError("no greeting")
    return _Greeting(0, frozenset(line.partition("\0")[2].split()), False)


def fetch_request(greeting: _Greeting, oids: Sequence[str], *, depth: int | None, below: int | None) -> bytes:
    """The body that asks for these objects and for nothing to be left out but blobs of `below` bytes and more."""
    asked = [] if below is None else [f"filter blob:limit={below}"]
    shallow = [] if depth is None else [f"deepen {depth}"]
    if greeting.version == 2:
        head = ["command=fetch", f"agent={user_agent()}", *(["object-format=sha1"] if greeting.sha1 else [])]
        wants = [f"want {oid}" for oid in oids]
        lines = [*wants, *shallow, *asked, "ofs-delta", "no-progress", "done"]
        return b"".join([*map(packet, head), Mark.DELIMITER.value, *map(packet, lines), Mark.FLUSH.value])
    known = ("side-band-64k", "ofs-delta", "no-progress", "shallow", *(["filter"] if asked else []))
    features = " ".join([*(name for name in known if name in greeting.features), f"agent={user_agent()}"])
    lines = [f"want {oids[0]} {features}", *(f"want {oid}" for oid in oids[1:]), *shallow, *asked]
    return b"".join([*map(packet, lines), Mark.FLUSH.value, packet("done")])


def pack_of(packets: Packets, version: int) -> Iterator[bytes]:
    """The pack's bytes out of a reply to `fetch_request`. Raises _Said for a refusal, FramingError."""
    for found in packets:
        if isinstance(found, bytes):
            if found.startswith(b"ERR "):
                raise _Said(found[4:].decode(errors="replace").strip())
            if found.rstrip(b"\n") == (b"packfile" if version == 2 else b"NAK"):
                break
    else:
        raise FramingError("no pack")
    for found in packets:
        if found is Mark.FLUSH:
            return
        if not isinstance(found, bytes) or not found:
            raise FramingError("a packet without a band")
        if found[0] == FATAL:
            raise _Said(found[1:].decode(errors="replace").strip())
        if found[0] == PACK:
            yield found[1:]
    raise FramingError("the reply ends before the pack does")
