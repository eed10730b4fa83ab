"""Connections under the wire: what goes wrong on them has httpx's names, and only whole replies keep them open."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from crucible.hub import connection, wire
from tests.fakes.wired import BODY, Hangup, Talk, Wired, content, cut_in_body, read, soon, stall_in_body


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with wire.client(5.0) as made:
        yield made


# What goes wrong


def reset_in_body(talk: Talk) -> None:
    talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
    time.sleep(0.2)  # a reset takes back what was not read yet
    talk.reset()


def cut_in_head(talk: Talk) -> None:
    talk.send(b"HTTP/1.1 200 OK\r\nContent-Le")
    raise Hangup


def saying(*said: bytes) -> Callable[[Talk], None]:
    def handler(talk: Talk) -> None:
        talk.send(*said)
        raise Hangup

    return handler


WRONG: list[tuple[str, Callable[[Talk], None], type[httpx.TransportError]]] = [
    ("reset", Talk.reset, httpx.ReadError),
    ("no reply", saying(), httpx.RemoteProtocolError),
    ("stall", Talk.stall, httpx.ReadTimeout),
    ("stall in body", stall_in_body, httpx.ReadTimeout),
    ("cut in body", cut_in_body, httpx.RemoteProtocolError),
    ("reset in body", reset_in_body, httpx.ReadError),
    ("cut in head", cut_in_head, httpx.RemoteProtocolError),
    ("no HTTP", saying(b"SSH-2.0-OpenSSH_9.9\r\n\r\n"), httpx.RemoteProtocolError),
    ("status", saying(b"HTTP/1.1 okay\r\n\r\n"), httpx.RemoteProtocolError),
    ("length", saying(b"HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n12345"), httpx.RemoteProtocolError),
    (
        "two lengths",
        saying(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc"),
        httpx.RemoteProtocolError,
    ),
    ("encoding", saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: pigeon\r\n\r\n12345"), httpx.RemoteProtocolError),
    (
        "chunk size",
        saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n"),
        httpx.RemoteProtocolError,
    ),
    (
        "cut chunk",
        saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"),
        httpx.RemoteProtocolError,
    ),
    (
        "no last chunk",
        saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"),
        httpx.RemoteProtocolError,
    ),
]


@pytest.mark.parametrize(("handler", "expected"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
@pytest.mark.parametrize("how", ["chunks", "read"])
def test_what_goes_wrong_is_called_as_httpx_calls_it(
    handler: Callable[[Talk], None], expected: type[httpx.TransportError], how: str
) -> None:
    timeout = httpx.Timeout(10, read=0.6 if expected is httpx.ReadTimeout else 10)
    with Wired(handler) as server, wire.client(5.0) as ours, httpx.Client(trust_env=False) as plain:
        with pytest.raises(httpx.TransportError) as theirs:
            plain.get(server.url, timeout=timeout)
        with pytest.raises(httpx.TransportError) as caught:
            read(ours, server.url, timeout=timeout) if how == "chunks" else ours.get(server.url, timeout=timeout)
        assert type(caught.value) is type(theirs.value) is expected
        assert str(caught.value)
        assert soon(lambda: server.open == 0), "a broken connection must not be kept"


def test_what_came_before_a_stall_is_handed_out(http: httpx.Client) -> None:
    with Wired(stall_in_body) as server, http.stream("GET", server.url, timeout=httpx.Timeout(30, read=2)) as reply:
        pieces = wire.chunks(reply)
        assert bytes(next(pieces)) == b"12345"
        with pytest.raises(httpx.ReadTimeout):
            next(pieces)


def test_a_reading_can_be_cut_from_another_thread(http: httpx.Client) -> None:
    with Wired(stall_in_body) as server, http.stream("GET", server.url, timeout=60) as reply:
        pieces = wire.chunks(reply)
        assert bytes(next(pieces)) == b"12345"
        timer = threading.Timer(0.2, wire.cut, (reply,))
        timer.start()
        with pytest.raises(httpx.TransportError):
            next(pieces)
        timer.join()
        wire.cut(reply)  # once more does nothing


def test_a_refused_connection_is_a_connect_error(http: httpx.Client) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(httpx.ConnectError):
            http.get(f"http://127.0.0.1:{closed.getsockname()[1]}")


def test_nobody_accepting_is_a_connect_timeout(http: httpx.Client) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as stack:
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        with pytest.raises(httpx.ConnectTimeout):
            http.get(f"http://127.0.0.1:{full.getsockname()[1]}", timeout=0.3)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "http:///path", f"http://{'a' * 70}.test/"])
def test_an_impossible_address_is_an_error_that_callers_catch(http: httpx.Client, url: str) -> None:
    with pytest.raises((httpx.TransportError, httpx.InvalidURL)):
        http.get(url)


def test_waiting_for_a_connection_ends_with_the_pool_timeout() -> None:
    with Wired(content) as server, wire.client(5.0, max_connections=1) as http:
        with http.stream("GET", server.url), pytest.raises(httpx.PoolTimeout):
            http.get(server.url, timeout=httpx.Timeout(5, pool=0.1))
        assert http.get(server.url).content == BODY


# Which connections are kept


def test_a_body_read_to_its_end_gives_the_connection_back(http: httpx.Client) -> None:
    with Wired(content) as server:
        for _ in range(3):
            assert read(http, server.url) == BODY
        assert server.accepted == 1
        http.close()
        assert soon(lambda: server.open == 0)


@pytest.mark.parametrize("how", ["unread", "first view", "first raw"])
def test_a_body_left_early_costs_the_connection(how: str) -> None:
    with Wired(content) as server, wire.client(5.0, max_connections=1) as http:
        with http.stream("GET", server.url) as reply:
            if how != "unread":
                next(wire.chunks(reply) if how == "first view" else reply.iter_raw())
        assert soon(lambda: server.open == 0)
        assert read(http, server.url) == BODY
        assert server.accepted == 2


def test_a_reply_that_ends_its_connection_is_read_and_not_reused(http: httpx.Client) -> None:
    def last(talk: Talk) -> None:
        talk.reply(BODY, "Connection: close")
        raise Hangup

    with Wired(last) as server:
        assert read(http, server.url) == read(http, server.url) == BODY
        assert server.accepted == 2


def test_a_connection_the_server_closed_while_it_rested_is_not_noticed(http: httpx.Client) -> None:
    def last(talk: Talk) -> None:
        talk.reply(BODY)
        raise Hangup

    with Wired(last) as server:
        for _ in range(3):
            assert read(http, server.url) == BODY
            assert soon(lambda: server.open == 0)
        assert http.post(server.url, content=b"x").content == BODY


def closing_kept(end: Callable[[Talk], None]) -> Callable[[Talk], None]:
    """Answers the first request of a connection, and closes when the second is already on its way."""

    def handler(talk: Talk) -> None:
        if talk.number:
            end(talk)
            raise Hangup
        if talk.path == "/wait":
            assert soon(lambda: talk.ended.is_set() or len(together) >= 3)
        talk.reply(b"ok")

    together: list[Talk] = []

    def counted(talk: Talk) -> None:
        together.append(talk)
        handler(talk)

    return counted


@pytest.mark.parametrize("end", [lambda talk: None, Talk.reset], ids=["closed", "reset"])
def test_a_get_that_meets_a_closing_connection_goes_out_once_more(
    http: httpx.Client, end: Callable[[Talk], None]
) -> None:
    with Wired(closing_kept(end)) as server:
        threads = [threading.Thread(target=http.get, args=(f"{server.url}/wait",)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.accepted == 3
        assert http.get(server.url).content == b"ok"
        assert (server.accepted, len(server.heads)) == (4, 5)
        with pytest.raises(httpx.TransportError):
            http.post(server.url, content=b"not twice")
        assert len(server.heads) == 6


def test_a_get_on_a_new_connection_is_never_repeated(http: httpx.Client) -> None:
    with Wired(saying()) as server:
        with pytest.raises(httpx.RemoteProtocolError):
            http.get(server.url)
        assert (server.accepted, len(server.heads)) == (1, 1)


def test_a_connection_that_rested_too_long_is_not_used(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IDLE_S", 0.0)
    with Wired(content) as server:
        assert read(http, server.url) == read(http, server.url) == BODY
        assert server.accepted == 2


def test_many_threads_share_few_connections_and_get_their_own_bytes() -> None:
    def slice_of(talk: Talk) -> None:
        start, stop = map(int, talk.path[1:].split("-"))
        talk.reply(BODY[start:stop])

    wrong: list[object] = []

    def hammer(http: httpx.Client, base: str, seed: int) -> None:
        for number in range(40):
            start = (seed * 7919 + number * 104729) % 2_000_000
            stop = start + (seed * 31 + number * 3571) % 200_000
            if read(http, f"{base}/{start}-{stop}") != BODY[start:stop]:
                wrong.append((start, stop))

    with Wired(slice_of) as server, wire.client(30.0, max_connections=4) as http:
        threads = [threading.Thread(target=hammer, args=(http, server.url, seed)) for seed in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert wrong == []
        assert len(server.heads) == 12 * 40
        assert server.accepted <= 4


def test_peers_share_one_client_and_a_forked_child_makes_its_own() -> None:
    script = """
        import os
        from crucible.hub import wire
        from tests.fakes.wired import Wired
        with Wired(lambda talk: talk.reply(b"ok")) as server:
            ours = wire.peer_client()
            assert ours is wire.peer_client()
            assert ours.get(server.url).content == ours.get(server.url).content == b"ok" and server.accepted == 1
            child = os.fork()
            if not child:
                made = wire.peer_client()
                os._exit(0 if made is not ours and made.get(server.url).content == b"ok" else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert server.accepted == 2
            assert ours.get(server.url).content == b"ok" and server.accepted == 2
    """
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
