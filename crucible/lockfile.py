"""The lock file of a job: all that says what its data is. Pure.

Whoever has it can check a bundle that was exported with it, or prefetch the same again and be told what differs. It is
canonical JSON, so that the same job gives the same bytes. docs/operations.md names its keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from crucible.cache.disk import is_key
from crucible.errors import BundleError, CrucibleError
from crucible.manifest import Manifest, manifest_from_json
from crucible.refs import (
    CONVERSION_VERSION,
    REPO_TYPES,
    DataRequest,
    RepoRef,
    ShardInfo,
    SourceFile,
    canonical_json,
    digest_of,
    is_full_sha,
    is_oid,
    is_repo_id,
    item_key,
    safe_repo_path,
)

FORMAT = 1
"""Of the lock file and of the bundle around it. Another one is refused by name."""

NAME = "crucible.lock.json"
"""Of the lock file in a bundle."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a bundle beside its lock file."""

    name: str
    """Path in the bundle."""
    size: int
    """Bytes."""
    digest: str
    """What its bytes hash to."""
    what: ShardInfo | SourceFile
    repo: RepoRef


@dataclass(frozen=True)
class Lock:
    """What a job gave. `of_json` checks that it does not contradict itself."""

    request: DataRequest
    """As it was asked, its revision as it was named then."""
    survey: Mapping[str, Any]
    """Configs and splits of the repo, as `Store.put_survey` keeps them."""
    manifests: tuple[Manifest, ...]
    """One a split, in the order of the request."""
    raw: bool = False
    """True if the bundle carries the source files too."""
    crucible: str = ""
    """Version that wrote this."""
    pyarrow: str = ""
    conversion: int = CONVERSION_VERSION
    """`CONVERSION_VERSION` of the shards."""

    @property
    def repo(self) -> RepoRef:
        """Pinned to the commit."""
        return self.manifests[0].repo

    @cached_property
    def digest(self) -> str:
        """64 hex: sha256 over the canonical JSON of all else."""
        return digest_of(self.to_dict())

    def members(self) -> Iterator[Member]:
        """The files of a bundle, in its order: each shard once, then with `raw` each source file once."""
        seen: set[str] = set()
        for manifest in self.manifests:
            for shard in manifest.shards:
                if shard.key not in seen:
                    seen.add(shard.key)
                    name = f"shards/{shard.key[:2]}/{shard.key}.arrow"
                    yield Member(name, shard.size, shard.digest, shard, manifest.repo)
        for manifest in self.manifests if self.raw else ():
            for item in manifest.items:
                for file in item.files:
                    if file.oid not in seen:
                        seen.add(file.oid)
                        yield Member(f"raw/{file.oid[:2]}/{file.oid}", file.size, file.oid, file, manifest.repo)

    def to_dict(self) -> dict[str, Any]:
        """All but the digest, as JSON has it."""
        request = asdict(self.request)
        del request["locked"]
        return {
            "format": FORMAT,
            "kind": "crucible lock",
            "crucible": self.crucible,
            "pyarrow": self.pyarrow,
            "conversion": self.conversion,
            "commit": self.repo.revision,
            "raw": self.raw,
            "request": request,
            "survey": dict(self.survey),
            "splits": [
                {"split": one.split, "manifest": one.id, "rows": one.rows, "shards": len(one.shards), "bytes": one.size}
                for one in self.manifests
            ],
            "manifests": [manifest.to_dict() for manifest in self.manifests],
        }

    def to_json(self) -> bytes:
        """Canonical, with a newline at the end."""
        told = self.to_dict()
        return canonical_json({**told, "digest": digest_of(told)}) + b"\n"


