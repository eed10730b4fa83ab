"""The wire: what httpx promises holds over urllib3's connections, over real sockets and whatever a server does."""

from __future__ import annotations

import gzip
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.errors import UsageError
from crucible.hub import wire
from tests.fakes.wired import BODY, Hangup, Talk, Wired, content, cut_in_body, read, stall_in_body


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with wire.client(5.0) as made:
        yield made


# What comes out


def test_chunks_are_views_of_one_buffer_and_an_old_one_is_unusable(http: httpx.Client) -> None:
    with Wired(content) as server, http.stream("GET", server.url) as reply:
        buffer, body, old = bytearray(64 << 10), bytearray(), None
        for chunk in wire.chunks(reply, buffer):
            assert isinstance(chunk, memoryview)
            assert chunk.obj is buffer
            body += chunk
            if old is not None:
                with pytest.raises(ValueError, match="released"):
                    bytes(old)
            old = chunk
        assert body == BODY


@pytest.mark.parametrize("size", [1, 100, 8191, 8192, 1 << 20])
def test_a_buffer_of_any_size_serves(http: httpx.Client, size: int) -> None:
    body = BODY[: 20_000 if size < 8192 else None]
    with Wired(lambda talk: talk.reply(body)) as server, http.stream("GET", server.url) as reply:
        assert b"".join(bytes(chunk) for chunk in wire.chunks(reply, memoryview(bytearray(size)))) == body


def test_what_httpx_hands_out_is_never_written_over(http: httpx.Client) -> None:
    with Wired(content) as server:
        with http.stream("GET", server.url) as reply:
            kept = list(reply.iter_raw())
        with http.stream("GET", server.url) as reply:
            decoded = list(reply.iter_bytes())
        assert b"".join(kept) == b"".join(decoded) == http.get(server.url).content == BODY
        assert server.accepted == 1


def test_a_body_is_read_once(http: httpx.Client) -> None:
    with Wired(content) as server:
        with http.stream("GET", server.url) as reply:
            list(map(len, wire.chunks(reply)))
            with pytest.raises(httpx.StreamConsumed):
                list(wire.chunks(reply))
            with pytest.raises(httpx.StreamConsumed):
                reply.read()
        with pytest.raises(httpx.StreamError):
            list(wire.chunks(reply))


FRAMES = ("length", "chunked", "close")


def framed(talk: Talk, body: bytes, cuts: list[int], frame: str, packed: bool) -> None:
    wire_body = gzip.compress(body, mtime=0) if packed else body
    edges = sorted({0, len(wire_body), *(cut % (len(wire_body) + 1) for cut in cuts)})
    pieces = [wire_body[start:stop] for start, stop in pairwise(edges)]
    head = "HTTP/1.1 200 OK\r\n" + ("Content-Encoding: gzip\r\n" if packed else "")
    if frame == "chunked":
        pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\n\r\n"]
        head += "Transfer-Encoding: chunked\r\n"
    elif frame == "length":
        head += f"Content-Length: {len(wire_body)}\r\n"
    else:
        head += "Connection: close\r\n"
    talk.send(head.encode() + b"\r\n", *pieces)
    if frame == "close":
        raise Hangup


@pytest.fixture(scope="module")
def desk() -> Iterator[tuple[Wired, httpx.Client, httpx.Client]]:
    """A server whose handler the test changes, our client and httpx's own."""
    with Wired(content) as server, wire.client(5.0) as ours, httpx.Client(trust_env=False) as plain:
        yield server, ours, plain


