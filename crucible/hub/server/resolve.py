"""Files: `/{id}/resolve/{revision}/{path}` on the Hub's origin, blobs on the second one.

A regular file is answered with its bytes. An LFS file is answered with a 302 to a signed link on the other origin,
its metadata on the 302 itself. A small regular file may be answered with a relative 307 first, as the Hub does.
"""

from __future__ import annotations

import mimetypes
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from .access import Refusal, check_gate
from .call import Call, no_entry
from .snapshot import FileEntry


@dataclass(frozen=True, slots=True)
class Bytes:
    """Answer with this file, or the range of it that is asked for."""

    path: Path
    size: int
    etag: str
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Answer with a redirect."""

    status: int
    headers: dict[str, str]


def resolve(call: Call) -> Bytes | Elsewhere:
    """What a file request gets. Raises Refusal, or Redirect for a renamed repo."""
    if call.method not in ("GET", "HEAD"):
        raise Refusal(405, "", f"{call.method} is not there; this Hub is read-only")
    repo, meta = call.repo()
    check_gate(repo, meta, call.user)
    commit = call.commit(repo)
    path = call.route.path
    file = repo.snapshot(commit).file(path)
    if file is None:
        raise no_entry(path, commit)
    said = {"X-Repo-Commit": commit}
    if file.lfs:
        return _to_cdn(call, file, said)
    if call.route.kind == "file" and file.size < call.hub.options.resolve_cache_below:
        target = f"/api/resolve-cache/{repo.type}s/{quote(repo.id, safe='')}/{commit}/{quote(path)}"
        return Elsewhere(307, {"Location": target, **said})
    name = path.rpartition("/")[2]
    headers = {
        **said,
        "Content-Type": content_type(name),
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(name)}",
    }
    return Bytes(call.hub.store.blob_path(file.sha256), file.size, file.oid, headers)


def content_type(name: str) -> str:
    """By the name only, and never a type that a browser would run: a repo's pages are not this server's."""
    guess = mimetypes.guess_type(name)[0] or "application/octet-stream"
    if guess.startswith("text/") or guess == "application/json":
        return "text/plain; charset=utf-8"
    return guess if guess.startswith(("audio/", "video/")) else "application/octet-stream"


def _to_cdn(call: Call, file: FileEntry, said: dict[str, str]) -> Elsewhere:
    options = call.hub.options
    link = call.hub.signer.link(file.sha256, file.path, expires=int(options.clock()) + options.link_ttl_s)
    return Elsewhere(
        302,
        {
            "Location": call.cdn_base + link,
            "ETag": f'"{file.oid}"',
            "X-Linked-Etag": f'"{file.sha256}"',
            "X-Linked-Size": str(file.size),
            **said,
        },
    )
