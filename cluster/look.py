"""What is where: this node's store, the nodes of a running cluster and their jobs, and who holds which shard.

Runs in the process of whoever asks. Changes nothing, and starts no Ray of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from crucible.cache.store import Store
from crucible.cluster import manage
from crucible.cluster.ledger import Entry
from crucible.config import Settings, settings_with
from crucible.data_files import DataFiles, data_request
from crucible.errors import ManifestError
from crucible.reach import listens
from crucible.workers.caring import manifest_ids


@dataclass(frozen=True, slots=True)
class Located:
    """Where a split's shards are."""

    split: str
    shard: int
    key: str
    rows: int
    size: int
    nodes: tuple[str, ...]
    """That hold it; `local` for this one, where no cluster was asked."""
    urls: tuple[str, ...]
    """Of their agents."""


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Who holds a dataset: its manifests with figures, and a page of the list of its shards."""

    manifests: list[dict[str, Any]]
    shards: list[Located]


def nodes(address: str | None = None) -> list[dict[str, Any]]:
    """One entry a node of a running cluster: its store's shards, bytes and free bytes. Raises ClusterUnreachable."""
    found: list[dict[str, Any]] = manage.figures(address, "nodes")
    return found


def status(address: str | None = None) -> dict[str, Any]:
    """This node's store and agent; and a cluster's jobs and figures, by `address`, RAY_ADDRESS or this node's agent.

    Where the agent answers, it has counted the store already, and its coordinator the manifests that are too big to be
    read for a table.
    """
    from crucible.workers.serve import read_address, store_status

    settings = Settings.from_env()
    store = Store(settings.home)
    agent = read_address(store)
    url = agent.url if agent and listens(agent.url) else ""
    where = manage.running(address)
    told = manage.near("here") if url and where in (None, "auto") else None
    here: dict[str, Any] = store_status(store, manage.LOCAL, url) if told is None else told
    counted = {one["manifest"]: one for one in here["cluster"]["manifests"]} if told is not None else {}
    here["manifests"] = []
    for manifest_id in manifest_ids(store):
        if manifest_id in counted and _is_big(store, manifest_id):
            facts = counted[manifest_id]
            here["manifests"].append({**{name: facts[name] for name in _FACTS}, "shards_here": facts["here"]})
            continue
        with suppress(ManifestError):
            manifest = store.get_manifest(manifest_id)
            facts = {name: value for name, value in Entry.of(manifest).facts().items() if name in _FACTS}
            there = sum(store.has_shard(shard) for shard in manifest.shards)
            here["manifests"].append({**facts, "shards_here": there})
    if told is None and where is not None:
        with manage.Cluster(where) as ask:
            here["jobs"], here["cluster"] = ask.jobs(), ask("summary")
    return here


_FACTS = ("repo", "commit", "config", "split", "rows", "shards", "bytes", "manifest", "partial")
BIG_BYTES = 32 << 20
"""A manifest of so much JSON has about a hundred thousand shards, and takes a second to read."""


def _is_big(store: Store, manifest_id: str) -> bool:
    return (store.home / "manifests" / f"{manifest_id}.json").stat().st_size > BIG_BYTES


def locate(repo: str, config: str | None = None, **asked: Any) -> list[Located]:
    """Which node holds which shard of a dataset that was prefetched with the same arguments: those of `whereabouts`."""
    return whereabouts(repo, config, **asked).shards


def whereabouts(
    repo: str,
    config: str | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
    columns: Sequence[str] | None = None,
    partial: bool = False,
    data_dir: str | None = None,
    data_files: DataFiles | None = None,
    features: Mapping[str, Any] | None = None,
    address: str | None = None,
    endpoint: str | None = None,
    limit: int | None = None,
    **format_settings: Any,
) -> Whereabouts:
    """Who holds the shards of a dataset, the first `limit` of them one by one.

    Of a running cluster, by `address`, RAY_ADDRESS or this node's agent; else whether this store has them. Asks no
    Hub: a branch is what it was when it was prefetched. Raises ManifestError for what this node has no manifest of.
    """
    from crucible.cluster.prepare import known_manifests  # pyarrow and more, which tables need not wait for

    settings = settings_with(Settings.from_env(), endpoint=endpoint)
    request = data_request(
        repo,
        config,
        split=split,
        revision=revision,
        columns=columns,
        data_dir=data_dir,
        data_files=data_files,
        features=features,
        settings=format_settings,
        partial=partial,
    )
    store = Store(settings.home)
    ids = known_manifests(request, store)
    if ids is None:
        raise ManifestError(repo, f"is not in {settings.home}; run `crucible prefetch {repo}` first")
    asked: tuple[Any, ...] = ("locate", list(ids.values()), 0, limit)
    where = manage.running(address)
    told = manage.figures(where, *asked) if where is not None else manage.near(*asked)
    if told is not None:
        shards = [
            Located(**{**one, "nodes": tuple(one["nodes"]), "urls": tuple(one["urls"])}) for one in told["shards"]
        ]
        return Whereabouts(told["manifests"], shards)
    manifests, shards = [], []
    for manifest in (store.get_manifest(found) for found in ids.values()):
        here = [store.has_shard(shard) for shard in manifest.shards]
        facts = Entry.of(manifest).facts()
        manifests.append({**facts, "lost": here.count(False), "copies": here.count(True)})
        room = len(here) if limit is None else max(0, limit - len(shards))
        shards += [
            Located(
                manifest.split,
                number,
                shard.key,
                shard.rows,
                shard.size,
                (str(manage.LOCAL),) if here[number] else (),
                (),
            )
            for number, shard in enumerate(manifest.shards[:room])
        ]
    return Whereabouts(manifests, shards)
