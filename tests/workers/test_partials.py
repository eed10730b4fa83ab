"""Ranges that a node pushes to another's agent: the other goes on with them, and takes nothing else from anybody."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from crucible.cache.book import RoomBook
from crucible.cache.store import Store
from crucible.refs import NodeId, SourceFile
from crucible.report import Tally
from crucible.workers import partials
from crucible.workers.secret import ensure_secret
from crucible.workers.serve import AgentServer
from crucible.workers.spare import FAILURES, PUSH_BYTES, SparePusher, announce

CONTENT = os.urandom(3_000_000)
FILE = SourceFile("data.bin", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), True)
LEFT = 2_000_000


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "spare")


@pytest.fixture
def agent(store: Store) -> Iterator[AgentServer]:
    server = AgentServer(store, ensure_secret(store), NodeId("spare"), "127.0.0.1", 0, lambda _: [])
    yield server
    server.close()


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    """The descriptor of a file on its way, on the other node."""
    (tmp_path / "source").write_bytes(CONTENT)
    descriptor = os.open(tmp_path / "source", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def put(
    agent: AgentServer,
    body: bytes | Iterator[bytes] = b"x" * 10,
    *,
    oid: str = FILE.oid,
    secret: str | None = None,
    headers: dict[str, str] | None = None,
    **query: object,
) -> httpx.Response:
    asked = {"size": FILE.size, "lfs": 1, "start": 0, **query}
    sent = {"authorization": f"Bearer {secret}"} if secret else {}
    return httpx.put(
        f"{agent.url}/v1/partials/{oid}",
        params={name: str(value) for name, value in asked.items()},
        content=body,
        headers={**sent, **(headers or {})},
        timeout=30,
    )


def staged(store: Store) -> list[str]:
    return sorted(path.name for path in (store.home / "raw").glob("*")) if (store.home / "raw").exists() else []


def test_who_goes_on_with_the_file_finds_what_was_pushed(store: Store, agent: AgentServer, source: int) -> None:
    tally = Tally()
    push = SparePusher(agent.url, ensure_secret(store), tally)
    push(FILE, source, 0, 1_000_000)
    push(FILE, source, 2_500_000, FILE.size)
    push.close()
    assert (tally.counts.spare_bytes, tally.counts.spare_failures) == (1_500_000, 0)
    announce(agent.url, ensure_secret(store), [FILE.oid])
    with store.raw.claim(FILE, wait_s=60) as partial:
        assert partial is not None
        assert list(partial.ranges) == [(0, 1_000_000), (2_500_000, FILE.size)]
        assert os.pread(partial.descriptor, 1_000_000, 0) == CONTENT[:1_000_000]
        assert os.pread(partial.descriptor, 500_000, 2_500_000) == CONTENT[2_500_000:]


def test_a_range_bigger_than_a_request_comes_in_several(store: Store, agent: AgentServer, tmp_path: Path) -> None:
    size = PUSH_BYTES + 1000
    big = SourceFile("big.bin", size, "b" * 64, True)
    tally = Tally()
    with (tmp_path / "big").open("w+b") as data:
        data.truncate(size)
        push = SparePusher(agent.url, ensure_secret(store), tally)
        push(big, data.fileno(), 0, size)
        push.close()
    assert tally.counts.spare_bytes == size
    announce(agent.url, ensure_secret(store), [big.oid])
    with store.raw.claim(big, wait_s=60) as partial:
        assert partial is not None
        assert list(partial.ranges) == [(0, size)]


def test_what_nobody_needs_any_more_is_removed(store: Store, agent: AgentServer, source: int) -> None:
    push = SparePusher(agent.url, ensure_secret(store), Tally())
    push(FILE, source, 0, 1_000_000)
    assert staged(store)
    push.done()
    assert not [name for name in staged(store) if "journal" not in name]
    push(FILE, source, 0, 1_000_000)
    announce(agent.url, ensure_secret(store), [FILE.oid])  # nobody holds it now
    push.done()
    push.close()
    assert not [name for name in staged(store) if "journal" not in name]


def test_the_agent_lets_go_by_itself_when_nothing_comes_any_more(store: Store, source: int) -> None:
    landings = partials.Partials(store)
    incoming = landings.enter(FILE, 0)
    incoming.write(CONTENT[:100])
    landings.expire(0.0)  # a range is arriving
    incoming.finish()
    landings.leave(incoming)
    landings.expire(1000.0)
    with store.raw.claim(FILE, wait_s=0) as partial:
        assert partial is not None
        assert not partial.shared, "the agent holds it still"
    landings.expire(0.0)
    with store.raw.claim(FILE, wait_s=0) as partial:
        assert partial is not None
        assert list(partial.ranges) == [(0, 100)]


def test_a_file_that_somebody_brings_here_already_is_not_taken(store: Store, agent: AgentServer, source: int) -> None:
    secret = ensure_secret(store)
    with store.raw.claim(FILE) as partial:
        assert partial is not None
        assert put(agent, CONTENT[:10], secret=secret).status_code == 409
        partial.write(0, CONTENT)
        partial.record(0, FILE.size, zlib.crc32(CONTENT))
        partial.publish()
    assert put(agent, CONTENT[:10], secret=secret).status_code == 409
    assert store.raw.path(FILE.oid).read_bytes() == CONTENT


@pytest.mark.parametrize("given", [None, "wrong"])
def test_nothing_is_taken_without_the_secret(store: Store, agent: AgentServer, given: str | None) -> None:
    headers = {"authorization": f"Bearer {given}"} if given else {}
    assert put(agent, secret=given).status_code == 401
    assert put(agent, secret=given, oid="nonsense").status_code == 401
    url = f"{agent.url}/v1/partials/{FILE.oid}"
    assert httpx.delete(url, headers=headers).status_code == 401
    assert httpx.post(f"{url}/release", headers=headers).status_code == 401
    assert staged(store) == []


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({"start": -1}, 400),
        ({"start": "0x1"}, 400),
        ({"start": "\u0661"}, 400),
        ({"size": ""}, 400),
        ({"size": 1 << 60}, 400),
        ({"lfs": 0}, 400),
        ({"lfs": 2}, 400),
        ({"start": FILE.size}, 416),
        ({"start": FILE.size - 9}, 416),
        ({"size": 9}, 416),
        ({"oid": "a" * 63}, 404),
        ({"oid": "A" * 64}, 404),
        ({"oid": "a" * 40}, 400),
        ({"oid": "..%2f..%2fsecret"}, 404),
        ({"oid": "../../secret"}, 404),
        ({"oid": "%2e%2e"}, 404),
        ({"body": b""}, 416),
    ],
)
def test_what_is_no_range_of_a_file_is_refused(
    store: Store, agent: AgentServer, query: dict[str, object], status: int
) -> None:
    before = sorted(path for path in store.home.rglob("*"))
    assert put(agent, secret=ensure_secret(store), **query).status_code == status  # type: ignore[arg-type]
    assert sorted(path for path in store.home.rglob("*")) == before


def test_a_body_without_or_with_too_big_a_length_is_refused(store: Store, agent: AgentServer) -> None:
    secret = ensure_secret(store)
    assert put(agent, iter([b"x" * 10]), secret=secret).status_code == 411
    request = (
        f"PUT /v1/partials/{FILE.oid}?size={1 << 40}&lfs=1&start=0 HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {secret}\r\nContent-Length: {PUSH_BYTES + 1}\r\n\r\n"
    )
    assert raw_request(agent, request.encode()).startswith(b"HTTP/1.1 413")
    assert staged(store) == []


def test_a_body_that_ends_too_early_is_not_recorded(store: Store, agent: AgentServer) -> None:
    secret = ensure_secret(store)
    request = (
        f"PUT /v1/partials/{FILE.oid}?size={FILE.size}&lfs=1&start=0 HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {secret}\r\nContent-Length: 1000\r\n\r\n"
    )
    raw_request(agent, request.encode() + CONTENT[:999], ends=True)
    announce(agent.url, secret, [FILE.oid])
    with store.raw.claim(FILE, wait_s=60) as partial:
        assert partial is not None
        assert list(partial.ranges) == []


def test_no_more_files_at_once_than_the_bound(
    store: Store, agent: AgentServer, source: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partials, "MOST", 2)
    secret = ensure_secret(store)
    replies = [put(agent, oid=f"{number:064x}", secret=secret).status_code for number in range(3)]
    assert replies == [204, 204, 503]


def test_a_file_that_does_not_fit_on_the_disk_is_refused(store: Store, agent: AgentServer) -> None:
    assert put(agent, secret=ensure_secret(store), size=1 << 49).status_code == 507


def test_a_file_that_cannot_be_begun_with_now_holds_up_no_other(
    store: Store, agent: AgentServer, source: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process of the node measures its room for long, and evicts."""
    secret, tally = ensure_secret(store), Tally()
    push = SparePusher(agent.url, secret, tally)
    push(FILE, source, 0, 1000)
    monkeypatch.setattr(partials, "PATIENCE_S", 60.0)
    waiting, over = threading.Semaphore(0), threading.Event()

    class Book(RoomBook):
        @contextmanager
        def alone(self, *_: Any, **__: Any) -> Iterator[bool]:
            waiting.release()
            yield over.wait(60)

    monkeypatch.setattr(partials, "RoomBook", Book)
    with ThreadPoolExecutor(8) as pool:
        # as many as the agent begins with at once; of the first another stream pushes, too
        late = [pool.submit(put, agent, oid=f"{number:064x}", secret=secret) for number in (1, 2, 3, 4)]
        try:
            assert all(waiting.acquire(timeout=30) for _ in late)
            late.append(pool.submit(put, agent, oid=f"{1:064x}", secret=secret))
            push(FILE, source, 1000, 2000)
            announce(agent.url, secret, [FILE.oid])
            with store.raw.claim(FILE, wait_s=0) as partial:
                assert partial is not None
                assert list(partial.ranges) == [(0, 2000)]
            assert not any(one.done() for one in late)
        finally:
            over.set()
        assert [one.result(60).status_code for one in late] == [204] * 5
    push.close()
    assert (tally.counts.spare_bytes, tally.counts.spare_failures) == (2000, 0)


