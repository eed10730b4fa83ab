"""The JSON API of one repo: info, tree, paths-info, refs, commits; and who is asking.

Each handler takes a `Call` and returns an `Answer`. They run in a thread, since they read the store.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from .access import Refusal, check_gate
from .call import Call, no_entry
from .card import card_problem
from .describe import commit_json, entry_json, expanded, repo_json, sibling_json
from .search import list_repos
from .snapshot import Entry

PATHS_MOST = 1000  # paths in one paths-info request, as on the Hub


@dataclass(frozen=True, slots=True)
class Answer:
    """A JSON reply."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def answer(call: Call) -> Answer:
    """Answer any API call. Raises Refusal or Redirect."""
    kind = call.route.kind
    if kind == "repo":
        handler = HANDLERS[call.route.verb]
        if call.method not in (("POST",) if call.route.verb == "paths-info" else ("GET", "HEAD")):
            raise Refusal(405, "", f"{call.method} is not there; this Hub is read-only")
        return handler(call)
    if kind == "validate-yaml":
        return validate_yaml(call)
    if call.method not in ("GET", "HEAD"):
        raise Refusal(405, "", f"{call.method} is not there; this Hub is read-only")
    if kind == "list":
        found = list_repos(call)
        return Answer(found.repos, headers=call.next_link(cursor=found.cursor) if found.cursor else {})
    if kind == "whoami":
        if call.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        return Answer(call.user.whoami())
    raise Refusal(404, "", "Sorry, we can't find the page you are looking for.")


def info(call: Call) -> Answer:
    """`expand` asks for single properties and leaves the rest out."""
    repo, meta = call.repo()
    commit = call.commit(repo)
    described = repo_json(repo, meta, commit)
    wanted = call.query.getall("expand", [])
    snapshot = repo.snapshot(commit)
    if not wanted or "siblings" in wanted:
        blobs = call.flag("blobs")
        described["siblings"] = [sibling_json(file, blobs=blobs) for file in snapshot.files]
    described["usedStorage"] = sum(file.size for file in snapshot.files)
    if wanted:
        described = {key: value for key, value in described.items() if key in ("_id", "id", *wanted)}
    return Answer(described)


def tree(call: Call) -> Answer:
    repo, _ = call.repo()
    commit = call.commit(repo)
    options, expand = call.hub.options, call.flag("expand")
    most = options.expand_page_size if expand else options.page_size
    page = repo.snapshot(commit).page(
        call.route.path,
        recursive=call.flag("recursive"),
        after=_decoded(call.query.get("cursor", "")),
        limit=call.number("limit", most, most=most),
    )
    if page is None:
        raise no_entry(call.route.path, commit)
    headers = {"X-Repo-Commit": commit}
    if page.cursor is not None:
        headers |= call.next_link(cursor=_encoded(page.cursor))
    if expand:
        return Answer(expanded(repo, commit, page.entries), headers=headers)
    return Answer([entry_json(entry) for entry in page.entries], headers=headers)


def paths_info(call: Call) -> Answer:
    """Unknown paths are dropped without a word, as on the Hub."""
    repo, _ = call.repo()
    commit = call.commit(repo)
    paths = call.body.get("paths", [])
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise Refusal(400, "", "paths must be a list of strings")
    if len(paths) > PATHS_MOST:
        raise Refusal(413, "", f"at most {PATHS_MOST} paths a request")
    snapshot = repo.snapshot(commit)
    found: list[Entry] = [entry for path in paths if (entry := snapshot.get(path.strip("/"))) is not None]
    expand = call.body.get("expand")
    if (expand[-1:] if isinstance(expand, list) else [expand]) in (["true"], ["True"], ["1"], [True]):
        return Answer(expanded(repo, commit, found))
    return Answer([entry_json(entry) for entry in found])


def refs(call: Call) -> Answer:
    repo, _ = call.repo()
    kinds = {"branches": "refs/heads/", "converts": "refs/convert/", "tags": "refs/tags/"}
    if call.flag("include_prs"):
        kinds["pullRequests"] = "refs/pr/"
    known = repo.refs()
    return Answer(
        {
            kind: [{"name": name, "ref": ref, "targetCommit": commit} for name, ref, commit in known.below(prefix)]
            for kind, prefix in kinds.items()
        }
    )


def commits(call: Call) -> Answer:
    repo, _ = call.repo()
    head = call.commit(repo)
    size = call.number("limit", call.hub.options.page_size, most=call.hub.options.page_size)
    raw = call.query.get("p", "0")
    page = int(raw) if raw.isdecimal() and len(raw) < 10 else 0
    window = list(islice(repo.history(head), page * size, (page + 1) * size + 1))
    more = call.next_link(p=str(page + 1)) if len(window) > size else {}
    return Answer([commit_json(commit) for commit in window[:size]], headers=more)


def auth_check(call: Call) -> Answer:
    """May this caller read the files (or, with `/write`, change them)?"""
    repo, meta = call.repo()
    check_gate(repo, meta, call.user)
    if call.route.revision == "write" and not (call.user and call.user.role == "write" and call.user.owns(repo)):
        raise Refusal(403, "", f"You have no write access to {repo.id}")
    return Answer({})


def validate_yaml(call: Call) -> Answer:
    if call.method != "POST":
        raise Refusal(405, "", "validate-yaml takes POST")
    content = call.body.get("content")
    problem = card_problem(content) if isinstance(content, str) else "content must be the text of a README.md"
    if problem is None:
        return Answer({"errors": [], "warnings": []})
    return Answer({"errors": [{"message": problem}], "warnings": []}, status=400)


HANDLERS: dict[str, Callable[[Call], Answer]] = {
    "revision": info,
    "tree": tree,
    "paths-info": paths_info,
    "refs": refs,
    "commits": commits,
    "auth-check": auth_check,
}


def _encoded(path: str) -> str:
    return base64.urlsafe_b64encode(path.encode()).decode()


def _decoded(cursor: str) -> str:
    try:
        return base64.urlsafe_b64decode(cursor.encode()).decode()
    except (binascii.Error, ValueError):
        raise Refusal(400, "", "this cursor was not made by this server") from None
