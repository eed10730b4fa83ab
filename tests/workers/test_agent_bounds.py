"""Nobody can have more of an agent than its share, with the secret or without: connections, requests, memory, time."""

from __future__ import annotations

import gzip
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible.cache.store import Store
from crucible.errors import AgentUnavailable
from crucible.refs import NodeId
from crucible.workers.bounds import Bounds, Doors, address_of
from crucible.workers.serve import AgentServer

SECRET = "s3cret-of-a-test"
KEY = "ab" * 32
DATA = bytes(range(256)) * 8
WAIT_S = 60
"""Until a test gives up on what must happen. It happens at once, or after the bound that the test has set."""
FUZZED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
Start = Callable[..., AgentServer]
WORDS = b"shards locate status opening wishes partials secret .. . %2e%2e %2F %00 %ff % %zz # \xff ~ * ?size=1&lfs=1"
PATHS = st.lists(st.sampled_from([b"", KEY.encode(), *WORDS.split()]), max_size=5).map(b"/".join)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "home")
    path = store.shard_path(KEY)
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    return store


@pytest.fixture
def start(store: Store) -> Iterator[Start]:
    """`start(**bounds)` is an agent of that store."""
    with ExitStack() as stack:

        def begin(ask: Callable[[str, Any], Any] | None = None, **bounds: Any) -> AgentServer:
            agent = AgentServer(store, SECRET, NodeId("n"), "127.0.0.1", 0, lambda _: [], ask, bounds=Bounds(**bounds))
            stack.callback(agent.close)
            return agent

        yield begin


def connected(agent: AgentServer) -> socket.socket:
    host, _, port = agent.url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_S)


def ended(connection: socket.socket) -> bytes:
    """All that comes until the other side ends it, however it does so."""
    got = bytearray()
    with suppress(ConnectionError):
        while piece := connection.recv(1 << 16):
            got += piece
    return bytes(got)


def head(path: str = f"/v1/shards/{KEY}", *lines: str, secret: str | None = SECRET, method: str = "GET") -> bytes:
    said = [] if secret is None else [f"Authorization: Bearer {secret}"]
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *said, *lines, "", ""]).encode()


def get(agent: AgentServer, path: str = f"/v1/shards/{KEY}", secret: str = SECRET, **headers: str) -> httpx.Response:
    return httpx.get(agent.url + path, headers={"authorization": f"Bearer {secret}", **headers}, timeout=WAIT_S)


def still_serves(agent: AgentServer) -> bool:
    """Asked again where this machine was too busy for a bound that the test has made short."""
    for _ in range(20):
        with suppress(httpx.TransportError):
            return get(agent).content == DATA
    return False


