"""Xet storage as a source: the exchange of tokens, the switches, and the way back to plain HTTP.

`xet_get` is the official client's; here a stand-in takes its place, because no storage server can be reached.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import file_download
from huggingface_hub.utils import _xet

from crucible import session
from crucible.config import Settings, Token
from crucible.errors import SourceUnavailable
from crucible.hub.client import HubRepo
from crucible.hub.http import HubHttp
from crucible.refs import RepoRef, SourceFile
from crucible.report import Tally
from crucible.workers import xet
from crucible.workers.xet import XetSource, having, xet_source
from tests.hubserver.faults import FaultyHub

DATA = os.urandom(2_000_000)
REPO = RepoRef("org/data", "a" * 40)
FILE = SourceFile("big.bin", len(DATA), hashlib.sha256(DATA).hexdigest(), True, xet_hash="c" * 64)
OTHER = SourceFile("other.bin", 5, hashlib.sha256(b"other").hexdigest(), True, xet_hash="d" * 64)


@dataclass
class Storage:
    """What stands in for `xet_get`. It learns the token as the real one does, from the official client's cache."""

    contents: dict[str, bytes]
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    error: Exception | None = None

    def get(self, *, incomplete_path: Path, xet_file_data: Any, headers: dict[str, str], **options: Any) -> None:
        self.calls.append({"path": incomplete_path, "headers": headers, **options})
        if self.error is not None:
            incomplete_path.write_bytes(b"half")
            raise self.error
        access = _xet.refresh_xet_connection_info(file_data=xet_file_data, headers=headers)
        self.tokens.append(f"{access.endpoint} {access.access_token}")
        options["tqdm_class"](total=1).update(1)
        incomplete_path.write_bytes(self.contents[xet_file_data.file_hash])


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Storage:
    made = Storage({"c" * 64: DATA, "d" * 64: b"other"})
    monkeypatch.setattr(file_download, "xet_get", made.get)
    monkeypatch.setattr(_xet, "XET_CONNECTION_INFO_CACHE", {})
    return made


@dataclass
class TokenHub:
    """A Hub that can do one thing: give tokens. `asked` has path and Authorization of every request."""

    url: str
    asked: list[tuple[str, str | None]]
    headers: dict[str, str]


