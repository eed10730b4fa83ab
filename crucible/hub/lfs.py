"""Signed links to many LFS files in one request: git-lfs' batch endpoint instead of a resolve request for each file.

It is an offer: a file that got no link, or whose link does not work, is resolved as ever. A link is only an address.
What comes from it is checked against the hash that the listing promised, and it gets no token: one that leads to the
Hub's own origin, or that wants headers sent, is not used.

Written after git-lfs' public description of the request and what the official client sends for uploads. Checked against
crucible's own Hub, not against git-lfs itself and not against huggingface.co, where the requests are taken to spend the
quota of pages, as all of git's side does on our Hub. A Hub without the endpoint costs one request a work item or pull.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from crucible.config import Settings
from crucible.hub.http import HubHttp, Refusal, origin, refusal_of
from crucible.refs import RepoRef, SourceFile

CONTENT_TYPE = "application/vnd.git-lfs+json"
REPLY_LIMIT = 4 << 20
"""Bytes of a reply. A hundred signed links have about 0.2 MB."""
HREF_LIMIT = 16 << 10
LEAST_S = 30
"""A link that is said to live shorter than this is not used: it may have to wait for its turn."""


def links(
    http: HubHttp,
    repo: RepoRef,
    files: Sequence[SourceFile],
    heard: Callable[[Mapping[str, str]], None] = lambda _: None,
) -> dict[str, str]:
    """oid -> link, for those of `files` that the Hub of `http` gives a usable one to. One request, never tried again.

    `files` are LFS files of a commit of `repo`, at most `LINK_BATCH`. `heard` gets the reply's headers, whatever it is.
    Raises Refusal; OfflineMode.
    """
    prefix = "" if repo.repo_type == "model" else f"{repo.repo_type}s/"
    url = f"{http.settings.endpoint}/{prefix}{repo.repo_id}.git/info/lfs/objects/batch"
    body = {
        "operation": "download",
        "transfers": ["basic"],
        "hash_algo": "sha256",
        "objects": [{"oid": oid, "size": size} for oid, size in {file.oid: file.size for file in files}.items()],
    }
    headers = {"accept": CONTENT_TYPE, "content-type": CONTENT_TYPE}
    with http.stream(url, headers, method="POST", content=json.dumps(body).encode()) as response:
        heard(response.headers)
        if response.status_code != 200:
            raise refusal_of(
                response
            )  # a redirect too: it leads to a login or to a new name, which is resolve's matter
        reply = bytearray()
        for chunk in response.iter_bytes():
            reply += chunk
            if len(reply) > REPLY_LIMIT:
                raise Refusal(200, {}, f"an LFS batch reply of more than {REPLY_LIMIT:,} bytes")
    return read_links(bytes(reply), files, http.settings)


def read_links(reply: bytes, files: Sequence[SourceFile], settings: Settings) -> dict[str, str]:
    """The usable links of a batch reply to a request for `files`. Pure. Raises Refusal if it is no such reply."""
    try:
        said = json.loads(reply)
        objects = said["objects"]
        transfer = said.get("transfer", "basic")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refusal(200, {}, f"the answer is no LFS batch reply ({type(error).__name__})") from error
    if not isinstance(objects, list) or transfer != "basic":
        raise Refusal(200, {}, "the answer is no LFS batch reply for plain downloads")
    sizes = {file.oid: file.size for file in files}
    found = {}
    for one in objects:
        if isinstance(one, dict) and isinstance(oid := one.get("oid"), str) and one.get("size") == sizes.get(oid):
            link = _link(one, settings)
            if link is not None:
                found[oid] = link
    return found


def _link(said: dict[str, Any], settings: Settings) -> str | None:
    """The link of one object, if it may be used."""
    if said.get("error"):
        return None
    actions = said.get("actions")
    action = actions.get("download") if isinstance(actions, dict) else None
    if not isinstance(action, dict) or action.get("header"):
        return None
    lives, href = action.get("expires_in"), action.get("href")
    if isinstance(lives, int | float) and 0 != lives < LEAST_S:  # 0 is how some say that it never ends
        return None
    if not isinstance(href, str) or len(href) > HREF_LIMIT:
        return None
    try:
        (scheme, host, _), hub = origin(href), origin(settings.endpoint)
        secure = scheme == "https" or (scheme == "http" and urlsplit(settings.endpoint).scheme == "http")
        return href if secure and host and origin(href) != hub else None
    except ValueError:
        return None  # no address at all
