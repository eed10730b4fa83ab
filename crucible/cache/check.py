"""Whether a shard's bytes are the right ones, before somebody reads them. One that is wrong is put aside.

A shard that was verified since this boot, and whose file has not changed as far as the file system knows, is right
(`seen`); any other one is hashed. So a reader pays for a hash once a boot and shard, which on this hardware is a
thirtieth of a second for 64 MiB that have to be read anyway, and else for a look at the file.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress

from crucible.cache.seen import Stamp, stamp_of
from crucible.cache.store import Store
from crucible.errors import StoreError
from crucible.hashing import open_shard_digest
from crucible.refs import ShardInfo

TOUCH_S = 600.0
"""How exactly the last use of a shard is known."""
UNREADABLE = "unreadable"
"""Stands for the hash of a file that the disk does not give back."""
_log = logging.getLogger("crucible.integrity")


def is_sound(store: Store, shard: ShardInfo) -> bool:
    """True if the shard is here with the bytes that its manifest means. Marks it as used.

    One with other bytes goes to the quarantine, with a warning that names it; False then, and whoever asked fetches it
    anew. Of a shard without a digest, which is only being made, any file will do.
    """
    status = store.look_at(shard.key)
    if status is None:
        return False
    if not shard.digest:
        return True
    if status.st_size != shard.size:
        return False
    stamp = stamp_of(status)
    found = store.seen.digest(shard.key, stamp)
    if found is None:
        found = hash_shard(store, shard.key)
        if found is None:
            return False
    if found != shard.digest:
        put_aside(store, shard.key, stamp, shard.digest, found)
        return False
    _used(store, shard.key, status)
    return True


def is_unchanged(store: Store, key: str) -> bool:
    """True if the shard is here, was verified since this boot, and was not written to since. Marks it as used."""
    status = store.look_at(key)
    if status is None or store.seen.digest(key, stamp_of(status)) is None:
        return False
    _used(store, key, status)
    return True


def may_serve(store: Store, key: str) -> bool:
    """As `is_sound`, for one who knows only the key: true unless the shard was seen to have other bytes once.

    One that was never seen here is given out: whoever gets it hashes it.
    """
    status = store.look_at(key)
    if status is None:
        return False
    stamp = stamp_of(status)
    found = store.seen.digest(key, stamp)
    if found is None:
        expected = store.seen.expected(key)
        if expected is None:
            return True
        found = hash_shard(store, key)
        if found != expected:
            if found is not None:
                put_aside(store, key, stamp, expected, found)
            return False
    _used(store, key, status)
    return True


def hash_shard(store: Store, key: str) -> str | None:
    """Digest of the shard's file, noted in the store; UNREADABLE when the disk fails; None when it is not here."""
    path = store.shard_path(key)
    try:
        with path.open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            digest = open_shard_digest(file)
            after = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("%s: cannot be read (%s)", path, error.strerror)
        return UNREADABLE
    if stamp_of(before) == stamp_of(after):  # else it was written to meanwhile, and this says nothing of what it is now
        store.seen.note(key, digest, stamp_of(after))
    return digest


def put_aside(store: Store, key: str, stamp: Stamp, expected: str, found: str) -> None:
    """Quarantine the file with this stamp. On a disk that cannot be written it is named, and raised."""
    try:
        aside = store.quarantine(key, stamp)
    except StoreError as error:
        problem = f"shard {key[:12]} hashes to {found[:12]}, it should to {expected[:12]}, and cannot be put aside"
        raise StoreError(error.path, f"{problem} ({error.problem}); remove it", error.node) from error
    if aside is not None:
        _log.warning(
            "%s: shard %s hashes to %s and should to %s: put aside as %s; it is fetched or made anew",
            store.shard_path(key),
            key[:12],
            found[:12],
            expected[:12],
            aside,
        )


def _used(store: Store, key: str, status: os.stat_result) -> None:
    """Note the last use of a shard, which is the time of its last access, if the one that is noted is an old one."""
    if time.time() - max(status.st_atime, status.st_mtime) > TOUCH_S:
        mark_used(store, key, time.time())


def mark_used(store: Store, key: str, since: float) -> None:
    """Note that the shard is in use now, if its last use was before `since`, in seconds since 1970. Never fails."""
    path = store.shard_path(key)
    with suppress(OSError):
        status = os.stat(path)
        if max(status.st_atime, status.st_mtime) >= since:
            return
        stamp = stamp_of(status)
        digest = store.seen.digest(key, stamp)
        os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        now = stamp_of(os.stat(path))
        if digest is not None and now[:3] == stamp[:3]:  # a look at the clock is no write; but it may be another file
            store.seen.note(key, digest, now)
