"""Which shards the cluster is to hold and how often: what is known of all manifests, small enough for a million shards.

Pure. A shard is its key's 32 bytes, its size and the number of its recipe here; the rest is in the manifest, which is
read again when something has to be done.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crucible.manifest import Manifest
from crucible.refs import RepoRef

if TYPE_CHECKING:
    from crucible.cluster.upkeep import Wanted


@dataclass(frozen=True, slots=True)
class Order:
    """What was promised of a manifest, by the job that made it or by a person."""

    replicas: int = 1
    """Nodes that are to hold each shard; 0: it was given up, and what is left of it may go."""
    cluster: str = ""
    """Ray's name for the cluster whose job it was: a lost node of that one is made up for without being asked."""
    job: str = ""
    options: Mapping[str, Any] | None = None
    """`JobOptions` of the job, for what has to be made again from the Hub. No token."""

    def told(self) -> dict[str, Any]:
        return {"replicas": self.replicas, "cluster": self.cluster, "job": self.job, "options": self.options}

    @classmethod
    def heard(cls, told: Mapping[str, Any]) -> Order:
        """What `told` said; of what another version said, as much as makes sense."""
        options = told.get("options")
        return cls(
            int(told.get("replicas", 1)),
            str(told.get("cluster", "")),
            str(told.get("job", "")),
            options if isinstance(options, Mapping) else None,
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """One manifest, as a table shows it, and its shards."""

    manifest: str
    """Its id."""
    ref: RepoRef
    config: str
    split: str
    rows: int
    size: int
    """Bytes of all shards."""
    partial: bool
    keys: Sequence[bytes]
    counts: Sequence[int]
    """Rows of each shard."""
    sizes: Sequence[int]
    items: Sequence[int]
    """Of each shard the number of its recipe in the manifest."""

    @classmethod
    def of(cls, manifest: Manifest) -> Entry:
        return cls(
            manifest.id,
            manifest.repo,
            manifest.config,
            manifest.split,
            manifest.rows,
            manifest.size,
            manifest.partial,
            [bytes.fromhex(shard.key) for shard in manifest.shards],
            array("Q", [shard.rows for shard in manifest.shards]),
            array("Q", [shard.size for shard in manifest.shards]),
            array("L", [shard.item for shard in manifest.shards]),
        )

    @property
    def repo(self) -> str:
        return self.ref.repo_id

    @property
    def commit(self) -> str:
        return self.ref.revision

    def facts(self) -> dict[str, Any]:
        """What a person is shown of it, beside who holds it."""
        return {
            "manifest": self.manifest,
            "repo": self.repo,
            "commit": self.commit,
            "config": self.config,
            "split": self.split,
            "rows": self.rows,
            "shards": len(self.keys),
            "bytes": self.size,
            "partial": self.partial,
        }


@dataclass(frozen=True, slots=True)
class Choice:
    """Which manifests are meant: by any part of their names; all of them when nothing is said."""

    target: str = ""
    """A repo, or the beginning of a manifest's id."""
    config: str = ""
    split: str = ""
    revision: str = ""
    """The beginning of a commit."""

    def __bool__(self) -> bool:
        return any((self.target, self.config, self.split, self.revision))

    def means(self, entry: Entry) -> bool:
        named = self.target in ("", entry.repo) or (
            len(self.target) >= SHORTEST_ID and entry.manifest.startswith(self.target)
        )
        return (
            named
            and self.config in ("", entry.config)
            and self.split in ("", entry.split)
            and (not self.revision or entry.commit.startswith(self.revision))
        )

    def __str__(self) -> str:
        parts = [self.target or "any repo"]
        parts += [f"{name} {said}" for name in ("config", "split", "revision") if (said := getattr(self, name))]
        return ", ".join(parts)


SHORTEST_ID = 6
EVERYTHING = Choice()


class Ledger:
    """All manifests that the cluster knows, and what was promised of them.

    Concurrency: none; its owner guards it. What `shards` gives may be gone over while manifests are added.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self.orders: dict[str, Order] = {}

    def add(self, manifest: Manifest) -> None:
        if manifest.id not in self._entries and manifest.complete:
            self._entries = {**self._entries, manifest.id: Entry.of(manifest)}  # others go over the old one

    def forget(self, manifest_id: str) -> None:
        self._entries = {name: entry for name, entry in self._entries.items() if name != manifest_id}
        self.orders.pop(manifest_id, None)

    def __contains__(self, manifest_id: str) -> bool:
        return manifest_id in self._entries

    def entries(self, choice: Choice = EVERYTHING) -> list[Entry]:
        """Those that are meant, by repo, config, split and commit."""
        found = [entry for entry in self._entries.values() if choice.means(entry)]
        return sorted(found, key=lambda one: (one.repo, one.config, one.split, one.commit, one.manifest))

    def order(self, manifest_id: str) -> Order:
        return self.orders.get(manifest_id, _ONCE)

    def replicas(self, manifest_id: str) -> int:
        return self.order(manifest_id).replicas

    def shards(self, ids: Collection[str] | None = None, replicas: int | None = None) -> Shards:
        """The shards of these manifests, or of all, each once, for `upkeep`; wanted `replicas` times if said."""
        entries = [entry for name, entry in self._entries.items() if ids is None or name in ids]
        return Shards(entries, {one.manifest: replicas or self.replicas(one.manifest) for one in entries})

    def keys_of(self, ids: Collection[str]) -> list[str]:
        """Keys of the shards of these manifests, each once, in order; of those that were given up as well."""
        several = (key for name, entry in self._entries.items() if name in ids for key in entry.keys)
        return [key.hex() for key in dict.fromkeys(several)]

    def with_keys(self, keys: Collection[str]) -> dict[str, str]:
        """key -> a manifest that has it, of those keys that some manifest has."""
        asked = {bytes.fromhex(key): key for key in keys if len(key) == 64}
        found: dict[str, str] = {}
        for name, entry in self._entries.items():
            found.update((asked[key], name) for key in entry.keys if key in asked)
        return found


_ONCE = Order()


class Shards:
    """Shards of some manifests, each once: one that several have is wanted as often as the one that wants it most."""

    def __init__(self, entries: Sequence[Entry], replicas: Mapping[str, int]) -> None:
        self._replicas = replicas
        self._entries = sorted(entries, key=lambda entry: (-replicas[entry.manifest], entry.manifest))

    def __iter__(self) -> Iterator[Wanted]:
        from crucible.cluster.upkeep import Wanted  # numpy, for which a command that shows a table would wait

        seen: set[bytes] = set()
        several = len(self._entries) > 1
        for entry in self._entries:
            replicas = self._replicas[entry.manifest]
            if not replicas:
                continue
            for key, size, item in zip(entry.keys, entry.sizes, entry.items, strict=True):
                if several:
                    if key in seen:
                        continue
                    seen.add(key)
                yield Wanted(key.hex(), size, replicas, (entry.manifest, item))


@dataclass(frozen=True, slots=True)
class Held:
    """How a manifest's shards are held."""

    lost: int
    """By nobody."""
    under: int
    """By somebody, but by fewer than are wanted (or than there are nodes, if those are fewer)."""
    over: int
    copies: int


def held(entry: Entry, replicas: int, nodes: int, counts: Callable[[Sequence[bytes]], Mapping[int, int]]) -> Held:
    """`counts` gives, for keys, number of holders -> how many of them have so many."""
    found = counts(entry.keys)
    wanted = min(replicas, nodes)
    return Held(
        lost=found.get(0, 0),
        under=sum(shards for holders, shards in found.items() if 0 < holders < wanted),
        over=sum(shards for holders, shards in found.items() if holders > max(1, replicas)),
        copies=sum(holders * shards for holders, shards in found.items()),
    )
