"""Look whether a store is what it says it is: every shard there, of the right length, if asked with the right bytes.

Shallow: names, lengths, item records and manifests; costs a look a file. Deep: reads every shard, past the page cache
where the kernel lets go of it, at most `rate` bytes a second. What is wrong is quarantined at once, for a visible name
means right bytes; `heal` then brings those shards anew, from a peer, else from their source.

Raises StoreError when a wrong shard cannot be put aside. Anything else is a finding.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
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
from crucible.manifest import Manifest, manifest_from_json
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


@dataclass(frozen=True, slots=True)
class _Known:
    """What a shard should be."""

    size: int
    digest: str
    manifest: str


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
    manifests, unreadable = _manifests(store)
    if wanted is None:
        yield from unreadable
    known = _known(manifests, wanted)
    pace = _Pace(rate, stopped)
    aside: set[str] = set()
    for key in (key for key, _ in store.shards()) if wanted is None else sorted(wanted):
        rest(0, stopped)
        if (finding := _shard(store, key, known.get(key), pace if deep else None)) is not None:
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
    for manifest in store.manifests():
        for shard in manifest.shards if wanted else ():
            if shard.key in wanted:
                wanted.discard(shard.key)
                try:
                    source.path(manifest, shard, stopped)
                    outcome[shard.key] = ""
                except CrucibleError as error:
                    outcome[shard.key] = str(error)
    return outcome


def _manifests(store: Store) -> tuple[list[Manifest], list[Finding]]:
    found, unreadable = [], []
    with suppress(FileNotFoundError):
        for path in sorted((store.home / "manifests").glob("*.json")):
            try:
                found.append(manifest_from_json(path.read_bytes(), path.stem))
            except (ManifestError, OSError) as error:
                unreadable.append(Finding("unreadable manifest", path.stem, str(path), found=str(error)))
    return found, unreadable


def _known(manifests: list[Manifest], wanted: frozenset[str] | None) -> Mapping[str, _Known]:
    known: dict[str, _Known] = {}
    for manifest in manifests:
        for shard in manifest.shards:
            if shard.digest and (wanted is None or shard.key in wanted):
                known.setdefault(shard.key, _Known(shard.size, shard.digest, manifest.id))
    return known


def _shard(store: Store, key: str, known: _Known | None, pace: _Pace | None) -> Finding | None:
    path = store.shard_path(key)
    manifest = "" if known is None else known.manifest
    try:
        status = os.stat(path)
    except OSError as error:
        return Finding("missing", key, str(path), found=error.strerror or "", manifest=manifest)
    stamp = stamp_of(status)
    if known is not None and status.st_size != known.size:
        store.quarantine(key, stamp)
        expected, found = f"{known.size:,} bytes", f"{status.st_size:,} bytes"
        return Finding("wrong size", key, str(path), expected, found, manifest, quarantined=True)
    digest = store.seen.expected(key) if known is None else known.digest
    if pace is None or digest is None:
        return None
    pace.spend(status.st_size)
    _let_go(path)
    hashed = hash_shard(store, key)
    if hashed is None or hashed == digest:  # None: it was evicted meanwhile
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