class TestWithoutTheSecret:
    @FUZZED
    @given(st.one_of(st.binary(max_size=400), st.binary(max_size=60).map(lambda noise: head(secret=None)[:-2] + noise)))
    def test_noise_gets_no_answer_but_a_refusal(self, fuzzed: AgentServer, noise: bytes) -> None:
        with connected(fuzzed) as connection:
            connection.sendall(noise + b"\r\n\r\n")  # and not its end: that alone ends a connection
            reply = ended(connection)
        assert not reply.strip() or reply.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))
        assert DATA[:64] not in reply

    @pytest.fixture
    def fuzzed(self, start: Start) -> Iterator[AgentServer]:
        agent = start(failures=10**9, head_s=2.0)  # for noise that is the beginning of a head
        yield agent
        assert still_serves(agent)

    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW"])
    @pytest.mark.parametrize("path", [f"/v1/shards/{KEY}", "/v1/shards/" + "0" * 64, "/v1/partials/x", "/nothing"])
    def test_whatever_is_asked_for_the_answer_is_the_same(self, fuzzed: AgentServer, method: str, path: str) -> None:
        path = "x:1" if method == "CONNECT" else path
        with connected(fuzzed) as connection:
            connection.sendall(head(path, secret=None, method=method))
            first, _, body = ended(connection).partition(b"\r\n\r\n")
        unknown = method == "BREW"  # to HTTP itself
        assert first.startswith(b"HTTP/1.0 400" if unknown else b"HTTP/1.1 401")
        assert body in (b"", b'{"error": "the cluster\'s secret is missing or wrong"}')

    @pytest.mark.parametrize("given", ["", "x", SECRET[:-1], SECRET + "x", SECRET.upper(), "s3cret\xff", "\xff" * 16])
    def test_a_wrong_secret_of_any_length_and_letters_is_wrong(self, fuzzed: AgentServer, given: str) -> None:
        with connected(fuzzed) as connection:
            connection.sendall(
                head(secret=None)[:-2] + b"Authorization: Bearer " + given.encode("latin-1") + b"\r\n\r\n"
            )
            assert ended(connection).startswith(b"HTTP/1.1 401")

    def test_an_endless_body_is_not_read(self, fuzzed: AgentServer) -> None:
        with connected(fuzzed) as connection:
            connection.sendall(head("/v1/opening", "Content-Length: 999999999999", secret=None, method="POST"))
            with suppress(ConnectionError):
                for _ in range(2_000):
                    connection.sendall(b" " * 65536)
                pytest.fail("131 MB were taken")

    def test_who_fails_often_waits_and_who_knows_the_secret_does_not(self, start: Start) -> None:
        agent = start(failures=3, tarpit_s=WAIT_S * 10, tarpitted=2)
        for _ in range(3):
            assert get(agent, secret="wrong").status_code == 401
        with ExitStack() as stack:
            waiting = [stack.enter_context(connected(agent)) for _ in range(2)]
            for connection in waiting:
                connection.sendall(head(secret="wrong"))
                connection.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    connection.recv(1)
            with connected(agent) as over:  # no more wait at a time
                over.sendall(head(secret="wrong"))
                assert ended(over) == b""
            assert still_serves(agent)


class TestTime:
    @pytest.mark.parametrize("pieces", [[], [head()[:20]], [b"G", b"ET /v1/", *[b"x"] * 1000]])
    def test_a_head_that_does_not_come_ends_the_connection(self, start: Start, pieces: list[bytes]) -> None:
        agent = start(head_s=1.0)
        with connected(agent) as connection:
            with suppress(ConnectionError):
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(0.01)
            assert ended(connection) == b""
        assert still_serves(agent)

    def test_so_does_the_next_head_on_a_kept_connection(self, start: Start) -> None:
        agent = start(head_s=2.0)
        with connected(agent) as connection:
            connection.sendall(head())
            connection.recv(1)
            connection.sendall(head()[:20])
            assert ended(connection).endswith(DATA[-64:])

    def test_a_connection_that_rests_too_long_is_closed(self, start: Start) -> None:
        agent = start(idle_s=0.3)
        with connected(agent) as connection:
            connection.sendall(head())
            assert ended(connection).endswith(DATA[-64:])

    def test_a_question_that_does_not_come_whole_is_not_waited_for(self, start: Start) -> None:
        agent = start(ask=lambda *_: {}, body_s=0.3)
        with connected(agent) as connection:
            connection.sendall(head("/v1/wishes", "Content-Length: 50", method="POST") + b'{"a":')
            assert ended(connection).startswith(b"HTTP/1.1 408")

    def test_a_reader_that_does_not_take_its_bytes_is_cut_off(self, store: Store, start: Start) -> None:
        big = "cd" * 32
        path = store.shard_path(big)
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            file.truncate(64 << 20)
        agent = start(piece_s=0.3, connections=1)
        with connected(agent) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            connection.sendall(head(f"/v1/shards/{big}"))
            deadline = time.monotonic() + WAIT_S
            while time.monotonic() < deadline:  # its place is another's, though it has read nothing
                with suppress(httpx.HTTPError):
                    if get(agent).status_code == 200:
                        break
            else:
                pytest.fail("a reader that reads nothing keeps its place")
            assert len(ended(connection)) < 64 << 20


