"""git's smart HTTP protocol, version 2, for reading: what `git clone`, `git fetch` and a pack in two requests need.

A repo's git side is made from what is stored anyway: blobs by their oids, LFS files as their pointer texts, trees and
commits as git writes them. A pack holds every object whole; it is made while it is sent, an object at a time.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from crucible.hub.pktline import FramingError, Mark, Packets, banded, packet

from .access import Refusal, check_gate
from .call import Call
from .names import COMMIT
from .repos import Commit, Repo, commit_object
from .snapshot import FileEntry, Snapshot, git_sha1, lfs_pointer

COMMIT_KIND, TREE_KIND, BLOB_KIND = 1, 2, 3
PIECE = 1 << 20
LEVEL = 1  # of deflate: a pack is made for one reader
READ_ONLY = "this Hub is read-only"
CAPABILITIES = ("agent=crucible", "ls-refs", "fetch=shallow filter", "object-format=sha1")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


class Unserved(Exception):
    """What was asked for is not there or not done here; the reason goes to git, which shows it."""


@dataclass(frozen=True, slots=True)
class GitReply:
    """A 200 whose body is made as it is sent."""

    pieces: Iterable[bytes]
    headers: dict[str, str]


@dataclass(slots=True)
class Fetch:
    """The arguments of a fetch."""

    wants: list[str] = field(default_factory=list)
    haves: set[str] = field(default_factory=set)
    shallow: set[str] = field(default_factory=set)
    """Commits that the caller has without their parents."""
    depth: int | None = None
    below: int | None = None
    """Only blobs of fewer bytes are sent, unless they are asked for by name."""
    done: bool = False


Source = bytes | FileEntry
"""What an object's bytes are, or where they are."""


def git_reply(call: Call, protocol: str, body: bytes) -> GitReply:
    """Answer any git request. `protocol` is the Git-Protocol header. Raises Refusal or Redirect."""
    repo, meta = call.repo()
    check_gate(repo, meta, call.user)
    verb = call.route.verb
    service = call.query.get("service", "") if verb == "info/refs" else verb
    if service == "git-receive-pack":
        raise Refusal(403, "", READ_ONLY)
    if service != "git-upload-pack":
        raise Refusal(400, "", "git's old protocol without a service is not spoken here")
    if call.method != ("GET" if verb == "info/refs" else "POST"):
        raise Refusal(405, "", f"{call.method} is not there; {READ_ONLY}")
    said = "advertisement" if verb == "info/refs" else "result"
    headers = {"Content-Type": f"application/x-git-upload-pack-{said}", "Cache-Control": "no-cache"}
    if "version=2" not in protocol.split(":"):
        return GitReply([packet("ERR this Hub speaks git's protocol 2 only: git -c protocol.version=2 ...")], headers)
    if verb == "info/refs":
        lines = [packet("# service=git-upload-pack"), Mark.FLUSH.value, packet("version 2"), *map(packet, CAPABILITIES)]
        return GitReply([*lines, Mark.FLUSH.value], headers)
    try:
        return GitReply(_command(repo, body), headers)
    except Unserved as error:
        return GitReply([packet(f"ERR {error}")], headers)
    except FramingError as error:
        raise Refusal(400, "", str(error)) from None


def _command(repo: Repo, body: bytes) -> Iterable[bytes]:
    packets = Packets([body])
    head = list(iter(packets.text, None))
    split = head.index(Mark.DELIMITER) if Mark.DELIMITER in head else len(head)
    arguments = [line for line in head[split:] if isinstance(line, str)]
    said = {line for line in head[:split] if isinstance(line, str)}
    if not said:
        return []  # git asks with nothing first, to see whether it may come in
    if not said.isdisjoint({"object-format=sha256"}):
        raise Unserved("this repo's objects are named by sha1")
    if "command=ls-refs" in said:
        return _refs(repo, arguments)
    if "command=fetch" in said:
        return _fetch(repo, _parsed(arguments))
    raise Unserved("unknown command")


def _refs(repo: Repo, arguments: list[str]) -> Iterator[bytes]:
    prefixes = tuple(line.removeprefix("ref-prefix ") for line in arguments if line.startswith("ref-prefix "))
    refs = repo.refs().targets
    lines = [(ref, commit, "") for ref, commit in sorted(refs.items())]
    if "refs/heads/main" in refs:
        symref = " symref-target:refs/heads/main" if "symrefs" in arguments else ""
        lines.insert(0, ("HEAD", refs["refs/heads/main"], symref))
    for ref, commit, more in lines:
        if not prefixes or ref.startswith(prefixes):
            yield packet(f"{commit} {ref}{more}")
    yield Mark.FLUSH.value


def _parsed(arguments: list[str]) -> Fetch:
    asked = Fetch()
    for line in arguments:
        word, _, value = line.partition(" ")
        match word:
            case "want":
                asked.wants.append(value)
            case "have":
                asked.haves.add(value)
            case "shallow":
                asked.shallow.add(value)
            case "deepen" if value.isdecimal() and len(value) < 11 and int(value):
                asked.depth = int(value)
            case "filter":
                found = re.fullmatch(r"blob:(?:none|limit=(\d{1,18})([kmg]?))", value)
                if found is None:
                    raise Unserved(f"filter {value} is not done here; blob:none and blob:limit=n are")
                asked.below = int(found[1]) * _UNITS[found[2]] if found[1] else 0
            case "done":
                asked.done = True
            case "thin-pack" | "ofs-delta" | "no-progress" | "include-tag":
                pass  # allowed to us, or asked of us, and met by doing nothing
            case _:
                raise Unserved(f"{line[:100]} is not done here")
    return asked


