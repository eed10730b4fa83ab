"""Repos and files as the Hub's JSON. Reads the store, sends nothing."""

from __future__ import annotations

from typing import Any

from .card import CARD_BYTES, card_tags, parse_card
from .repos import Commit, Repo, RepoMeta
from .snapshot import Entry, FileEntry, lfs_pointer

EPOCH = "1970-01-01T00:00:00.000Z"


def read_card(repo: Repo, commit: str) -> dict[str, Any]:
    """The front matter of the README at a commit; {} without one."""
    readme = repo.snapshot(commit).file("README.md")
    if readme is None:
        return {}
    with repo.store.blob_path(readme.sha256).open("rb") as stream:
        return parse_card(stream.read(CARD_BYTES).decode(errors="replace"))


def repo_json(repo: Repo, meta: RepoMeta, commit: str | None) -> dict[str, Any]:
    """What listings and info share."""
    card = read_card(repo, commit) if commit else {}
    described = {
        "_id": repo.id,
        "id": repo.id,
        "author": repo.owner or None,
        "sha": commit,
        "lastModified": repo.commit(commit).date if commit else meta.created,
        "createdAt": meta.created,
        "private": meta.private,
        "gated": "manual" if meta.gated else False,
        "disabled": meta.disabled,
        "likes": meta.likes,
        "downloads": meta.downloads,
        "trendingScore": meta.likes,
        "tags": card_tags(card),
        "cardData": card,
    }
    if repo.type == "model":
        described["modelId"] = repo.id
        for key in ("pipeline_tag", "library_name"):
            if isinstance(card.get(key), str):
                described[key] = card[key]
    if repo.type == "space":
        described["sdk"] = card.get("sdk")
    return described


def sibling_json(file: FileEntry, *, blobs: bool) -> dict[str, Any]:
    """A file as `info` lists it; here the content's hash of an LFS file is `lfs.sha256`."""
    if not blobs:
        return {"rfilename": file.path}
    described: dict[str, Any] = {"rfilename": file.path, "size": file.size, "blobId": file.oid}
    if file.lfs:
        described["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": _pointer_size(file)}
    return described


def entry_json(entry: Entry) -> dict[str, Any]:
    """A file or folder as `tree` lists it; here the content's hash of an LFS file is `lfs.oid`."""
    if not isinstance(entry, FileEntry):
        return {"type": "directory", "oid": entry.oid, "size": 0, "path": entry.path}
    described: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": entry.path}
    if entry.lfs:
        described["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": _pointer_size(entry)}
    return described


def expanded(repo: Repo, commit: str, entries: list[Entry]) -> list[dict[str, Any]]:
    """`entry_json` with the commit that last changed each entry."""
    changed = _last_commits(repo, commit, entries)
    unscanned = {"status": "unscanned", "avScan": None, "pickleImportScan": None}  # clients require the keys
    return [
        {
            **entry_json(entry),
            "lastCommit": {
                "id": changed[entry.path].id,
                "title": changed[entry.path].message.partition("\n")[0],
                "date": changed[entry.path].date,
            },
            **({"securityFileStatus": unscanned} if isinstance(entry, FileEntry) else {}),
        }
        for entry in entries
    ]


def _last_commits(repo: Repo, commit: str, entries: list[Entry]) -> dict[str, Commit]:
    """Walks back until each entry differs; costs one tree per commit walked, so `expand` pages are small."""
    found: dict[str, Commit] = {}
    waiting = {entry.path: entry.oid for entry in entries}
    newer: Commit | None = None
    for older in repo.history(commit):
        tree = repo.store.snapshot(repo, older.tree)
        for path, oid in list(waiting.items()):
            there = tree.get(path)
            if newer is not None and (there is None or there.oid != oid):
                found[path] = newer
                del waiting[path]
        if not waiting:
            break
        newer = older
    if newer is not None:
        found.update(dict.fromkeys(waiting, newer))
    return found


def commit_json(commit: Commit) -> dict[str, Any]:
    title, _, rest = commit.message.partition("\n")
    return {
        "id": commit.id,
        "title": title,
        "message": rest.strip(),
        "date": commit.date,
        "authors": [{"user": commit.author}],
    }


def _pointer_size(file: FileEntry) -> int:
    return len(lfs_pointer(file.sha256, file.size))