class TestNumbers:
    def test_more_connections_than_one_address_may_have_are_refused_in_words(self, start: Start) -> None:
        agent = start(connections_each=2)
        with ExitStack() as stack:
            inside = [stack.enter_context(connected(agent)) for _ in range(2)]
            for connection in inside:
                connection.sendall(head())
                assert connection.recv(12) == b"HTTP/1.1 200"
            with connected(agent) as over:
                assert ended(over).startswith(b"HTTP/1.1 503 there are 2 connections from 127.0.0.1")
        deadline = time.monotonic() + WAIT_S
        while get(agent).status_code != 200:  # the two have ended, and room is there again
            assert time.monotonic() < deadline

    def test_more_requests_than_a_share_are_put_off(self, start: Start) -> None:
        agent = start(requests_s=1e-6, burst=3)
        with httpx.Client(headers={"authorization": f"Bearer {SECRET}"}) as client:
            replies = [client.get(f"{agent.url}/v1/shards/{KEY}") for _ in range(4)]
        assert [reply.status_code for reply in replies] == [200, 200, 200, 429]
        assert replies[-1].headers["retry-after"] == "1"

    @pytest.mark.parametrize(
        "said",
        [
            head("/" + "x" * 9000),
            head("/", "X: " + "x" * 9000),
            head("/", *[f"X-{number}: 1" for number in range(100)]),
        ],
    )
    def test_a_head_that_is_too_big_is_refused(self, start: Start, said: bytes) -> None:
        agent = start()
        with connected(agent) as connection:
            connection.sendall(said)
            assert ended(connection).startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))
        assert still_serves(agent)

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            (b"[" * 100_000 + b"]" * 100_000, 400),
            (b'{"a":' * 200 + b"1" + b"}" * 200, 400),
            (b'"' + b"x" * 5000 + b'"', 413),
            (b"1" * 4000, 400),
            (b'{"request": [[1]], "endpoint": 1}', 400),
            (b"[1, 2]", 400),
            (b"\xff\xfe", 400),
            (b"", 400),
        ],
    )
    @pytest.mark.parametrize("what", ["opening", "wishes"])
    def test_a_question_that_is_a_bomb_is_an_error(self, start: Start, what: str, body: bytes, status: int) -> None:
        def ask(_: str, question: Any) -> Any:
            return {"keys": [str(key) for key in question["request"]["x"]]}

        agent = start(ask, question_bytes=4096 if status == 413 else 1 << 20)
        reply = httpx.post(
            f"{agent.url}/v1/{what}", content=body, headers={"authorization": f"Bearer {SECRET}"}, timeout=WAIT_S
        )
        assert reply.status_code == status

    def test_a_question_is_not_unpacked(self, start: Start) -> None:
        agent = start(lambda *_: {})
        packed = gzip.compress(json.dumps({"a": " " * 1_000_000}).encode())
        headers = {"authorization": f"Bearer {SECRET}", "content-encoding": "gzip"}
        assert httpx.post(f"{agent.url}/v1/wishes", content=packed, headers=headers).status_code == 400

    @FUZZED
    @given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from("efrl")), max_size=120))
    def test_memory_and_counts_stay_in_their_bounds(self, calls: list[tuple[int, str]]) -> None:
        doors = Doors(Bounds(connections=5, connections_each=2, addresses=8, failures=3))
        inside: list[str] = []
        for now, (number, what) in enumerate(calls):
            who = f"10.0.0.{number}"
            if what == "e" and not doors.enter(who, now):
                inside.append(who)
            elif what == "f":
                doors.failed(who, now)
            elif what == "r":
                doors.request(who, now)
            elif what == "l" and inside:
                doors.leave(inside.pop(number % len(inside)))
            assert doors.inside == len(inside) <= 5
            assert max(map(inside.count, inside), default=0) <= 2
            assert len(doors) <= 8 + 5


