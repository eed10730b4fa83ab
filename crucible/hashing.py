"""The two hashes a Hub promises, sha256 of an LFS file and git's sha1 of a regular one, and ours of a shard, BLAKE3.

Over a stream, as it arrives. A shard is hashed when it is made, when it comes from a peer and when it is looked after:
BLAKE3 is as safe as sha256 and five times as fast here (10 GB/s a core against 2.0), so none of these costs much.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from isal import isal_zlib as untyped_zlib

from crucible.refs import SourceFile

crc32 = cast("Callable[[bytes | bytearray | memoryview, int], int]", cast("Any", untyped_zlib).crc32)
"""`zlib.crc32` of these bytes after those with this one: the same numbers, eleven times as fast (62 GB/s against 5.4).
Every byte that arrives goes through it for the journal, which was 2 to 3 % of an ingest's processor time."""


class Hasher(Protocol):
    def update(self, data: bytes | bytearray | memoryview, /) -> object: ...
    def hexdigest(self) -> str: ...


def hasher_for(file: SourceFile) -> Hasher:
    """A fresh hash whose final `hexdigest()` equals `file.oid` if the bytes are right."""
    if file.made:
        return shard_hasher()
    if file.lfs:
        return hashlib.sha256()
    # git hashes a blob with its header; the size is known before the first byte, so the stream needs no second pass
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def shard_hasher() -> Hasher:
    """A fresh hash whose `hexdigest()`, 64 hex digits, is the digest of a shard."""
    from blake3 import blake3  # who only talks to a Hub does without it

    hasher: Hasher = blake3()
    return hasher


def shard_digest(path: Path) -> str:
    """The digest of a shard on this disk, 64 hex digits."""
    with path.open("rb", buffering=0) as file:
        return open_shard_digest(file)


def open_shard_digest(file: BinaryIO | RawIOBase) -> str:
    """The digest of the rest of an open shard."""
    return hashlib.file_digest(file, shard_hasher).hexdigest()  # type: ignore[arg-type]


def hash_bytes(file: SourceFile, data: bytes | bytearray) -> str:
    """What `data` hashes to, by the kind of hash that `file` promises."""
    hasher = hasher_for(file)
    hasher.update(data)
    return hasher.hexdigest()


def hash_file(source: BinaryIO | RawIOBase, file: SourceFile) -> str:
    """What the rest of an open file hashes to, by the kind of hash that `file` promises."""
    hasher = hasher_for(file)
    return hashlib.file_digest(source, lambda: hasher).hexdigest()  # type: ignore[arg-type, return-value]


def git_pointer_oid(sha256: str, size: int) -> str:
    """git's sha1 of the text that git stores in place of an LFS file: what the Hub calls that file's blob id."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return hashlib.sha1(b"blob %d\0" % len(text) + text, usedforsecurity=False).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file on this disk, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
