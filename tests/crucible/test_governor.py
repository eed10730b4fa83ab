"""One process's governor: threads that share quotas and connections, against a real Hub with real windows."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from crucible.config import Settings, Token
from crucible.errors import SourceUnavailable
from crucible.hub.client import open_repo, resolve_url
from crucible.hub.governor import Desk, Key, Ledger, LocalGovernor, account_of, local_governor, spoken
from crucible.hub.http import HubHttp, Refusal, bucket_of
from crucible.hub.server import HubOptions, import_files
from crucible.hub.server.ratelimit import RateLimits
from crucible.refs import RepoRef
from crucible.report import Tally
from tests.hubserver.counting import CountingHub
from tests.hubserver.faults import FaultyHub

WINDOW_S = 3
QUOTA = 70
REPO = RepoRef("org/small", "main")


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[CountingHub]:
    """A Hub with 70 resolves in three seconds, and a file of one line."""
    import_files(tmp_path / "strict", REPO.repo_id, {"a.txt": b"one line\n"}, durable=False)
    options = HubOptions(limits=RateLimits(resolvers=QUOTA, window_s=WINDOW_S))
    with CountingHub(tmp_path / "strict", options=options, takes_s=0.01) as hub:
        yield hub


def settings_for(hub: CountingHub | FaultyHub, home: Path, connections: int = 64) -> Settings:
    return Settings(home, endpoint=hub.endpoint, connections=connections)


# --- items 51 and 54, in one process


def test_64_threads_stay_within_quota_and_connections_and_all_get_their_replies(
    strict: CountingHub, tmp_path: Path
) -> None:
    """Checklist 54, and 51 without a refusal: who shares a budget needs none."""
    settings = settings_for(strict, tmp_path, connections=12)
    url = resolve_url(strict.endpoint, REPO, "a.txt")

    def client(_: int) -> list[int]:
        http = HubHttp(settings, Tally())  # each its own, as tasks in one process have
        try:
            return [http.read(url, limit=100).status_code for _ in range(2)]
        finally:
            http.close()

    with ThreadPoolExecutor(64) as pool:
        assert [*pool.map(client, range(64))] == [[200, 200]] * 64
    assert len(strict.ours("resolvers")) == 128
    assert not strict.refused("resolvers", WINDOW_S)
    assert 2 <= strict.peak <= 12


def test_after_one_refusal_no_thread_sends_before_the_reset(strict: CountingHub, tmp_path: Path) -> None:
    """Checklist 51: somebody else eats the quota, so that refusals come; each window has one, and those in flight."""
    settings = settings_for(strict, tmp_path, connections=8)
    url = resolve_url(strict.endpoint, REPO, "a.txt")
    http = HubHttp(settings, Tally())
    strict.eat(url)

    def client(_: int) -> int:
        return http.read(url, limit=100).status_code

    with ThreadPoolExecutor(64) as pool:
        replies = pool.map(client, range(64))
        assert [*replies] == [200] * 64
    http.close()
    refused = strict.refused("resolvers", WINDOW_S)
    assert refused, "the quota was eaten before anybody asked"
    for refusals, later in refused.values():
        assert refusals <= 8
        assert later <= 7, "what came after the first refusal was in flight when it said no"


def test_a_bucket_that_is_quiet_does_not_hold_up_another(strict: CountingHub, tmp_path: Path) -> None:
    settings = settings_for(strict, tmp_path)
    governor = local_governor(settings)
    with governor.request("resolvers") as replied:
        replied(
            429, {"ratelimit": '"resolvers";r=0;t=60', "ratelimit-policy": '"fixed window";"resolvers";q=3000;w=300'}
        )
    waiter = threading.Thread(target=_enter, args=(governor, "resolvers"), daemon=True)
    waiter.start()
    with open_repo(REPO, settings, Tally()) as repo:
        assert [file.path for file in repo.files(repo.pin(REPO))] == ["a.txt"]
    seen = governor.waiting()
    assert seen is not None
    assert (seen.bucket, seen.reason) == ("resolvers", "0 of 3000 left")
    assert 55 < seen.until - time.monotonic() <= 66
    assert waiter.is_alive()


def _enter(governor: LocalGovernor, bucket: str) -> None:
    with governor.request(bucket) as replied:
        replied(200, {})


# --- item 52: what is tried again where no header speaks


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_without_a_word_the_caller_backs_off_with_jitter_and_a_budget(
    hub: FaultyHub, tmp_path: Path, status: int
) -> None:
    """Checklist 52, first half."""
    hub.import_files(REPO.repo_id, {"a.txt": b"one line\n"})
    fault = hub.add("status", path="*/resolve/*", status=status, times=3)
    slept: list[float] = []
    http = HubHttp(settings_for(hub, tmp_path), Tally(), sleep=slept.append)
    assert http.read(resolve_url(hub.endpoint, REPO, "a.txt"), limit=100).content == b"one line\n"
    assert hub.hits(fault) == 3
    assert [math.floor(math.log2(wait)) for wait in slept] == [0, 1, 2]
    assert all(base <= wait <= 1.5 * base for wait, base in zip(slept, (1, 2, 4), strict=True))
    hub.add("status", path="*/resolve/*", status=status)
    with pytest.raises(Refusal):
        http.read(resolve_url(hub.endpoint, REPO, "a.txt"), limit=100)
    assert len(slept) == 3 + http.settings.tries - 1
    http.close()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 412])
def test_what_asking_again_cannot_help_is_not_asked_again(hub: FaultyHub, tmp_path: Path, status: int) -> None:
    """Checklist 52, second half."""
    fault = hub.add("status", path="*/resolve/*", status=status)
    http = HubHttp(settings_for(hub, tmp_path), Tally())
    with pytest.raises(Refusal):
        http.read(resolve_url(hub.endpoint, REPO, "a.txt"), limit=100)
    assert hub.hits(fault) == 1
    http.close()


def test_a_said_wait_is_kept_by_the_governor_and_not_slept_by_the_caller(hub: FaultyHub, tmp_path: Path) -> None:
    hub.import_files(REPO.repo_id, {"a.txt": b"one line\n"})
    hub.add("retry-after", path="*/resolve/*", status=503, wait=0, times=1)
    slept: list[float] = []
    http = HubHttp(settings_for(hub, tmp_path), Tally(), sleep=slept.append)
    assert http.read(resolve_url(hub.endpoint, REPO, "a.txt"), limit=100).status_code == 200
    assert slept == []
    first, second = (record.time for record in hub.requests("*/resolve/*"))
    assert second - first >= 1, "a second after what it said"
    http.close()


def test_a_cut_connection_gives_its_permit_back(hub: FaultyHub, tmp_path: Path) -> None:
    hub.import_files(REPO.repo_id, {"a.txt": b"one line\n"})
    hub.add("reset", path="/api/*")
    settings = replace(settings_for(hub, tmp_path, connections=1), backoff_cap_s=0.01)
    with open_repo(REPO, settings, Tally()) as repo:
        with pytest.raises(SourceUnavailable):
            repo.pin(REPO)
        hub.clear_faults()
        assert repo.pin(REPO).revision != "main"


# --- the ledger by itself


def test_first_come_first_served_and_a_full_house_lets_nobody_overtake() -> None:
    ledger = Ledger(lambda: 0.0)
    for number, bucket in enumerate(["api", "cdn", "api", "cdn"]):
        ledger.ask(f"t{number}", Key("hub", bucket), connections=2)
    assert ledger.grant(0) == (["t0", "t1"], 1.0)
    ledger.end("t1", 0)
    assert ledger.grant(0)[0] == ["t2"]
    ledger.end("t3", 0)  # leaves the line
    ledger.end("t0", 0)
    assert ledger.grant(0) == ([], math.inf)


def test_threads_that_wait_are_served_in_the_order_they_came() -> None:
    governor = LocalGovernor("hub", 1, Desk())
    order: list[int] = []

    def client(number: int) -> None:
        with governor.request("cdn") as replied:
            order.append(number)
            replied(200, {})

    with governor.request("cdn") as replied:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(10)]
        for number, thread in enumerate(threads):
            thread.start()
            _until(lambda number=number: len(governor._desk._turns) == number + 1)  # type: ignore[misc]
        replied(200, {})
    for thread in threads:
        thread.join(60)
    assert order == list(range(10))


def test_credentials_are_in_no_name_and_no_header() -> None:
    secret = Token("hf_a_secret_of_some_length")
    alice = Settings(Path("/x"), token=secret)
    assert account_of(alice) == account_of(alice)
    assert (
        len({account_of(s) for s in (alice, Settings(Path("/x")), Settings(Path("/x"), token=Token("hf_other")))}) == 3
    )
    assert secret not in account_of(alice)
    assert spoken({"authorization": secret, "set-cookie": "x", "retry-after": "3"}) == {"retry-after": "3"}


@pytest.mark.parametrize(
    ("url", "bucket"),
    [
        ("https://hub/api/models/a/b", "api"),
        ("https://hub/a/b/resolve/main/x", "resolvers"),
        ("https://hub/api/resolve-cache/models/a/b", "resolvers"),
        ("https://hub/datasets/a/b", "pages"),
        ("https://cdn/api/x", "cdn"),
        ("https://hub:444/a/b/resolve/main/x", "cdn"),
        ("http://hub/api/x", "cdn"),
    ],
)
def test_the_bucket_is_told_by_the_url(url: str, bucket: str) -> None:
    assert bucket_of(url, "https://hub") == bucket


def test_a_mirror_below_a_path_has_the_same_buckets() -> None:
    assert bucket_of("https://mirror/api/hf/api/models/a", "https://mirror/api/hf") == "api"
    assert bucket_of("https://mirror/api/hf/a/b/resolve/main/x", "https://mirror/api/hf") == "resolvers"


def test_a_forked_child_knows_what_the_hub_said_and_holds_nothing_of_its_parents(tmp_path: Path) -> None:
    script = """
        import os, pathlib, threading, time
        from crucible.config import Settings
        from crucible.hub.governor import DESK, local_governor

        governor = local_governor(Settings(pathlib.Path("/x"), connections=1))
        with governor.request("api") as replied:
            replied(429, {"ratelimit": '"api";r=0;t=60'})
        with governor.request("cdn"):
            DESK._lock.acquire()  # as when another thread is inside at the moment of the fork
            child = os.fork()
            if child == 0:
                with governor.request("cdn") as replied:
                    replied(200, {})
                waiter = threading.Thread(target=lambda: governor.request("api").__enter__(), daemon=True)
                waiter.start()
                until = time.monotonic() + 10
                while governor.waiting() is None and time.monotonic() < until:
                    time.sleep(0.01)
                os._exit(0 if governor.waiting().bucket == "api" else 3)
            DESK._lock.release()
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    (tmp_path / "fork.py").write_text(textwrap.dedent(script))
    done = subprocess.run([sys.executable, "fork.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n", done.stderr


def _until(true: object, most_s: float = 60.0) -> None:
    assert callable(true)
    end = time.monotonic() + most_s
    while not true():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.001)
