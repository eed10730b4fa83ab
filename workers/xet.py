"""Xet storage as one more source, through the official client's `xet_get`. Optional, and off unless CRUCIBLE_XET=1.

The Hub serves every Xet file over plain HTTP too, by ranges and with the same hash, so nothing depends on this: it
needs the `xet` extra, and anything that goes wrong (no package, no token, no storage server, a wrong size) ends in
SourceUnavailable, after which the next source, the Hub, is asked. One failure is enough: the source then stays off.

`xet_get` writes a whole file of its own and knows nothing of sha256 (Xet's hash is another one). So the file is made in
a scratch folder, where for that while it takes its size a second time, and is read out from there by whatever ranges
are asked for; the caller's hash judges its bytes like any other source's. The token is asked of the Hub through
`HubHttp`, where requests are counted and limits are kept, and lent to the official client. The storage server gets that
short-lived token and never the Hub's. What `hf_xet` then sends is counted by nobody.

What was seen here is the token exchange, the switches and the way back to the Hub. Traffic with a real storage server
was never seen: none can be reached from where this was written.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from crucible.config import Token
from crucible.errors import SourceUnavailable
from crucible.hub.http import HubHttp, Refusal, origin, user_agent
from crucible.refs import RepoRef, SourceFile, is_oid
from crucible.workers.sources import Body, Source

TOKEN_LIMIT = 1 << 20
"""Bytes of a reply that carries a token; a few hundred are usual."""
EARLY_S = 60
"""A token that expires sooner than this is asked for anew."""
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class XetAccess:
    """Where a repo's Xet storage is, and what opens it."""

    url: str
    token: Token
    expires: int
    """Unix time in seconds."""


def read_access(http: HubHttp, repo: RepoRef) -> XetAccess:
    """Ask the Hub for the right to read a commit's files from storage. Raises SourceUnavailable."""
    url = access_url(http.settings.endpoint, repo)
    try:
        headers = http.read(url, limit=TOKEN_LIMIT).headers
        return XetAccess(
            headers["x-xet-cas-url"],
            Token(headers["x-xet-access-token"]),
            int(headers["x-xet-token-expiration"]),
        )
    except Refusal as refused:
        raise SourceUnavailable(f"the Xet token of {repo}", http.settings.endpoint, refused.reason) from refused
    except (KeyError, ValueError) as error:
        reason = f"the reply has no usable {error}"
        raise SourceUnavailable(f"the Xet token of {repo}", http.settings.endpoint, reason) from error


def access_url(endpoint: str, repo: RepoRef) -> str:
    return f"{endpoint}/api/{repo.repo_type}s/{repo.repo_id}/xet-read-token/{repo.revision}"


@contextmanager
def xet_source(http: HubHttp, repo: RepoRef, scratch: Path) -> Iterator[XetSource | None]:
    """The source for the time of a `with`, or None where Xet is not switched on.

    `scratch` is a folder on the disk that the files are for; files named `*.incomplete` come and go there.
    """
    if not http.settings.xet or http.settings.offline:
        yield None
        return
    source = XetSource(http, repo, scratch)
    try:
        yield source
    finally:
        source.close()


def having(file: SourceFile, sources: Sequence[Source]) -> Sequence[Source]:
    """Those of `sources` that may have `file`: Xet storage only where the listing said so."""
    return sources if file.xet_hash else [source for source in sources if not isinstance(source, XetSource)]