@given(
    size=st.integers(0, 300_000),
    cuts=st.lists(st.integers(0, 300_000), max_size=6),
    frame=st.sampled_from(FRAMES),
    packed=st.booleans(),
    room=st.integers(1, 200_000),
)
@settings(max_examples=60, deadline=None)
def test_the_bytes_are_those_that_httpx_reads(
    desk: tuple[Wired, httpx.Client, httpx.Client], size: int, cuts: list[int], frame: str, packed: bool, room: int
) -> None:
    server, ours, plain = desk
    body = BODY[:size]  # any bytes will do; as an example of hypothesis's they would be too long to print
    server.handler = partial(framed, body=body, cuts=cuts, frame=frame, packed=packed)
    with ours.stream("GET", server.url) as reply:
        viewed = b"".join(bytes(chunk) for chunk in wire.chunks(reply, bytearray(max(room, len(body) // 50 + 1))))
    with ours.stream("GET", server.url) as reply:
        raw = b"".join(reply.iter_raw())
    with plain.stream("GET", server.url) as reply:
        assert b"".join(reply.iter_raw()) == raw
    assert viewed == ours.get(server.url).content == plain.get(server.url).content == body


# What goes out


def test_the_request_is_what_httpx_wrote(http: httpx.Client) -> None:
    sent = [(b"X-Twice", b"one"), (b"X-Twice", b"two"), (b"X-Latin", b"\xe9")]
    target = "/a%2fb/./c~d?sig=x%3d&y='(1)'|z&%C3%BC"
    with Wired(lambda talk: talk.reply(b"")) as server, httpx.Client(trust_env=False) as plain:
        for client in (http, plain):
            client.headers.clear()
            client.get(server.url + target, headers=sent)
            client.post(server.url, content=b"a body")
            client.put(server.url, content=iter([b"a ", b"", b"body"]))
            client.delete(server.url)
            client.post(server.url)
        ours, theirs = server.heads[:5], server.heads[5:]
        assert [head.split("\r\n")[0] for head in ours] == [head.split("\r\n")[0] for head in theirs]
        assert [sorted(head.lower().split("\r\n")) for head in ours] == [
            sorted(head.lower().split("\r\n")) for head in theirs
        ]
        assert "/a%2fb/" in ours[0]
        assert server.bodies[:5] == server.bodies[5:]
        assert server.bodies[1] == b"a body"


def test_duplicate_reply_headers_are_kept_and_no_redirect_is_followed(http: httpx.Client) -> None:
    def moved(talk: Talk) -> None:
        talk.reply(
            b"", "Set-Cookie: a=1", "Set-Cookie: b=2", "X-Latin: \xe9", "Location: /else", status="302 Found Elsewhere"
        )

    with Wired(moved) as server:
        reply = http.get(server.url)
        assert reply.headers.get_list("set-cookie") == ["a=1", "b=2"]
        assert reply.headers["x-latin"] == "\xe9"
        assert (reply.status_code, reply.reason_phrase, reply.http_version) == (302, "Found Elsewhere", "HTTP/1.1")
        assert len(server.heads) == 1


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified", "200 OK"])
def test_a_reply_without_a_body_keeps_the_connection(http: httpx.Client, status: str) -> None:
    def bodiless(talk: Talk) -> None:
        talk.send(f"HTTP/1.1 {status}\r\nContent-Length: {5 if talk.head[:4] == 'HEAD' else 0}\r\n\r\n".encode())

    with Wired(bodiless) as server:
        assert http.head(server.url).content == b""
        assert http.get(server.url).content == b""
        with http.stream("HEAD", server.url) as reply:
            assert list(wire.chunks(reply)) == []
        assert (server.accepted, len(server.heads)) == (1, 3)


def test_hints_before_a_reply_are_skipped(http: httpx.Client) -> None:
    def hinting(talk: Talk) -> None:
        talk.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n")
        talk.reply(BODY, "X-Real: yes")

    with Wired(hinting) as server:
        for _ in range(2):
            reply = http.get(server.url)
            assert (reply.status_code, reply.content, reply.headers["x-real"]) == (200, BODY, "yes")
        assert server.accepted == 1


# TLS and proxies


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for 127.0.0.1 that no authority knows."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    try:
        subprocess.run(
            [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path, "-out", f"{path}.crt"],
            check=True,
            capture_output=True,
            timeout=60,
        )
    except FileNotFoundError:
        pytest.skip("no openssl command to make a certificate with")
    path.write_bytes(path.read_bytes() + Path(f"{path}.crt").read_bytes())
    return path


def trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


def served_by(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_tls_is_made_once_when_it_is_first_needed(certificate: Path) -> None:
    made: list[ssl.SSLContext] = []

    def counted() -> ssl.SSLContext:
        made.append(trusting(certificate))
        return made[-1]

    with (
        Wired(content) as plain,
        Wired(content, tls=served_by(certificate)) as server,
        httpx.Client(transport=wire.PoolTransport(tls=counted)) as http,
    ):
        assert read(http, plain.url) == BODY
        assert made == []
        for _ in range(3):
            assert read(http, server.url) == BODY
            assert http.get(server.url).content == BODY
        assert (server.accepted, len(made)) == (1, 1)


def test_a_certificate_nobody_vouches_for_is_a_connect_error(http: httpx.Client, certificate: Path) -> None:
    with Wired(content, tls=served_by(certificate)) as server, pytest.raises(httpx.ConnectError, match="certificate"):
        http.get(server.url)


def test_a_reading_over_tls_can_be_cut_and_hands_out_nothing_that_is_encrypted(certificate: Path) -> None:
    with (
        Wired(content, tls=served_by(certificate)) as server,
        httpx.Client(transport=wire.PoolTransport(tls=partial(trusting, certificate))) as http,
        http.stream("GET", server.url) as reply,
    ):
        pieces = wire.chunks(reply, bytearray(4096))
        first = bytes(next(pieces))
        wire.cut(reply)
        got, error = until_error(pieces)
        assert isinstance(error, httpx.TransportError)
        assert BODY.startswith(first + got)


@pytest.mark.parametrize("handler", [cut_in_body, stall_in_body], ids=["cut", "stall"])
def test_a_broken_body_is_found_out_over_tls(certificate: Path, handler: Callable[[Talk], None]) -> None:
    transport = wire.PoolTransport(tls=partial(trusting, certificate))
    expected = httpx.RemoteProtocolError if handler is cut_in_body else httpx.ReadTimeout
    with (
        Wired(handler, tls=served_by(certificate)) as server,
        httpx.Client(transport=transport, timeout=httpx.Timeout(30, read=30 if handler is cut_in_body else 1)) as http,
        pytest.raises(expected),
    ):
        read(http, server.url)


def test_a_proxy_gets_the_whole_address_and_its_password() -> None:
    with Wired(content) as proxy:
        proxies = {"http": proxy.url.replace("//", "//user:p%40ss@")}
        with wire.client(5.0, proxies=proxies) as http:
            assert read(http, "http://data.test/a%2fb?c") == read(http, "http://data.test/a%2fb?c") == BODY
        assert proxy.accepted == 1
        assert proxy.heads[0].startswith("GET http://data.test/a%2fb?c HTTP/1.1\r\n")
        assert "host: data.test\r\n" in proxy.heads[0].lower() + "\r\n"
        assert "proxy-authorization: basic dxnlcjpwqhnz" in proxy.heads[0].lower()


def test_https_goes_through_a_tunnel(certificate: Path) -> None:
    with (
        Wired(content, tls=served_by(certificate)) as server,
        Wired(partial(tunnel, port=server.port)) as proxy,
        httpx.Client(transport=wire.PoolTransport(proxy=proxy.url, tls=partial(trusting, certificate))) as http,
    ):
        assert read(http, server.url) == read(http, server.url) == BODY
        assert len(proxy.heads) == 1
        assert proxy.heads[0].startswith(f"CONNECT 127.0.0.1:{server.port} ")


def test_a_stall_within_a_tls_record_costs_only_that_record(certificate: Path) -> None:
    with (
        Wired(content, tls=served_by(certificate)) as server,
        Wired(partial(tunnel, port=server.port, most=1_000_000)) as proxy,
        httpx.Client(transport=wire.PoolTransport(proxy=proxy.url, tls=partial(trusting, certificate))) as http,
        http.stream("GET", server.url, timeout=httpx.Timeout(30, read=2)) as reply,
    ):
        got, error = until_error(wire.chunks(reply))
        assert isinstance(error, httpx.ReadTimeout)
        assert BODY.startswith(got)
        assert len(got) > 1_000_000 - 2 * 16384 - 4000  # the handshake, the framing and a record


def until_error(pieces: Iterator[memoryview | bytes]) -> tuple[bytes, Exception | None]:
    got = bytearray()
    try:
        for chunk in pieces:
            got += chunk
    except httpx.TransportError as error:
        return bytes(got), error
    return bytes(got), None


def tunnel(talk: Talk, port: int, most: int = 1 << 40) -> None:
    """What a proxy does for CONNECT; of what comes back it passes on `most` bytes and swallows the rest."""
    talk.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as far:
        back = threading.Thread(target=pump, args=(far, talk.connection, most))
        back.start()
        pump(talk.connection, far)
        back.join()
    raise Hangup


def pump(source: socket.socket, target: socket.socket, most: int = 1 << 40) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data[:most])
            most -= min(len(data), most)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def test_a_proxy_that_refuses_is_a_proxy_error() -> None:
    with (
        Wired(lambda talk: talk.reply(b"", status="407 Proxy Authentication Required")) as proxy,
        wire.client(5.0, proxies={"https": proxy.url}) as http,
        pytest.raises(httpx.ProxyError, match="407"),
    ):
        http.get("https://data.test/")


def test_a_proxy_without_a_scheme_is_http_and_socks_is_refused_by_name() -> None:
    with Wired(content) as proxy, wire.client(5.0, proxies={"http": f"127.0.0.1:{proxy.port}"}) as http:
        assert read(http, "http://data.test/") == BODY
    for wrong in ("socks5://127.0.0.1:1080", "http://", "http://[::"):
        with pytest.raises(UsageError, match="HTTPS_PROXY"):
            wire.client(5.0, proxies={"https": wrong})
