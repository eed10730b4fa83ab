"""The manifest: the immutable, content-addressed list of a split's shards. Pure; `cache.store` keeps it on disk.

It is the truth of what the dataset is: which rows, in which order, with which bytes. It also carries the recipe
(`items`), so that any process can re-make a lost shard from the Hub and check it against `digest`.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from crucible.errors import ManifestError
from crucible.refs import ReadOptions, RepoRef, ShardInfo, SourceFile, WorkItem, canonical_json, digest_of, item_key

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 2
"""Version of the JSON below. A manifest of another version is refused by name, never guessed at."""

BESIDE_THE_POINT = tuple(f.name for f in fields(SourceFile) if not f.compare)
"""What a source file may carry that says nothing about its content: it stays out of manifests and their ids."""

LOCAL_EVERYWHERE_BYTES = 256 << 20
"""A split of at most this many bytes of shards counts as small enough to lie on every node, and is shuffled exactly.

Part of the manifest, so that all ranks take the same branch. 256 MiB is about what one node pulls from a peer in a
fifth of a second at the peer rate the transfer benchmark aims for.
"""


@dataclass(frozen=True)
class Manifest:
    """All shards of one split of one config at one commit, in source order.

    Equal content has an equal `id` on every node. Shards without rows are not listed.
    """

    repo: RepoRef
    """`revision` is the pinned commit."""
    config: str
    split: str
    features: str | None
    """JSON of `datasets`' feature dict for the rows, or None when the Arrow schema says it all."""
    schema: str
    """Key into `schemas`: what a reader casts every shard to."""
    schemas: tuple[tuple[str, str], ...]
    """(sha256, base64 of the serialised Arrow schema), for every schema that occurs."""
    items: tuple[WorkItem, ...]
    """Item i has index i."""
    shards: tuple[ShardInfo, ...]
    local_bytes: int = LOCAL_EVERYWHERE_BYTES
    variant: str = ""
    """`DataRequest.variant` of the request that made it: another choice of files or types than the repo's own."""
    cuts: tuple[tuple[int, int], ...] = ()
    """Of a slice (`crucible.splits`), for each shard: its first row that belongs, and how many its file holds."""

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def size(self) -> int:
        """Bytes of all shards; of a slice its share of them, by rows."""
        if self.cuts:
            return sum(shard.size * shard.rows // whole for shard, (_, whole) in zip(self.shards, self.cuts))
        return sum(shard.size for shard in self.shards)

    def cut(self, number: int) -> tuple[int, int] | None:
        """(first row, rows in the file) where only a part of shard `number` belongs; None in a whole split."""
        return self.cuts[number] if self.cuts else None

    @property
    def partial(self) -> bool:
        """True if the rows come from ranges of the source files, which were not checked against a hash."""
        return any(item.options.partial for item in self.items)

    @property
    def current(self) -> bool:
        """False if another version of the conversion made the shards: what this one makes has other names."""
        first = self.items[0] if self.items else None
        return first is None or first.key == item_key(first.files, first.options, first.shard_bytes)

    @property
    def local_everywhere(self) -> bool:
        return self._order_bytes <= self.local_bytes

    @property
    def _order_bytes(self) -> int:
        """What tells a small split from a big one: of parquet the source's bytes, known before there are shards."""
        if not self.items or self.items[0].options.builder != "parquet":
            return self.size
        source = sum(item.size for item in self.items)
        return source * self.rows // max(1, sum(whole for _, whole in self.cuts)) if self.cuts else source

    @property
    def complete(self) -> bool:
        """False while some shards are not made as far as this manifest knows: with no digest, and a guessed size."""
        return all(shard.digest for shard in self.shards)

    @cached_property
    def id(self) -> str:
        """64 hex: the sha256 of the canonical JSON."""
        return digest_of(self.to_dict())

    @cached_property
    def order_id(self) -> str:
        """64 hex that name the rows and their order: what a reader's state says that it is a state of.

        The same before the shards are made, where their rows are known, and after. Made of the shards' keys, which
        follow from source files and options, and of their rows.
        """
        told = {
            "repo": [self.repo.repo_type, self.repo.repo_id, self.repo.revision],
            "config": self.config,
            "split": self.split,
            "variant": self.variant,
            "small": self.local_everywhere,
            "shards": [[shard.key, shard.rows] for shard in self.shards],
            "cuts": self.cuts,
        }
        return digest_of(told)

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """What the rows look like after the reader's cast."""
        return self.arrow_schema_of(self.schema)

    def arrow_schema_of(self, digest: str) -> pa.Schema:
        import pyarrow as pa

        packed = dict(self.schemas).get(digest)
        if packed is None:
            raise ManifestError(
                self.id[:12], f"names schema {digest[:12]} but does not carry it; fetch the manifest again"
            )
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(packed)))

    def item_of(self, shard: ShardInfo) -> WorkItem:
        """The recipe that makes `shard`."""
        if not 0 <= shard.item < len(self.items) or self.items[shard.item].index != shard.item:
            raise ManifestError(self.id[:12], f"shard {shard.key[:12]} names item {shard.item}, which is not there")
        return self.items[shard.item]

    def to_dict(self) -> dict[str, Any]:
        told = {"format": FORMAT, **_told(self, _OWN)}
        told["repo"] = _told(self.repo, _REPO)
        options: dict[ReadOptions, dict[str, Any]] = {}  # of a million items nearly all have the same
        told["items"] = [
            {
                "index": item.index,
                "repo": _told(item.repo, _REPO),
                "files": [_told(file, _FILE) for file in item.files],
                "options": options.get(item.options) or options.setdefault(item.options, item.options.to_dict()),
                "shard_bytes": item.shard_bytes,
                "key": item.key,
            }
            for item in self.items
        ]
        told["shards"] = [_told(shard, _SHARD) for shard in self.shards]
        for name in ("variant", "cuts"):
            if not told[name]:
                del told[name]
        return told

    def to_json(self) -> bytes:
        return canonical_json(self.to_dict())


