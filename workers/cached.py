"""Use what the official client, or `crucible hub pull`, has in the Hub cache of this node instead of downloading it.
And what an earlier process left complete in the store, on its way into shards.

The official client checks the size of what it downloads and nothing else, so a file is hashed here before it is used.
It is used where it lies; a broken one is named in a warning, and the Hub is asked instead. It is left as it is, unless
source files are to be kept there. What crucible brought itself was hashed when it came, but that may have been before a
crash and a reboot: so it is hashed once more.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

from crucible.cache.blobs import SMALL_BYTES as SMALL_BYTES
from crucible.cache.blobs import BlobFolder
from crucible.cache.hubcache import HubCache
from crucible.cache.seen import Stamp
from crucible.cache.store import Store
from crucible.hashing import hash_file
from crucible.refs import RepoRef, SourceFile
from crucible.report import Tally

_log = logging.getLogger(__name__)


def cached_copy(cache: HubCache, repo: RepoRef, file: SourceFile, tally: Tally) -> Path | None:
    """A file of the Hub cache whose bytes are those promised, or None. `repo` carries the commit. Never raises for what
    the cache holds: a cache that cannot be read is one that has nothing."""
    path = cache.find(repo, file)
    if path is None:
        return None
    try:
        right = is_right(path, file)
    except OSError as error:
        _log.warning("%s: cannot be read (%s); asking the Hub for %s", path, error.strerror, file.path)
        return None
    if not right:
        _log.warning(
            "%s: its bytes are not those of %s/%s; asking the Hub instead (`crucible hub pull --verify` replaces it)",
            path,
            repo,
            file.path,
        )
        return None
    tally.add(cached_bytes=file.size, verified_files=1)
    return path


def drop_rotten(store: Store, blobs: BlobFolder, file: SourceFile) -> None:
    """Remove a blob that is here complete, if its bytes are not those promised any more; a warning names it.

    A big one that was seen to be right, and not written to since, is not read again: items may share it.
    """
    stamp = _stamp(blobs, file)
    if stamp is None or store.seen.digest(file.oid, stamp) == file.oid:
        return
    path = blobs.path(file.oid)
    try:
        right = is_right(path, file)
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("%s: cannot be read (%s)", path, error.strerror)
        right = False
    if right:
        note_right(store, blobs, file)
        return
    _log.warning("%s: its bytes are not those of %s any more; removed, and brought again", path, file.path)
    blobs.remove(file.oid)


def note_right(store: Store, blobs: BlobFolder, file: SourceFile) -> None:
    """Remember that a blob was hashed; of a small one not, to hash it again costs less."""
    stamp = _stamp(blobs, file) if file.size >= SMALL_BYTES else None
    if stamp is not None:
        store.seen.note(file.oid, file.oid, stamp)


def _stamp(blobs: BlobFolder, file: SourceFile) -> Stamp | None:
    """As `seen.stamp_of`, without the ctime: a blob gets more names, and loses them, while items use it."""
    if blobs.has(file):
        with suppress(OSError):
            status = os.stat(blobs.path(file.oid))
            return status.st_ino, status.st_size, status.st_mtime_ns, 0
    return None


def is_right(path: Path, file: SourceFile) -> bool:
    """Read the whole file and compare its hash. Raises OSError."""
    with path.open("rb", buffering=0) as source:
        return hash_file(source, file) == file.oid
