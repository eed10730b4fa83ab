"""A peer that knows the secret and means ill: nothing wrong becomes visible, nobody waits for it for long."""

from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from crucible.cache.store import Store
from crucible.config import Settings
from crucible.data_files import data_request
from crucible.errors import SourceUnavailable, TransferError
from crucible.hashing import shard_digest
from crucible.hub import connection
from crucible.manifest import Manifest
from crucible.refs import NodeId
from crucible.session import local_job
from crucible.workers import fetch
from crucible.workers.asking import Line
from crucible.workers.fetch import NodeShards
from crucible.workers.secret import ensure_secret, keep_secret
from crucible.workers.serve import AgentAddress, AgentServer, write_address
from tests.fakes.wired import Hangup, Talk, Wired

Handler = Callable[[Talk], None]
SIZES = {"small": 2_000, "big": 700_000}
"""Bytes of text in the shard: below and above what comes in one request."""
LONG_S = 60.0
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module", params=SIZES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Settings, Manifest]:
    """(repo, a store that has its only split, its manifest)."""
    folder = tmp_path_factory.mktemp("peers")
    repo = folder / "repo"
    repo.mkdir()
    text = "".join(chr(97 + (i * i) % 26) for i in range(SIZES[request.param]))
    (repo / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(2)))
    settings = Settings(folder / "full")
    asked = data_request(str(repo), None, split="train", revision=None, columns=None)
    manifests, _ = local_job(asked, settings)
    return repo, settings, manifests[0]


@pytest.fixture
def good(made: tuple[Path, Settings, Manifest]) -> Iterator[AgentServer]:
    store = Store(made[1].home)
    agent = AgentServer(store, ensure_secret(store), NodeId("full"), "127.0.0.1", 0, lambda _: [])
    yield agent
    agent.close()


def reading(
    made: tuple[Path, Settings, Manifest], tmp_path: Path, *peers: str, patience_s: float = LONG_S
) -> NodeShards:
    """A node with an empty store that knows these peers, in this order, and asks each once."""
    settings = replace(made[1], home=tmp_path / "empty", stall_s=patience_s, timeout_s=2 * patience_s, tries=1)
    store = Store(settings.home)
    keep_secret(store, ensure_secret(Store(made[1].home)))
    write_address(store, AgentAddress("http://127.0.0.1:9", NodeId("empty"), 0, peers))
    return NodeShards(settings)


