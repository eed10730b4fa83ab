"""One node's store: shards, item records, manifests and refs under `home`. The only code that knows the layout.

<home>/VERSION                          the layout's number
<home>/shards/ab/<key>.arrow            a shard; visible by this name only when whole, verified and fsynced
<home>/raw/<oid>                        a source file on its way into shards; see `blobs`
<home>/items/ab/<key>.json              an item whose shards are all there: what it gave
<home>/manifests/<id>.json              content-addressed, never changed
<home>/refs/<repo>/<revision>/<config>/<split>.json   where a name points: commit and manifest id
<home>/leases/                          which shards each process of the node reads; see `holds`
<home>/early/<digest>.json              manifests of what is not brought yet, for this node's readers: `cluster.early`
<home>/tmp/<host>-<pid>-<random>/       work in progress of one process, locked by it; removed by it, or by the next one
<home>/locks/<name>.lock                saves double work between processes; correctness never rests on it
<home>/quarantine/                      shards whose bytes turned out wrong, kept for a look
<home>/seen/ab                          which shards were seen to have the right bytes: `seen`
<home>/room/, <home>/pins/              bytes promised to work under way (`book`); manifests that stay (`pins`)
<home>/agent.json, <home>/secret        see `workers.serve`
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from filelock import FileLock, Timeout

from crucible.cache.blobs import BlobFolder
from crucible.cache.disk import LOCK_WAIT_S, fsync_folder, key_files, new_workspace, sweep_workspaces, write_atomic
from crucible.cache.disk import disk_errors as disk_errors
from crucible.cache.disk import is_key as is_key
from crucible.cache.holds import Holds, holds_of, lease_book_of
from crucible.cache.layout import LAYOUT, open_layout
from crucible.cache.seen import Seen, Stamp, seen_of, stamp_of
from crucible.errors import ManifestError, StoreError
from crucible.manifest import Manifest, manifest_from_json
from crucible.refs import NodeId, RepoRef, ShardInfo, WorkItem, digest_of
from crucible.report import ItemResult
from crucible.stopping import LOOK_S, check, never

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})
"""What a disk without locks says of one."""
RAW_KEEP_S = 86_400.0
"""A source file nobody wrote to for a day is not on its way any more."""


class Store:
    """A node's store.

    Concurrency: any number of threads and processes of one node may use one store at once. Everything visible is
    made by rename, so a crash leaves at most a folder in `tmp`, which the next `workspace()` removes.
    A store on a read-only disk serves what it has; writing raises StoreReadOnly.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._shards = str(home / "shards")
        open_layout(home)

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        return Store, (self.home,)

    @property
    def raw(self) -> BlobFolder:
        """Where source files are brought before they are converted."""
        return BlobFolder(self.home / "raw", self.home / "locks")

    @property
    def staged(self) -> BlobFolder:
        """The same files for who needs them only until they are shards: none waits for the disk."""
        return replace(self.raw, lasting=False)

    # --- shards

    def shard_path(self, key: str) -> Path:
        if not is_key(key):
            raise StoreError(str(self.home), f"{key!r} is not a shard key")
        return self.home / "shards" / key[:2] / f"{key}.arrow"

    def has_shard(self, shard: ShardInfo) -> bool:
        """True if the shard is here with the right length. (Its bytes were verified before it got its name.)

        Of a shard without a digest, of a manifest that was made before it, the size is not known: its name will do.
        """
        status = self.look_at(shard.key)
        return status is not None and (status.st_size == shard.size or not shard.digest)

    def look_at(self, key: str) -> os.stat_result | None:
        """What the file system says of a shard's file; None if there is none."""
        try:  # asked for each shard that is opened, or about to be: a Path costs four times as much as the look
            return os.stat(f"{self._shards}/{key[:2]}/{key}.arrow") if is_key(key) else None
        except OSError:
            return None

    def commit_shard(self, draft: Path, key: str, digest: str = "") -> Path:
        """Give a finished, verified, fsynced file in a workspace its visible name. Replaces an equal one.

        `digest` is what its bytes were seen to hash to, so that who opens it need not look again.
        """
        target = self.shard_path(key)
        with disk_errors(target, "the name of a finished shard"):
            target.parent.mkdir(parents=True, exist_ok=True)
            inode = os.stat(draft).st_ino
            os.replace(draft, target)
            if digest and (stamp := stamp_of(os.stat(target)))[0] == inode:  # else another process's, by now
                self.seen.note(key, digest, stamp)
            fsync_folder(target.parent)
        return target

    @property
    def seen(self) -> Seen:
        """Which shards were seen to have the right bytes."""
        return seen_of(self.home)

    def quarantine(self, key: str, stamp: Stamp | None = None) -> Path | None:
        """Take a shard whose bytes are wrong out of sight. Readers that have it mapped keep what they mapped.

        With `stamp` only the file that had it: not the one that somebody has put in its place meanwhile. Returns where
        it lies now; None if it was not there. On a full disk it is removed: a wrong shard is worth nothing.
        """
        path, target = self.shard_path(key), self.home / "quarantine" / f"{key}.{secrets.token_hex(4)}.arrow"
        with disk_errors(target), suppress(FileNotFoundError):
            if stamp is not None and os.stat(path).st_ino != stamp[0]:
                return None
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                path.unlink()
            return target
        return None

    def put_aside(self, key: str) -> bool:
        """True if a file of this shard is in quarantine."""
        with suppress(OSError), os.scandir(self.home / "quarantine") as entries:
            return any(entry.name.startswith(key) for entry in entries)
        return False

    @property
    def holds(self) -> Holds:
        """What this process has leased, and where it leases more."""
        return holds_of(self.home)

    def leased(self) -> set[str]:
        """Keys of the shards that a living process of this node reads, or has fetched ahead."""
        return lease_book_of(self.home).keys()

    def evict(self, key: str) -> int:
        """Remove a shard, unless somebody has leased it. Returns the bytes freed: 0 if it is leased, or not here.

        Who leases it in this very moment finds it gone and fetches it again, or has it mapped and keeps it.
        """
        path = self.shard_path(key)
        if lease_book_of(self.home).has(key):
            return 0
        with disk_errors(path), suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()  # of two who evict it at once, one counts it
            return size
        return 0

    def shards(self) -> Iterator[tuple[str, int]]:
        """(key, size in bytes) of every visible shard, in no order."""
        for entry in key_files(self.home / "shards", "arrow"):
            with suppress(FileNotFoundError):
                yield entry.name.partition(".")[0], entry.stat().st_size

    def item_keys(self) -> Iterator[str]:
        """Keys of the items recorded here, in no order. `get_item` tells whether all their shards still are."""
        for entry in key_files(self.home / "items", "json"):
            yield entry.name.partition(".")[0]

    # --- items

    def _item_path(self, key: str) -> Path:
        return self.home / "items" / key[:2] / f"{key}.json"

    def put_item(self, result: ItemResult) -> None:
        """Record that all shards of an item are here. Called after the last of them was committed."""
        record = {"shards": [asdict(shard) for shard in result.shards], "schemas": result.schemas}
        self._write(self._item_path(result.key), json.dumps(record).encode())

    def get_item(self, item: WorkItem, node: NodeId) -> ItemResult | None:
        """The result of an item that this store has in full, or None. An unreadable record counts as None."""
        return self.get_record(item.key, node, item.index)

    def get_record(self, key: str, node: NodeId, index: int = 0) -> ItemResult | None:
        """As `get_item`, of an item of which only the key is known."""
        try:
            record = json.loads(self._item_path(key).read_bytes())
            shards = tuple(ShardInfo(**{**shard, "item": index}) for shard in record["shards"])
            schemas = tuple((digest, packed) for digest, packed in record["schemas"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not all(self.has_shard(shard) for shard in shards):
            return None
        return ItemResult(index, key, node, shards, schemas, reused=True)

    # --- manifests and the names that point to them

    def put_manifest(self, manifest: Manifest, revisions: tuple[str, ...] = ()) -> None:
        """Keep a manifest and let its commit, and each of `revisions`, point to it."""
        self._write(self.home / "manifests" / f"{manifest.id}.json", manifest.to_json())
        pointer = json.dumps({"commit": manifest.repo.revision, "manifest": manifest.id}).encode()
        columns = manifest.items[0].options.columns if manifest.items else None
        for revision in {manifest.repo.revision, *revisions}:
            ref = RepoRef(manifest.repo.repo_id, revision, manifest.repo.repo_type)
            folder = self._ref_folder(ref) / _variant(manifest.config, columns, manifest.variant)
            self._write(folder / f"{_part(manifest.split)}.json", pointer)

    def get_manifest(self, manifest_id: str) -> Manifest:
        """Read and check a manifest. Raises ManifestError when it is missing or altered."""
        if not is_key(manifest_id):
            raise ManifestError(manifest_id[:12], "is not a manifest id")
        try:
            data = (self.home / "manifests" / f"{manifest_id}.json").read_bytes()
        except OSError as error:
            raise ManifestError(
                manifest_id[:12], f"is not in {self.home} ({error.strerror}); prefetch again"
            ) from error
        return manifest_from_json(data, manifest_id)

    def find_manifests(
        self, repo: RepoRef, config: str, columns: tuple[str, ...] | None = None, variant: str = ""
    ) -> dict[str, str]:
        """Split name -> manifest id for a repo at a revision, as far as this store knows them."""
        found = {}
        with suppress(OSError):
            for path in sorted((self._ref_folder(repo) / _variant(config, columns, variant)).glob("*.json")):
                with suppress(ValueError, KeyError, TypeError):
                    manifest_id = json.loads(path.read_bytes())["manifest"]
                    found[_unpart(path.stem)] = str(manifest_id)
        return found

    def put_survey(self, repo: RepoRef, survey: dict[str, Any]) -> None:
        """Remember which configs and splits a revision has, for offline use. Its `variant` says for which requests."""
        path = self._ref_folder(repo) / _survey(str(survey.get("variant", "")))
        self._write(path, json.dumps(survey).encode())

    def get_survey(self, repo: RepoRef, variant: str = "") -> dict[str, Any] | None:
        """What `put_survey` remembered, or None."""
        try:
            survey = json.loads((self._ref_folder(repo) / _survey(variant)).read_bytes())
        except (OSError, ValueError):
            return None
        return survey if isinstance(survey, dict) else None

    def manifests(self) -> Iterator[Manifest]:
        """Every readable manifest here, by id."""
        with suppress(OSError):
            for path in sorted((self.home / "manifests").glob("*.json")):
                with suppress(ManifestError, OSError):
                    yield manifest_from_json(path.read_bytes(), path.stem)

    def names(self) -> dict[str, set[str]]:
        """Manifest id -> the revisions (a commit is one) whose name points to it."""
        found: dict[str, set[str]] = {}
        with suppress(OSError):
            for path in (self.home / "refs").glob("*/*/*/*.json"):
                with suppress(OSError, ValueError, KeyError, TypeError):
                    manifest_id = str(json.loads(path.read_bytes())["manifest"])
                    found.setdefault(manifest_id, set()).add(_unpart(path.parts[-3]))
        return found

    def _ref_folder(self, repo: RepoRef) -> Path:
        return self.home / "refs" / _part(f"{repo.repo_type}s/{repo.repo_id}") / _part(repo.revision)

    # --- files

    def read_small(self, name: str) -> bytes | None:
        """A small file at the root of the store (`agent.json`, `secret`), or None."""
        try:
            return (self.home / name).read_bytes()
        except OSError:
            return None

    def write_small(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._write(self.home / name, data, mode)

    @contextmanager
    def lock(self, name: str, stopped: Callable[[], bool] = never) -> Iterator[None]:
        """Hold a lock between the processes of this node. It saves double work; nothing is wrong without it.

        So a holder that hangs is waited for `LOCK_WAIT_S` and then passed by, and a disk without real locks is fine.
        Raises Stopped if nobody waits for it any more.
        """
        path = self.home / "locks" / f"{name}.lock"
        lock = FileLock(path)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            give_up = time.monotonic() + LOCK_WAIT_S
            while not lock.is_locked and (left := give_up - time.monotonic()) > 0:
                try:
                    lock.acquire(timeout=left if stopped is never else min(left, LOOK_S))
                except Timeout:
                    pass
                except (OSError, NotImplementedError) as error:  # the latter of older filelocks, for ENOSYS
                    if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                        raise
                    break
                if stopped():
                    break
        try:
            check(stopped)
            yield
        finally:
            lock.release()

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A fresh folder on the store's own disk, removed at the end. Folders of dead processes are removed first."""
        root = self.home / "tmp"
        with disk_errors(root, "a folder for work in progress"):
            root.mkdir(parents=True, exist_ok=True)
            self._stamp()
            sweep_workspaces(root)
            with suppress(OSError):
                self.raw.sweep(RAW_KEEP_S, complete=True)
            folder, held = new_workspace(root)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)

    def _stamp(self) -> None:
        if not (self.home / "VERSION").exists():
            write_atomic(self.home / "VERSION", LAYOUT.encode() + b"\n")

    def _write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        with disk_errors(path, f"{len(data):,} bytes for a record"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stamp()
            write_atomic(path, data, mode)


def _part(name: str) -> str:
    """A repo, revision, config or split name as one folder name: reversible, and never `.` or `..`."""
    return quote(name, safe="").replace(".", "%2E")


def _variant(config: str, columns: tuple[str, ...] | None, variant: str) -> str:
    """Folder of one config's pointers; a column subset, or a choice of files, is another dataset in another folder."""
    subset = "" if columns is None else f"+{digest_of({'columns': columns})[:16]}"
    return f"{_part(config)}{subset}" + (f"++{variant}" if variant else "")


def _survey(variant: str) -> str:
    return f"repo+{variant}.json" if variant else "repo.json"


def _unpart(part: str) -> str:
    return unquote(part)
