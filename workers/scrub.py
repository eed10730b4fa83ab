"""Look whether a store is what it says it is: every shard there, of the right length, if asked with the right bytes.

Shallow: names, lengths, item records and manifests; costs a look a file. Deep: reads every shard, past the page cache
where the kernel lets go of it, at most `rate` bytes a second. What is wrong is quarantined at once, for a visible name
means right bytes; `heal` then brings those shards anew, from a peer, else from their source.

Raises StoreError when a wrong shard cannot be put aside. Anything else is a finding.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from json import loads
from pathlib import Path
from typing import Any, Literal

from crucible.cache.check import hash_shard, put_aside
from crucible.cache.disk import is_key, key_files
from crucible.cache.seen import stamp_of
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.errors import CrucibleError, ManifestError
from crucible.manifest import manifest_from_json
from crucible.refs import ShardInfo
from crucible.stopping import never, rest

Kind = Literal[
    "missing", "wrong size", "wrong bytes", "unreferenced", "record without shard", "unreadable manifest", "not a shard"
]
WRONG: tuple[Kind, ...] = ("missing", "wrong size", "wrong bytes")
"""What `heal` can make right."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    kind: Kind
    key: str
    """Of the shard, the item or the manifest."""
    path: str
    expected: str = ""
    found: str = ""
    manifest: str = ""
    """Id of one that names the shard, where one is here."""
    quarantined: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        said = f"{self.path}: {self.kind}"
        if self.expected:
            said += f", {self.found[:64] or 'nothing'} and not {self.expected[:64]}"
        return said + (" (in quarantine)" if self.quarantined else "")


_Known = tuple[int, str, str]
"""What a shard should be, as a manifest says: bytes, digest, id of the manifest. Two manifests may differ in it, where
another pyarrow made the shard anew; either is right then."""


def scrub(
    store: Store,
    keys: Collection[str] | None = None,
    *,
    deep: bool = False,
    rate: int | None = None,
    stopped: Callable[[], bool] = never,
) -> Iterator[Finding]:
    """What is wrong with the shards `keys`, or with all that is here. Lazily: what is found is told at once.

    A shard that a manifest names and that is not here is missing only if it is asked for by its key: on a node of a
    cluster it lies elsewhere. Raises Stopped.
    """
    wanted = None if keys is None else frozenset(keys)
    here = frozenset(key for key, _ in store.shards()) if wanted is None else wanted
    known, unreadable = _known(store, here)
    if wanted is None:
        yield from unreadable
    pace = _Pace(rate, stopped)
    aside: set[str] = set()
    for key in sorted(here):
        rest(0, stopped)
        if (finding := _shard(store, key, known.get(key, ()), pace if deep else None)) is not None:
            if wanted is None and finding.kind == "missing":
                continue  # it was evicted since
            aside.add(key)
            yield finding
        elif wanted is None and key not in known:
            yield Finding("unreferenced", key, str(store.shard_path(key)), found="no manifest here names it")
    if wanted is None:
        yield from _records(store, aside)
        yield from _strangers(store)


def heal(
    store: Store, settings: Settings, findings: Collection[Finding], stopped: Callable[[], bool] = never
) -> dict[str, str]:
    """Bring the shards of these findings anew, verified. Returns key -> "" or why it could not be had."""
    from crucible.workers.fetch import NodeShards

    wanted = {finding.key for finding in findings if finding.kind in WRONG}
    outcome: dict[str, str] = dict.fromkeys(sorted(wanted), "no manifest of this node names it")
    source = NodeShards(settings)
    for manifest in store.manifests() if wanted else ():
        for shard in manifest.shards:
            if shard.key in wanted:
                try:
                    source.path(manifest, shard, stopped)
                except CrucibleError as error:  # another manifest may mean it as it can be had
                    outcome[shard.key] = str(error)
                else:
                    wanted.discard(shard.key)
                    outcome[shard.key] = ""
    return outcome