class Lies:
    """What a peer may answer instead of the shard, by name. `data` is what it should be."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.wrong = bytes(byte ^ 1 for byte in data)

    def ranged(self, talk: Talk, body: bytes, *headers: str) -> None:
        """As the protocol has it: 206 with what was asked for, out of `body`."""
        asked = next(line for line in talk.head.lower().split("\r\n") if line.startswith("range: bytes="))
        first, _, last = asked.removeprefix("range: bytes=").partition("-")
        start, stop = int(first), int(last) + 1
        said = f"Content-Range: bytes {start}-{stop - 1}/{len(self.data)}"
        talk.reply(body[start:stop], said, *headers, status="206 Partial Content")

    def wrong_bytes(self, talk: Talk) -> None:
        self.ranged(talk, self.wrong)

    def one_wrong_byte(self, talk: Talk) -> None:
        self.ranged(talk, self.data[:-1] + self.wrong[-1:])

    def another_shard(self, talk: Talk) -> None:
        talk.reply(b"x" * len(self.data))

    def too_short(self, talk: Talk) -> None:
        talk.reply(self.data[:-1])

    def too_long(self, talk: Talk) -> None:
        talk.reply(self.data + b"x" * 100_000)

    def empty(self, talk: Talk) -> None:
        talk.reply(b"")

    def another_size(self, talk: Talk) -> None:
        body = self.data[:100]
        talk.reply(body, f"Content-Range: bytes 0-99/{10**15}", status="206 Partial Content")

    def another_range(self, talk: Talk) -> None:
        size = len(self.data)
        talk.reply(self.data, f"Content-Range: bytes 1-{size}/{size}", status="206 Partial Content")

    def cut(self, talk: Talk) -> None:
        talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(self.data), self.data[:500])
        raise Hangup

    def endless(self, talk: Talk) -> None:
        talk.send(CHUNKED)
        while True:
            talk.send(b"10000\r\n", b"x" * 0x10000, b"\r\n")

    def endless_without_a_length(self, talk: Talk) -> None:
        talk.send(b"HTTP/1.0 200 OK\r\n\r\n")
        while True:
            talk.send(b"x" * 0x10000)

    def drip(self, talk: Talk) -> None:
        talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(self.data))
        for byte in self.data:
            talk.send(bytes([byte]))
            time.sleep(0.05)

    def drip_of_the_head(self, talk: Talk) -> None:
        talk.send(b"HTTP/1.1 200 OK\r\n")
        while True:
            talk.send(b"x")
            time.sleep(0.05)

    def silence(self, talk: Talk) -> None:
        talk.stall()

    def interim_for_ever(self, talk: Talk) -> None:
        while True:
            talk.send(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000)

    def headers_for_ever(self, talk: Talk) -> None:
        talk.send(b"HTTP/1.1 200 OK\r\n")
        while True:
            talk.send(b"X-Y: " + b"z" * 1000 + b"\r\n")

    def one_endless_header(self, talk: Talk) -> None:
        talk.send(b"HTTP/1.1 200 OK\r\nX: ")
        while True:
            talk.send(b"z" * 65536)

    def garbage(self, talk: Talk) -> None:
        talk.send(bytes(range(256)) * 40)
        raise Hangup

    def status_that_is_none(self, talk: Talk) -> None:
        talk.reply(b"", status="99999999999999999999 \x1b[2J")

    def nothing(self, talk: Talk) -> None:
        raise Hangup

    def reset(self, talk: Talk) -> None:
        talk.reset()

    def refusal(self, talk: Talk) -> None:
        talk.reply(b"", status="401 Unauthorized")

    def failure(self, talk: Talk) -> None:
        talk.reply(b"", status="500 Internal Server Error")

    def wait(self, talk: Talk) -> None:
        talk.reply(b"", "Retry-After: 100000", status="429 Too Many Requests")

    def packed(self, talk: Talk) -> None:
        talk.reply(gzip.compress(self.data), "Content-Encoding: gzip")

    def bomb(self, talk: Talk) -> None:
        once = gzip.compress(bytes(8 << 20))
        talk.reply(gzip.compress(once), "Content-Encoding: gzip, gzip")

    def lengths_that_differ(self, talk: Talk) -> None:
        talk.reply(self.data, f"Content-Length: {len(self.data) + 7}")


LIES = sorted(name for name in vars(Lies) if not name.startswith("_") and name != "ranged")
SLOW = ("drip", "drip_of_the_head", "silence")
"""Those that nothing but the reader's patience ends. With the others it has time: a good peer may be slow, too."""
PATIENCE_S = 1.5


