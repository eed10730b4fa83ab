"""A raw request path taken apart. No I/O.

The raw path is split on `/` first and each segment is unquoted after: `refs%2Fpr%2F1` is one revision, not three
folders. A server that unquotes first cannot tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote, unquote

from crucible.refs import RepoType

from .names import REPO_TYPES

Kind = Literal["list", "repo", "file", "cached-file", "git", "lfs", "whoami", "validate-yaml", "page", "unknown"]
VERBS = frozenset({"revision", "tree", "paths-info", "refs", "commits", "auth-check"})
GIT_VERBS = frozenset({"info/refs", "git-upload-pack", "git-receive-pack"})
LFS_VERBS = frozenset({"info/lfs/objects/batch"})


@dataclass(frozen=True, slots=True)
class Route:
    """What a path asks for. `repo_at` is where the repo's id stands among the raw segments."""

    kind: Kind
    repo_type: RepoType = "model"
    repo_id: str = ""
    verb: str = ""
    revision: str = ""
    path: str = ""
    repo_at: tuple[int, int] = (0, 0)

    def renamed(self, raw_path: str, query: str, new_id: str) -> str:
        """The same request, relative to this origin, for the repo's new id."""
        raw = raw_path.split("/")[1:]
        start, stop = self.repo_at
        moved = "/" + "/".join([*raw[:start], *(quote(part) for part in new_id.split("/")), *raw[stop:]])
        return f"{moved}?{query}" if query else moved


def parse(raw_path: str) -> Route:
    """The route of a raw path (no query)."""
    raw = raw_path.split("/")[1:]
    parts = [unquote(segment) for segment in raw]
    if parts[0] == "api":
        return _api(parts)
    repo_type, start = _file_prefix(parts[0])
    for length in (2, 1):
        stop = start + length
        if len(parts) > stop + 2 and parts[stop] == "resolve":
            repo_id, path = "/".join(parts[start:stop]), "/".join(parts[stop + 2 :])
            return Route("file", repo_type, repo_id, "resolve", parts[stop + 1], path, (start, stop))
        if (verb := "/".join(parts[stop:])) in GIT_VERBS | LFS_VERBS:
            repo_id = "/".join(parts[start:stop]).removesuffix(".git")
            return Route("git" if verb in GIT_VERBS else "lfs", repo_type, repo_id, verb, repo_at=(start, stop))
    return Route("page", path="/".join(parts))


def _file_prefix(segment: str) -> tuple[RepoType, int]:
    """Models have no prefix in file URLs, the others have theirs."""
    for repo_type in REPO_TYPES:
        if repo_type != "model" and segment == f"{repo_type}s":
            return repo_type, 1
    return "model", 0


def _api(parts: list[str]) -> Route:
    rest = parts[1:]
    if rest == ["whoami-v2"]:
        return Route("whoami")
    if rest == ["validate-yaml"]:
        return Route("validate-yaml")
    if len(rest) >= 5 and rest[0] == "resolve-cache":
        for repo_type in REPO_TYPES:
            if rest[1] == f"{repo_type}s":
                # /api/resolve-cache/{type}s/{id}/{commit}/{path}: the id's own slash is quoted, so it is one segment
                return Route("cached-file", repo_type, rest[2], "resolve", rest[3], "/".join(rest[4:]), (3, 4))
    for repo_type in REPO_TYPES:
        if rest and rest[0] == f"{repo_type}s":
            return _repo(repo_type, rest[1:])
    return Route("unknown")


def _repo(repo_type: RepoType, rest: list[str]) -> Route:
    if not rest or rest == [""]:
        return Route("list", repo_type)
    for length in (2, 1):
        if len(rest) > length and rest[length] in VERBS:
            repo_id, verb, args = "/".join(rest[:length]), rest[length], rest[length + 1 :]
            revision = args[0] if args else "main"
            return Route("repo", repo_type, repo_id, verb, revision, "/".join(args[1:]).strip("/"), (2, 2 + length))
    if len(rest) <= 2:
        return Route("repo", repo_type, "/".join(rest), "revision", "main", "", (2, 2 + len(rest)))
    return Route("unknown")