def _known(store: Store, wanted: frozenset[str]) -> tuple[Mapping[str, tuple[_Known, ...]], list[Finding]]:
    """What the shards `wanted` should be, and the manifests that cannot be read. One manifest at a time in memory."""
    known: dict[str, tuple[_Known, ...]] = {}
    unreadable = []
    with suppress(FileNotFoundError):
        for path in sorted((store.home / "manifests").glob("*.json")):
            try:
                manifest = manifest_from_json(path.read_bytes(), path.stem)
            except (ManifestError, OSError) as error:
                unreadable.append(Finding("unreadable manifest", path.stem, str(path), found=str(error)))
                continue
            for shard in manifest.shards:
                if shard.digest and shard.key in wanted:
                    known[shard.key] = (*known.get(shard.key, ()), (shard.size, shard.digest, manifest.id))
    return known, unreadable


def _shard(store: Store, key: str, known: Sequence[_Known], pace: _Pace | None) -> Finding | None:
    path = store.shard_path(key)
    size, digest, manifest = known[0] if known else (0, store.seen.expected(key), "")
    try:
        status = os.stat(path)
    except OSError as error:
        return Finding("missing", key, str(path), found=error.strerror or "", manifest=manifest)
    stamp = stamp_of(status)
    if known and all(status.st_size != size for size, _, _ in known):
        store.quarantine(key, stamp)
        expected, found = f"{size:,} bytes", f"{status.st_size:,} bytes"
        return Finding("wrong size", key, str(path), expected, found, manifest, quarantined=True)
    if pace is None or digest is None:
        return None
    pace.spend(status.st_size)
    _let_go(path)
    hashed = hash_shard(store, key)
    if hashed is None or hashed == digest or any(hashed == right for _, right, _ in known):  # None: evicted meanwhile
        return None
    put_aside(store, key, stamp, digest, hashed)
    return Finding("wrong bytes", key, str(path), digest, hashed, manifest, quarantined=True)


def _records(store: Store, told: Collection[str]) -> Iterator[Finding]:
    """Items that are recorded as done here and have a shard that is not, but for those that were told of."""
    for entry in key_files(store.home / "items", "json"):
        key = entry.name.partition(".")[0]
        try:
            shards = [ShardInfo(**shard) for shard in loads(Path(entry.path).read_bytes())["shards"]]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield Finding("record without shard", key, entry.path, found=f"cannot be read ({error})")
            continue
        gone = [shard.key for shard in shards if shard.key not in told and not store.has_shard(shard)]
        if gone:
            found = f"shard {gone[0][:12]} is not here" + (f", nor {len(gone) - 1} more" if len(gone) > 1 else "")
            yield Finding("record without shard", key, entry.path, found=found)


def _strangers(store: Store) -> Iterator[Finding]:
    """What lies among the shards and is none."""
    root = store.home / "shards"
    with suppress(FileNotFoundError):
        for folder in os.scandir(root):
            if not folder.is_dir(follow_symlinks=False):
                yield Finding("not a shard", "", folder.path)
                continue
            for entry in os.scandir(folder.path):
                key, _, suffix = entry.name.partition(".")
                right = is_key(key) and suffix == "arrow" and key[:2] == folder.name
                if not right or not entry.is_file(follow_symlinks=False):
                    yield Finding("not a shard", "", entry.path)


def _let_go(path: Path) -> None:
    """Have the kernel forget what it remembers of a file, so that the disk is read and not the memory."""
    with suppress(OSError, AttributeError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class _Pace:
    """Keeps reading within a rate, a file at a time: after each it waits for as long as its bytes are worth."""

    def __init__(self, rate: int | None, stopped: Callable[[], bool]) -> None:
        self._rate, self._stopped, self._free_at = rate, stopped, time.monotonic()

    def spend(self, size: int) -> None:
        """Wait until `size` bytes may be read. Raises Stopped."""
        if self._rate:
            now = time.monotonic()
            if self._free_at > now:
                rest(self._free_at - now, self._stopped)
            self._free_at = max(now, self._free_at) + size / self._rate