def test_a_spare_that_waits_too_long_for_others_refuses(
    store: Store, agent: AgentServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partials, "PATIENCE_S", 0.1)
    with RoomBook(store.home).alone():
        assert put(agent, secret=ensure_secret(store)).status_code == 503
    assert put(agent, secret=ensure_secret(store)).status_code == 204


@pytest.mark.parametrize("unwanted", [False, True])
def test_what_is_let_go_of_while_it_is_begun_with_is_let_go_of_then(
    store: Store, monkeypatch: pytest.MonkeyPatch, unwanted: bool
) -> None:
    with store.raw.claim(FILE) as partial:
        assert partial is not None
        partial.write(0, CONTENT[:100])
        partial.record(0, 100, zlib.crc32(CONTENT[:100]))
    landings = partials.Partials(store)

    class Book(RoomBook):
        @contextmanager
        def alone(self, *_: Any, **__: Any) -> Iterator[bool]:
            (landings.drop if unwanted else landings.release)(FILE.oid)
            yield True

    monkeypatch.setattr(partials, "RoomBook", Book)
    with pytest.raises(partials.PartialRefused, match="another process goes on"):
        landings.enter(FILE, 0)
    with store.raw.claim(FILE, wait_s=0) as partial:
        assert partial is not None
        assert partial.shared
        assert list(partial.ranges) == ([] if unwanted else [(0, 100)])


def test_a_spare_that_is_gone_is_given_up_after_a_few_tries_and_harms_nothing(store: Store, source: int) -> None:
    tally = Tally()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        push = SparePusher(f"http://127.0.0.1:{closed.getsockname()[1]}", "secret", tally)
        for start in range(0, 1000, 100):
            push(FILE, source, start, start + 100)
        push.done()
        push.close()
    assert (tally.counts.spare_bytes, tally.counts.spare_failures) == (0, FAILURES)


def raw_request(agent: AgentServer, data: bytes, *, ends: bool = False) -> bytes:
    where = urlsplit(agent.url)
    with socket.create_connection((where.hostname, where.port), timeout=30) as connection:
        connection.sendall(data)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        return connection.recv(100)
