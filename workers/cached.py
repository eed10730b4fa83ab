"""Use what the official client, or `crucible hub pull`, has in the Hub cache of this node instead of downloading it.

The official client checks the size of what it downloads and nothing else, so a file is hashed here before it is used.
It is used where it lies; a broken one is named in a warning, left as it is, and the Hub is asked instead.
"""

from __future__ import annotations

import logging
from pathlib import Path

from crucible.cache.hubcache import HubCache
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


def is_right(path: Path, file: SourceFile) -> bool:
    """Read the whole file and compare its hash. Raises OSError."""
    with path.open("rb", buffering=0) as source:
        return hash_file(source, file) == file.oid
