"""git-lfs' batch request to the local Hub, by raw HTTP: who gets links to what. git-lfs itself was not there to ask."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from crucible.hub.server import HubOptions, RateLimits, User, rename_repo, set_access
from crucible.hub.server.route import parse
from tests.hubserver.faults import FaultyHub

OLD, NEW = b"old" * 1000, b"new" * 1000
TYPE = "application/vnd.git-lfs+json"
PATH = "/datasets/org/data.git/info/lfs/objects/batch"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FaultyHub]:
    tokens = {"hf_org": User("org"), "hf_guest": User("guest"), "hf_other": User("other")}
    options = HubOptions(tokens=tokens, limits=RateLimits(pages=50), link_ttl_s=900)
    with FaultyHub(tmp_path / "hub", options=options) as server:
        server.import_files("org/data", {"a.bin": OLD, "ü 1.bin": NEW, "b.txt": b"text"})
        server.import_files("org/data", {}, delete=["a.bin"])
        yield server


def named(content: bytes, **fields: Any) -> dict[str, Any]:
    return {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), **fields}


def asked(hub: FaultyHub, *objects: object, path: str = PATH, token: str = "", **fields: Any) -> httpx.Response:
    body = {"operation": "download", "transfers": ["basic"], "objects": list(objects), **fields}
    headers = {"content-type": TYPE, "accept": TYPE} | ({"authorization": f"Bearer {token}"} if token else {})
    return httpx.post(hub.endpoint + path, json=body, headers=headers, timeout=10)


def test_links_lead_to_the_bytes_of_any_commit_and_need_no_token(hub: FaultyHub) -> None:
    reply = asked(hub, named(NEW), named(OLD), hash_algo="sha256")
    assert (reply.status_code, reply.headers["content-type"].partition(";")[0]) == (200, TYPE)
    assert '"pages";r=49' in reply.headers["ratelimit"]
    said = reply.json()
    assert said["transfer"] == "basic"
    for one, content in zip(said["objects"], (NEW, OLD), strict=True):
        action = one["actions"]["download"]
        assert ({k: one[k] for k in ("oid", "size")}, action["expires_in"]) == (named(content), 900)
        assert action["href"].startswith(hub.cdn_endpoint)
        assert httpx.get(action["href"], timeout=10).content == content
    (record,) = hub.requests("*/batch")
    assert (record.method, record.bucket, record.origin, record.had_token) == ("POST", "pages", "hub", False)


def test_an_object_that_is_not_there_is_an_error_of_its_own(hub: FaultyHub) -> None:
    hub.import_files("org/else", {"c.bin": b"\0" * 3000})
    wanted = [named(NEW), named(b"\0" * 3000), named(b"text"), named(NEW) | {"size": 1}, {"oid": 5}, "nonsense"]
    objects = asked(hub, *wanted).json()["objects"]
    assert [one.get("error", {}).get("code", 200) for one in objects] == [200, 404, 404, 422, 404, 404]
    assert ["actions" in one for one in objects] == [True] + [False] * 5


def test_who_may_not_read_the_repo_gets_no_links(hub: FaultyHub) -> None:
    def statuses() -> list[int]:
        return [asked(hub, named(NEW), token=token).status_code for token in ("", "hf_org", "hf_guest", "hf_other")]

    set_access(hub.root, "org/data", private=True)
    assert statuses() == [401, 200, 404, 404]
    assert asked(hub, named(NEW)).headers["www-authenticate"].startswith("Basic")
    assert asked(hub, named(NEW), token="wrong").status_code == 401
    set_access(hub.root, "org/data", private=False, gated=True, allowed=["guest"])
    assert statuses() == [401, 200, 200, 403]
    set_access(hub.root, "org/data", disabled=True)
    assert statuses() == [403] * 4


def test_uploads_and_nonsense_are_refused_with_a_word(hub: FaultyHub) -> None:
    refused = asked(hub, named(b"mine"), operation="upload", token="hf_org")
    assert (refused.status_code, refused.json()["error"]) == (403, "this Hub is read-only")
    assert refused.headers["x-error-message"] == "this Hub is read-only"
    assert asked(hub, operation="delete").status_code == 422
    assert asked(hub, named(NEW), hash_algo="md5").status_code == 409
    assert asked(hub, *[named(NEW)] * 1001).status_code == 413
    assert httpx.get(hub.endpoint + PATH, timeout=10).status_code == 405
    for body, status in ((b"{", 400), (b"[]", 422), (b'{"operation": "download"}', 422)):
        reply = httpx.post(hub.endpoint + PATH, content=body, headers={"content-type": TYPE}, timeout=10)
        assert reply.status_code == status
    assert asked(hub, named(NEW), path=PATH.replace("data.git", "none.git")).status_code == 401


def test_repo_types_are_kept_apart_and_a_renamed_repo_is_elsewhere(hub: FaultyHub) -> None:
    hub.import_files("org/data", {"m.bin": b"\0model" * 9}, repo_type="model")
    found = asked(hub, named(b"\0model" * 9), path=PATH.removeprefix("/datasets")).json()["objects"]
    assert "actions" in found[0]
    rename_repo(hub.root, "org/data", "org/new")
    moved = asked(hub, named(NEW))
    assert moved.status_code == 307
    assert parse(moved.headers["location"]).repo_id == "org/new"
    assert "actions" in asked(hub, named(NEW), path=moved.headers["location"]).json()["objects"][0]