class XetSource:
    """The files of one commit whose listing names a Xet hash.

    Concurrency: any number of threads. A file is fetched once and whole; whoever asks for another range of it waits.
    """

    def __init__(self, http: HubHttp, repo: RepoRef, scratch: Path) -> None:
        self._http, self._repo, self._scratch = http, repo, scratch
        self.name = "Xet storage"
        self._lock = threading.Lock()
        self._token_lock = threading.Lock()
        self._access: XetAccess | None = None
        self._fetches: dict[str, _Fetch] = {}
        self._broken = ""

    @contextmanager
    def open(self, file: SourceFile, start: int, stop: int) -> Iterator[Body]:
        fetch = self._fetched(file)
        with fetch.path.open("rb") as source:
            source.seek(start)
            chunks = (source.read(min(_CHUNK, stop - at)) for at in range(start, stop, _CHUNK))
            yield Body(start, takewhile(len, chunks))
            fetch.left -= source.tell() - start
        if fetch.left <= 0:  # all of it was handed on: the disk is needed for other things
            self._forget(file)

    def refused(self, file: SourceFile, refusal: Refusal) -> Exception:
        return SourceUnavailable(file.path, self.name, refusal.reason)

    def count(self, size: int) -> None:
        self._http.tally.add(hub_bytes=size)

    def close(self) -> None:
        """Remove what is left in the scratch folder."""
        with self._lock:
            fetches, self._fetches = self._fetches, {}
        for fetch in fetches.values():
            fetch.path.unlink(missing_ok=True)

    def _forget(self, file: SourceFile) -> None:
        with self._lock:
            fetch = self._fetches.pop(file.oid, None)
        if fetch is not None:
            fetch.path.unlink(missing_ok=True)

    def _fetched(self, file: SourceFile) -> _Fetch:
        if not is_oid(file.xet_hash, lfs=True):
            raise SourceUnavailable(file.path, self.name, "the listing names no Xet hash")
        with self._lock:
            if file.oid not in self._fetches:
                path = self._scratch / f"{file.oid}.{secrets.token_hex(4)}.incomplete"
                self._fetches[file.oid] = _Fetch(path, file.size)
            fetch = self._fetches[file.oid]
        with fetch.lock:
            if self._broken:
                raise SourceUnavailable(file.path, self.name, self._broken)
            if not fetch.ready:
                try:
                    self._get(file, fetch.path)
                except Exception as error:  # whatever it is, in a package of others: the Hub is asked instead
                    self._broken = f"{type(error).__name__}: {error}".splitlines()[0]
                    self._forget(file)
                    raise SourceUnavailable(file.path, self.name, self._broken) from error
                fetch.ready = True
        return fetch

    def _get(self, file: SourceFile, path: Path) -> None:
        from huggingface_hub.file_download import xet_get
        from huggingface_hub.utils._xet import XetFileData

        path.parent.mkdir(parents=True, exist_ok=True)
        url = access_url(self._http.settings.endpoint, self._repo)
        headers = {"user-agent": user_agent()}
        if self._http.settings.token:  # for the Hub, should the token have to be renewed; storage never gets it
            headers["authorization"] = "Bearer " + self._http.settings.token
        with self._token_lock:
            if self._access is None or self._access.expires <= time.time() + EARLY_S:
                self._access = read_access(self._http, self._repo)
                _reach(self._access.url, self._http.settings.timeout_s)
            _lend(self._access, url, headers)
        xet_get(
            incomplete_path=path,
            xet_file_data=XetFileData(file.xet_hash, url),
            headers=headers,
            expected_size=file.size,
            displayed_filename=file.path,
            tqdm_class=cast("Any", _Mute),
        )
        if (size := path.stat().st_size) != file.size:
            raise OSError(f"{size:,} bytes came, {file.size:,} were promised")


class _Fetch:
    """One file on its way through the scratch folder."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.left = path, size
        self.lock = threading.Lock()
        self.ready = False


class _Mute:
    """A progress bar that shows nothing: progress is told by who asked for the file."""

    def __init__(self, *_: object, **__: object) -> None:
        self.n = self.total = 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


def _reach(url: str, timeout_s: float) -> None:
    """Raise OSError when nobody answers at the storage server's address: `hf_xet` tried a dead one for 239 s here."""
    parts = urlsplit(url)
    if parts.scheme in urllib.request.getproxies():
        return  # it may be reached through the proxy only
    with socket.create_connection((parts.hostname or "", origin(url)[2]), timeout=timeout_s):
        pass


def _lend(access: XetAccess, url: str, headers: dict[str, str]) -> None:
    """Put a token where the official client looks before it asks for one itself. If that place has moved in another
    version it asks, which costs one request that nobody counts."""
    try:
        from huggingface_hub.utils import _xet

        known = _xet.XetConnectionInfo(str(access.token), access.expires, access.url)
        _xet.XET_CONNECTION_INFO_CACHE[_xet._cache_key(url, headers)] = known
    except (ImportError, AttributeError, TypeError):
        return
