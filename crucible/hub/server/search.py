"""Lists of repos: filtered, searched, sorted, paged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .access import may_see
from .call import Call
from .describe import repo_json, sibling_json
from .repos import Repo

SORTS = ("lastModified", "trendingScore", "createdAt", "downloads", "likes")


@dataclass(frozen=True, slots=True)
class Found:
    """A page of repos; `cursor` is '' on the last."""

    repos: list[dict[str, Any]]
    cursor: str


def list_repos(call: Call) -> Found:
    """Reads each repo's card once a call: fine for the thousands of repos of one cluster, not for millions."""
    found = []
    for repo in call.hub.store.repos(call.route.repo_type):
        meta = repo.meta()
        if not may_see(repo, meta, call.user) or not _named(call, repo):
            continue
        described = repo_json(repo, meta, repo.resolve("main"))
        if _matches(call, described):
            found.append((repo, described))
    sort = call.query.get("sort", "trendingScore")
    key = sort if sort in SORTS else "trendingScore"
    found.sort(key=lambda item: item[0].id)
    found.sort(key=lambda item: item[1][key], reverse=call.query.get("direction") != "1")
    raw = call.query.get("cursor", "0")
    start = int(raw) if raw.isdecimal() and len(raw) < 10 else 0
    size = call.number("limit", call.hub.options.page_size, most=call.hub.options.page_size)
    page = [_shaped(call, repo, described) for repo, described in found[start : start + size]]
    return Found(page, str(start + size) if start + size < len(found) else "")


def _named(call: Call, repo: Repo) -> bool:
    author = call.query.get("author")
    words = call.query.getall("search", [])
    return (author is None or repo.owner == author) and all(word.lower() in repo.id.lower() for word in words)


def _matches(call: Call, described: dict[str, Any]) -> bool:
    tags = set(described["tags"])
    wanted = [tag for value in call.query.getall("filter", []) for tag in value.split(",") if tag]
    wanted += [f"dataset:{name}" for name in call.query.getall("datasets", [])]
    if not all(tag in tags for tag in wanted):
        return False
    task = call.query.get("pipeline_tag")
    if task is not None and described.get("pipeline_tag") != task:
        return False
    return "gated" not in call.query or bool(described["gated"]) == call.flag("gated")


def _shaped(call: Call, repo: Repo, described: dict[str, Any]) -> dict[str, Any]:
    wanted = call.query.getall("expand", [])
    if (call.flag("full") or "siblings" in wanted) and described["sha"]:
        files = repo.snapshot(described["sha"]).files
        described["siblings"] = [sibling_json(file, blobs=False) for file in files]
    if wanted:
        return {key: value for key, value in described.items() if key in ("_id", "id", *wanted)}
    if not (call.flag("full") or call.flag("cardData")):
        described.pop("cardData")
    return described