_OWN, _REPO, _SHARD = (tuple(one.name for one in fields(kind)) for kind in (Manifest, RepoRef, ShardInfo))
_FILE = tuple(one.name for one in fields(SourceFile) if one.name not in BESIDE_THE_POINT)


def _told(value: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """A dataclass as a dict, a tenth of the time that `asdict` takes: what is in it is not copied."""
    return {name: getattr(value, name) for name in names}


def manifest_from_json(data: bytes, expected_id: str | None = None) -> Manifest:
    """Read a manifest, checking its version, its shape and, when given, its id. Raises ManifestError."""
    name = (expected_id or "?")[:12]
    try:
        raw = json.loads(data)
        version = raw.pop("format")
        if version != FORMAT:
            raise ManifestError(name, f"is of format {version}, this crucible reads {FORMAT}; prefetch again")
        manifest = Manifest(
            repo=RepoRef(**raw["repo"]),
            config=raw["config"],
            split=raw["split"],
            features=raw["features"],
            schema=raw["schema"],
            schemas=tuple((key, packed) for key, packed in raw["schemas"]),
            items=tuple(_item(item) for item in raw["items"]),
            shards=tuple(ShardInfo(**shard) for shard in raw["shards"]),
            local_bytes=raw["local_bytes"],
            variant=raw.get("variant", ""),
            cuts=tuple((first, rows) for first, rows in raw.get("cuts", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(name, f"cannot be read ({error}); delete it and prefetch again") from error
    if expected_id is not None and manifest.id != expected_id:
        raise ManifestError(name, f"hashes to {manifest.id[:12]}: altered on disk or on the way; prefetch again")
    return manifest


def _item(raw: dict[str, Any]) -> WorkItem:
    options = raw["options"]
    return WorkItem(
        index=raw["index"],
        repo=RepoRef(**raw["repo"]),
        files=tuple(SourceFile(**file) for file in raw["files"]),
        options=ReadOptions(
            builder=options["builder"],
            params=tuple((name, value) for name, value in options["params"]),
            features=options["features"],
            columns=None if options["columns"] is None else tuple(options["columns"]),
            partial=options.get("partial", False),
        ),
        shard_bytes=raw["shard_bytes"],
        key=raw["key"],
    )


def pack_schema(schema: pa.Schema) -> tuple[str, str]:
    """(sha256, base64) of the serialised schema: one entry of `Manifest.schemas`."""
    import hashlib

    data = schema.serialize().to_pybytes()
    return hashlib.sha256(data).hexdigest(), base64.b64encode(data).decode()
