"""Many small LFS files: a batch of links for a hundred of them, and whatever happens to those, every file comes."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler

import crucible
from crucible import session
from crucible.config import Settings
from crucible.hub.http import Refusal
from crucible.hub.lfs import read_links
from crucible.hub.server import HubOptions, HubServer, RateLimits, User, import_files
from crucible.parts import LINK_BATCH, LINKED_FILES, SMALL_BYTES, link_batches
from crucible.refs import SourceFile
from crucible.workers.links import LINKS_AHEAD
from crucible.workers.pull import PullReport
from crucible.workers.sources import BAD_LINKS, BATCH_FAILURES
from tests.hubserver.faults import Fault, FaultyHub
from tests.workers.pull_cases import blob_names_are_true

BATCH = "*.git/info/lfs/objects/batch"
COUNT = 240
FILES: dict[str, bytes | Path] = {f"{n // 100}/{n:03}.bin": random.Random(n).randbytes(700) for n in range(COUNT)}


@pytest.fixture
def many(hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> FaultyHub:
    hub.import_files("org/many", FILES, lfs=True)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("CRUCIBLE_BACKOFF_CAP", "0.05")
    return hub


def pulled(home: Path, **options: Any) -> PullReport:
    """A pull that must have brought all of FILES, right."""
    report = session.pull("org/many", **options)
    assert {path: (Path(report.path) / path).read_bytes() for path in FILES} == FILES
    blob_names_are_true(home)
    return report


def break_once(hub: FaultyHub, fault: str, count: int) -> list[Fault]:
    """Of so many files the first request to the CDN fails, and of no file the one after it."""
    oids = [lfs_oid(content) for _, content in sorted(FILES.items())[:count]]
    return [hub.add(fault, path=f"/blobs/{oid}/*", origin="cdn", status=404, times=1) for oid in oids]  # type: ignore[arg-type]


def lfs_oid(content: bytes | Path) -> str:
    assert isinstance(content, bytes)
    return hashlib.sha256(content).hexdigest()


def sent(hub: HubServer) -> Counter[str]:
    """Requests by what they were for."""
    kinds = Counter[str]()
    for record in hub.log:
        if record.origin == "cdn":
            kinds["cdn"] += 1
        elif record.path.endswith("/objects/batch"):
            kinds["batch"] += 1
        else:
            kinds["resolve" if "/resolve/" in record.path else "other"] += 1
    return kinds


def test_two_hundred_and_forty_files_are_three_batches_and_a_request_each(many: FaultyHub, hf_home: Path) -> None:
    report = pulled(hf_home)
    kinds = sent(many)
    assert (kinds["batch"], kinds["cdn"], kinds["resolve"]) == (3, COUNT, 0)
    assert report.counts.requests == len(many.log)
    assert report.counts.retries == 0
    many.clear_log()
    assert pulled(hf_home).reused_files == COUNT
    assert sent(many)["batch"] == 0, "what is here needs no links"


def test_only_what_is_missing_is_asked_for(many: FaultyHub, hf_home: Path) -> None:
    report = pulled(hf_home)
    gone = sorted(FILES)[:150]
    for path in gone[:140] + gone[149:]:
        (Path(report.path) / path).resolve().unlink()
    many.clear_log()
    pulled(hf_home)
    kinds = sent(many)
    assert (kinds["batch"], kinds["cdn"], kinds["resolve"]) == (2, 141, 0)


def test_a_few_files_are_resolved_and_so_is_what_is_not_small_or_not_lfs(hub: FaultyHub, hf_home: Path) -> None:
    few = dict(sorted(FILES.items())[: LINKED_FILES - 1])
    more: dict[str, bytes | Path] = {"big.bin": b"\0" * SMALL_BYTES, "text.md": b"text", "empty.bin": b""}
    hub.import_files("org/few", few | {"big.bin": more["big.bin"]}, lfs=True)
    hub.import_files("org/few", {"text.md": b"text", "empty.bin": b""})
    session.pull("org/few", endpoint=hub.endpoint)
    kinds = sent(hub)
    assert (kinds["batch"], kinds["cdn"], kinds["resolve"]) == (0, LINKED_FILES, LINKED_FILES + 1)


@pytest.mark.parametrize("fault", ["404", "403", "garbage", "503", "reset", "cut"])
def test_without_links_every_file_comes_as_before(many: FaultyHub, hf_home: Path, fault: str) -> None:
    match fault:
        case "garbage":
            many.add("flip", path=BATCH, after=0)
        case "reset":
            many.add("reset", path=BATCH)
        case "cut":
            many.add("cut", path=BATCH, after=5000)
        case _:
            many.add("status", path=BATCH, status=int(fault))
    pulled(hf_home)
    kinds = sent(many)
    assert 1 <= kinds["batch"] <= 3, "some were under way when the first was refused"
    assert (kinds["cdn"], kinds["resolve"]) == (COUNT, COUNT)


def test_a_hub_without_batches_is_asked_by_each_pull_but_not_for_each_hundred(
    many: FaultyHub, hf_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crucible.workers.links.LINKS_AHEAD", 1)
    refused = many.add("status", path=BATCH, status=404)
    pulled(hf_home)
    assert many.hits(refused) == 1


def test_a_hub_that_is_broken_now_is_asked_twice(
    many: FaultyHub, hf_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crucible.workers.links.LINKS_AHEAD", 1)
    broken = many.add("status", path=BATCH, status=503)
    pulled(hf_home)
    assert many.hits(broken) == BATCH_FAILURES


def test_a_file_without_a_link_is_resolved_and_the_others_are_not(many: FaultyHub, hf_home: Path) -> None:
    # the flipped byte is in the first object's oid, which is then nobody's
    many.add("flip", path=BATCH, after=len('{"transfer": "basic", "hash_algo": "sha256", "objects": [{"oid": "'))
    pulled(hf_home)
    kinds = sent(many)
    assert (kinds["batch"], kinds["cdn"], kinds["resolve"]) == (3, COUNT, 3)


@pytest.mark.parametrize("fault", ["expired", "status", "reset", "flip"])
def test_a_link_that_does_not_work_is_resolved(many: FaultyHub, hf_home: Path, fault: str) -> None:
    broken = break_once(many, fault, 5)
    report = pulled(hf_home)
    kinds = sent(many)
    assert [many.hits(one) for one in broken] == [1] * 5
    assert (kinds["cdn"], kinds["resolve"]) == (COUNT + 5, 5)
    if fault in ("expired", "status"):
        assert report.counts.retries == 0, "nothing was lost but a request"


@web.middleware
async def wrongly_signed(request: web.Request, handler: Handler) -> web.StreamResponse:
    reply = await handler(request)
    if request.path.endswith("/objects/batch"):
        assert isinstance(reply, web.Response)
        reply.text = (reply.text or "").replace("Signature=", "Signature=0")
    return reply


def test_links_that_never_work_are_given_up(tmp_path: Path, hf_home: Path) -> None:
    import_files(tmp_path / "wrong", "org/many", FILES, lfs=True, durable=False)
    with HubServer(tmp_path / "wrong", middlewares=[wrongly_signed]) as hub:
        pulled(hf_home, endpoint=hub.endpoint)
        kinds = sent(hub)
    assert kinds["resolve"] == COUNT
    assert BAD_LINKS <= kinds["cdn"] - COUNT < COUNT // 2


def test_links_are_asked_for_shortly_before_they_are_used(hub: FaultyHub, hf_home: Path) -> None:
    hub.import_files("org/many", {f"{n:04}.bin": b"%d" % n for n in range(1000)}, lfs=True)
    session.pull("org/many", endpoint=hub.endpoint)
    behind = 0
    for record in hub.log:
        behind += (record.path.endswith("/batch")) * LINK_BATCH - (record.origin == "cdn")
        assert behind <= 6 * LINK_BATCH
    assert (sent(hub)["batch"], sent(hub)["resolve"]) == (10, 0)


def test_the_token_goes_to_the_hub_only(tmp_path: Path, hf_home: Path) -> None:
    with FaultyHub(tmp_path / "private", options=HubOptions(tokens={"hf_anna": User("anna", ("org",))})) as hub:
        hub.import_files("org/many", FILES, lfs=True, private=True)
        pulled(hf_home, endpoint=hub.endpoint, token="hf_anna")
        assert [record.had_token for record in hub.requests(BATCH)] == [True] * 3
        assert not any(record.had_token for record in hub.requests(origin="cdn"))
        assert sent(hub)["resolve"] == 0


def test_a_mirror_is_asked_for_links_without_the_token_and_left_for_the_hub(
    tmp_path: Path, many: FaultyHub, hf_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyHub(tmp_path / "mirror") as mirror:
        mirror.import_files("org/many", FILES, lfs=True)
        monkeypatch.setenv("CRUCIBLE_MIRRORS", mirror.endpoint)
        monkeypatch.setenv("CRUCIBLE_TRIES", "1")
        many.options.tokens["hf_anna"] = User("anna")  # type: ignore[index]
        broken = break_once(mirror, "status", 3)
        pulled(hf_home, token="hf_anna")
        kinds = sent(mirror)
        assert (kinds["batch"], kinds["resolve"], sum(map(mirror.hits, broken))) == (3, 3, 3)
        assert not any(record.had_token for record in mirror.log)
        assert sent(many)["resolve"] == sent(many)["batch"] == 0


def test_a_quota_that_is_nearly_used_up_is_not_waited_for(tmp_path: Path, hf_home: Path) -> None:
    files: dict[str, bytes | Path] = {f"{n:04}.bin": b"%d" % n for n in range(900)}
    # time stands still: this window never ends, and a pull that waited for the next one would not come to its end
    options = HubOptions(limits=RateLimits(pages=10, window_s=3600), clock=lambda: 1_800_000_000.0)
    with FaultyHub(tmp_path / "tight", options=options) as hub:
        hub.import_files("org/many", files, lfs=True)
        assert session.pull("org/many", endpoint=hub.endpoint).files == 900
        kinds = sent(hub)
    assert 3 <= kinds["batch"] <= 3 + LINKS_AHEAD, "some were under way when that reply came"
    assert kinds["resolve"] == 900 - 100 * kinds["batch"]
    assert kinds["cdn"] == 900


def test_a_work_item_asks_in_batches_too_and_the_plan_knows(
    hub: FaultyHub, hf_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[str, bytes | Path] = {f"train-{n:03}.jsonl": b'{"n": %d, "u": "\xc3\xbc"}\n' % n for n in range(300)}
    hub.import_files("org/rows", rows, lfs=True)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    plan = crucible.plan("org/rows")
    hub.clear_log()
    loaded = crucible.load_dataset("org/rows", split="train")
    assert [row["n"] for row in loaded] == list(range(300))
    kinds = sent(hub)
    assert (kinds["batch"], kinds["cdn"], kinds["resolve"]) == (4, 300, 0), "256 files are an item, 44 the next"
    assert plan.requests == len(hub.log)


def lfs_file(number: int, size: int = 10) -> SourceFile:
    return SourceFile(f"{number}.bin", size, f"{number:064x}", True)


def test_which_files_are_asked_for_in_batches() -> None:
    small = [lfs_file(n) for n in range(250)]
    others = [lfs_file(900, 0), lfs_file(901, SMALL_BYTES), SourceFile("a", 5, "0" * 40, False)]
    assert [len(batch) for batch in link_batches(small + others)] == [100, 100, 50]
    assert [file for batch in link_batches(others + small) for file in batch] == small
    assert link_batches(small[: LINKED_FILES - 1] + others) == []
    assert len(link_batches(small[:LINKED_FILES])) == 1


HUB, SECURE = "http://hub.example:8080", "https://hub.example"
GOOD = "http://cdn.example/blobs/1?sig=%2f"


def one(href: object = GOOD, **fields: Any) -> dict[str, Any]:
    action = {"href": href, **{k: fields.pop(k) for k in ("header", "expires_in") if k in fields}}
    return {"oid": lfs_file(1).oid, "size": 10, "actions": {"download": action}, **fields}


@pytest.mark.parametrize(
    ("said", "endpoint", "used"),
    [
        (one(), HUB, True),
        (one(header={}, expires_in=3600), HUB, True),
        (one(expires_in=0), HUB, True),
        (one("https://cdn.example/1"), SECURE, True),
        (one(GOOD), SECURE, False),
        (one("http://hub.example:8080/blobs/1"), HUB, False),
        (one("https://hub.example:443/x"), SECURE, False),
        (one(header={"Authorization": "Bearer x"}), HUB, False),
        (one(expires_in=3), HUB, False),
        (one(expires_in=-1), HUB, False),
        (one("ftp://cdn.example/1"), HUB, False),
        (one("/blobs/1"), HUB, False),
        (one("http://[cdn/1"), HUB, False),
        (one("http://cdn.example:99999999/1"), HUB, False),
        (one("http://cdn.example/" + "x" * 20_000), HUB, False),
        (one(5), HUB, False),
        (one(size=11), HUB, False),
        (one(oid="f" * 64), HUB, False),
        (one(oid=["f"]), HUB, False),
        (one(error={"code": 404}), HUB, False),
        (one(actions={}), HUB, False),
        (one(actions=[1]), HUB, False),
        (one(actions={"download": "x"}), HUB, False),
        (one(actions=None), HUB, False),
        ("x", HUB, False),
    ],
)
def test_which_links_are_used(said: object, endpoint: str, used: bool, tmp_path: Path) -> None:
    settings = replace(Settings(home=tmp_path), endpoint=endpoint)
    reply = json.dumps({"transfer": "basic", "objects": [said, one(oid="e" * 64)]}).encode()
    found = read_links(reply, [lfs_file(1)], settings)
    assert list(found) == ([lfs_file(1).oid] if used else [])


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b'{"objects": 5}',
        b'{"objects": [], "transfer": "multipart"}',
        b"[" * 99_999,
        b"\xff",
    ],
)
def test_what_is_no_batch_reply(reply: bytes, tmp_path: Path) -> None:
    with pytest.raises(Refusal):
        read_links(reply, [lfs_file(1)], Settings(home=tmp_path))