class TestPlaces:
    @FUZZED
    @given(
        st.one_of(
            st.text("0123456789-=bytes, ", max_size=24), st.from_regex(r"bytes=[0-9]{0,20}-[0-9]{0,20}", fullmatch=True)
        )
    )
    def test_any_range_gets_those_bytes_or_none(self, ranged: AgentServer, said: str) -> None:
        with connected(ranged) as connection:
            connection.sendall(head(f"/v1/shards/{KEY}", f"Range: {said.strip() or 'x'}", "Connection: close"))
            reply = ended(connection)
        status, body = reply[9:12], reply.partition(b"\r\n\r\n")[2]
        if status == b"206":
            first, _, last = said.strip().removeprefix("bytes=").partition("-")
            expected = (
                DATA[int(first) :][: int(last) - int(first) + 1 if last else None] if first else DATA[-int(last) :]
            )
            assert body == expected != b""
        else:
            assert status == b"416" or (status, body) == (b"200", DATA)

    @FUZZED
    @given(st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH"]), PATHS, st.binary(max_size=30))
    def test_no_path_with_the_secret_breaks_the_agent_or_leads_out(
        self, ranged: AgentServer, method: str, path: bytes, body: bytes
    ) -> None:
        with connected(ranged) as connection:
            first = head("@", "Connection: close", f"Content-Length: {len(body)}", method=method)
            connection.sendall(first.replace(b"@", b"/v1/" + path, 1) + body)
            reply = ended(connection)
        assert reply[9:12] in (b"200", b"400", b"404", b"405", b"411", b"503"), (path, reply[:100])
        assert SECRET.encode() not in reply

    @pytest.fixture
    def ranged(self, start: Start) -> AgentServer:
        return start()

    @pytest.mark.parametrize("kind", ["link", "folder link", "pipe", "folder", "packed"])
    def test_what_is_no_plain_file_of_the_store_is_not_there(self, store: Store, start: Start, kind: str) -> None:
        other = "cd" * 32
        path = store.shard_path(other)
        outside = store.home.parent / "outside"
        outside.mkdir()
        (outside / path.name).write_bytes(b"private")
        if kind == "folder link":
            path.parent.symlink_to(outside)
        else:
            path.parent.mkdir(parents=True)
            if kind == "link":
                path.symlink_to(outside / path.name)
            elif kind == "pipe":
                os.mkfifo(path)
            elif kind == "folder":
                path.mkdir()
            else:
                path.with_name(path.name + ".gz").write_bytes(b"private")
        reply = get(start(), f"/v1/shards/{other}", **{"accept-encoding": "gzip"})
        assert (reply.status_code, b"private" in reply.content) == (404, False)

    def test_it_listens_on_its_own_address_only(self, store: Store) -> None:
        agent = AgentServer(store, SECRET, NodeId("n"), "127.0.0.1", 0, lambda _: [])
        try:
            port = int(agent.url.rpartition(":")[2])
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port), timeout=WAIT_S)
        finally:
            agent.close()

    def test_an_address_of_the_newer_kind_is_served(self, store: Store) -> None:
        try:
            agent = AgentServer(store, SECRET, NodeId("n"), "::1", 0, lambda _: [])
        except AgentUnavailable:
            pytest.skip("this machine has no IPv6")
        try:
            assert agent.url.startswith("http://[::1]:")
            assert still_serves(agent)
        finally:
            agent.close()

    def test_of_a_range_of_ports_the_first_free_one_is_taken(self, store: Store, start: Start) -> None:
        taken = int(start().url.rpartition(":")[2])
        if taken > 65_000:
            pytest.skip("the kernel gave a port at the end of all")
        agent = AgentServer(store, SECRET, NodeId("n"), "127.0.0.1", (taken, taken + 200), lambda _: [])
        try:
            assert taken < int(agent.url.rpartition(":")[2]) <= taken + 200
        finally:
            agent.close()

    def test_a_network_of_the_newer_kind_counts_as_one_machine(self) -> None:
        assert address_of("2001:db8::1") == address_of("2001:db8::ffff:1") != address_of("2001:db8:0:1::1")
        assert address_of("::ffff:10.0.0.1") == address_of("10.0.0.1") == "10.0.0.1"
        assert (address_of("::1"), address_of("no address")) == ("::1", "no address")
