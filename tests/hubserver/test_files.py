"""The Hub's replies for files, by raw HTTP: checklist items 1-6, 11-16, 17-20 of the protocol."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from crucible.hub.server import (
    HubOptions,
    User,
    create_branch,
    create_pr,
    create_tag,
    delete_repo,
    rename_repo,
    set_access,
)
from crucible.hub.server.blob import Span, parse_range
from tests.hubserver.faults import FaultyHub

README = b"---\nlicense: mit\nlanguage: [en]\n---\n# data\n"
BLOB = bytes(range(256)) * 40
ANNA = {"Authorization": "Bearer hf_anna"}
BERT = {"Authorization": "Bearer hf_bert"}
METADATA = ("etag", "x-repo-commit", "x-linked-etag", "x-linked-size", "content-length", "content-type")


@dataclass
class Clock:
    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Setup:
    hub: FaultyHub
    web: httpx.Client
    sha: str
    clock: Clock


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    clock = Clock()
    options = HubOptions(tokens={"hf_anna": User("anna", ("org",), "write"), "hf_bert": User("bert")}, clock=clock)
    with FaultyHub(tmp_path / "hub", options=options) as hub, httpx.Client(base_url=hub.endpoint, timeout=20) as web:
        sha = hub.import_files("org/data", {"README.md": README, "data/a.parquet": BLOB, "empty.parquet": b""})
        yield Setup(hub, web, sha, clock)


def file_url(path: str, revision: str = "main", repo: str = "org/data") -> str:
    return f"/datasets/{repo}/resolve/{revision}/{path}"


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.mark.parametrize("path", ["README.md", "data/a.parquet", "empty.parquet"])
def test_head_and_get_say_the_same_of_a_file(setup: Setup, path: str) -> None:
    head, get = setup.web.head(file_url(path)), setup.web.get(file_url(path))
    assert head.status_code == get.status_code
    if head.status_code == 200:
        assert {key: head.headers.get(key) for key in METADATA} == {key: get.headers.get(key) for key in METADATA}
    else:
        assert {key: head.headers.get(key) for key in METADATA[:4]} == {
            key: get.headers.get(key) for key in METADATA[:4]
        }
    assert head.content == b""


def test_a_regular_file_has_its_git_sha1_as_quoted_etag(setup: Setup) -> None:
    reply = setup.web.get(file_url("README.md"))
    assert (reply.status_code, reply.content) == (200, README)
    assert reply.headers["etag"] == f'"{git_sha1(README)}"'


def test_an_lfs_file_redirects_with_its_metadata_on_the_redirect(setup: Setup) -> None:
    reply = setup.web.head(file_url("data/a.parquet"))
    assert reply.status_code == 302
    assert reply.headers["x-linked-etag"] == f'"{hashlib.sha256(BLOB).hexdigest()}"'
    assert reply.headers["x-linked-size"] == str(len(BLOB))
    assert reply.headers["x-repo-commit"] == setup.sha
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(BLOB).hexdigest()}\nsize {len(BLOB)}\n"
    )
    assert reply.headers["etag"] == f'"{git_sha1(pointer.encode())}"'


def test_a_blob_lies_on_another_origin_and_needs_no_token(setup: Setup) -> None:
    set_access(setup.hub.root, "org/data", private=True)
    link = setup.web.get(file_url("data/a.parquet"), headers=ANNA).headers["location"]
    assert urlsplit(link).netloc == urlsplit(setup.hub.cdn_endpoint).netloc != urlsplit(setup.hub.endpoint).netloc
    assert httpx.get(link).content == BLOB
    assert setup.hub.requests(origin="cdn")[-1].had_token is False


def test_a_link_to_a_blob_expires_and_cannot_be_altered(setup: Setup) -> None:
    link = setup.web.get(file_url("data/a.parquet")).headers["location"]
    other = hashlib.sha256(README).hexdigest()
    assert httpx.get(link.replace(hashlib.sha256(BLOB).hexdigest(), other)).status_code == 403
    assert httpx.get(link.replace("Expires=1", "Expires=2")).status_code == 403
    assert httpx.get(link.partition("?")[0]).status_code == 403
    setup.clock.now += 3601
    assert httpx.get(link).status_code == 403
    assert httpx.get(setup.web.get(file_url("data/a.parquet")).headers["location"]).status_code == 200


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("0-9", 0, 10),
        ("100-", 100, len(BLOB)),
        ("-7", len(BLOB) - 7, len(BLOB)),
        ("5-999999", 5, len(BLOB)),
        ("0-0", 0, 1),
    ],
)
def test_a_range_of_a_blob_is_answered_with_206(setup: Setup, asked: str, start: int, stop: int) -> None:
    reply = setup.web.get(file_url("data/a.parquet"), headers={"Range": f"bytes={asked}"}, follow_redirects=True)
    assert reply.status_code == 206
    assert reply.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(BLOB)}"
    assert reply.content == BLOB[start:stop]
    assert setup.hub.requests(origin="cdn")[-1].sent == stop - start


def test_a_range_of_a_regular_file_is_answered_with_206(setup: Setup) -> None:
    reply = setup.web.get(file_url("README.md"), headers={"Range": "bytes=4-9"})
    assert (reply.status_code, reply.content) == (206, README[4:10])


def test_a_range_past_the_end_is_answered_with_416(setup: Setup) -> None:
    reply = setup.web.get(file_url("data/a.parquet"), headers={"Range": f"bytes={len(BLOB)}-"}, follow_redirects=True)
    assert (reply.status_code, reply.headers["content-range"]) == (416, f"bytes */{len(BLOB)}")


@pytest.mark.parametrize(
    ("header", "span"),
    [
        (None, Span(0, 10, False)),
        ("bytes=2-1", Span(0, 10, False)),
        ("bytes=0-1,3-4", Span(0, 10, False)),
        ("rows=0-1", Span(0, 10, False)),
        ("bytes=-", Span(0, 10, False)),
        ("bytes=-99", Span(0, 10, True)),
        ("bytes=-0", None),
        ("bytes=10-", None),
        ("bytes= 3 - 4", Span(3, 5, True)),
    ],
)
def test_odd_ranges_are_ignored_and_empty_ones_refused(header: str | None, span: Span | None) -> None:
    assert parse_range(header, 10) == span


def test_a_known_etag_saves_the_body(setup: Setup) -> None:
    reply = setup.web.get(file_url("README.md"), headers={"If-None-Match": f'"{git_sha1(README)}"'})
    assert (reply.status_code, reply.content) == (304, b"")


def test_every_kind_of_revision_resolves_to_its_own_commit(setup: Setup) -> None:
    root = setup.hub.root
    create_tag(root, "org/data", "v1.0")
    create_branch(root, "org/data", "feature/x")
    second = setup.hub.import_files("org/data", {"README.md": b"second"}, message="second")
    create_pr(root, "org/data", 1)
    convert = setup.hub.import_files("org/data", {"default/train/0000.parquet": BLOB}, branch="refs/convert/parquet")
    for revision, sha in [("main", second), ("v1.0", setup.sha), ("feature%2Fx", setup.sha), (setup.sha, setup.sha),
                          ("refs%2Fpr%2F1", second), ("refs%2Fheads%2Fmain", second)]:  # fmt: skip
        reply = setup.web.head(file_url("README.md", revision))
        assert (revision, reply.status_code, reply.headers["x-repo-commit"]) == (revision, 200, sha)
    reply = setup.web.head(file_url("default/train/0000.parquet", "refs%2Fconvert%2Fparquet"))
    assert (reply.status_code, reply.headers["x-repo-commit"]) == (302, convert)
    assert setup.web.get("/api/datasets/org/data/tree/refs%2Fpr%2F1/data").json()[0]["path"] == "data/a.parquet"


def test_a_missing_file_is_entry_not_found_at_a_known_commit(setup: Setup) -> None:
    for method in ("HEAD", "GET"):
        for path in ("nothing.txt", "data", "..%2F..%2Fhub.json", "../../../hub.json"):
            connection = http.client.HTTPConnection("127.0.0.1", setup.hub.port, timeout=20)  # sends `..` as it is
            with contextlib.closing(connection):
                connection.request(method, file_url(path))
                reply = connection.getresponse()
                assert (reply.status, reply.headers["x-error-code"]) == (404, "EntryNotFound"), path
                assert reply.headers["x-repo-commit"] == setup.sha


def test_a_missing_revision_is_revision_not_found(setup: Setup) -> None:
    for revision in ("nope", "0" * 40, "..%2F..%2Frepo.json", "refs%2F..%2Frepo.json"):
        for url in (file_url("README.md", revision), f"/api/datasets/org/data/tree/{revision}",
                    f"/api/datasets/org/data/revision/{revision}"):  # fmt: skip
            reply = setup.web.get(url)
            assert (reply.status_code, reply.headers["x-error-code"]) == (404, "RevisionNotFound"), url


def test_a_missing_and_a_private_repo_look_the_same(setup: Setup) -> None:
    setup.hub.import_files("org/secret", {"a.txt": b"a"}, private=True)
    for repo in ("org/secret", "org/nothing", "no--such"):
        for url in (file_url("a.txt", repo=repo), f"/api/datasets/{repo}", f"/api/datasets/{repo}/tree/main"):
            for method in ("GET", "HEAD"):
                anonymous = setup.web.request(method, url)
                assert (anonymous.status_code, anonymous.headers["x-error-code"]) == (401, "RepoNotFound")
                signed_in = setup.web.request(method, url, headers=BERT)
                assert (signed_in.status_code, signed_in.headers["x-error-code"]) == (404, "RepoNotFound")
    assert setup.web.get(file_url("a.txt", repo="org/secret"), headers=ANNA).content == b"a"
    assert all(found["id"] != "org/secret" for found in setup.web.get("/api/datasets", headers=BERT).json())
    assert any(found["id"] == "org/secret" for found in setup.web.get("/api/datasets", headers=ANNA).json())


def test_behind_https_an_anonymous_caller_gets_a_bare_401(tmp_path: Path) -> None:
    with FaultyHub(tmp_path / "hub", options=HubOptions(public_url="https://hub.example")) as hub:
        reply = httpx.get(hub.endpoint + "/api/datasets/org/nothing")
    assert reply.status_code == 401
    assert "x-error-code" not in reply.headers


def test_a_wrong_token_is_refused_with_the_message_clients_know(setup: Setup) -> None:
    reply = setup.web.get("/api/datasets/org/data", headers={"Authorization": "Bearer hf_wrong"})
    assert (reply.status_code, reply.headers["x-error-message"]) == (401, "Invalid credentials in Authorization header")
    assert "x-error-code" not in reply.headers


def test_a_gated_repo_shows_its_list_but_not_its_files(setup: Setup) -> None:
    set_access(setup.hub.root, "org/data", gated=True)
    for method in ("GET", "HEAD"):
        anonymous = setup.web.request(method, file_url("README.md"))
        assert (anonymous.status_code, anonymous.headers["x-error-code"]) == (401, "GatedRepo")
        outsider = setup.web.request(method, file_url("README.md"), headers=BERT)
        assert (outsider.status_code, outsider.headers["x-error-code"]) == (403, "GatedRepo")
    assert setup.web.get(file_url("README.md"), headers=ANNA).status_code == 200
    info = setup.web.get("/api/datasets/org/data")
    assert (info.status_code, info.json()["gated"]) == (200, "manual")
    assert setup.web.get("/api/datasets/org/data/auth-check", headers=BERT).status_code == 403
    set_access(setup.hub.root, "org/data", allowed=["bert"])
    assert setup.web.get(file_url("README.md"), headers=BERT).status_code == 200
    assert setup.web.get("/api/datasets/org/data/auth-check", headers=BERT).status_code == 200
    assert setup.web.get("/api/datasets/org/data/auth-check/write", headers=BERT).status_code == 403
    assert setup.web.get("/api/datasets/org/data/auth-check/write", headers=ANNA).status_code == 200


def test_a_disabled_repo_says_so_without_a_code(setup: Setup) -> None:
    set_access(setup.hub.root, "org/data", disabled=True)
    for url in (file_url("README.md"), "/api/datasets/org/data"):
        reply = setup.web.head(url)
        assert (reply.status_code, reply.headers["x-error-message"]) == (403, "Access to this resource is disabled.")
        assert "x-error-code" not in reply.headers


def test_every_error_names_itself_in_headers_and_has_a_request_id(setup: Setup) -> None:
    urls = ["/api/nonsense", "/api/datasets/org/no", file_url("no"), file_url("no", "no"), "/api/whoami-v2"]
    for url in urls:
        for method in ("HEAD", "GET", "POST"):
            reply = setup.web.request(method, url)
            assert reply.status_code >= 400
            assert reply.headers["x-error-message"]
            assert reply.headers["x-request-id"]
            assert reply.content == b"" if method == "HEAD" else reply.json()["error"]


def test_a_renamed_repo_is_followed_by_relative_307s(setup: Setup) -> None:
    rename_repo(setup.hub.root, "org/data", "org/newer")
    rename_repo(setup.hub.root, "org/newer", "legacy")
    for method in ("HEAD", "GET"):
        first = setup.web.request(method, file_url("README.md"))
        assert (first.status_code, first.headers["location"]) == (307, file_url("README.md", repo="legacy"))
        final = setup.web.request(method, file_url("README.md"), follow_redirects=True)
        assert (final.status_code, final.headers["x-repo-commit"]) == (200, setup.sha)
        assert final.headers["etag"] == f'"{git_sha1(README)}"'
    tree = setup.web.get("/api/datasets/org/data/tree/main?recursive=true")
    assert tree.headers["location"] == "/api/datasets/legacy/tree/main?recursive=true"
    set_access(setup.hub.root, "legacy", private=True)
    assert setup.web.get(file_url("README.md")).status_code == 401
    set_access(setup.hub.root, "legacy", private=False)
    setup.hub.import_files("org/data", {"README.md": b"mine now"})
    assert setup.web.get(file_url("README.md")).content == b"mine now"
    delete_repo(setup.hub.root, "org/data")
    assert setup.web.get(file_url("README.md")).status_code == 401


def test_small_files_may_come_by_a_relative_307(tmp_path: Path) -> None:
    options = HubOptions(resolve_cache_below=1000)
    with FaultyHub(tmp_path / "hub", options=options) as hub, httpx.Client(base_url=hub.endpoint) as web:
        sha = hub.import_files("org/data", {"sub dir/ü.txt": README, "big.txt": b"b" * 1000})
        for method in ("HEAD", "GET"):
            first = web.request(method, file_url("sub%20dir/%C3%BC.txt"))
            assert first.status_code == 307
            assert first.headers["location"].startswith("/api/resolve-cache/")
            final = web.request(method, file_url("sub%20dir/%C3%BC.txt"), follow_redirects=True)
            assert (final.headers["x-repo-commit"], final.headers["content-length"]) == (sha, str(len(README)))
            assert final.headers["etag"] == f'"{git_sha1(README)}"'
        assert web.get(file_url("big.txt")).status_code == 200
        assert {record.bucket for record in hub.log} == {"resolvers"}


def test_a_log_record_is_frozen_and_holds_no_token(setup: Setup) -> None:
    setup.web.get(file_url("README.md"), headers={**ANNA, "Range": "bytes=0-3"})
    setup.web.get("/api/datasets/org/data")
    ranged, api = setup.hub.log
    assert replace(ranged, time=0, user_agent="") == replace(
        ranged, time=0, user_agent="", method="GET", path=file_url("README.md"), range="bytes=0-3", had_token=True,
        status=206, sent=4, origin="hub", bucket="resolvers", done=True,
    )  # fmt: skip
    assert (api.bucket, api.had_token) == ("api", False)
    assert "hf_anna" not in repr(setup.hub.log) + repr(setup.hub.options)
    with pytest.raises(AttributeError):
        ranged.status = 500  # type: ignore[misc]