@pytest.mark.parametrize("lie", LIES)
def test_a_reader_goes_to_the_next_peer_and_gets_the_right_bytes(
    made: tuple[Path, Settings, Manifest],
    good: AgentServer,
    tmp_path: Path,
    lie: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (shard,) = made[2].shards
    patience_s = PATIENCE_S if lie in SLOW else LONG_S
    monkeypatch.setattr(connection, "HEAD_S", patience_s)
    data = Store(made[1].home).shard_path(shard.key).read_bytes()
    with Wired(getattr(Lies(data), lie)) as bad:
        source = reading(made, tmp_path, bad.url, good.url, patience_s=patience_s)
        began = time.monotonic()
        path = source.path(made[2], shard)
        assert time.monotonic() - began < LONG_S, "what does not come is not waited for"
        assert bad.heads, "the bad one was not asked"
        store = Store(tmp_path / "empty")
        assert shard_digest(path) == shard.digest
        assert [key for key, _ in store.shards()] == [shard.key]
        assert source.note()["hub_shards"] == 0


@pytest.mark.parametrize("made", ["small"], indirect=True)
def test_it_is_named_in_the_log_and_asked_last_from_then_on(
    made: tuple[Path, Settings, Manifest], good: AgentServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shard,) = made[2].shards
    data = Store(made[1].home).shard_path(shard.key).read_bytes()
    with Wired(Lies(data).wrong_bytes) as bad, caplog.at_level(logging.WARNING, "crucible.feed"):
        source = reading(made, tmp_path, bad.url, good.url)
        for _ in range(3):
            source.path(made[2], shard)
            Store(tmp_path / "empty").shard_path(shard.key).unlink()
        asked = len(bad.heads)
    assert asked <= 2, "it was asked again for the second or third"
    assert [record for record in caplog.records if bad.url in record.getMessage()]


@pytest.mark.parametrize("made", ["small"], indirect=True)
def test_the_secret_follows_no_redirect(
    made: tuple[Path, Settings, Manifest], good: AgentServer, tmp_path: Path
) -> None:
    (shard,) = made[2].shards
    with Wired(lambda talk: talk.reply(b"")) as thief:
        places = iter([f"{thief.url}/x", "file:///etc/passwd", "//evil.example/x", "http://[::1", f"{thief.url}\x0b"])

        def redirect(talk: Talk) -> None:
            talk.reply(b"", f"Location: {next(places, thief.url)}", status="307 Temporary Redirect")

        with Wired(redirect) as bad:
            for _ in range(5):
                source = reading(made, tmp_path, bad.url, good.url)
                path = source.path(made[2], shard)
                assert shard_digest(path) == shard.digest
                path.unlink()
        assert thief.heads == []


@pytest.mark.parametrize("made", ["small"], indirect=True)
def test_where_there_is_nobody_else_the_error_says_what_each_of_them_did(
    made: tuple[Path, Settings, Manifest], tmp_path: Path
) -> None:
    (shard,) = made[2].shards
    repo = made[0]
    data = Store(made[1].home).shard_path(shard.key).read_bytes()
    (repo / "train.jsonl").rename(repo / "hidden")
    try:
        with Wired(Lies(data).wrong_bytes) as one, Wired(Lies(data).failure) as other:
            with pytest.raises(TransferError) as caught:
                reading(made, tmp_path, one.url, other.url).path(made[2], shard)
            notes = "\n".join(caught.value.__notes__)
            assert other.url in notes
            assert not list(Store(tmp_path / "empty").shards())
    finally:
        (repo / "hidden").rename(repo / "train.jsonl")


ANSWERS: dict[str, Handler] = {
    "deep": lambda talk: talk.reply(b"[" * 200_000),
    "no JSON": lambda talk: talk.reply(b"\xff\xfe"),
    "a list": lambda talk: talk.reply(b"[1, 2]"),
    "numbers": lambda talk: talk.reply(b'{"urls": [1, null, {"a": 2}], "state": []}'),
    "no number": lambda talk: talk.reply(b'{"urls": ' + b"9" * 100_000 + b"}"),
    "other schemes": lambda talk: talk.reply(
        b'{"urls": ["file:///etc/passwd", "gopher://x", "", "http://[::1", "\\u0000"]}'
    ),
    "a crowd": lambda talk: talk.reply(
        json.dumps({"urls": [f"http://127.0.0.1:{1 + i % 8}" for i in range(10**5)]}).encode()
    ),
    "endless": lambda talk: Lies(b"").endless(talk),
    "drip": lambda talk: Lies(b"[" * 10_000).drip(talk),
}


@pytest.mark.parametrize("made", ["small"], indirect=True)
@pytest.mark.parametrize("answer", ANSWERS)
def test_an_agent_that_answers_nonsense_costs_the_reader_its_agent_and_no_more(
    made: tuple[Path, Settings, Manifest], tmp_path: Path, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "LOCATE_TIMEOUT_S", 0.5)
    (shard,) = made[2].shards
    with Wired(ANSWERS[answer]) as agent:
        source = reading(made, tmp_path)
        write_address(Store(tmp_path / "empty"), AgentAddress(agent.url, NodeId("empty"), 0, ()))
        assert shard_digest(source.path(made[2], shard)) == shard.digest
        assert source.note()["hub_shards"] == 1
        if answer not in ("drip", "endless"):
            said = Line(source._settings).wish("job", ["key"])
            assert said is None or set(said) == {"urls", "state"} or set(said) == {"urls"}


def test_no_peer_at_all_is_an_error_that_names_the_shard(made: tuple[Path, Settings, Manifest], tmp_path: Path) -> None:
    place = reading(made, tmp_path)
    from crucible.report import Tally
    from crucible.workers.work import Workplace, copy_shard

    (shard,) = made[2].shards
    workplace = Workplace(Store(tmp_path / "empty"), place._settings, NodeId("empty"))
    with pytest.raises(SourceUnavailable, match=shard.key[:12]):
        copy_shard(shard, ["http://127.0.0.1:9"], "secret", workplace, Tally())
