"""The Hub's JSON API, by raw HTTP: checklist items 21-30 and 40 of the protocol."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from crucible.hub.server import HubOptions, RateLimits, User, create_branch, create_pr, create_tag
from tests.hubserver.faults import FaultyHub

CARD = b"---\nlanguage: [en, de]\nlicense: mit\ntask_categories: [question-answering]\ntags: [math]\n---\n"
FILES: dict[str, bytes | Path] = {
    "README.md": CARD,
    "data/a.parquet": b"a" * 100,
    "data/b.parquet": b"b" * 200,
    "data/deep/c.txt": b"c",
    "data.txt": b"d",
    "data-1/x.txt": b"x",
}


@pytest.fixture
def small(tmp_path: Path) -> Iterator[FaultyHub]:
    """A Hub with pages of two entries."""
    options = HubOptions(tokens={"hf_anna": User("anna", ("org",))}, page_size=2, expand_page_size=1)
    with FaultyHub(tmp_path / "hub", options=options) as hub:
        hub.import_files("org/data", FILES)
        yield hub


def follow(hub: FaultyHub, url: str) -> tuple[list[Any], int]:
    """All items of a paginated listing, and the number of pages."""
    items, pages, link = [], 0, hub.endpoint + url
    while link and pages < 100:
        reply = httpx.get(link)
        assert reply.status_code == 200, reply.text
        items += reply.json()
        pages += 1
        found = re.fullmatch(r'<(http://[^>]+)>; rel="next"', reply.headers.get("link", ""))
        assert ("link" in reply.headers) == (found is not None)
        link = found[1] if found else ""
    return items, pages


def test_a_tree_comes_in_pages_that_absolute_links_chain(small: FaultyHub) -> None:
    entries, pages = follow(small, "/api/datasets/org/data/tree/main?recursive=true&expand=false")
    assert [entry["path"] for entry in entries] == sorted([*FILES, "data", "data-1", "data/deep"])
    assert pages == 5  # nine entries; the last page has no link


def test_a_tree_whose_last_page_is_full_ends_there(small: FaultyHub) -> None:
    entries, pages = follow(small, "/api/datasets/org/data/tree/main")
    assert [entry["path"] for entry in entries] == ["README.md", "data", "data-1", "data.txt"]
    assert pages == 2


def test_a_recursive_tree_has_folders_and_all_files_below_a_path(small: FaultyHub) -> None:
    deep, _ = follow(small, "/api/datasets/org/data/tree/main/data?recursive=true")
    assert [(entry["type"], entry["path"]) for entry in deep] == [
        ("file", "data/a.parquet"), ("file", "data/b.parquet"), ("directory", "data/deep"), ("file", "data/deep/c.txt"),
    ]  # fmt: skip
    flat, _ = follow(small, "/api/datasets/org/data/tree/main/data")
    assert [entry["path"] for entry in flat] == ["data/a.parquet", "data/b.parquet", "data/deep"]
    quoted, _ = follow(small, "/api/datasets/org/data/tree/main/data%2Fdeep")
    assert [entry["path"] for entry in quoted] == ["data/deep/c.txt"]
    folder = next(entry for entry in flat if entry["type"] == "directory")
    assert (folder["size"], len(folder["oid"])) == (0, 40)


def test_an_expanded_tree_names_the_commit_that_last_changed_each_entry(small: FaultyHub) -> None:
    first = httpx.get(small.endpoint + "/api/datasets/org/data").json()["sha"]
    second = small.import_files("org/data", {"data/deep/c.txt": b"changed"}, message="Change c\n\nbecause")
    entries, pages = follow(small, "/api/datasets/org/data/tree/main?recursive=true&expand=true")
    last = {entry["path"]: entry["lastCommit"] for entry in entries}
    assert pages == len(last) == 9
    assert {path for path, commit in last.items() if commit["id"] == second} == {"data", "data/deep", "data/deep/c.txt"}
    assert last["data"]["title"] == "Change c"
    assert last["README.md"]["id"] == first


def test_tree_info_paths_info_and_resolve_agree_on_an_lfs_file(small: FaultyHub) -> None:
    api, sha256 = small.endpoint + "/api/datasets/org/data", hashlib.sha256(b"a" * 100).hexdigest()
    tree = next(entry for entry in httpx.get(f"{api}/tree/main/data").json() if entry["path"] == "data/a.parquet")
    siblings = httpx.get(f"{api}?blobs=true").json()["siblings"]
    info = next(file for file in siblings if file["rfilename"] == "data/a.parquet")
    posted = httpx.post(f"{api}/paths-info/main", data={"paths": ["data/a.parquet"]}).json()[0]
    head = httpx.head(small.endpoint + "/datasets/org/data/resolve/main/data/a.parquet")
    assert tree["lfs"] == {"oid": sha256, "size": 100, "pointerSize": 128}
    assert info["lfs"] == {"sha256": sha256, "size": 100, "pointerSize": 128}
    assert posted == tree
    assert head.headers["x-linked-etag"] == f'"{sha256}"'
    assert head.headers["etag"] == f'"{tree["oid"]}"' == f'"{info["blobId"]}"'


def test_info_without_blobs_has_names_only_and_expand_picks_properties(small: FaultyHub) -> None:
    api = small.endpoint + "/api/datasets/org/data"
    info = httpx.get(api).json()
    assert info["siblings"] == [{"rfilename": path} for path in sorted(FILES)]
    assert info["cardData"]["license"] == "mit"
    assert {"language:en", "language:de", "license:mit", "task_categories:question-answering", "math"} == set(
        info["tags"]
    )
    assert {"id", "sha", "private", "gated", "disabled", "lastModified", "createdAt", "downloads", "likes"} <= set(info)
    picked = httpx.get(api, params={"expand": ["sha", "likes"]}).json()
    assert set(picked) == {"_id", "id", "sha", "likes"}


def test_paths_info_takes_a_form_reports_folders_and_drops_the_unknown(small: FaultyHub) -> None:
    url = small.endpoint + "/api/datasets/org/data/paths-info/main"
    found = httpx.post(url, data={"paths": ["data", "nothing", "data.txt"], "expand": "false"}).json()
    assert [(entry["type"], entry["path"]) for entry in found] == [("directory", "data"), ("file", "data.txt")]
    assert "lastCommit" in httpx.post(url, data={"paths": "data.txt", "expand": "true"}).json()[0]
    assert httpx.post(url, data={"paths": ["x"] * 1001}).status_code == 413
    assert httpx.post(url, json={"paths": ["data.txt"]}).json()[0]["path"] == "data.txt"


def test_refs_are_sorted_by_kind(small: FaultyHub) -> None:
    sha = create_tag(small.root, "org/data", "v1")
    create_branch(small.root, "org/data", "dev")
    create_branch(small.root, "org/data", "refs/convert/parquet")
    create_pr(small.root, "org/data", 7)
    url = small.endpoint + "/api/datasets/org/data/refs"
    plain, full = httpx.get(url).json(), httpx.get(url + "?include_prs=1").json()
    assert "pullRequests" not in plain
    assert {kind: [ref["name"] for ref in refs] for kind, refs in full.items()} == {
        "branches": ["dev", "main"], "converts": ["parquet"], "tags": ["v1"], "pullRequests": ["7"],
    }  # fmt: skip
    assert full["converts"] == [{"name": "parquet", "ref": "refs/convert/parquet", "targetCommit": sha}]


def test_commits_come_newest_first_in_pages(small: FaultyHub) -> None:
    for number in range(4):
        small.import_files("org/data", {"n.txt": b"%d" % number}, message=f"n is {number}\n\nbody", author="anna")
    commits, pages = follow(small, "/api/datasets/org/data/commits/main")
    assert [commit["title"] for commit in commits] == ["n is 3", "n is 2", "n is 1", "n is 0", "Import files"]
    assert (pages, commits[0]["message"], commits[0]["authors"]) == (3, "body", [{"user": "anna"}])


def test_a_tree_below_a_missing_path_is_entry_not_found(small: FaultyHub) -> None:
    for path in ("nothing", "data.txt", "dat"):
        reply = httpx.get(small.endpoint + f"/api/datasets/org/data/tree/main/{path}")
        assert (reply.status_code, reply.headers["x-error-code"]) == (404, "EntryNotFound")


def test_repos_are_searched_filtered_sorted_and_paged(small: FaultyHub) -> None:
    for name in ("alpha", "beta", "gamma"):
        small.import_files(f"lab/{name}", {"README.md": b"---\nlanguage: fr\n---\n"})
    small.import_files("lab/net", {"README.md": b"---\npipeline_tag: fill-mask\n---\n"}, repo_type="model")
    small.import_files("lab/app", {"README.md": b"---\nsdk: static\ndatasets: [lab/beta]\n---\n"}, repo_type="space")

    def ids(url: str) -> list[str]:
        return [repo["id"] for repo in follow(small, url)[0]]

    assert ids("/api/datasets") == ["lab/alpha", "lab/beta", "lab/gamma", "org/data"]
    assert ids("/api/datasets?author=org") == ["org/data"]
    assert ids("/api/datasets?search=ALPH") == ["lab/alpha"]
    assert ids("/api/datasets?filter=language:fr&search=a&search=m") == ["lab/gamma"]
    assert ids("/api/datasets?filter=language:en&filter=math") == ["org/data"]
    assert ids("/api/datasets?sort=lastModified")[0] == "lab/gamma"
    assert len(httpx.get(small.endpoint + "/api/datasets?limit=1").json()) == 1
    assert ids("/api/models?pipeline_tag=fill-mask") == ["lab/net"]
    assert ids("/api/models?pipeline_tag=other") == []
    assert ids("/api/spaces?datasets=lab/beta") == ["lab/app"]
    assert "siblings" in httpx.get(small.endpoint + "/api/datasets?full=true").json()[0]


def test_every_reply_of_the_hub_says_what_is_left_of_its_bucket(small: FaultyHub) -> None:
    urls = {
        "/api/datasets/org/data": "api",
        "/api/datasets/none/none": "api",
        "/datasets/org/data/resolve/main/README.md": "resolvers",
        "/datasets/org/data/resolve/main/data/a.parquet": "resolvers",
        "/datasets/org/data": "pages",
    }
    for url, bucket in urls.items():
        headers = httpx.get(small.endpoint + url).headers
        assert re.fullmatch(rf'"{bucket}";r=\d+;t=\d+', headers["ratelimit"])
        assert headers["ratelimit-policy"] == f'"fixed window";"{bucket}";q=100000;w=300'


def test_a_spent_quota_is_429_for_that_caller_and_bucket_until_the_window_ends(tmp_path: Path) -> None:
    now = [1_800_000_000.0]
    options = HubOptions(tokens={"hf_anna": User("anna")}, limits=RateLimits(api=2, window_s=10), clock=lambda: now[0])
    with FaultyHub(tmp_path / "hub", options=options) as hub:
        hub.import_files("org/data", FILES)
        url = hub.endpoint + "/api/datasets/org/data"
        assert [httpx.get(url).status_code for _ in range(3)] == [200, 200, 429]
        refused = httpx.get(url)
        assert refused.headers["ratelimit"] == '"api";r=0;t=10'
        assert refused.headers["x-error-message"]
        assert httpx.get(url, headers={"Authorization": "Bearer hf_anna"}).status_code == 200
        assert httpx.get(hub.endpoint + "/datasets/org/data/resolve/main/README.md").status_code == 200
        now[0] += 10
        assert httpx.get(url).status_code == 200


def test_whoami_knows_a_token_and_refuses_the_rest(small: FaultyHub) -> None:
    url = small.endpoint + "/api/whoami-v2"
    known = httpx.get(url, headers={"Authorization": "Bearer hf_anna"})
    assert (known.status_code, known.json()["name"], known.json()["orgs"][0]["name"]) == (200, "anna", "org")
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer nonsense"}).status_code == 401


def test_a_card_is_checked_and_nothing_is_kept(small: FaultyHub) -> None:
    url = small.endpoint + "/api/validate-yaml"
    good = httpx.post(url, json={"content": CARD.decode(), "repoType": "dataset"})
    assert (good.status_code, good.json()) == (200, {"errors": [], "warnings": []})
    bad = httpx.post(url, json={"content": "---\na: [\n---\n", "repoType": "dataset"})
    assert bad.status_code == 400
    assert "YAML" in bad.json()["errors"][0]["message"]


def test_what_is_not_there_says_that_this_hub_is_read_only(small: FaultyHub) -> None:
    reply = httpx.delete(small.endpoint + "/api/datasets/org/data")
    assert (reply.status_code, "read-only" in reply.headers["x-error-message"]) == (405, True)


def test_the_log_is_written_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    with FaultyHub(tmp_path / "hub", options=HubOptions(log_path=path)) as hub:
        httpx.get(hub.endpoint + "/api/datasets", headers={"Authorization": "Bearer hf_secret"})
        assert len(hub.log) == 1
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["path"], line["status"], line["had_token"]) for line in lines] == [("/api/datasets", 401, True)]
    assert "hf_secret" not in path.read_text()