def lock_from_json(data: bytes, where: str) -> Lock:
    """Read a lock file and check it; `where` names it. Raises BundleError.

    What is checked: its digest, the version of its format and of the conversion, that manifests hash to their ids, and
    that the names of shards are those that their source files and options give.
    """
    try:
        raw = json.loads(data)
        if not isinstance(raw, dict) or raw.get("kind") != "crucible lock":
            raise BundleError(where, NAME, "is no lock file of crucible; is it whole, and is this the right path?")
        if (found := raw.get("format")) != FORMAT:
            said = f"is of format {str(found)[:20]}, this crucible reads {FORMAT}"
            raise BundleError(where, NAME, f"{said}; use crucible {str(raw.get('crucible'))[:20]}, which wrote it")
        if (conversion := raw["conversion"]) != CONVERSION_VERSION:
            said = f"has shards of conversion {str(conversion)[:20]}, this crucible makes {CONVERSION_VERSION}"
            raise BundleError(where, NAME, f"{said}; use crucible {str(raw['crucible'])[:20]}, or export it anew")
        told = str(raw.pop("digest"))
        if (actual := digest_of(raw)) != told:
            raise BundleError(where, NAME, f"hashes to {actual[:12]}, it says {told[:12]}: altered; copy it again")
        lock = Lock(
            request=_request(raw["request"]),
            survey=dict(raw["survey"]),
            manifests=tuple(
                manifest_from_json(canonical_json(one), str(split["manifest"]))
                for one, split in zip(raw["manifests"], raw["splits"], strict=True)
            ),
            raw=bool(raw["raw"]),
            crucible=str(raw["crucible"]),
            pyarrow=str(raw["pyarrow"]),
            conversion=conversion,
        )
    except BundleError:
        raise
    except CrucibleError as error:
        raise BundleError(where, NAME, str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BundleError(where, NAME, f"cannot be read ({_first(error)}); copy it again") from error
    _check(lock, where)
    return lock


def _first(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _request(raw: Mapping[str, Any]) -> DataRequest:
    known = {one.name for one in fields(DataRequest)} - {"repo", "locked"}
    if raw.keys() - known != {"repo"}:
        raise ValueError(f"the request has other keys: {sorted(raw.keys() ^ (known | {'repo'}))}")
    named = {name: _tuples(value) for name, value in raw.items() if name != "repo"}
    return DataRequest(repo=RepoRef(**raw["repo"]), **named)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _check(lock: Lock, where: str) -> None:
    """Raise BundleError for a lock file that names what it may not, or under names that its own recipe denies."""

    def wrong(problem: str) -> BundleError:
        return BundleError(where, NAME, f"{problem}; it was not written by `crucible export`, or altered")

    if not lock.manifests:
        raise wrong("it has no split")
    first = lock.manifests[0]
    if not all(isinstance(name, str) for one in lock.manifests for name in (one.config, one.split, one.variant)):
        raise wrong("the name of a config or a split is none")
    if len({manifest.split for manifest in lock.manifests}) != len(lock.manifests):
        raise wrong("it has a split twice")
    for repo in (lock.request.repo, first.repo, *(item.repo for one in lock.manifests for item in one.items)):
        # all three become parts of paths, or say where something is fetched from
        named = (repo.repo_id, repo.revision, repo.repo_type)
        if not all(isinstance(name, str) for name in named) or not is_repo_id(repo.repo_id):
            raise wrong(f"{str(repo.repo_id)[:60]!r} is no repo of a Hub")
        if repo.repo_type not in REPO_TYPES:
            raise wrong(f"{str(repo.repo_type)[:60]!r} is no kind of repo")
    if not is_full_sha(first.repo.revision):
        raise wrong(f"{first.repo.revision[:60]!r} is no commit")
    asked = lock.request
    if (asked.repo.repo_id, asked.repo.repo_type) != (first.repo.repo_id, first.repo.repo_type):
        raise wrong(f"it was asked for {asked.repo.repo_id}, its shards are of {first.repo.repo_id}")
    if is_full_sha(asked.repo.revision) and asked.repo.revision != first.repo.revision:
        raise wrong(f"it was asked for {asked.repo.revision[:12]}, its shards are of {first.repo.revision[:12]}")
    if lock.survey.get("commit") != first.repo.revision or lock.survey.get("variant", "") != asked.variant:
        raise wrong("what it says of configs and splits is about another commit or request")
    digests: dict[str, str] = {}
    for manifest in lock.manifests:
        if (manifest.repo, manifest.config, manifest.variant) != (first.repo, first.config, asked.variant):
            raise wrong(f"split {manifest.split} is of another repo, config or request")
        if manifest.cuts or not manifest.complete:
            raise wrong(f"split {manifest.split} is not whole")
        for number, item in enumerate(manifest.items):
            if item.index != number or item.key != item_key(item.files, item.options, item.shard_bytes):
                raise wrong(f"item {number} of split {manifest.split} is not what its key says")
            for file in item.files:
                safe_repo_path(item.repo.repo_id, file.path)
                if not is_oid(file.oid, lfs=file.lfs) or file.size < 0:
                    raise wrong(f"{file.path[:200]!r} has an absurd hash or size")
        for shard in manifest.shards:
            if shard.key != manifest.item_of(shard).shard_key(shard.number) or not is_key(shard.digest):
                raise wrong(f"shard {shard.key[:12]} of split {manifest.split} is not what its key says")
            if shard.size < 0 or shard.rows < 0 or digests.setdefault(shard.key, shard.digest) != shard.digest:
                raise wrong(f"shard {shard.key[:12]} of split {manifest.split} has an absurd size or two digests")