@pytest.fixture
def tokens() -> Iterator[TokenHub]:
    hub = TokenHub("", [], {})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append((self.path, self.headers["authorization"]))
            self.send_response(200)
            for name, value in {**hub.headers, "Content-Length": "2"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.headers |= access(hub.url, "t1", 3600)
    yield hub
    server.shutdown()
    thread.join(timeout=10)
    server.server_close()


def access(url: str, token: str, lasts_s: float) -> dict[str, str]:
    return {
        "X-Xet-Cas-Url": url,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(int(time.time() + lasts_s)),
    }


@pytest.fixture
def source(tokens: TokenHub, storage: Storage, tmp_path: Path) -> Iterator[XetSource]:
    settings = replace(Settings.from_env({}), endpoint=tokens.url, token=Token("hf_mine"), tries=1)
    with closing(HubHttp(settings, Tally())) as http, closing(XetSource(http, REPO, tmp_path / "blobs")) as made:
        yield made


def read(source: XetSource, file: SourceFile, start: int = 0, stop: int | None = None) -> bytes:
    with source.open(file, start, file.size if stop is None else stop) as body:
        assert body.start == start
        return b"".join(bytes(chunk) for chunk in body.chunks)


def test_one_token_serves_all_files_of_a_commit_and_the_official_client_asks_for_none(
    source: XetSource, tokens: TokenHub, storage: Storage
) -> None:
    assert read(source, FILE) == DATA
    assert read(source, OTHER) == b"other"
    assert tokens.asked == [(f"/api/datasets/org/data/xet-read-token/{REPO.revision}", "Bearer hf_mine")]
    assert storage.tokens == [f"{tokens.url} t1"] * 2


def test_a_token_that_is_about_to_expire_is_asked_for_anew(
    source: XetSource, tokens: TokenHub, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read(source, OTHER) == b"other"
    tokens.headers |= access(tokens.url, "t2", 7200)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3590)
    assert read(source, FILE) == DATA
    assert storage.tokens == [f"{tokens.url} t1", f"{tokens.url} t2"]
    assert len(tokens.asked) == 2


def test_ranges_are_cut_out_of_one_fetch_and_nothing_stays_on_the_disk(
    source: XetSource, storage: Storage, tmp_path: Path
) -> None:
    half = len(DATA) // 2
    parts: dict[int, bytes] = {}
    threads = [
        threading.Thread(target=lambda a=a, b=b: parts.update({a: read(source, FILE, a, b)}))
        for a, b in ((0, half), (half, len(DATA)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert parts[0] + parts[half] == DATA
    assert len(storage.calls) == 1
    assert storage.calls[0]["path"].name.endswith(".incomplete"), "what a crash leaves, prune finds"
    assert list((tmp_path / "blobs").iterdir()) == []


@pytest.mark.parametrize(
    "break_it",
    [
        lambda tokens, storage: tokens.headers.clear(),
        lambda tokens, storage: tokens.headers.update({"X-Xet-Token-Expiration": "soon"}),
        lambda tokens, storage: tokens.headers.update(access("http://127.0.0.1:9", "t1", 3600)),
        lambda tokens, storage: setattr(storage, "error", RuntimeError("it broke")),
        lambda tokens, storage: storage.contents.update({"c" * 64: DATA[:-1]}),
    ],
    ids=["no token", "a token without an end", "nobody there", "storage fails", "a short file"],
)
def test_any_failure_is_the_end_of_this_source(
    source: XetSource,
    tokens: TokenHub,
    storage: Storage,
    tmp_path: Path,
    break_it: Callable[[TokenHub, Storage], None],
) -> None:
    break_it(tokens, storage)
    with pytest.raises(SourceUnavailable, match="Xet storage"):
        read(source, FILE)
    calls = len(storage.calls)
    with pytest.raises(SourceUnavailable):
        read(source, OTHER)
    assert len(storage.calls) == calls, "it is not tried again for every file"
    assert not (tmp_path / "blobs").exists() or list((tmp_path / "blobs").iterdir()) == []


def test_a_file_without_a_hash_is_not_asked_for(source: XetSource, storage: Storage) -> None:
    plain = replace(FILE, xet_hash="")
    assert having(plain, [source]) == []
    assert having(FILE, [source]) == [source]
    with pytest.raises(SourceUnavailable, match="no Xet hash"):
        read(source, plain)
    assert read(source, FILE) == DATA


@pytest.mark.parametrize(
    ("environment", "on"),
    [
        ({}, False),
        ({"CRUCIBLE_XET": "0"}, False),
        ({"CRUCIBLE_XET": "1"}, True),
        ({"CRUCIBLE_XET": "1", "HF_HUB_DISABLE_XET": "1"}, False),
        ({"CRUCIBLE_XET": "1", "HF_HUB_OFFLINE": "1"}, False),
    ],
)
def test_it_is_off_unless_switched_on(environment: dict[str, str], on: bool, tmp_path: Path) -> None:
    with closing(HubHttp(Settings.from_env(environment), Tally())) as http, xet_source(http, REPO, tmp_path) as made:
        assert (made is not None) == on


# --- in a pull


@pytest.fixture
def repo(hub: FaultyHub, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> FaultyHub:
    """A Hub whose listing names Xet hashes. It has no tokens to give: those are put where they are lent."""
    hub.import_files("org/data", {"big.bin": DATA, "other.bin": b"other" * 300_000, "README.md": b"# x"})
    real = HubRepo.files

    def with_hashes(self: HubRepo, ref: RepoRef) -> Iterator[SourceFile]:
        for file in real(self, ref):
            yield replace(file, xet_hash=("c" if file.path == "big.bin" else "d") * 64) if file.lfs else file

    monkeypatch.setattr(HubRepo, "files", with_hashes)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("CRUCIBLE_XET", "1")
    monkeypatch.setenv("CRUCIBLE_BACKOFF_CAP", "0.05")
    storage.contents["d" * 64] = b"other" * 300_000
    return hub


def give_tokens(repo: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    there = xet.XetAccess(repo.endpoint, Token("t"), int(time.time()) + 3600)
    monkeypatch.setattr(xet, "read_access", lambda http, repo: there)


def test_what_is_in_xet_storage_comes_from_there_and_is_verified(
    repo: FaultyHub, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_tokens(repo, monkeypatch)
    report = session.pull("org/data")
    assert (Path(report.path) / "big.bin").read_bytes() == DATA
    assert len(storage.calls) == 2
    assert [record.path.rpartition("/")[2] for record in repo.requests("*/resolve/*")] == ["README.md"]
    assert not list(Path(report.path).parents[1].glob("blobs/*.incomplete"))
    tree = next(Path(report.path).parents[1].glob("trees/*.json")).read_text()
    assert '"xet_hash": "' + "c" * 64 in tree


def test_wrong_bytes_of_the_right_size_are_caught_and_the_hub_is_asked(
    repo: FaultyHub, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_tokens(repo, monkeypatch)
    storage.contents["c" * 64] = DATA[:-1] + bytes([DATA[-1] ^ 1])
    report = session.pull("org/data")
    assert (Path(report.path) / "big.bin").read_bytes() == DATA
    assert repo.requests("*/big.bin", origin="hub")


def test_without_a_token_without_storage_or_without_the_package_the_hub_is_asked(
    repo: FaultyHub, storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def check(folder: str) -> None:
        report = session.pull("org/data", cache_dir=tmp_path / folder)
        assert (Path(report.path) / "big.bin").read_bytes() == DATA
        assert report.counts.hub_bytes >= len(DATA)

    check("no token: this Hub knows no such address")
    give_tokens(repo, monkeypatch)
    storage.error = RuntimeError("no storage")
    check("no storage")
    monkeypatch.setitem(sys.modules, "huggingface_hub.file_download", None)
    check("no package")


def test_switched_off_no_token_is_asked_for(repo: FaultyHub, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    session.pull("org/data")
    assert storage.calls == []
    assert repo.requests("*xet*") == []