def _fetch(repo: Repo, asked: Fetch) -> Iterable[bytes]:
    """The sections of a reply. Raises Unserved before the first of them."""
    known = {have for have in asked.haves if COMMIT.fullmatch(have) and repo.resolve(have) == have}
    head = []
    if not asked.done:
        acknowledged = [f"ACK {have}" for have in sorted(known)] or ["NAK"]
        head = [packet("acknowledgments"), *map(packet, acknowledged)]
        if not known:
            return [*head, Mark.FLUSH.value]
        head += [packet("ready"), Mark.DELIMITER.value]
    names = set(asked.wants)
    tips = [want for want in asked.wants if COMMIT.fullmatch(want) and repo.resolve(want) == want]
    objects: dict[str, tuple[int, Source]] = {}
    edges: set[str] = set()  # commits that are sent without their parents
    whole: set[str] = set()
    for tip in tips:
        for commit, edge in _walk(repo, tip, asked, known):
            snapshot = repo.snapshot(commit.id)
            content = commit_object(snapshot.oid, commit.parent, commit.message)
            if git_sha1(content, "commit") != commit.id:
                raise Unserved(f"commit {commit.id} is older than this Hub's git side; make a new one")
            objects[commit.id] = (COMMIT_KIND, content)
            (edges if edge else whole).add(commit.id)
            objects |= _below(snapshot, asked.below)
    if asked.depth is None:
        for have in known:
            for oid in _below(repo.snapshot(have), None):
                objects.pop(oid, None)
    objects |= _named(repo, names - set(tips))
    if asked.depth is not None:
        head.append(packet("shallow-info"))
        head += [packet(f"shallow {oid}") for oid in sorted(edges - asked.shallow)]
        head += [packet(f"unshallow {oid}") for oid in sorted(whole & asked.shallow)]
        head.append(Mark.DELIMITER.value)
    head.append(packet("packfile"))
    return _chain(head, banded(_pack(repo, objects)), [Mark.FLUSH.value])


def _chain(*parts: Iterable[bytes]) -> Iterator[bytes]:
    for part in parts:
        yield from part


def _walk(repo: Repo, tip: str, asked: Fetch, known: set[str]) -> Iterator[tuple[Commit, bool]]:
    """The commits to send, newest first, each with whether its parent is kept back from a caller who asked for that."""
    for number, commit in enumerate(repo.history(tip), 1):
        if asked.depth is None and commit.id in known:
            return
        edge = asked.depth is not None and number >= asked.depth and commit.parent is not None
        yield commit, edge
        if edge or (asked.depth is None and commit.id in asked.shallow):
            return


def _below(snapshot: Snapshot, below: int | None) -> dict[str, tuple[int, Source]]:
    """The trees and blobs of a commit."""
    found: dict[str, tuple[int, Source]] = {git_sha1(tree, "tree"): (TREE_KIND, tree) for tree in snapshot.trees()}
    for file in snapshot.files:
        if below is None or _size(file) < below:
            found[file.oid] = (BLOB_KIND, file)
    return found


def _named(repo: Repo, oids: set[str]) -> dict[str, tuple[int, Source]]:
    """Blobs by their names, as a partial clone asks for them. Raises Unserved for one that no commit has."""
    found: dict[str, tuple[int, Source]] = {}
    seen: set[str] = set()
    for ref in sorted(repo.refs().targets.values()) if oids else []:
        for commit in repo.history(ref):
            if commit.id in seen or not oids:
                break
            seen.add(commit.id)
            for file in repo.snapshot(commit.id).files:
                if file.oid in oids:
                    found[file.oid] = (BLOB_KIND, file)
            oids = oids - found.keys()
    if oids:
        raise Unserved(f"upload-pack: not our ref {min(oids)[:64]}")
    return found


def _size(file: FileEntry) -> int:
    return len(lfs_pointer(file.sha256, file.size)) if file.lfs else file.size


def _pack(repo: Repo, objects: dict[str, tuple[int, Source]]) -> Iterator[bytes]:
    digest = hashlib.sha1(usedforsecurity=False)
    for piece in _chain([struct.pack(">4sII", b"PACK", 2, len(objects))], _entries(repo, objects.values())):
        digest.update(piece)
        yield piece
    yield digest.digest()


def _entries(repo: Repo, objects: Iterable[tuple[int, Source]]) -> Iterator[bytes]:
    for kind, source in objects:
        content = lfs_pointer(source.sha256, source.size) if isinstance(source, FileEntry) and source.lfs else source
        if isinstance(content, bytes):
            yield _head(kind, len(content)) + zlib.compress(content, LEVEL)
            continue
        deflater = zlib.compressobj(LEVEL)
        yield _head(kind, content.size)
        with repo.store.blob_path(content.sha256).open("rb") as stream:
            while piece := stream.read(PIECE):
                yield deflater.compress(piece)
        yield deflater.flush()


def _head(kind: int, size: int) -> bytes:
    """Kind and size of a packed object: four bits of the size, then seven a byte."""
    made, size = bytearray([kind << 4 | size & 15]), size >> 4
    while size:
        made[-1] |= 0x80
        made.append(size & 0x7F)
        size >>= 7
    return bytes(made)
