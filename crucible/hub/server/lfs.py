"""git-lfs' batch request, for downloads: signed links to many LFS files at once.

What git-lfs asks after a clone, and what spares a request for each of many small files. It names contents and no
revision, so the LFS files of every commit of the repo are answered for; whatever is not among them is a 404 of that
object alone. Uploads are refused like all else that writes.
"""

from __future__ import annotations

from typing import Any

from .access import Refusal, check_gate
from .call import Call
from .snapshot import FileEntry

CONTENT_TYPE = "application/vnd.git-lfs+json"
OBJECTS_MOST = 1000
"""Objects of one request; git-lfs sends 100."""
READ_ONLY = "this Hub is read-only"


def batch(call: Call) -> dict[str, Any]:
    """Answer a batch request. Raises Refusal or Redirect."""
    repo, meta = call.repo()
    check_gate(repo, meta, call.user)
    if call.method != "POST":
        raise Refusal(405, "", f"{call.method} is not there; {READ_ONLY}")
    asked = call.body
    if asked.get("operation") == "upload":
        raise Refusal(403, "", READ_ONLY)
    objects = asked.get("objects")
    if asked.get("operation") != "download" or not isinstance(objects, list):
        raise Refusal(422, "", "a batch request has an operation, download, and a list of objects")
    if asked.get("hash_algo", "sha256") != "sha256":
        raise Refusal(409, "", "objects are named by sha256 here")
    if len(objects) > OBJECTS_MOST:
        raise Refusal(413, "", f"{len(objects):,} objects in one request; {OBJECTS_MOST:,} are the most")
    named = [one if isinstance(one, dict) else {} for one in objects]
    found = repo.lfs_files({oid for one in named if isinstance(oid := one.get("oid"), str)})
    return {"transfer": "basic", "hash_algo": "sha256", "objects": [_object(call, one, found) for one in named]}


def _object(call: Call, asked: dict[str, Any], found: dict[str, FileEntry]) -> dict[str, Any]:
    """What is said of one object: where it is, or why not."""
    oid, size = asked.get("oid"), asked.get("size")
    said = {"oid": oid, "size": size}
    file = found.get(oid) if isinstance(oid, str) else None
    if file is None:
        return said | {"error": {"code": 404, "message": "Object does not exist in this repository"}}
    if size != file.size:
        return said | {"error": {"code": 422, "message": f"Object has {file.size} bytes"}}
    options = call.hub.options
    link = call.hub.signer.link(file.sha256, file.path, expires=int(options.clock()) + options.link_ttl_s)
    action = {"href": call.cdn_base + link, "expires_in": options.link_ttl_s}
    return said | {"authenticated": True, "actions": {"download": action}}
